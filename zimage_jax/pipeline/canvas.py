"""What a job starts from: a picture and a mask, opened safely, fitted, and put back when drawn.

Everything is in host memory. A mask is the weight of the drawing at each pixel: 0 (black) is kept, 1
(white) is redrawn. Axes: H, W pixels, h, w latent rows and columns.
"""

import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

Source = str | os.PathLike | Image.Image | np.ndarray  # a picture, as users give one
FITS = ("crop", "pad", "stretch")
_LARGEST_FILE = 256 << 20  # bytes
_LONGEST_SIDE, _MOST_PIXELS = 65536, 16384 * 16384
# `Image.open` is not used: its limit of pixels is a global of the process, and a reader that is named
# here cannot be another. A phone's JPEG with several pictures (MPO) is read as its first
_READERS: dict[bytes, Any] = {
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"\xff\xd8\xff": JpegImageFile,
    rb"RIFF....WEBPVP8[ LX]": WebPImageFile,
    rb"BM": BmpImageFile,
    rb"II[*+]\0|MM\0[*+]": TiffImageFile,
    rb"GIF8[79]a": GifImageFile,
}
_STRIP = 256  # rows that are computed at once in float32: bounds the temporaries
_FAINT = 1 / 512  # a smaller weight changes no byte


# -- opening ---------------------------------------------------------------------------------------


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
    if not isinstance(source, str | os.PathLike):
        checks.refuse(name, "a path, a PIL image or a numpy array", source)
    path = Path(source)
    where = f"{name} {printable(path, LONGEST_PATH)}"
    try:
        data = read_regular(path, _LARGEST_FILE)
    except UsageError as fault:
        raise UsageError(f"{name} {fault}") from None
    reader = next((r for magic, r in _READERS.items() if re.match(magic, data, re.DOTALL)), None)
    if reader is None:
        raise UsageError(f"{where}: expected a PNG, JPEG, WEBP, BMP, TIFF or GIF picture")
    if (
        data[12:16] == b"VP8X"
    ):  # Pillow's reader asks memory for the picture before it tells the size
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        check_pixels(where, width, height)
    with _reading(where, reader.format):
        image = reader(io.BytesIO(data))
    return _from_image(image, where)


def open_mask(source: object, name: str) -> Float32[np.ndarray, "H W"]:
    """The mask in `source`, as `open_picture` takes it: its grey, over black where transparent.

    Floats [H, W] stay as exact as float32 is. Raises UsageError.
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype.kind == "f":
        _check_array(source, name)
        return source.astype(np.float32)
    opened = open_picture(source, name)
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
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or _MOST_PIXELS):
        yield  # filters of warnings belong to all threads: they are changed only if they must
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def check_pixels(where: str, width: int, height: int) -> None:
    if not width or not height:
        raise UsageError(f"{where}: a picture without pixels ({width}x{height})")
    if max(width, height) > _LONGEST_SIDE or width * height > _MOST_PIXELS:
        raise UsageError(
            f"{where}: {width}x{height} pixels are too many (at most {_MOST_PIXELS}, as in "
            f"16384x16384, and {_LONGEST_SIDE} per side)"
        )


# -- the canvas ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cut:
    """Where a canvas was cut from. The mask has the region's size, in pixels of the picture."""

    picture: UInt8[np.ndarray, "H0 W0 3"]
    region: tuple[int, int, int, int]  # left, top, right, bottom
    mask: Float32[np.ndarray, "h0 w0"]


