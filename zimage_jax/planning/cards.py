"""Cards by name: what each holds, how fast it is, and what our programs take of it beside their
arguments.

The bytes are the compiler's own, stored: scripts/measure/temporaries.py compiles the very programs
for each capability."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..model.config import TURBO, ModelConfig
from ..model.kv import UNUSED_WHEN_REUSED, Nfe
from ..model.vae_strips import layer_costs
from ..weights import components
from ..weights.components import tree_bytes
from .planner import GIB, Plan, StreamPlan, Visit, Work
from .schedule import Free, Load, Pin, Run, steps

TEMPORARIES = Path(__file__).parent.parent / "assets" / "temporaries.json"

# Assumed, not measured: large bf16 matrix products reach 60 % of the data sheet's dense tensor
# FLOP/s, copies from pinned memory 80 % of the link's; and JAX gives a process three quarters of
# the memory (XLA_CLIENT_MEM_FRACTION)
ACHIEVED_FLOPS, ACHIEVED_LINK, ALLOWED = 0.6, 0.8, 0.75
ASSUMED = f"assumed, not measured: {ACHIEVED_FLOPS:.0%} of the data sheet's FLOP/s, {ACHIEVED_LINK:.0%} of the link's"
PCIE4_X8, PCIE4_X16, PCIE5_X16 = 15.75e9, 31.5e9, 63.0e9  # bytes/s


class Rates(NamedTuple):
    """What a device achieves: FLOP/s, bytes/s from host to device, whether it copies beside
    computing (a CPU, whose cores do both, does not), and the seconds that starting and awaiting a
    chunk's program takes, where they are not hidden."""

    flops: float
    link: float
    overlaps: bool = True
    dispatch: float = 0.0


@dataclass(frozen=True)
class Card:
    """An NVIDIA card by its public data sheet."""

    name: str
    device: str  # what its driver calls it, "NVIDIA " aside
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # GHz, boost
    l2_bytes: int
    bandwidth: float  # bytes/s of its own memory
    memory: int  # bytes
    pcie: float  # bytes/s, one way

    @property
    def usable(self) -> int:
        return int(ALLOWED * self.memory)

    @property
    def rates(self) -> Rates:
        # of one multiprocessor in one cycle: dense bf16 products, summed in float32
        flops = 4096 if self.capability == (9, 0) else 512
        peak = self.multiprocessors * self.clock * 1e9 * flops
        return Rates(ACHIEVED_FLOPS * peak, ACHIEVED_LINK * self.pcie)


_MIB = 2**20
CARDS = {
    card.name: card
    for card in (
        # as many laptops wire it: eight lanes
        Card(
            "rtx-3060-laptop",
            "GeForce RTX 3060 Laptop GPU",
            (8, 6),
            30,
            1.425,
            3 * _MIB,
            336e9,
            6 * GIB,
            PCIE4_X8,
        ),
        Card(
            "rtx-3060", "GeForce RTX 3060", (8, 6), 28, 1.777, 3 * _MIB, 360e9, 12 * GIB, PCIE4_X16
        ),
        Card("rtx-4060", "GeForce RTX 4060", (8, 9), 24, 2.46, 24 * _MIB, 272e9, 8 * GIB, PCIE4_X8),
        Card(
            "rtx-4070", "GeForce RTX 4070", (8, 9), 46, 2.475, 36 * _MIB, 504e9, 12 * GIB, PCIE4_X16
        ),
        Card(
            "rtx-4080", "GeForce RTX 4080", (8, 9), 76, 2.505, 64 * _MIB, 717e9, 16 * GIB, PCIE4_X16
        ),
        Card(
            "rtx-4090",
            "GeForce RTX 4090",
            (8, 9),
            128,
            2.52,
            72 * _MIB,
            1008e9,
            24 * GIB,
            PCIE4_X16,
        ),
        Card(
            "rtx-5090",
            "GeForce RTX 5090",
            (12, 0),
            170,
            2.407,
            96 * _MIB,
            1792e9,
            32 * GIB,
            PCIE5_X16,
        ),
        Card("h100", "H100 80GB HBM3", (9, 0), 132, 1.83, 50 * _MIB, 3350e9, 80 * GIB, PCIE5_X16),
        Card("h200", "H200", (9, 0), 132, 1.83, 50 * _MIB, 4800e9, 140 * GIB, PCIE5_X16),
    )
}


def find(name: str) -> Card:
    """Raises UsageError for a name that is not in the table."""
    if name not in CARDS:
        raise UsageError(f"card {name!r}: expected one of {', '.join(CARDS)}")
    return CARDS[name]


def of_device(kind: str) -> Card | None:
    """The card of a JAX device by its `device_kind`; None for one that is not in the table, however
    alike its name."""
    return next((card for card in CARDS.values() if kind == f"NVIDIA {card.device}"), None)


# -- what programs take ----------------------------------------------------------------------------


class StoredCosts:
    """What the planner asks, answered with stored figures of the compiler for the published widths.
    (planner.Costs)

    Between stored points a figure is linear in tokens or pixels, and in the blocks of a chunk, and
    never below that of the next smaller point. Below the first point it is that one's, above the
    last it goes on as between the last two."""

    def __init__(self, config: ModelConfig, card: Card):
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


# -- how long a plan takes -------------------------------------------------------------------------


