"""Scratch bytes of programs, stored: the compiler's own figures for the published widths.

scripts/measure/temporaries.py compiles the very programs for one card of each capability.
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
from ..weights.formats import Storage
from .cards import Card, MeasuredCard
from .plan import Stage, VisitKind
from .work import Work

TEMPORARIES = Path(__file__).parent.parent / "assets" / "temporaries.json"


class Figures:
    """The stored figures of the capability nearest to a card's.

    Between stored points a figure is linear in tokens or pixels, and in the blocks of a chunk, and never below that of
    the next smaller point. Below the first point it is that one's, above the last it goes on as between the last two.
    """

    def __init__(self, storage: Storage, card: Card | MeasuredCard):
        """Raises UsageError for a model of other widths."""
        if not has_published_widths(storage.config):
            raise UsageError(
                "figures are stored for Z-Image's published widths only; --compile asks the compiler for this model's"
            )
        self.storage = storage
        wanted, table = 10 * card.capability[0] + card.capability[1], _table()["capabilities"]
        nearest = min(table, key=lambda key: abs(int(key.replace(".", "")) - wanted))
        self._figures = of = table[nearest]
        self.source = f"stored, compiled for sm_{nearest.replace('.', '')} ({of['card']}, jax {of['jax']}, {of['date']})"
        if nearest != "{}.{}".format(*card.capability):
            self.source += ", the nearest stored to this card's capability"

    @property
    def config(self) -> ModelConfig:
        return self.storage.config

    def at(self, name: str, x: int) -> int:
        """The figure of `name` at x tokens or pixels."""
        return _at(self._figures[name], x)

    def strips(self, of_strip: int, of_picture: int) -> int:
        """Decoding a picture of `of_picture` pixels in strips of `of_strip`."""
        return _at(
            [(pixels, _at(points, of_strip)) for pixels, points in self._figures["strips"]],
            of_picture,
        )

    def blocks(self, stage: str, kinds: frozenset[VisitKind], tokens: int) -> int:
        """The most of any of these visits over so many tokens.

        Two cases are stored: copying as many blocks as run, or none. They are of K and V held whole; those in groups take
        less.
        """
        scratch = [0]
        for kind in kinds:
            points = [
                (int(key.split(",")[0]), _at(of_tokens, tokens))
                for key, of_tokens in self._figures[stage].items()
                if (int(key.split(",")[1]) > 0) == (kind.copied > 0)
            ]
            scratch.append(_at(sorted(points), max(kind.blocks, kind.copied)))
        return max(scratch)


class StoredCosts:
    """Scratch bytes by stored figures. (planning.plan.Costs)"""

    def __init__(self, storage: Storage, card: Card | MeasuredCard):
        """Raises UsageError for a model of other widths than the published ones."""
        self._figures = Figures(storage, card)

    @property
    def source(self) -> str:
        return self._figures.source

    def scratch(self, stage: Stage, work: Work, choice: Any) -> int:
        return stage.stored(self._figures, work, choice)


@cache
def _table() -> dict:
    return json.loads(TEMPORARIES.read_text("utf-8"))


def has_published_widths(config: ModelConfig) -> bool:
    """True if all widths are Turbo's; numbers of layers, positions and words may differ."""
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
    """The figure at x of points (x, figure) in order."""
    above = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    if above == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[above - 1 : above + 1]
    least = y1 if x >= x1 else y0
    return max(least, math.ceil(y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
