"""Pictures that a job begins from: opened safely, fitted to the size to draw, masked, pasted back.

Pictures come from anyone. The size is read from the header before pixels are decoded, and nothing
is opened but the formats below.

Axes: H, W pixels.
"""

import hashlib
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import checks
from ..errors import UsageError
from ..files import open_regular, printable
from .picture import FITS

Source = str | Path | Image.Image | np.ndarray  # a picture, as users give one
Pixels = UInt8[np.ndarray, "H W 3"]
Mask = Float[np.ndarray, "H W"]  # float32; 1 is redrawn

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]
LARGEST_FILE = 256 << 20  # bytes
MOST_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 9459 x 9459


# -- opening ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A picture in memory, turned as its EXIF orientation says. `alpha`: None if all is opaque."""

    pixels: Pixels
    alpha: UInt8[np.ndarray, "H W"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]


def open_picture(source: Source, name: str) -> Opened:
    """A picture from a file, a PIL image, or an array: uint8, or floats in 0..1, of shape [H, W], [H,
    W, 3] or [H, W, 4].

    `name` is the argument's, for messages. Raises UsageError for what is no such picture, and for
    one of more than MOST_PIXELS before it is decoded.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source, name)
    if isinstance(source, Image.Image):
        return _of_image(source, name)
    if not isinstance(source, str | Path):
        checks.refuse(name, "a path, a PIL image or an array", source)
    where = f"{name} {printable(source)}"
    with open_regular(Path(source)) as file:
        nbytes = Path(source).stat().st_size
        if nbytes > LARGEST_FILE:
            raise UsageError(f"{where}: {nbytes >> 20} MiB, expected at most {LARGEST_FILE >> 20}")
        return _of_file(file, where)


def _of_file(file: BinaryIO, where: str) -> Opened:
    try:
        with warnings.catch_warnings():
            # the library warns where more than MOST_PIXELS are to be decoded
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(image, where)
                image.load()
                return _of_image(image, where)
    except (UsageError, MemoryError):
        raise
    except UnidentifiedImageError:
        expected = ", ".join(FORMATS)
        raise UsageError(f"{where}: expected a picture ({expected}), this is none") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UsageError(f"{where}: expected at most {MOST_PIXELS:,} pixels") from None
    except Exception as fault:  # the decoders raise whatever a damaged file leads to
        raise UsageError(f"{where}: a damaged picture ({printable(fault)})") from None


def _check_pixels(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UsageError(
            f"{where}: {width} x {height} pixels, expected at most {MOST_PIXELS:,} together"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise UsageError(f"{where}: {frames} frames or pages, expected a single picture")


def _of_image(image: Image.Image, where: str) -> Opened:
    _check_pixels(image, where)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _of_array(_wide(image, where), where)
    alpha = None
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    pixels = np.array(image.convert("RGB"))
    return Opened(pixels, None if alpha is None or (alpha == 255).all() else np.array(alpha))


def _wide(image: Image.Image, where: str) -> np.ndarray:
    """A grey picture of more than 8 bits, as 8."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UsageError(f"{where}: expected a picture of 8 or 16 bits, found mode {image.mode}")
    return np.round(values.astype(np.float64) / 257).astype(np.uint8)


def _of_array(values: np.ndarray, name: str) -> Opened:
    shape = " x ".join(map(str, values.shape))
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise UsageError(f"{name}: expected an array of H x W (x 3 or 4), got {shape}")
    if 0 in values.shape or values.shape[0] * values.shape[1] > MOST_PIXELS:
        raise UsageError(f"{name}: expected 1 to {MOST_PIXELS:,} pixels, got {shape}")
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UsageError(f"{name}: expected floats from 0 to 1")
        values = np.round(values.astype(np.float64) * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise UsageError(f"{name}: expected uint8 or floats from 0 to 1, got {values.dtype}")
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, 2)
    alpha = values[:, :, 3] if values.shape[2] == 4 else None
    opaque = alpha is None or (alpha == 255).all()
    return Opened(np.array(values[:, :, :3]), None if opaque else np.array(alpha))


def open_mask(source: Source | None, image: Opened, name: str) -> Mask | None:
    """What is redrawn of `image`: white of the mask, or without one the image's transparent part.

    Raises UsageError for a mask of another size, and if there is nothing to redraw or to keep.
    """
    if source is None:
        if image.alpha is None:
            return None
        if not image.alpha.any():
            raise UsageError("the image is wholly transparent: there is nothing to keep")
        return (1 - image.alpha / 255).astype(np.float32)
    found = open_picture(source, name)
    if found.size != image.size:
        size, expected = ("{} x {}".format(*of.size) for of in (found, image))
        raise UsageError(f"{name}: expected the image's size, {expected} pixels, got {size}")
    grey = np.asarray(Image.fromarray(found.pixels).convert("L"), np.float32) / 255
    if found.alpha is not None:  # on black: what is transparent is kept
        grey = grey * (found.alpha / 255).astype(np.float32)
    if not grey.any():
        raise UsageError(f"{name} is black: nothing would be redrawn")
    return grey


