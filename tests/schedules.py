"""A model, a job and the memory schedules that many tests draw it under."""

from collections.abc import Collection, Iterable

import pytest

from tests import small
from zimage_jax import Memory
from zimage_jax.weights.formats import uniform

MODEL = "five_blocks"  # two refiner blocks, five main ones: chunks of 2, 1, 1, 1 by default
STORAGE = uniform(small.CONFIGS[MODEL], "float32")
JOB = {"seed": 3, "width": 64, "height": 48, "steps": 3}
BLOCK = STORAGE.nbytes("transformer", "layers.0")
SCHEDULES = {
    "resident": Memory(schedule="resident"),
    "swap": Memory(schedule="swap"),
    "ring": Memory(schedule="ring"),
    "hybrid": Memory(schedule="hybrid", resident_chunks=2),
    "auto": Memory(),
    "low_vram": Memory(low_vram=True),
    "one chunk": Memory(schedule="ring", chunks=1),
    "a chunk per block": Memory(schedule="ring", chunks=5),
    "half a block": Memory(schedule="ring", chunks=10),
    "half a block or a block": Memory(schedule="ring", chunks=7),
    "half a block, swapped": Memory(schedule="swap", chunks=10),
    "half a block, some pinned": Memory(schedule="hybrid", chunks=10, resident_chunks=3),
    "half a block, two copied ahead": Memory(schedule="ring", chunks=10, prefetch=2),
    "half a block under a size": Memory(schedule="ring", max_chunk_bytes=int(0.7 * BLOCK)),
    "half a block from disk": Memory(schedule="ring", chunks=10, host_bytes=2 * BLOCK),
    "two chunks, swapped": Memory(schedule="swap", chunks=2),
    "chunks under a size": Memory(schedule="ring", max_chunk_bytes=2 * BLOCK),
    "one chunk pinned": Memory(schedule="ring", pins=((1, "resident"),)),
    "one chunk streamed": Memory(
        schedule="resident", pins=((0, "streamed"), (2, "streamed"), (3, "streamed"))
    ),
    "disk": Memory(schedule="ring", host_bytes=4 * BLOCK),
    "disk, a chunk at a time": Memory(schedule="swap", chunks=5, host_bytes=BLOCK),
    "text on the host": Memory(schedule="ring", text_encoder="host"),
    "text staged": Memory(text_encoder="staged"),
    "a budget": Memory(max_vram_bytes=int(2.6e6)),
}
SCAN = {"scan": Memory(schedule="scan")}
# one of each kind, for tests of another feature under every schedule; --long has all
KINDS = "ring", "hybrid", "half a block", "half a block, swapped", "disk", "scan"


def every(values: Iterable, quick: Collection, often: Collection | None = None) -> list:
    """All of them as parameters of a test: `quick` run always, `often` (None: all others) with
    scripts/test --all, the rest with --long."""

    def of(value):
        if value in quick:
            return value
        is_often = often is None or value in often
        return pytest.param(value, marks=pytest.mark.exhaustive if is_often else pytest.mark.long)

    return list(map(of, values))