def seconds(
    plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates
) -> dict[str, float]:
    """Seconds of each stage of the first picture: parameters of `dtype` in host memory, programs
    compiled.

    The driver waits after every program. A copy beside a run therefore costs what it takes longer
    than the run over the first micro-batch, and every other copy all it takes. A text encoder on
    the host is not predicted."""
    text, dit = config.text_encoder, config.transformer
    groups = work.batch // work.micro_batch
    stem = components.nbytes(config, "transformer", "stem", dtype) / rates.link
    once = partial(_block_seconds, config, "transformer", width=dit.dim, rates=rates)
    at_once = work.contexts // groups

    def stage(
        stream: StreamPlan, component: str, run: Callable[[str, Nfe | None], float], **repeated
    ) -> float:
        copy = partial(_copy_seconds, config, component, dtype, rates)
        return _timeline(stream, copy, run, rates, **repeated)

    def of_denoise(unit: str, nfe: Nfe | None) -> float:
        if not unit.startswith("layers."):
            return once(at_once, work.image_tokens)
        keys = nfe.kv_format.keys(work.tokens) if nfe else work.tokens
        return once(at_once, work.tokens, keys=keys, reuses=nfe is not None and nfe.reuses)

    found = {}
    if plan.text is not None:
        width = text.num_attention_heads * text.head_dim
        layer = _block_seconds(
            config, "text_encoder", work.prompts, work.bucket, width=width, rates=rates
        )
        found["text"] = stage(plan.text, "text_encoder", lambda unit, nfe: layer)
    found["context"] = stem + stage(
        plan.context, "transformer", lambda unit, nfe: once(work.contexts, work.bucket)
    )
    denoise = stage(plan.denoise, "transformer", of_denoise, nfes=work.nfes, groups=groups)
    cached = _cache_seconds(work, config, rates) if plan.kv_on_host else 0.0
    found["denoise"] = (0 if plan.kept else stem) + denoise + cached
    decoder = components.nbytes(config, "vae", "decoder", dtype) / rates.link
    found["decode"] = decoder + work.batch * _decode_seconds(plan, work, config, dtype, rates)
    return found


def bound_by(plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates) -> str:
    """ "compute" or "link": which of the two, were it twice as fast, would make the picture
    faster."""
    faster = {
        "compute": rates._replace(flops=2 * rates.flops),
        "link": rates._replace(link=2 * rates.link),
    }
    return min(
        faster, key=lambda name: sum(seconds(plan, work, config, dtype, faster[name]).values())
    )


def _timeline(
    stream: StreamPlan,
    copy: Callable[[str, bool], float],
    run: Callable[[str, Nfe | None], float],
    rates: Rates,
    nfes: Sequence[Nfe | None] = (None,),
    groups: int = 1,
) -> float:
    """`copy(unit, lightly)` and `run(unit, nfe)` are seconds of one block. What stays is copied in
    the order of use while others compute, and gives way to what is streamed."""
    now, runs, chunks = 0.0, 0, stream.chunks
    pinned, streamed, arrives = (
        0.0,
        0.0,
        {},
    )  # seconds of the link; of it before a pinned chunk is there
    for step in steps(stream.schedule, len(chunks), len(nfes)):
        if isinstance(step, Free):
            continue
        load = step.then if isinstance(step, Run) else step
        copied = 0.0
        if load is not None:
            lightly = isinstance(load, Load) and stream.lightly(load.chunk, nfes[load.sweep])
            copied = sum(copy(unit, lightly) for unit in chunks[load.chunk])
        if isinstance(step, Pin) and rates.overlaps:
            pinned += copied
            arrives[step.chunk] = pinned
            continue
        if isinstance(step, Run):
            if step.chunk in arrives:
                now = max(now, arrives.pop(step.chunk) + streamed)
            nfe = nfes[runs // len(chunks)]
            computed = sum(run(unit, nfe) for unit in chunks[step.chunk])
            now += max(computed, copied) if rates.overlaps else computed + copied
            now += (groups - 1) * computed + groups * rates.dispatch
            runs += 1
        else:
            now += copied + (rates.dispatch if isinstance(step, Load) else 0.0)
        streamed += copied
    return now


def _copy_seconds(
    config: ModelConfig, component: str, dtype: str, rates: Rates, unit: str, lightly: bool
) -> float:
    leaves = components.leaves(config, component, unit, dtype)
    if lightly:
        leaves = components.without_keys_values(config, unit, leaves)
    return tree_bytes(leaves) / rates.link


def _cache_seconds(work: Work, config: ModelConfig, rates: Rates) -> float:
    """K and V on their way to the host and back: nothing computes meanwhile."""
    moves = [nfe.keeps or nfe.reuses for nfe in work.nfes]
    of_block = work.kv_bytes_by_nfe(config.transformer)
    return config.transformer.n_layers * sum(np.multiply(moves, of_block)) / rates.link


def _block_seconds(
    config: ModelConfig,
    component: str,
    batch: int,
    tokens: int,
    *,
    width: int,
    rates: Rates,
    keys: int | None = None,
    reuses: bool = False,
) -> float:
    """One block over batch x tokens: two operations per parameter and token, four per pair of token
    and key and channel."""
    leaves = components.units(config, component)["layers.0"]
    without = (
        "modulation.kernel",
        "modulation.bias",
        *(UNUSED_WHEN_REUSED if reuses else ()),
    )  # once per picture
    parameters = sum(leaf.size for path, leaf in leaves.items() if not path.endswith(without))
    return batch * tokens * (2 * parameters + 4 * (keys or tokens) * width) / rates.flops


def _decode_seconds(plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates) -> float:
    decoder = components.unit_spec(config, "vae", "decoder")
    shape = (1, work.h, work.w, config.vae.latent_channels)
    products, elements = (sum(column) for column in zip(*layer_costs(decoder, shape), strict=True))
    crossing = 0 if plan.vae_rows is None else elements * components.DTYPES[dtype].itemsize
    return 2 * products / rates.flops + crossing / rates.link