# -- masks -----------------------------------------------------------------------------------------


def grown(mask: Mask, pixels: int) -> Mask:
    """The largest value within `pixels` in rows and columns: a wider mask."""
    for axis in (0, 1):
        found = mask
        reach = 1
        # windows that double: 2, 4, 8, ... values
        while reach < pixels + 1:
            by = min(reach, pixels + 1 - reach)
            found = np.maximum(found, _moved(found, by, axis))
            reach += by
        back = mask
        reach = 1
        while reach < pixels + 1:
            by = min(reach, pixels + 1 - reach)
            back = np.maximum(back, _moved(back, -by, axis))
            reach += by
        mask = np.maximum(found, back)
    return mask


def _moved(values: np.ndarray, by: int, axis: int) -> np.ndarray:
    """`values` moved along an axis; 0 comes in."""
    found = np.zeros_like(values)
    n = values.shape[axis]
    if abs(by) < n:
        into, outof = (slice(max(by, 0), n + min(by, 0)), slice(max(-by, 0), n - max(by, 0)))
        if axis == 0:
            found[into] = values[outof]
        else:
            found[:, into] = values[:, outof]
    return found


def blurred(mask: Mask, sigma: float) -> Mask:
    """A Gaussian blur; the mask goes on beyond the picture's edge."""
    if sigma <= 0:
        return mask
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        edges = [(0, 0), (0, 0)]
        edges[axis] = (reach, reach)
        padded = np.pad(mask, edges, mode="edge")
        mask = np.apply_along_axis(np.convolve, axis, padded, weights, "valid").astype(np.float32)
    return np.clip(mask, 0, 1)


# -- the canvas ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, values: np.ndarray) -> np.ndarray:
        return values[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, repr=False)
