"""Opens pictures and masks that we did not make: files, PIL images and arrays.

A mask has a weight for each pixel: 0 (black) is kept, 1 (white) is redrawn. Axes: H, W pixels.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .. import checks
from ..errors import UsageError
from ..files import LONGEST_PATH, printable, read_regular

LONGEST_SIDE, MOST_PIXELS = 65536, 16384 * 16384
_LARGEST_FILE = 256 << 20  # bytes
# `Image.open` is not used: its limit of pixels is a global of the process, and it may choose other
# readers. A phone's JPEG with several pictures (MPO) is read as its first
_READERS: list[tuple[str, bytes, Callable[[io.BytesIO], Image.Image]]] = [
    ("PNG", rb"\x89PNG\r\n\x1a\n", PngImageFile),
    ("JPEG", rb"\xff\xd8\xff", JpegImageFile),
    ("WEBP", rb"RIFF....WEBPVP8[ LX]", WebPImageFile),
    ("BMP", rb"BM", BmpImageFile),
    ("TIFF", rb"II[*+]\0|MM\0[*+]", TiffImageFile),
    ("GIF", rb"GIF8[79]a", GifImageFile),
]


@dataclass(frozen=True, eq=False)
class File:
    """A file's bytes, for a machine that does not have it."""

    name: str
    data: bytes

    @classmethod
    def read(cls, path: str | os.PathLike, name: str) -> "File":
        """`name` is the user's name of the value. Raises UsageError."""
        try:
            return cls(Path(path).name, read_regular(Path(path), _LARGEST_FILE))
        except UsageError as fault:
            raise UsageError(f"{name} {fault}") from None


Source = str | os.PathLike | File | Image.Image | np.ndarray  # a picture, as users give one


@dataclass(frozen=True, eq=False)
class Opened:
    """A picture in 8 bits. `alpha` is None if it is opaque everywhere, else 0 is transparent."""

    pixels: UInt8[np.ndarray, "H W 3"]
    alpha: UInt8[np.ndarray, "H W"] | None


def open_picture(source: object, name: str) -> Opened:
    """The picture in `source`, upright: a path, a PIL image or an array.

    A file is a PNG, JPEG, WEBP, BMP, TIFF or GIF of one frame. An array has uint8, floats in [0, 1]
    or booleans, as [H, W], [H, W, 3] or [H, W, 4]. Colours behind transparent pixels stay as they
    are, colour profiles are ignored (as in diffusers), and 16 bits are rounded to 8. `name` is the
    user's name of the value. Raises UsageError before anything large is decoded.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _from_image(source, name)
    if isinstance(source, str | os.PathLike):
        where, file = Path(source), File.read(source, name)
    elif isinstance(source, File):
        where, file = Path(source.name), source
    else:
        checks.refuse(name, "a path, a PIL image or a numpy array", source)
    return decode(file.data, f"{name} {printable(where, LONGEST_PATH)}")


def decode(data: bytes, where: str, most_pixels: int = MOST_PIXELS) -> Opened:
    """The picture in the bytes of a file, as `open_picture` takes it. `where` begins each message.

    Raises UsageError, for more than `most_pixels` before they are decoded.
    """
    fitting = [(k, reader) for k, magic, reader in _READERS if re.match(magic, data, re.DOTALL)]
    if not fitting:
        raise UsageError(f"{where}: expected a PNG, JPEG, WEBP, BMP, TIFF or GIF picture")
    kind, reader = fitting[0]
    if kind == "WEBP" and data[15:16] == b"X":  # its reader allocates before it tells the size
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        check_pixels(where, width, height, most_pixels)
    with _reading(where, kind):
        image = reader(io.BytesIO(data))
    check_pixels(where, *image.size, most_pixels)
    return _from_image(image, where)


def open_mask(source: object, name: str) -> Float32[np.ndarray, "H W"]:
    """The mask in `source`, as `open_picture` takes it: its grey, over black where transparent.

    Floats [H, W] stay as exact as float32 is. Raises UsageError.
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype.kind == "f":
        _check_array(source, name)
        return source.astype(np.float32)
    return mask_of(open_picture(source, name))


