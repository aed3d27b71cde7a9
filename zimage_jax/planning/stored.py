"""What programs take beside their arguments, stored: the compiler's own figures for the published
widths.

scripts/measure/temporaries.py compiles the very programs for one card of each capability."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..errors import UsageError
from ..model.config import TURBO, ModelConfig
from .cards import Card, MeasuredCard
from .planner import Visit, Work

TEMPORARIES = Path(__file__).parent.parent / "assets" / "temporaries.json"


class StoredCosts:
    """What the planner asks, answered with stored figures of the compiler for the published widths.
    (planner.Costs)

    Between stored points a figure is linear in tokens or pixels, and in the blocks of a chunk, and
    never below that of the next smaller point. Below the first point it is that one's, above the
    last it goes on as between the last two."""

    def __init__(self, config: ModelConfig, card: Card | MeasuredCard):
        """Raises UsageError for a model of other widths."""
        if not has_published_widths(config):
            raise UsageError(
                "figures are stored for Z-Image's published widths only; --compile asks the compiler for this model's"
            )
        wanted, table = 10 * card.capability[0] + card.capability[1], _table()["capabilities"]
        nearest = min(table, key=lambda key: abs(int(key.replace(".", "")) - wanted))
        self._transformer, self._scale, self._figures = (
            config.transformer,
            config.vae.scale,
            table[nearest],
        )
        of = self._figures
        self.source = f"stored, compiled for sm_{nearest.replace('.', '')} ({of['card']}, jax {of['jax']}, {of['date']})"
        if nearest != "{}.{}".format(*card.capability):
            self.source += ", the nearest stored to this card's capability"
        self.source += "; attention by query chunks where the card would use cuDNN's: conservative"

    def text(self, work: Work, visits: frozenset[Visit], slot: int) -> int:
        return self._blocks("text", visits, work.prompts * work.bucket)

    def context(self, work: Work, visits: frozenset[Visit], slot: int) -> int:
        return self._blocks("context", visits, work.contexts * work.bucket)

    def denoise(
        self, work: Work, refiner: frozenset[Visit], main: frozenset[Visit], slot: int
    ) -> int:
        contexts = work.micro_batch * work.contexts // work.batch
        return max(
            self._blocks("denoise", refiner, contexts * work.image_tokens),
            self._blocks("denoise", main, contexts * work.tokens),
        )

    def decode(self, work: Work, rows: int | None, tile: int | None) -> int:
        height, width = (self._scale * n for n in (work.h, work.w))
        if rows is None:
            side = tile or max(height, width)
            return _at(self._figures["decode"], min(height, side) * min(width, side))
        strips = [(pixels, _at(points, rows * width)) for pixels, points in self._figures["strips"]]
        return _at(strips, height * width)

    def scan(self, work: Work) -> int:
        kept = work.kv_bytes(self._transformer) if any(phase.caches for phase in work.phases) else 0
        return _at(self._figures["scan"], work.contexts * work.tokens) + kept

    def _blocks(self, stage: str, visits: frozenset[Visit], tokens: int) -> int:
        """The most that running chunks over so many tokens takes; stored are copies of as many
        blocks as run, and of none. They are of K and V held whole: those in groups take less."""
        own = [0]
        for visit in visits:
            points = [
                (int(key.split(",")[0]), _at(of_tokens, tokens))
                for key, of_tokens in self._figures[stage].items()
                if (int(key.split(",")[1]) > 0) == (visit.copied > 0)
            ]
            own.append(_at(sorted(points), max(visit.blocks, visit.copied)))
        return max(own)


@cache
def _table() -> dict:
    return json.loads(TEMPORARIES.read_text("utf-8"))


def has_published_widths(config: ModelConfig) -> bool:
    """Numbers of layers, positions and words do not matter."""
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
