"""Arrays that a job is given instead of texts and pictures: text features, latents with a mask.

Axes: B pictures, T tokens, E feature width, h, w latent rows and columns, C latent channels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.prompt import MAX_TOKENS

# arguments of ZImage.generate that programs give, not people
ARGUMENTS = ("features", "negative_features", "latents", "noise_mask", "output")

Features = Float[np.ndarray, "_ E"]


@dataclass(frozen=True, eq=False, repr=False)
class LatentCanvas:
    """The latents that a job begins from, of each picture or one for all, and what is redrawn of
    them, from 0 to 1 (None: a mask was not given). The counterpart of Canvas, which has pixels."""

    latents: Float32[np.ndarray, "B h w C"]  # the sampler's
    mask: Float32[np.ndarray, "m h w"] | None
    scale: int  # pixels per latent
    enlarges = False

    @property
    def count(self) -> int:
        """How many pictures' latents these are."""
        return len(self.latents)

    def __repr__(self) -> str:
        return "<LatentCanvas {}x{}>".format(*self.size)

    @classmethod
    def of(cls, config: ModelConfig, latents: object, mask: object = None) -> "LatentCanvas":
        """Check `latents` [B h w C] and a `mask` [B or 1, h, w] of their size. Raises UsageError."""
        channels = config.transformer.in_channels
        found = _finite("latents", latents)
        if found.ndim != 4 or 0 in found.shape or found.shape[-1] != channels:
            raise UsageError(
                f"latents must be [pictures, rows, columns, {channels}], got {list(found.shape)}"
            )
        soft = None if mask is None else _finite("noise_mask", mask)
        if soft is not None:
            if soft.shape not in (found.shape[:3], (1, *found.shape[1:3])):
                expected = f"[1 or {found.shape[0]}, {found.shape[1]}, {found.shape[2]}]"
                raise UsageError(
                    f"noise_mask must have the latents' size, {expected}, got {list(soft.shape)}"
                )
            if soft.min() < 0 or soft.max() > 1:
                raise UsageError("noise_mask must have weights from 0 (kept) to 1 (redrawn)")
            if not soft.any():
                raise UsageError("noise_mask is all 0: nothing would be redrawn")
        return cls(found, soft, config.vae.scale)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        _, height, width, _ = self.latents.shape
        return self.scale * width, self.scale * height

    def latent_mask(self, scale: int) -> Float32[np.ndarray, "m h w"] | None:
        """As of Canvas: the mask, which has the latents' size already."""
        assert scale == self.scale
        return self.mask

    def finish(self, drawn: np.ndarray) -> np.ndarray:
        """As of Canvas: there are no pixels that `drawn` would be pasted over."""
        return drawn

    def to_json(self) -> dict[str, Any]:
        """As of Canvas: a checksum of the latents and the mask."""
        found = hashlib.sha256(repr(self.latents.shape).encode())
        for array in (self.latents, self.mask):
            if array is not None:
                found.update(array.astype("<f4").tobytes())
        return {"is_latents": True, "sha256": found.hexdigest()}


def features_of(config: ModelConfig, name: str, value: object) -> tuple[Features, ...]:
    """The features of one text [T E], or of several: at most 512 tokens each, as ZImage.encode gives
    them. Raises UsageError."""
    if isinstance(value, np.ndarray) and value.ndim == 2:
        several: Sequence[object] = [value]
    elif isinstance(value, np.ndarray | list | tuple) and len(value):
        several = list(value)
    else:
        several = [value]
    width, found = config.text_encoder.hidden_size, []
    for one in several:
        array = _finite(name, one)
        if array.ndim != 2 or array.shape[1] != width or not len(array):
            raise UsageError(f"{name} must be [tokens, {width}], got {list(array.shape)}")
        if len(array) > MAX_TOKENS:
            raise UsageError(
                f"{name} have {len(array)} tokens, the model reads at most {MAX_TOKENS}: shorten "
                "the text"
            )
        found.append(array)
    return tuple(found)


def _finite(name: str, value: object) -> Float32[np.ndarray, "..."]:
    """A copy in float32 of an array of floats. Raises UsageError."""
    if not isinstance(value, np.ndarray) or value.dtype.name not in (
        *("float16", "bfloat16", "float32", "float64"),
    ):
        what = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UsageError(f"{name} must be an array of floats, got {what}")
    with np.errstate(over="ignore"):
        found = value.astype(np.float32)
    if not np.isfinite(found).all():
        raise UsageError(f"{name} must be finite numbers")
    return found
