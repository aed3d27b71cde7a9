"""What goes into a pipeline and what comes out of it.

Axes: B pictures, H, W pixels, h, w latent rows and columns, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, UInt8

from ..errors import UsageError
from ..files import write_whole
from ..model import sampling
from ..model.attention import CHOICES
from ..model.kv import KVPolicy
from ..planning.plan import Plan
from ..planning.work import Work
from ..runtime.ledger import Ledger
from . import picture as image


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


class Report(TypedDict):
    """The report of a batch. `prompt`, `seed` and `latents_sha256` are lists when there are several pictures.

    Bytes are of device memory unless the key says otherwise; seconds are by the clock.
    """

    prompt: str | list[str]
    seed: int | list[int]
    latents_sha256: str | list[str]
    width: int
    height: int
    steps: int  # NFEs
    guidance: float
    negative_prompt: str
    noise: str
    kv: dict[str, Any]  # what KVPolicy.parse takes
    dtype: str  # computed in
    model: str
    versions: dict[str, str]
    schedule: str
    chunks: int  # of the main blocks
    resident_chunks: int
    attention: str  # how the main blocks' attention was computed
    device: str
    seconds: dict[str, float]  # by stage, and total; load and compile are parts of the others
    compilations: int
    warnings: list[str]
    predicted_seconds: float | None
    predicted_peak_bytes: int
    predicted_peak_bytes_by_stage: dict[str, int]
    peak_device_bytes: int
    peak_device_bytes_from: str  # "allocator", or "ledger" where the device keeps no count
    ledger_peak_bytes: int
    allocator_peak_bytes: int | None
    peak_device_bytes_by_stage: dict[str, int]  # the ledger's
    copied_bytes: int  # from host to device
    copied_bytes_by_stage: dict[str, int]
    copied_bytes_saved_by_reuse: int
    kv_bytes: int  # the most K and V held at once
    kv_bytes_without_policy: int
    kv_bytes_of_a_block_by_nfe: list[int]
    host_bytes: int  # of parameters kept in host memory between jobs


@dataclass(frozen=True)
class Result:
    pictures: list[Picture]
    report: Report
    latents: Float[np.ndarray, "B h w C"]
    work: Work
    plan: Plan
    ledger: Ledger  # every copy and every program's run; `ledger.trace()` draws them


@dataclass(frozen=True, kw_only=True)
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
        negatives = (self.negative_prompt,) * len(self.prompts) if self.guidance else ()
        return self.prompts + negatives

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
