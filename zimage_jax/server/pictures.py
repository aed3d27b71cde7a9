"""Pictures as clients want them: other formats than the PNG on the disk."""

import base64
import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ..pipeline.opened import decode
from ..pipeline.picture import encode_png

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp")
_MARK = "XML:com.adobe.xmp"  # the PNG chunk that says that a model made the picture


def encoded(png: bytes | Path, form: Format, quality: int = 100) -> bytes:
    """The bytes of a PNG of ours as they are, or as JPEG or WEBP of `quality` 0 to 100."""
    data = png.read_bytes() if isinstance(png, Path) else png
    if form == "png":
        return data
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        mark = image.info.get(_MARK, "").encode()
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, form.upper(), quality=quality, xmp=mark)
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def transparent_as_mask(data: bytes, most_pixels: int) -> bytes:
    """OpenAI's mask, whose transparent parts are redrawn, as ours, whose white parts are."""
    opened = decode(data, "mask", most_pixels)
    height, width = opened.pixels.shape[:2]
    alpha = np.full((height, width), 255, np.uint8) if opened.alpha is None else opened.alpha
    return encode_png(np.repeat(255 - alpha[..., None], 3, axis=2))