class Canvas:
    """A picture at the size to draw, and what of it is redrawn."""

    pixels: Pixels
    mask: Mask | None
    settings: dict[str, Any]  # for the metadata: names of files, and the arguments of `of`
    # with `crop_mask`: the whole picture and its mask, and where in it the pixels are
    whole: tuple[Pixels, Mask, Box] | None = None

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        masked = "" if self.mask is None else f", {100 * self.mask.mean():.0f} % redrawn"
        return f"<Canvas {width}x{height}{masked}>"

    @classmethod
    def of(
        cls,
        image: Source,
        mask: Source | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        multiple: int = 16,
        fit: str = "crop",
        mask_blur: float = 0.0,
        mask_grow: int = 0,
        crop_mask: int | None = None,
        model_side: int = 1024,
    ) -> "Canvas":
        """Open a picture and its mask, and fit them to `width` x `height` (Lanczos).

        Without a size the picture keeps its own, less what exceeds a multiple of `multiple`; with
        `crop_mask` it is `model_side` squared. `fit`: cover the size and crop, pad with the edge
        (which is redrawn if there is a mask), or stretch. `mask_grow` and `mask_blur` (the Gaussian's
        sigma) are in pixels of the image, and come before the fit.

        Raises UsageError.
        """
        checks.one_of("fit", fit, FITS)
        checks.real("mask_blur", mask_blur, 0, 512)
        checks.whole("mask_grow", mask_grow, 0, 512)
        opened = open_picture(image, "image")
        values = open_mask(mask, opened, "mask")
        given = {"mask_blur": mask_blur, "mask_grow": mask_grow, "crop_mask": crop_mask}
        if values is None and any(given.values()):
            name = next(name for name, value in given.items() if value)
            raise UsageError(f"{name} needs a mask: none is given, and the image is opaque")
        if values is not None:
            values = blurred(grown(values, mask_grow), mask_blur)
        settings = {
            "image": _name(image),
            "mask": None if mask is None else _name(mask),
            "fit": fit,
            **given,
        }
        if crop_mask is not None and values is not None:
            checks.whole("crop_mask", crop_mask, 0, 4096)
            size = (width or model_side, height or model_side)
            return cls._cropped(opened.pixels, values, size, crop_mask, settings)
        own = tuple(n // multiple * multiple for n in opened.size)
        if not (width or height) and 0 in own:
            raise UsageError(f"image: expected {multiple} pixels a side or more, got {opened.size}")
        size = (width or own[0], height or own[1])
        way = "stretch" if not (width or height) else fit
        pixels, values = _fitted(opened.pixels, values, size, way)
        return cls(pixels, values, settings)

    @classmethod
    def _cropped(
        cls, pixels: Pixels, mask: Mask, size: tuple[int, int], context: int, settings: dict
    ) -> "Canvas":
        box = region_of(mask, size, context)
        drawn, values = _fitted(box.cut(pixels), box.cut(mask), size, "stretch")
        return cls(drawn, values, settings, (pixels, mask, box))

    def named(self, **names: Any) -> "Canvas":
        """The same canvas with other names for the metadata."""
        return replace(self, settings=self.settings | names)

    # -- what the pipeline asks ------------------------------------------------------------------

    @property
    def sha256(self) -> str:
        """Of the pixels and the mask, at the size to draw."""
        found = hashlib.sha256(self.pixels.tobytes())
        if self.mask is not None:
            found.update(self.mask.astype("<f4").tobytes())
        return found.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """For the metadata: what `of` was given, and the checksum."""
        return {**self.settings, "sha256": self.sha256}

    def to_model(self) -> Float[np.ndarray, "H W 3"]:
        """float32 in [-1, 1]. (diffusers `VaeImageProcessor.normalize`)"""
        return 2 * (self.pixels.astype(np.float32) / np.float32(255)) - 1

    def latent_mask(self, scale: int) -> Float[np.ndarray, "h w"]:
        """The mask of latents: the mean over `scale` x `scale` pixels, so that soft stays soft."""
        assert self.mask is not None
        h, w = (n // scale for n in self.mask.shape)
        return self.mask.reshape(h, scale, w, scale).mean((1, 3), dtype=np.float32)

    def finish(self, drawn: Pixels) -> Pixels:
        """The picture to give back: `drawn` where it was redrawn, else the bytes of the image."""
        if self.mask is None:
            return drawn
        if self.whole is None:
            return _pasted(self.pixels, drawn, self.mask)
        pixels, mask, box = self.whole
        small = Image.fromarray(drawn).resize((box.width, box.height), Image.Resampling.LANCZOS)
        found = pixels.copy()
        box.cut(found)[...] = _pasted(box.cut(pixels), np.asarray(small), box.cut(mask))
        return found


def _name(source: Source) -> str | None:
    return Path(source).name if isinstance(source, str | Path) else None


def _pasted(below: Pixels, above: Pixels, mask: Mask) -> Pixels:
    """`above` over `below`, with the mask as its weight."""
    weight = mask[:, :, None]
    mixed = np.round(weight * above + (1 - weight) * below).astype(np.uint8)
    return np.where(weight == 0, below, mixed)


def region_of(mask: Mask, size: tuple[int, int], context: int) -> Box:
    """The masked part with `context` pixels around it, in the shape of `size`, inside the picture.

    Where the picture is too narrow for that shape, the region is as wide as the picture.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    found = []
    spans = [
        (max(0, int(used[0]) - context), min(total, int(used[-1]) + 1 + context))
        for used, total in ((columns, mask.shape[1]), (rows, mask.shape[0]))
    ]
    lengths = [end - begin for begin, end in spans]
    scale = max(length / side for length, side in zip(lengths, size, strict=True))
    for (begin, end), side, total in zip(spans, size, mask.shape[::-1], strict=True):
        length = min(total, max(end - begin, round(scale * side)))
        first = min(max(0, (begin + end - length) // 2), total - length)
        found.append((first, length))
    (left, width), (top, height) = found
    return Box(left, top, width, height)


def _fitted(
    pixels: Pixels, mask: Mask | None, size: tuple[int, int], fit: str
) -> tuple[Pixels, Mask | None]:
    """Both at `size` (width, height)."""
    h, w = pixels.shape[:2]
    if fit == "crop":
        scale = min(w / size[0], h / size[1])
        width, height = (min(n, max(1, round(scale * s))) for n, s in ((w, size[0]), (h, size[1])))
        box = Box((w - width) // 2, (h - height) // 2, width, height)
        pixels, mask = box.cut(pixels), None if mask is None else box.cut(mask)
    if fit == "pad":
        return _padded(pixels, mask, size)
    return _resized(pixels, size), None if mask is None else _resized_mask(mask, size)


def _padded(pixels: Pixels, mask: Mask | None, size: tuple[int, int]) -> tuple[Pixels, Mask | None]:
    h, w = pixels.shape[:2]
    scale = min(size[0] / w, size[1] / h)
    width, height = (min(s, max(1, round(scale * n))) for n, s in ((w, size[0]), (h, size[1])))
    edges = [((n - m) // 2, n - m - (n - m) // 2) for n, m in ((size[1], height), (size[0], width))]
    inner = _resized(pixels, (width, height))
    found = np.pad(inner, [*edges, (0, 0)], mode="edge")
    if mask is None:
        return found, None
    return found, np.pad(_resized_mask(mask, (width, height)), edges, constant_values=1)


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize(size, Image.Resampling.LANCZOS))


def _resized_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Bilinear: a Lanczos filter would leave 0..1."""
    if mask.shape[::-1] == size:
        return mask
    image = Image.fromarray(np.ascontiguousarray(mask))
    return np.clip(np.asarray(image.resize(size, Image.Resampling.BILINEAR)), 0, 1)
