"""What the stages of the VAE's halves share: a half runs whole, or in strips of rows.

Axes: H, W pixels, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from ...model import vae
from ...model.config import VAEConfig
from ...model.vae_strips import layer_costs, strip_programs
from ...planning.plan import Choice, Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.work import Work
from ...runtime.programs import Programs
from ...units import tree_bytes
from ...weights import components
from ..attempt import Attempt


@dataclass(frozen=True)
class VAEChoice(Choice):
    """`rows`: pixel rows of a strip. `tile`: side of a tile in pixels. Neither: the half runs
    whole."""

    rows: int | None = None
    tile: int | None = None


class VAEStage(ABC):
    """A stage that applies one half of the VAE, to one picture at a time."""

    name: str
    half: str  # decoder or encoder
    takes: str  # the half's input, in words
    apply: ClassVar[Callable[..., Any]]  # vae.decode or vae.encode
    figure: ClassVar[str]  # the name of its stored figures

    @abstractmethod
    def shape(self, work: Work, config: VAEConfig) -> tuple[int, int, int, int]:
        """Of the half's input for one picture: 1, rows, columns, channels."""

    @abstractmethod
    def count(self, work: Work) -> int:
        """How many pictures the half is applied to."""

    @abstractmethod
    def run(self, attempt: Attempt) -> Any:
        """As of planning.plan.Stage."""

    # -- bytes -------------------------------------------------------------------------------------

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        config = sizes.config.vae
        weights = {f"VAE {self.half}": sizes.storage.nbytes("vae", self.half)}
        held = {self.takes: 4 * math.prod(self.shape(work, config))}
        stays = frozenset({("vae", self.half, 0)})
        yield Option(VAEChoice(), weights, held, stays)
        rows = work.h * config.scale // 2
        while rows >= config.scale:
            # in strips the input and the feature maps are on the host
            yield Option(VAEChoice(rows=rows), weights, {}, stays)
            rows //= 2

    def compiled(self, programs: Programs, work: Work, choice: VAEChoice, device: int = 0) -> int:
        config, attend = programs.config.vae, programs.attend(work)
        dtype = vae.compute_dtype(programs.dtype)
        module = programs.storage.assemble(
            "vae", {self.half: programs.storage.specs("vae", self.half)}
        )
        b, h, w, channels = self.shape(work, config)
        if choice.rows is not None:
            half = getattr(module, self.half)
            calls = strip_programs(half, (b, h, w, channels), dtype, choice.rows, attend)
            return max(
                programs(c.function, **c.static).compiled(*c.arguments)[1]
                + tree_bytes(c.arguments[1:])
                for c in calls
            )
        if choice.tile:
            h, w = (min(n, choice.tile // config.scale) for n in (h, w))
        array = jax.ShapeDtypeStruct((b, h, w, channels), np.float32)
        return programs(type(self).apply, dtype=dtype, attend=attend).compiled(module, array)[1]

    def stored(self, figures: Figures, work: Work, choice: VAEChoice, device: int = 0) -> int:
        height, width = (figures.config.vae.scale * n for n in (work.h, work.w))
        if choice.rows is None:
            side = choice.tile or max(height, width)
            return figures.at(self.figure, min(height, side) * min(width, side))
        return figures.strips(self.figure, choice.rows * width, height * width)

    # -- seconds -----------------------------------------------------------------------------------

    def seconds(self, timing: Timing, choice: VAEChoice) -> float:
        work, config = timing.work, timing.sizes.config
        module = getattr(components.spec(config, "vae"), self.half)
        costs = layer_costs(module, self.shape(work, config.vae))
        products, elements = (sum(column) for column in zip(*costs, strict=True))
        crossing = 0 if choice.rows is None else elements * timing.sizes.compute_bytes
        each = 2 * products / timing.rates.flops + crossing / timing.rates.link
        return timing.unit("vae", self.half) + timing.jobs * self.count(work) * each

    # -- the run -----------------------------------------------------------------------------------

    def module(self, attempt: Attempt) -> vae.VAE:
        """The VAE with this half on the device."""
        (leaves,) = attempt.loan.pin("vae", [self.half])
        return attempt.programs.storage.assemble("vae", {self.half: leaves})

    def applied(
        self,
        attempt: Attempt,
        module: vae.VAE,
        array: np.ndarray,
        strips: Callable,
        tiles: Callable | None = None,
    ) -> np.ndarray:
        """The half applied to the `array` of one picture, as the plan chose."""
        choice = attempt.plan.choices[self.name]
        dtype = vae.compute_dtype(attempt.programs.dtype)
        attend = attempt.programs.attend(attempt.work)

        def run(function, weights, *arrays, **static):
            attempt.hold(*arrays)
            return attempt.programs(function, **static)(attempt.recorder, weights, *arrays)

        if choice.rows is not None:
            found = strips(module, array, dtype, choice.rows, run, attend)
        elif choice.tile is not None:
            assert tiles is not None
            found = tiles(module, array, dtype, choice.tile, run, attend)
        else:
            found = np.asarray(run(type(self).apply, module, array, dtype=dtype, attend=attend))
        attempt.drop()
        return found