@dataclass(frozen=True, eq=False, repr=False)
class Canvas:
    """The picture at the size drawn, and what is redrawn of it (None: a mask was not given)."""

    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Float32[np.ndarray, "H W"] | None
    cut: Cut | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # for the metadata: names, how it fits

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        masked = "" if self.mask is None else f", {100 * self.mask.mean():.0f} % redrawn"
        return f"<Canvas {width}x{height}{masked}>"

    @classmethod
    def of(
        cls,
        image: object,
        mask: object = None,
        *,
        width: object = None,
        height: object = None,
        multiple: int = 16,
        fit: object = "crop",
        mask_blur: object = 0.0,
        mask_grow: object = 0,
        crop_mask: object = None,
        model_side: int | None = None,
    ) -> "Canvas":
        """Fit `image` and `mask` (or an `Opened`, and what `open_mask` gave) to a size in pixels.

        Without a mask the transparent part of the image is redrawn. Without a size it is the image's
        own, each side floored to `multiple`; one side alone keeps the image's ratio. To another
        ratio `fit` crops centrally, pads with the edge's colours (with a mask the padding is
        redrawn, so an all-black mask then redraws only the padding), or stretches. `mask_grow` (0
        to 512) and then `mask_blur` (a Gaussian's sigma, 0 to 512) are in pixels of the image as
        given.

        `crop_mask` draws only a region: the mask's bounding box and so many pixels around it (0 to
        4096), widened to the ratio of the size, which is by default `model_side` squared. Where the
        image is too small for that ratio, the region ends at its edges and is stretched.

        Raises UsageError, also if nothing would be redrawn or nothing of the image would be seen.
        """
        opened = image if isinstance(image, Opened) else open_picture(image, "image")
        fit = checks.one_of("fit", fit, FITS)
        sides: list[Any] = [
            None if side is None else _side(name, side, multiple)
            for name, side in (("width", width), ("height", height))
        ]
        soft = _mask_of(opened, mask, mask_grow, mask_blur, may_be_black=fit == "pad")
        if crop_mask is None:
            sides = _sides(opened, sides, multiple)
            # without a size the ratio changes by less than `multiple`: diffusers stretches
            place = _FIT["stretch" if width is None and height is None else fit]
            pixels = place(opened.pixels, *sides)
            fitted = None if soft is None else _settled(place(soft, *sides))
            return cls(pixels, _check_redraws(fitted))
        context = checks.whole("crop_mask", crop_mask, 0, 4096)
        if soft is None:
            raise UsageError("crop_mask needs a mask, or an image with transparent parts")
        if fit != "crop":
            raise UsageError(f"fit {fit} has no effect with crop_mask")
        sides = [side or model_side for side in sides]
        if None in sides:
            raise UsageError("crop_mask needs width and height")
        check_pixels("crop_mask", *sides)
        _check_redraws(soft)
        left, top, right, bottom = region = _region(soft, context, *sides)
        inside = slice(top, bottom), slice(left, right)
        fitted = _settled(_resized(soft[inside], *sides))
        cut = Cut(opened.pixels, region, soft[inside])
        return cls(_resized(opened.pixels[inside], *sides), _check_redraws(fitted), cut)

    def finish(self, drawn: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H0 W0 3"]:
        """The picture with what was drawn: `drawn` weighted by the mask, over the fitted picture or,
        with a cut, over the whole image as given. Bytes where the mask is 0 stay as they were.

        Raises UsageError if `drawn` has another size than the canvas.
        """
        if drawn.shape != self.pixels.shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (self.pixels, drawn)]
            raise UsageError(f"drawn must be {sizes[0]} pixels, got {sizes[1]}")
        if self.mask is None:
            return drawn
        if self.cut is None:
            return _pasted(self.pixels, drawn, self.mask)
        left, top, right, bottom = self.cut.region
        whole = self.cut.picture.copy()
        piece = whole[top:bottom, left:right]
        piece[:] = _pasted(piece, _resized(drawn, right - left, bottom - top), self.cut.mask)
        return whole

    def to_model(self) -> Float32[np.ndarray, "H W 3"]:
        """The pixels in [-1, 1], bit for bit as by diffusers' `VaeImageProcessor`."""
        return 2 * (self.pixels.astype(np.float32) / 255) - 1

    def latent_mask(self, scale: int) -> Float32[np.ndarray, "h w"] | None:
        """The mask's mean over each `scale` x `scale` pixels; both sides are multiples of `scale`."""
        if self.mask is None:
            return None
        height, width = self.mask.shape
        tiles = self.mask.reshape(height // scale, scale, width // scale, scale)
        return tiles.mean((1, 3))

    def named(self, **settings: Any) -> "Canvas":
        """The same canvas with more settings."""
        return replace(self, settings=self.settings | settings)

    def to_json(self) -> dict[str, Any]:
        """The settings, and the checksum."""
        return {**self.settings, "sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """Of the size, the pixels and the mask, as drawn."""
        height, width = self.pixels.shape[:2]
        found = hashlib.sha256(f"{width}x{height}\n".encode())
        found.update(self.pixels.tobytes())
        if self.mask is not None:
            found.update(self.mask.astype("<f4").tobytes())
        return found.hexdigest()


def _side(name: str, value: object, multiple: int) -> int:
    side = checks.whole(name, value, multiple, _LONGEST_SIDE)
    if side % multiple:
        near = max(1, round(side / multiple)) * multiple
        raise UsageError(
            f"{name} must be a multiple of {multiple}, got {side} (the nearest is {near})"
        )
    return side


def _sides(opened: Opened, sides: list, multiple: int) -> list[int]:
    """Width and height of the drawing, where either or both may be None."""
    own = opened.pixels.shape[1::-1]
    if sides == [None, None]:
        sides = [side // multiple * multiple for side in own]
        if 0 in sides:
            raise UsageError(
                f"image must have at least {multiple} pixels per side, got {own[0]}x{own[1]} "
                "(width and height enlarge it)"
            )
    elif None in sides:
        missing = sides.index(None)
        ratio = own[missing] / own[1 - missing]
        sides[missing] = max(1, round(sides[1 - missing] * ratio / multiple)) * multiple
    check_pixels("width and height", *sides)
    return sides


# -- masks -----------------------------------------------------------------------------------------


def _mask_of(
    opened: Opened, mask: object, mask_grow: object, mask_blur: object, *, may_be_black: bool
) -> Float32[np.ndarray, "H W"] | None:
    """The mask in pixels of the image as given."""
    grow = checks.whole("mask_grow", mask_grow, 0, 512)
    blur = checks.real("mask_blur", mask_blur, 0, 512)
    if opened.alpha is not None and not opened.alpha.any():
        raise UsageError("image is wholly transparent: nothing of it can be seen")
    if mask is None and opened.alpha is None:
        if grow or blur:
            name = "mask_grow" if grow else "mask_blur"
            raise UsageError(f"{name} needs a mask, or an image with transparent parts")
        return None
    if mask is None:
        assert opened.alpha is not None
        found = 1 - opened.alpha / np.float32(255)
    else:
        found = open_mask(mask, "mask")
        sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (opened.pixels, found)]
        if sizes[0] != sizes[1]:
            raise UsageError(f"mask must have the size of the image, {sizes[0]}, got {sizes[1]}")
    if not found.any() and not may_be_black:
        raise UsageError("mask is all black: nothing would be redrawn (white is redrawn)")
    if grow:
        found = _grown(found, grow)
    if blur > 0.1:  # below, the weight of the next pixel is under 1e-21
        found = _blurred(found, blur)
    return _settled(found)


def _grown(mask: np.ndarray, reach: int) -> np.ndarray:
    """The maximum over a regular octagon with `reach` pixels from its centre to its sides.

    An octagon is the sum of four lines, so the work grows with the logarithm of `reach`.
    """
    diagonal = min(round(reach * (1 - math.sqrt(0.5))), (reach - 1) // 2)
    straight = reach - 2 * diagonal
    mask = np.pad(mask, reach)
    for dy, dx, count in (
        (0, 1, straight),
        (1, 0, straight),
        (1, 1, diagonal),
        (1, -1, diagonal),
    ):
        for sign in (1, -1):
            _spread(mask, sign * dy, sign * dx, count)
    return mask[reach:-reach, reach:-reach]


def _spread(mask: np.ndarray, dy: int, dx: int, count: int) -> None:
    """Replace each pixel by the maximum of itself and the next `count` in one direction."""
    done = 0
    while done < count:
        step = min(done + 1, count - done)
        pairs = [
            (slice(max(0, -d), n - max(0, d)), slice(max(0, d), n - max(0, -d)))
            for d, n in zip((step * dy, step * dx), mask.shape, strict=True)
        ]
        here, there = zip(*pairs, strict=True)
        mask[here] = np.maximum(mask[here], mask[there])
        done += step


def _blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian cut at 3 sigma (0.13 % on each side, under a byte's half), edges repeated."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):  # rows, then columns
        mask = np.ascontiguousarray(_convolved(mask, weights).T)
    return mask


def _convolved(mask: np.ndarray, weights: np.ndarray) -> np.ndarray:
    reach, width = len(weights) // 2, mask.shape[1]
    length = -(-(width + 2 * reach) // 64) * 64  # a product of small primes is faster
    transfer, found = np.fft.rfft(weights, length), np.empty_like(mask)
    for start in range(0, len(mask), _STRIP):
        strip = np.pad(mask[start : start + _STRIP], ((0, 0), (reach, reach)), "edge")
        around = np.fft.irfft(np.fft.rfft(strip, length) * transfer, length)
        found[start : start + _STRIP] = around[:, 2 * reach : 2 * reach + width]
    return found


def _settled(mask: np.ndarray) -> np.ndarray:
    """Weights in [0, 1], and exactly 0 or 1 if they are so close that no byte would differ."""
    mask = np.clip(mask, 0, 1)
    mask[mask < _FAINT] = 0
    mask[mask > 1 - _FAINT] = 1
    return mask


def _check_redraws(mask: np.ndarray | None) -> np.ndarray | None:
    if mask is not None and not mask.any():
        raise UsageError(
            f"nothing of the mask is left at {mask.shape[1]}x{mask.shape[0]} pixels: expected a "
            "larger white part, more mask_grow or less mask_blur"
        )
    return mask


def _region(mask: np.ndarray, context: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: the mask's bounding box with `context` pixels around it, widened to
    the ratio `width` : `height` as far as the picture goes, and shifted to lie inside."""
    spans, sizes = [], mask.shape[::-1]
    for axis, size in enumerate(sizes):
        found = np.flatnonzero(mask.any(axis))
        spans.append((max(0, int(found[0]) - context), min(size, int(found[-1]) + 1 + context)))
    wide, high = (end - start for start, end in spans)
    wanted = max(wide, -(-high * width // height)), max(high, -(-wide * height // width))
    ends = []
    for (start, end), size, want in zip(spans, sizes, wanted, strict=True):
        length = min(want, size)
        start = min(max(0, start - (length - (end - start)) // 2), size - length)
        ends.append((start, start + length))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


# -- pixels ----------------------------------------------------------------------------------------


def _resized(array: np.ndarray, width: int, height: int, box: tuple | None = None) -> np.ndarray:
    """Pixels by Lanczos, a mask by a triangle, which has no negative lobes. `box`: the part used."""
    method = Image.Resampling.LANCZOS if array.ndim == 3 else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(array).resize((width, height), method, box=box))


def _cropped(array: np.ndarray, width: int, height: int) -> np.ndarray:
    high, wide = array.shape[:2]
    scale = max(width / wide, height / high)
    used = min(wide, width / scale), min(high, height / scale)
    # whole pixels: half a pixel off would blur a picture that is not scaled
    left, top = int((wide - used[0]) / 2), int((high - used[1]) / 2)
    return _resized(array, width, height, (left, top, left + used[0], top + used[1]))


def _padded(array: np.ndarray, width: int, height: int) -> np.ndarray:
    high, wide = array.shape[:2]
    scale = min(width / wide, height / high)
    inner = [max(1, min(m, round(n * scale))) for m, n in ((width, wide), (height, high))]
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    around = ((top, height - inner[1] - top), (left, width - inner[0] - left))
    array = _resized(array, *inner)
    if array.ndim == 3:
        return np.pad(array, (*around, (0, 0)), "edge")
    return np.pad(array, around, constant_values=1)


_FIT = {"crop": _cropped, "pad": _padded, "stretch": _resized}


def _pasted(under: np.ndarray, over: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found = np.empty_like(under)
    for start in range(0, len(under), _STRIP):
        rows = slice(start, start + _STRIP)
        below = under[rows].astype(np.float32)
        found[rows] = np.rint(below + mask[rows, :, None] * (over[rows] - below))
    return found


def enlarged_size(opened: Opened, factor: object, multiple: int) -> tuple[int, int]:
    """Width and height of a picture `factor` times as large, each to the nearest multiple.

    Raises UsageError for a `factor` that is not above 1 and at most 8, or if that is too many pixels.
    """
    times = checks.real("factor", factor, 1, 8, above=True)
    height, width = (
        max(1, math.floor(n * times / multiple + 0.5)) * multiple for n in opened.pixels.shape[:2]
    )
    check_pixels("factor", width, height)
    return width, height
