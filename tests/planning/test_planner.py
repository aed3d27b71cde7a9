"""What the planner promises whatever the programs take."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from tests.planning.jobs import one_phase, plan_of, planner, square
from zimage_jax.errors import OutOfMemoryError, UsageError
from zimage_jax.model.config import ControlConfig
from zimage_jax.model.kv import KVPolicy
from zimage_jax.model.samplers import SAMPLERS, Trajectory
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.planning import schedule
from zimage_jax.planning.plan import Memory, Stage
from zimage_jax.planning.planner import Planner
from zimage_jax.planning.seconds import Rates
from zimage_jax.planning.work import Work
from zimage_jax.units import GIB
from zimage_jax.weights.formats import uniform

CONTROL = ControlConfig(5, 33, "control_layers")  # whose blocks are in three runs
STORAGE = uniform(replace(small.CONFIGS["five_blocks"], control=CONTROL), "float32")
BLOCKS = small.CONFIGS["five_blocks"].transformer.n_layers


class LinearCosts:
    """So many bytes per token, per block and per pixel: any numbers will do."""

    def __init__(self, token: int, block: int, pixel: int):
        self.token, self.block, self.pixel = token, block, pixel

    def scratch(self, stage: Stage, work: Work, choice: Any, device: int = 0) -> int:
        if stage.name in ("encode", "control", "decode"):
            return (choice.rows or 8 * work.h) * 8 * work.w * self.pixel
        if stage.name == "denoise" and choice.is_one_program:
            return 2 * work.contexts * work.tokens * self.token
        tokens = {
            "text": work.prompts * work.bucket,
            "context": work.contexts * work.bucket,
            "denoise": work.contexts * work.tokens,
        }[stage.name]
        nfes = work.nfes if stage.name == "denoise" else (None,)
        kinds = [] if choice.stream is None else [kind for *_, kind in choice.stream.visits(nfes)]
        units = max((kind.units + kind.copied for kind in kinds), default=0)
        return tokens * self.token + units * self.block


def allowed(schedule: str, chunks: int | None, resident_chunks: int | None, **_) -> int | None:
    """A number of resident chunks that there can be, where the schedule leaves a choice."""
    if resident_chunks is None or schedule not in ("auto", "hybrid"):
        return None
    return min(resident_chunks, (chunks or BLOCKS) - 1)


# words and numbers alone: our own classes are checked with `random`, which a strategy must not use
WORDS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["auto", *schedule.names()]),
        "chunks": st.none() | st.integers(1, 2 * BLOCKS),
        "resident_chunks": st.none() | st.integers(0, BLOCKS - 1),
        "text_encoder": st.sampled_from(["auto", "device", "staged", "host"]),
    }
).map(lambda words: words | {"resident_chunks": allowed(**words)})
SHAPES = st.tuples(
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([32, 64]),
    st.integers(1, 32),
    st.integers(1, 32),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(sorted(SAMPLERS)),
    st.sampled_from([0, CONTROL.layers]),
    st.sampled_from([0, 8, 16]),  # latents of a region's side, in a picture that begins from one
)
COSTS = st.tuples(st.integers(0, 4000), st.integers(0, 10**5), st.integers(0, 2000))
jobs = given(st.tuples(COSTS, WORDS, st.booleans(), SHAPES, st.integers(10**5, 2 * 10**7)))


def planned(costs, words, low_vram, shape, budget):
    """The plan, or the bytes of the smallest budget that would do."""
    batch, guided, bucket, h, w, steps, reuse, sampler, control, side = shape
    path = Trajectory.of(1, 3.0, sampler=sampler, guidance=float(guided), is_masked=side > 0)
    phases = one_phase(steps, reuse)
    work = Work(
        batch,
        batch,
        bucket,
        2 * h,
        2 * w,
        phases,
        path.template,
        encodes=side > 0,
        side=side or None,
        control_layers=control,
    )
    try:
        return Planner(STAGES, STORAGE, 4, LinearCosts(*costs)).plan(
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


RATES = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 50), st.integers(10**5, 10**7)),
    min_size=2,
    max_size=4,
)


@given(st.tuples(COSTS, WORDS, st.booleans(), SHAPES), RATES)
def test_no_plan_is_over_the_budget_of_any_device(job, cards):
    """Of TFLOP/s, GB/s and bytes each. What is resident is on its own device, and counted there."""
    costs, words, low_vram, (batch, guided, bucket, h, w, steps, *_), *_ = job
    words = words | {"schedule": "auto" if words["schedule"] == "scan" else words["schedule"]}
    path = Trajectory.of(1, 3.0, guidance=float(guided))
    work = Work(batch, batch, bucket, 2 * h, 2 * w, one_phase(steps, 1), path.template)
    rates = [Rates(flops * 1e12, link * 1e9) for flops, link, _ in cards]
    budgets = tuple(budget for *_, budget in cards)
    planner = Planner(STAGES, STORAGE, 4, LinearCosts(*costs), rates)
    try:
        plan = planner.plan(work, Memory(low_vram=low_vram, **words), budgets)
    except OutOfMemoryError:
        return
    assert all(peak <= most for peak, most in zip(plan.peaks_by_device, budgets, strict=True))
    for name, choice in plan.choices.items():
        if choice.stream is None or choice.stream.devices == 1:
            continue
        stream = choice.stream
        assert sorted(c for lane in stream.lanes for c in lane.numbers) == [
            *range(len(stream.chunks))
        ]
        for device, lane in enumerate(stream.lanes):
            own = sum(STORAGE.nbytes(c, unit) for c, unit, d in plan.kept if d == device)
            assert plan.peaks_on(device)[name] >= max(own, lane.device_bytes)


def rank(stream) -> tuple:
    return stream.waits, stream.is_halved, stream.copied_bytes


@jobs
def test_a_larger_budget_never_copies_more_nor_waits_for_it(job):
    less, more = planned(*job), planned(*job[:-1], job[-1] * 5 // 4)
    if not isinstance(less, int):
        assert not isinstance(more, int)
        assert more.kept >= less.kept  # all units, or none
        for stage, choice in less.choices.items():
            if choice.stream is not None:
                slow, fast = choice.stream, more.choices[stage].stream
                assert rank(fast) <= rank(slow)
        rows = [plan.choices["decode"].rows or math.inf for plan in (less, more)]
        assert rows == sorted(rows)


@jobs
def test_the_smallest_plan_holds_no_more_than_any(job):
    costs, words, low_vram, shape, budget = job
    found, least = (planned(costs, words, low, shape, budget) for low in (low_vram, True))
    if not isinstance(found, int):
        assert not isinstance(least, int)
        smallest, other = (plan.denoise.blocks.device_bytes for plan in (least, found))
        assert smallest <= other


@pytest.mark.parametrize("memory", [Memory(), Memory(schedule="ring"), Memory(low_vram=True)])
def test_one_job_together_is_that_job_alone(memory):
    work = square(512)
    alone = plan_of(memory, work, GIB)
    assert planner().together([work], [alone], memory, GIB) == (alone,)


def test_jobs_of_different_kinds_share_streams_and_keep_their_own_strips():
    """What moves no blocks is run as alone, for the VAE's strips change last bits."""
    works = [square(512), square(1024, kv=KVPolicy(reuse=2)), square(768)]
    memory, budget = Memory(schedule="ring"), int(1.5 * GIB)
    alone = [plan_of(memory, work, budget) for work in works]
    plans = planner().together(works, alone, memory, 16 * GIB)
    for name in ("text", "context", "denoise"):
        assert len({plan.choices[name].stream for plan in plans}) == 1
    for plan, own in zip(plans, alone, strict=True):
        assert plan.choices["decode"] == own.choices["decode"]
    largest = max(own.arrays_by_stage["denoise"]["tokens"] for own in alone)
    assert plans[0].arrays_by_stage["denoise"]["tokens"] > largest
    with pytest.raises(OutOfMemoryError):
        planner().together(works * 5, alone * 5, memory, budget // 2)


@pytest.mark.parametrize(
    ("most", "size", "name", "resident"),
    [
        *[
            (1, None, "swap", 0),
            (2, None, "ring", 0),
            (3, None, "hybrid", 1),
            (4, None, "resident", 4),
        ],
        *[(2, GIB, "ring", 0), (4, GIB, "hybrid", 2), (128, GIB, "resident", 15)],
    ],
)
def test_the_chunks_on_the_device_are_no_more_than_allowed(most, size, name, resident):
    memory = Memory(chunks_on_device=most, max_chunk_bytes=size)
    choice = plan_of(memory, square(1024)).denoise
    assert choice.stream.schedule.name == name
    assert choice.resident_chunks == resident
    assert resident + choice.stream.schedule.slots <= max(most, resident)


def test_a_schedule_that_needs_more_chunks_on_the_device_is_refused():
    with pytest.raises(UsageError, match="chunks on device: 1 are too few for schedule ring"):
        plan_of(Memory(schedule="ring", chunks_on_device=1), square(1024))
