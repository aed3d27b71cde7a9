"""What the planner promises whatever the programs take."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tests import small
from tests.planning.jobs import one_phase
from zimage_jax.errors import OutOfMemoryError
from zimage_jax.planning import schedule
from zimage_jax.planning.planner import Memory, Planner, Work

FIVE = small.CONFIGS["five_blocks"]


class LinearCosts:
    """So many bytes per token, per block and per pixel: any numbers will do."""

    def __init__(self, token: int, block: int, pixel: int):
        self.token, self.block, self.pixel = token, block, pixel

    def text(self, work, visits, slot):
        return work.prompts * work.bucket * self.token + self._blocks(visits)

    def context(self, work, visits, slot):
        return work.contexts * work.bucket * self.token + self._blocks(visits)

    def denoise(self, work, refiner, main, slot):
        return work.contexts * work.tokens * self.token + self._blocks(refiner | main)

    def decode(self, work, rows, tile):
        return (rows or 8 * work.h) * 8 * work.w * self.pixel

    def scan(self, work):
        return 2 * work.contexts * work.tokens * self.token

    def _blocks(self, visits):
        return self.block * max((visit.blocks + visit.copied for visit in visits), default=0)


# words and numbers alone: our own classes are checked with `random`, which a strategy must not use
maybe = st.none() | st.integers(1, 6)
WORDS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["auto", *schedule.NAMES]),
        "chunks": maybe,
        "resident_chunks": maybe,
        "text_encoder": st.sampled_from(["auto", "device", "staged", "host"]),
    }
)
SHAPES = st.tuples(
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([32, 64]),
    st.integers(1, 32),
    st.integers(1, 32),
    st.integers(1, 4),
    st.integers(1, 3),
)
COSTS = st.tuples(st.integers(0, 4000), st.integers(0, 10**5), st.integers(0, 2000))
jobs = given(st.tuples(COSTS, WORDS, st.booleans(), SHAPES, st.integers(10**5, 2 * 10**7)))


def planned(costs, words, low_vram, shape, budget):
    """The plan, or the bytes of the smallest budget that would do."""
    batch, guided, bucket, h, w, steps, reuse = shape
    work = Work(batch, guided, batch, bucket, 2 * h, 2 * w, one_phase(steps, reuse))
    try:
        return Planner(FIVE, "float32", 4, LinearCosts(*costs)).plan(
            work, Memory(low_vram=low_vram, **words), budget
        )
    except OutOfMemoryError as fault:
        return fault.needed


@jobs
def test_no_plan_is_over_its_budget(job):
    found = planned(*job)
    if isinstance(found, int):
        assert found > job[-1]
    else:
        assert found.peak_bytes <= job[-1]


@jobs
def test_what_an_error_says_is_needed_is_enough(job):
    found = planned(*job)
    if isinstance(found, int):
        assert not isinstance(planned(*job[:-1], found), int)


@jobs
def test_a_larger_budget_never_copies_more_nor_waits_for_it(job):
    less, more = planned(*job), planned(*job[:-1], job[-1] * 5 // 4)
    if not isinstance(less, int):
        assert not isinstance(more, int)
        assert more.kept >= less.kept
        for stage in (
            ("context", "denoise") if less.text is None else ("text", "context", "denoise")
        ):
            slow, fast = getattr(less, stage), getattr(more, stage)
            assert (fast.waits, fast.copied_blocks) <= (slow.waits, slow.copied_blocks)
        assert (more.vae_rows or math.inf) >= (less.vae_rows or math.inf)


@jobs
def test_the_smallest_plan_holds_no_more_than_any(job):
    costs, words, low_vram, shape, budget = job
    found, least = (planned(costs, words, low, shape, budget) for low in (low_vram, True))
    if not isinstance(found, int):
        assert not isinstance(least, int)
        assert least.denoise.device_blocks <= found.denoise.device_blocks
