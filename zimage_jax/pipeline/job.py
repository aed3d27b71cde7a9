"""What goes into a pipeline and what comes out of it.

Axes: B pictures, H, W pixels, h, w latent rows and columns, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ..errors import UsageError
from ..files import write_whole
from ..model import sampling
from ..model.attention import CHOICES
from ..model.config import ModelConfig
from ..model.kv import KVPolicy
from ..planning.planner import Plan, Work
from ..runtime.ledger import Ledger
from . import picture as image


def check_size(config: ModelConfig, width: int, height: int) -> None:
    """Raises UsageError for a size in pixels that the model cannot draw."""
    multiple = config.pixel_multiple
    for name, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UsageError(
                f"{name} must be a multiple of {multiple}, got {value} (the nearest is {near})"
            )
    most_high, most_wide = (n * multiple for n in config.transformer.axes_lens[1:])
    if height > most_high or width > most_wide:
        raise UsageError(
            f"this model draws at most {most_wide} x {most_high} pixels, {width} x {height} were asked for"
        )


class ZImageWarning(UserWarning):
    """Something was not done as the words of the job suggest."""


@dataclass(frozen=True)
class Step:
    """What a callback sees after each NFE."""

    index: int  # from 0
    steps: int
    t: float  # the scheduler's time, 1000 sigma, at which the model was evaluated
    latents: Float[np.ndarray, "B h w C"]
    _to_rgb: Callable[[np.ndarray], np.ndarray]

    def previews(self) -> UInt8[np.ndarray, "B h w 3"]:
        """Small pictures, made linearly from the latents."""
        return self._to_rgb(self.latents)


@dataclass(frozen=True)
class Picture:
    pixels: UInt8[np.ndarray, "H W 3"]
    metadata: dict

    def save(self, path: str | Path, *, metadata: bool = True, overwrite: bool = False) -> Path:
        """Write a PNG; a name in use gets "-2", … unless `overwrite`. Returns the path used."""
        data = image.encode_png(self.pixels, self.metadata if metadata else None)
        return write_whole(Path(path), data, overwrite=overwrite)


@dataclass(frozen=True)
class Result:
    pictures: list[Picture]
    report: dict  # one value per picture for prompt, seed, latents_sha256: a list when there are several
    latents: Float[np.ndarray, "B h w C"]
    work: Work
    plan: Plan
    ledger: Ledger  # every copy and every program's run; `ledger.trace()` draws them


@dataclass(frozen=True)
class Job:
    """One batch of pictures of one size: what `generate` was asked for, checked and with its seeds
    drawn."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    noise: str
    kv: KVPolicy
    attention: str

    @property
    def texts(self) -> tuple[str, ...]:
        """A text per context: the prompts, then with guidance the negative prompt for each."""
        return self.prompts + (self.negative_prompt,) * len(self.prompts) * bool(self.guidance)

    def __post_init__(self):
        for text in self.prompts:
            if not text.strip():
                raise UsageError("the prompt is empty: say what to draw")
        for seed in self.seeds:
            if not 0 <= seed <= sampling.LARGEST_SEED:
                raise UsageError(
                    f"seed {seed} is out of range: 0 to {sampling.LARGEST_SEED}, or -1 for a random one"
                )
        if self.noise not in sampling.NOISE:
            raise UsageError(f"noise {self.noise!r}: expected one of {', '.join(sampling.NOISE)}")
        if self.attention not in CHOICES:
            raise UsageError(f"attention {self.attention!r}: expected one of {', '.join(CHOICES)}")
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"steps must be from 1 to 1000, got {self.steps}")
        if not 0 <= self.guidance <= 100:
            raise UsageError(f"guidance must be from 0 (off) to 100, got {self.guidance}")
