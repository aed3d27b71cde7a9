"""Contact sheets: pictures of several seeds side by side, each of which can be taken out again.

The PNG has a text chunk with the metadata of every picture and its place.

Axes: H, W pixels.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .. import checks
from ..errors import UsageError
from ..files import parse_json, printable
from . import canvas, picture
from .canvas import MOST_PIXELS
from .job import Picture

_KEY = "zimage_jax_sheet"
MOST = 256  # pictures
_MARGIN, _LABEL = 8, 20  # pixels


def contact_sheet(pictures: list[Picture]) -> bytes:
    """A PNG of the pictures, each above its seed. They have one size.

    Raises UsageError for more than MOST pictures, or too many pixels.
    """
    if not 1 <= len(pictures) <= MOST:
        raise UsageError(f"a contact sheet has 1 to {MOST} pictures, got {len(pictures)}")
    h, w = pictures[0].pixels.shape[:2]
    columns = math.ceil(math.sqrt(len(pictures) * h / w))
    rows = math.ceil(len(pictures) / columns)
    width, height = columns * (w + _MARGIN) + _MARGIN, rows * (h + _LABEL + _MARGIN) + _MARGIN
    if width * height > MOST_PIXELS:
        raise UsageError(
            f"a contact sheet of {len(pictures)} pictures of {w} x {h} pixels has {width} x "
            f"{height}: draw fewer or smaller ones"
        )
    sheet = Image.new("RGB", (width, height), "white")
    draw, cells = ImageDraw.Draw(sheet), []
    for index, of in enumerate(pictures):
        left = _MARGIN + index % columns * (w + _MARGIN)
        top = _MARGIN + index // columns * (h + _LABEL + _MARGIN)
        sheet.paste(Image.fromarray(of.pixels), (left, top))
        draw.text((left, top + h + 4), str(of.metadata["seed"]), fill="black")
        cells.append({"left": left, "top": top, "metadata": of.metadata})
    texts = {_KEY: json.dumps({"pictures": cells}, ensure_ascii=False)}
    return picture.encode_png_with(np.asarray(sheet), texts)


def picked(path: Path, seed: int) -> Picture:
    """The picture of a seed, out of one of our contact sheets. Raises UsageError."""
    where, text, pixels = picture.read_png(path, _KEY)
    if text is None:
        raise UsageError(f"{where}: expected a contact sheet (--explore writes one)")
    found = parse_json(text, f"{where}: contact sheet")
    picture.check_metadata(f"{where}: contact sheet", found, {"pictures": _a_list})
    for cell in found["pictures"]:
        picture.check_metadata(f"{where}: a picture", cell, _CELL)
        metadata = cell["metadata"]
        if metadata["seed"] == seed:
            box = canvas.Box(cell["left"], cell["top"], metadata["width"], metadata["height"])
            cut = box.cut(pixels)
            if cut.shape[:2] != (box.height, box.width):
                raise UsageError(f"{where}: seed {seed} lies outside the contact sheet")
            return Picture(np.ascontiguousarray(cut), metadata)
    seeds = ", ".join(str(cell["metadata"]["seed"]) for cell in found["pictures"])
    raise UsageError(f"{where}: no seed {seed}; it has {printable(seeds)}")


def _a_list(name: str, value: object) -> None:
    if not isinstance(value, list) or len(value) > MOST:
        checks.refuse(name, f"a list of at most {MOST} pictures", value)


_CELL: dict[str, Any] = {
    "left": partial(checks.whole, low=0, high=MOST_PIXELS),
    "top": partial(checks.whole, low=0, high=MOST_PIXELS),
    "metadata": lambda name, value: picture.check_metadata(name, value, picture.FIELDS),
}