def mask_of(opened: Opened) -> Float32[np.ndarray, "H W"]:
    """The mask that a picture is: its grey, over black where transparent."""
    grey = np.asarray(Image.fromarray(opened.pixels).convert("L")) / np.float32(255)
    return grey if opened.alpha is None else grey * (opened.alpha / np.float32(255))


def _from_array(array: np.ndarray, name: str) -> Opened:
    _check_array(array, name)
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        array = np.rint(array * array.dtype.type(255)).astype(np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return _joined(array[..., :3], array[..., 3] if array.shape[2] == 4 else None)


def _check_array(array: np.ndarray, name: str) -> None:
    is_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_shape or not (array.dtype in (np.uint8, np.bool_) or array.dtype.kind == "f"):
        raise UsageError(
            f"{name} must be an array [H, W], [H, W, 3] or [H, W, 4] of uint8 or of floats from 0 "
            f"to 1, got {array.dtype} {list(array.shape)}"
        )
    check_pixels(name, array.shape[1], array.shape[0])
    if array.dtype.kind == "f" and not ((array >= 0) & (array <= 1)).all():  # NaN is neither
        low, high = array.min(), array.max()
        raise UsageError(f"{name} must have floats from 0 to 1, got {low:g} to {high:g}")


def _from_image(image: Image.Image, where: str) -> Opened:
    check_pixels(where, *image.size)
    kind = image.format or "picture"
    with _reading(where, kind):
        frames = 1 if kind == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise UsageError(f"{where}: expected one picture, found {frames} frames or pages")
    with _reading(where, kind), _without_bomb_warning(image):
        image = ImageOps.exif_transpose(image)
        mode, key = image.mode, image.info.get("transparency")
        if mode[0] not in "IF":
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        array = np.asarray(image)
    if mode == "F":
        return _from_array(array, where)
    if mode[0] != "I":
        return _joined(array[..., :3], array[..., 3] if array.shape[2] == 4 else None)
    if array.min() < 0 or array.max() > 65535:  # Pillow would clip to 8 bits
        raise UsageError(f"{where}: expected at most 16 bits per pixel, found 32")
    grey = ((array.astype(np.int32) + 128) // 257).astype(np.uint8)
    alpha = (array != key) * np.uint8(255) if isinstance(key, int) else None
    return _joined(np.repeat(grey[..., None], 3, axis=2), alpha)


def _joined(pixels: np.ndarray, alpha: np.ndarray | None) -> Opened:
    """Copies, so that the caller's arrays may change."""
    is_opaque = alpha is None or bool((alpha == 255).all())
    return Opened(np.array(pixels, order="C"), None if is_opaque else np.array(alpha, order="C"))


@contextmanager
def _reading(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as fault:  # a damaged file leads Pillow's readers to any exception
        reason = printable(fault) or type(fault).__name__
        raise UsageError(f"{where}: a {kind} that is damaged or not supported ({reason})") from None


@contextmanager
def _without_bomb_warning(image: Image.Image) -> Iterator[None]:
    """Pillow's TIFF reader warns of many pixels, which are checked by then."""
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or MOST_PIXELS):
        yield  # filters of warnings belong to all threads: they are changed only if they must
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def check_pixels(where: str, width: int, height: int, most: int = MOST_PIXELS) -> None:
    if not width or not height:
        raise UsageError(f"{where}: a picture without pixels ({width}x{height})")
    if max(width, height) > LONGEST_SIDE or width * height > most:
        square = math.isqrt(most)
        raise UsageError(
            f"{where}: {width}x{height} pixels are too many (at most {most}, as in "
            f"{square}x{square}, and {LONGEST_SIDE} per side)"
        )
