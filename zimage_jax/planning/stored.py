"""Stored scratch bytes of programs, as the compiler reports them for the published widths.

scripts/measure/temporaries.py compiles the same programs for one card of each compute capability.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..model.config import TURBO, ModelConfig
from ..model.ops import RUN_TOKENS
from ..units import MIB
from ..weights import components
from ..weights.formats import Storage
from .cards import Card, MeasuredCard
from .plan import Stage
from .stream_plan import VisitKind
from .work import Work

TEMPORARIES = Path(__file__).parent.parent / "assets" / "temporaries.json"


class Figures:
    """The stored figures of the compute capability that is nearest to a card's.

    The figures are of parameters stored as arrays. An encoded model's programs also hold a decoded
    matrix: the largest of a block is added, and 2 MiB. scripts/results/formats.md has the error.

    Between stored points a figure is linear in tokens or pixels, and in blocks per chunk, but never
    below the next smaller point's. Below the first point it is that point's; above the last point
    the last two are extrapolated.
    """

    def __init__(self, storage: Storage, card: Card | MeasuredCard):
        """Raises UsageError for a model whose widths are not the published ones."""
        if not has_published_widths(storage.config):
            raise UsageError(
                "figures are stored for Z-Image's published widths only; "
                "--compile asks the compiler for this model's"
            )
        self.storage = storage
        wanted, table = 10 * card.capability[0] + card.capability[1], _table()["capabilities"]
        nearest = min(table, key=lambda key: abs(int(key.replace(".", "")) - wanted))
        self._figures = found = table[nearest]
        self.source = (
            f"stored, compiled for sm_{nearest.replace('.', '')} "
            f"({found['card']}, jax {found['jax']}, {found['date']})"
        )
        if nearest != "{}.{}".format(*card.capability):
            self.source += ", the nearest stored to this card's capability"

    @property
    def config(self) -> ModelConfig:
        return self.storage.config

    def at(self, name: str, x: int) -> int:
        """The figure `name` at `x` tokens or pixels."""
        return _at(self._figures[name], x)

    def strips(self, name: str, of_strip: int, of_picture: int) -> int:
        """The figure `name` of `of_picture` pixels in strips of `of_strip` pixels."""
        of_pictures = self._figures[f"{name} strips"]
        return _at([(pixels, _at(points, of_strip)) for pixels, points in of_pictures], of_picture)

    def blocks(self, stage: str, kinds: frozenset[VisitKind], tokens: int) -> int:
        """The largest figure of the visits `kinds` over `tokens` tokens.

        Two cases are stored for a block and for each half: a visit that copies as much as it runs,
        and one that copies nothing. They are stored for K and V without groups; groups take less.
        """
        scratch = [0]
        for kind in kinds:
            of_stage = self._figures[f"{stage} {kind.half}" if kind.half else stage]
            points = [
                (int(key.split(",")[0]), _at(of_tokens, tokens))
                for key, of_tokens in of_stage.items()
                if (int(key.split(",")[1]) > 0) == (kind.copied > 0)
            ]
            own = _at(sorted(points), max(kind.units, kind.copied)) - kind.unused
            component = "text_encoder" if stage == "text" else "transformer"
            scratch.append(
                own + self.decoded(component, kind.half) + self.beside(component, tokens)
            )
        return max(scratch)

    def beside(self, component: str, tokens: int) -> int:
        """Bytes added for a LoRA: what it adds to the widest layer's result, for a run of tokens in
        float32. No figure was compiled with one."""
        widths = [
            leaf.shape[-1]
            for unit in self.storage.units(component)
            for path, leaf in self.storage.leaves(component, unit).items()
            if ".side." in path
        ]
        return 4 * min(tokens, RUN_TOKENS) * max(widths, default=0)

    def decoded(self, component: str, half: str | None = None) -> int:
        """Bytes added for the matrix that a block of a component, or its half, has decoded."""
        return _decoded(self.storage, component, half)


class StoredCosts:
    """Scratch bytes from stored figures: a planning.plan.Costs."""

    def __init__(self, storage: Storage, *cards: Card | MeasuredCard):
        """`cards`: of each device. Raises UsageError for a model whose widths are not the published
        ones."""
        self._figures = [Figures(storage, card) for card in cards]

    @property
    def source(self) -> str:
        return "; ".join(dict.fromkeys(figures.source for figures in self._figures))

    def scratch(self, stage: Stage, work: Work, choice: Any, device: int = 0) -> int:
        return stage.stored(self._figures[device], work, choice, device)


@cache
def _decoded(storage: Storage, component: str, half: str | None) -> int:
    sizes = [
        leaf.size
        for unit, leaves in components.units(storage.config, component).items()
        for path, leaf in components.of_half(f"{unit}.{half}" if half else unit, leaves).items()
        if storage.of(component, path).encoding_of(path, leaf) is not None
    ]
    return 2 * max(sizes) + 2 * MIB if sizes else 0  # decoded to 16 bits


@cache
def _table() -> dict:
    return json.loads(TEMPORARIES.read_text("utf-8"))


def has_published_widths(config: ModelConfig) -> bool:
    """True if all widths are Turbo's; numbers of layers, positions and vocabulary may differ."""
    ours, theirs = config.transformer, TURBO.transformer
    counts = {
        name: getattr(ours, name)
        for name in ("n_layers", "n_refiner_layers", "axes_lens", "rope_theta")
    }
    text = {
        name: getattr(config.text_encoder, name)
        for name in ("num_hidden_layers", "vocab_size", "rope_theta")
    }
    return (
        ours == replace(theirs, **counts)
        and config.text_encoder == replace(TURBO.text_encoder, **text)
        and config.vae.block_out_channels == TURBO.vae.block_out_channels
        and config.vae.layers_per_block == TURBO.vae.layers_per_block
    )


def _at(points: Sequence[Sequence[int]], x: int) -> int:
    """The figure at `x`, interpolated between `points`: pairs (x, figure) in ascending order."""
    above = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    if above == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[above - 1 : above + 1]
    least = y1 if x >= x1 else y0
    return max(least, math.ceil(y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
