"""What a job starts from: a picture and a mask, fitted, and put back when the drawing is done.

Everything is in host memory. A mask is the weight of the drawing at each pixel: 0 (black) is kept,
1 (white) is redrawn. Axes: H, W pixels as drawn, h, w latent rows and columns.
"""

import hashlib
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from .. import checks
from ..errors import UsageError
from ..model.choices import FITS
from .opened import LONGEST_SIDE, File, Opened, check_pixels, open_mask, open_picture

_STRIP = 256  # rows that are computed at once in float32: bounds the temporaries
_FAINT = 1 / 512  # a smaller weight changes no byte


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
    count = 1  # picture, for all that are drawn
    enlarges: bool = False  # a small picture, whose composition is to be kept
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

        Without a mask the transparent part of the image is redrawn. Without a size it is the
        image's own, each side floored to `multiple`; one side alone keeps the ratio. To another
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
        grow = checks.whole("mask_grow", mask_grow, 0, 512)
        blur = checks.real("mask_blur", mask_blur, 0, 512)
        asked = (_side("width", width, multiple), _side("height", height, multiple))
        soft = _mask_of(opened, mask, grow, blur, may_be_black=fit == "pad")
        if crop_mask is None:
            # without a size the ratio changes by less than `multiple` pixels: diffusers stretches
            fit = fit if any(asked) else "stretch"
            made = cls(*_fitted(opened, soft, asked, multiple, fit))
        else:
            crop_mask = checks.whole("crop_mask", crop_mask, 0, 4096)
            if fit != "crop":
                raise UsageError(f"fit {fit} has no effect with crop_mask")
            made = cls._cropped(
                opened, soft, crop_mask, tuple(side or model_side for side in asked)
            )
        return made.named(
            image=name_of(image),
            mask=name_of(mask),
            fit=fit,
            mask_blur=blur,
            mask_grow=grow,
            crop_mask=crop_mask,
        )

    @classmethod
    def of_control(
        cls,
        image: object,
        *,
        width: object = None,
        height: object = None,
        multiple: int = 16,
        fit: object = "crop",
    ) -> "Canvas":
        """What a ControlNet makes the picture follow, opaque, at the size to draw: by default its
        own. The arguments are those of `of`. Raises UsageError."""
        opened = image if isinstance(image, Opened) else open_picture(image, "control_image")
        if opened.alpha is not None:
            raise UsageError("control_image has transparent parts: expected an opaque picture")
        made = cls.of(opened, width=width, height=height, multiple=multiple, fit=fit)
        return made.named(image=name_of(image))

    @classmethod
    def _cropped(
        cls, opened: Opened, mask: np.ndarray | None, context: int, size: tuple[int | None, ...]
    ) -> "Canvas":
        if mask is None:
            raise UsageError("crop_mask needs a mask, or an image with transparent parts")
        wide, high = size
        if wide is None or high is None:
            raise UsageError("crop_mask needs width and height")
        check_pixels("width and height", wide, high)
        _check_redraws(mask)
        left, top, right, bottom = region = _region(mask, context, wide, high)
        inside = slice(top, bottom), slice(left, right)
        drawn = _settled(_resized(mask[inside], wide, high))
        _check_redraws(drawn)
        cut = Cut(opened.pixels, region, mask[inside])
        return cls(_resized(opened.pixels[inside], wide, high), drawn, cut)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.pixels.shape[:2]
        return width, height

    def finish(self, drawn: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H0 W0 3"]:
        """The picture with what was drawn: `drawn`, weighted by the mask, over the fitted picture
        or, with a cut, over the whole image as given. Bytes where the mask is 0 stay as they were.

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
        """The mask's mean over each `scale` x `scale` pixels; sides are multiples of `scale`."""
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


def name_of(source: object) -> str | None:
    """The name of a file, for the metadata; never its folder."""
    if isinstance(source, File):
        return source.name
    return Path(source).name if isinstance(source, str | os.PathLike) else None


def _side(name: str, value: object, multiple: int) -> int | None:
    if value is None:
        return None
    side = checks.whole(name, value, multiple, LONGEST_SIDE)
    if side % multiple:
        near = max(1, round(side / multiple)) * multiple
        raise UsageError(
            f"{name} must be a multiple of {multiple}, got {side} (the nearest is {near})"
        )
    return side


def _fitted(
    opened: Opened,
    mask: np.ndarray | None,
    asked: tuple[int | None, int | None],
    multiple: int,
    fit: str,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The whole picture and its mask at the size asked for, or at the picture's own."""
    width, height = _size(opened, asked, multiple)
    place = _FIT[fit]
    pixels = place(opened.pixels, width, height)
    if mask is None:
        return pixels, None
    mask = _settled(place(mask, width, height))
    _check_redraws(mask)
    return pixels, mask


def _size(opened: Opened, asked: tuple[int | None, int | None], multiple: int) -> tuple[int, int]:
    """Width and height of the drawing."""
    own_height, own_width = opened.pixels.shape[:2]
    width, height = asked
    if width is None and height is None:
        width, height = (n // multiple * multiple for n in (own_width, own_height))
        if not width or not height:
            raise UsageError(
                f"image must have at least {multiple} pixels per side, got "
                f"{own_width}x{own_height} (width and height enlarge it)"
            )
    if width is None:
        assert height is not None
        width = max(1, round(height * own_width / own_height / multiple)) * multiple
    if height is None:
        assert width is not None
        height = max(1, round(width * own_height / own_width / multiple)) * multiple
    check_pixels("width and height", width, height)
    return width, height


# -- masks -----------------------------------------------------------------------------------------


def _mask_of(
    opened: Opened, mask: object, grow: int, blur: float, *, may_be_black: bool
) -> Float32[np.ndarray, "H W"] | None:
    """The mask in pixels of the image as given."""
    if opened.alpha is not None and not opened.alpha.any():
        raise UsageError("image is wholly transparent: nothing of it can be seen")
    if mask is not None:
        found = open_mask(mask, "mask")
        sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (opened.pixels, found)]
        if sizes[0] != sizes[1]:
            raise UsageError(f"mask must have the size of the image, {sizes[0]}, got {sizes[1]}")
    elif opened.alpha is not None:
        found = 1 - opened.alpha / np.float32(255)
    else:
        if grow or blur:
            name = "mask_grow" if grow else "mask_blur"
            raise UsageError(f"{name} needs a mask, or an image with transparent parts")
        return None
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


def _check_redraws(mask: np.ndarray) -> None:
    if not mask.any():
        raise UsageError(
            f"nothing of the mask is left at {mask.shape[1]}x{mask.shape[0]} pixels: expected a "
            "larger white part, more mask_grow or less mask_blur"
        )


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
    """Pixels by Lanczos, a mask by a triangle (no negative lobes). `box`: the part used."""
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

    Raises UsageError for a `factor` that is not above 1 and at most 8, or for too many pixels.
    """
    times = checks.real("factor", factor, 1, 8, above=True)
    height, width = (
        max(1, math.floor(n * times / multiple + 0.5)) * multiple for n in opened.pixels.shape[:2]
    )
    check_pixels("factor", width, height)
    return width, height
