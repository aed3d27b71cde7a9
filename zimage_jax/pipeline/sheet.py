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
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from .. import checks
from ..errors import UsageError
from ..files import parse_json, printable
from . import picture
from .job import Picture
from .opened import check_pixels

_KEY = "zimage_jax_sheet"
MOST = 256  # pictures


def contact_sheet(pictures: list[Picture]) -> bytes:
    """A PNG of the pictures, each above its seed, from which `picked` takes them.

    Raises UsageError for more than MOST pictures, or too many pixels.
    """
    if len(pictures) > MOST:
        raise UsageError(f"a contact sheet has at most {MOST} pictures, got {len(pictures)}")
    labels = [f"seed {of.metadata['seed']}" for of in pictures]
    sheet, places = drawn([of.pixels for of in pictures], labels)
    cells = [
        {"left": left, "top": top, "metadata": of.metadata}
        for of, (left, top) in zip(pictures, places, strict=True)
    ]
    texts = {_KEY: json.dumps({"pictures": cells}, ensure_ascii=False)}
    return picture.encode_png_with(sheet, texts)


_MARGIN, _TEXT = 16, 16  # pixels


def drawn(
    pictures: list[UInt8[np.ndarray, "H W 3"]], labels: list[str]
) -> tuple[UInt8[np.ndarray, "H2 W2 3"], list[tuple[int, int]]]:
    """Pictures of one size, unscaled, in about a square, each above its label.

    Also returns (left, top) of each picture on the sheet. Raises UsageError for too many pixels.
    """
    font = ImageFont.load_default(_TEXT)
    height, width = pictures[0].shape[:2]
    wide = max(width, *(math.ceil(font.getlength(label)) for label in labels))
    high, count = height + 2 * _TEXT, len(pictures)
    across = min(count, max(1, round(math.sqrt(count * high / wide))))
    size = [
        _MARGIN + n * (cell + _MARGIN)
        for n, cell in ((across, wide), (math.ceil(count / across), high))
    ]
    check_pixels("a contact sheet", *size)
    page = Image.new("RGB", (size[0], size[1]), "white")
    draw, places = ImageDraw.Draw(page), []
    for index, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        left = _MARGIN + index % across * (wide + _MARGIN)
        top = _MARGIN + index // across * (high + _MARGIN)
        page.paste(Image.fromarray(pixels), (left, top))
        draw.text((left, top + height + _TEXT // 2), label, "black", font)
        places.append((left, top))
    return np.array(page), places


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
            left, top = cell["left"], cell["top"]
            width, height = metadata["width"], metadata["height"]
            cut = pixels[top : top + height, left : left + width]
            if cut.shape[:2] != (height, width):
                raise UsageError(f"{where}: seed {seed} lies outside the contact sheet")
            return Picture(np.ascontiguousarray(cut), metadata)
    seeds = ", ".join(str(cell["metadata"]["seed"]) for cell in found["pictures"])
    raise UsageError(f"{where}: no seed {seed}; it has {printable(seeds)}")


def _a_list(name: str, value: object) -> None:
    if not isinstance(value, list) or len(value) > MOST:
        checks.refuse(name, f"a list of at most {MOST} pictures", value)


_MOST = 65536  # pixels of a side
_CELL: dict[str, Any] = {
    "left": partial(checks.whole, low=0, high=_MOST),
    "top": partial(checks.whole, low=0, high=_MOST),
    "metadata": lambda name, value: picture.check_metadata(name, value, picture.FIELDS),
}
