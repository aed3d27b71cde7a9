"""The seconds of a plan, and what bounds it."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import small
from tests.planning.jobs import SIZES, STORAGE, one_phase, plan_of, planner, square
from tests.schedules import every
from zimage_jax.errors import UsageError
from zimage_jax.model import dit, vae, vae_strips
from zimage_jax.model.attention import Attend
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.planning import cards, schedule
from zimage_jax.planning import seconds as predicted
from zimage_jax.planning.plan import Memory, Plan, Sizes, host_bytes
from zimage_jax.planning.planner import Planner
from zimage_jax.planning.seconds import Rates, Timing
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.planning.stream_plan import StreamPlan
from zimage_jax.planning.work import Work
from zimage_jax.units import GIB, MIB
from zimage_jax.weights import components
from zimage_jax.weights.formats import parse, uniform

seconds, bound_by = (partial(of, STAGES) for of in (predicted.seconds, predicted.bound_by))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swap", 3 * (4 * 2 + 4 * 5)),  # nothing overlaps
        ("ring", 2 + 3 * 4 * 5),  # the first copy alone is waited for
        ("resident", 2 + 3 * 4 * 5),  # as is that of what stays
    ],
)
def test_a_timeline_that_computes_longer_than_it_copies(name, expected):
    assert timeline(name, 2.0, 5.0) == expected


def test_a_timeline_that_copies_longer_than_it_computes():
    assert timeline("ring", 7.0, 5.0) == 7 + 11 * 7 + 5
    # where copies take the cores that compute, as on a CPU, they come on top
    assert timeline("ring", 7.0, 5.0, Rates(1, 1, overlaps=False)) == 12 * (7 + 5)
    # what stays is needed before it is there in the first sweep alone
    assert timeline("resident", 7.0, 5.0) == 4 * 7 + 5 + 2 * 4 * 5
    # a copy is spread over the micro-batches of a visit, but over four at most
    assert timeline("ring", 7.0, 5.0, groups=2) == 7 + 12 * 2 * 5
    assert timeline("ring", 24.0, 5.0, groups=2) == 24 + 11 * 24 + 2 * 5
    assert timeline("ring", 28.0, 5.0, groups=8) == 28 + 11 * (28 + 4 * 5) + 8 * 5
    # every program takes its time to start: the first load's and the runs', of each micro-batch
    assert (
        timeline("ring", 7.0, 5.0, Rates(1, 1, dispatch=1.0), groups=2)
        == 7 + 12 * 2 * 5 + 1 + 2 * 12
    )


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (1, 5 + 2 + 11 * (5 + 3) + 3),  # the next is read when the last was copied
        (2, 12 * 5 + 3 + 3),  # the disk never rests; two runs come after the last read
        (None, 12 * 5 + 3 + 3),
    ],
)
def test_a_timeline_that_reads_longer_than_it_computes(ahead, expected):
    assert timeline("ring", 2.0, 3.0, read=5.0, ahead=ahead) == expected


def test_a_timeline_that_reads_what_stays():
    """Through the slower of disk and link, while others compute; a CPU reads, then copies."""
    assert timeline("resident", 2.0, 3.0, read=5.0) == 4 * 5 + 3 + 2 * 4 * 3
    alone = Rates(1, 1, overlaps=False)
    assert timeline("resident", 2.0, 3.0, alone, read=5.0) == 4 * (5 + 2) + 12 * 3


def timeline(
    name: str,
    copy: float,
    run: float,
    rates: Rates = Rates(1, 1),
    groups: int = 1,
    *,
    read: float = 0.0,
    ahead: int | None = None,
    others: tuple[Rates, ...] = (),
    tokens: int = 0,
) -> float:
    """Of four chunks of a block over three sweeps."""
    chunks = tuple((f"layers.{i}",) for i in range(4))
    block = STORAGE.nbytes("transformer", "layers.0")
    owners = schedule.share_out(4, (1.0,) * (1 + len(others))) if others else ()
    made, devices = schedule.make(name, 4, owners=owners), 1 + len(others)
    stream = StreamPlan(
        "transformer",
        chunks,
        made,
        (0,) * 4,
        ((block,),) * 4,
        owners=owners,
        devices=devices,
    )
    window = None if ahead is None else ahead * block

    class Given(Timing):
        def read(self, component, *units) -> float:
            return read

        def moved(self, component, *units, without_kv=False) -> int:
            return int(copy)

    plan = Plan(nfes=3, choices={}, host_window=window, arrays_by_stage={})
    timing = Given(plan, square(512), SIZES, rates, others=others)
    return timing.stream(stream, lambda device, unit, nfe: run, (None,) * 3, groups, tokens)


def test_devices_take_turns_and_copy_while_the_others_compute():
    """A visit waits for the one before it, and for its own device, which copies after each visit."""
    one, two, three = ((Rates(1, 1),) * count for count in (1, 2, 3))
    # both copy at first; then each computes for 3 and copies for 2 while the other computes
    assert timeline("ring", 2.0, 3.0, others=one) == 2 + 12 * 3
    # (3 + 7) / 2 a visit: each device computes or copies all the time
    assert timeline("ring", 7.0, 3.0, others=one) == 7 + 5 * 10 + 3 + 3
    # of four chunks the first of three devices has two in a row, and waits once a sweep
    assert timeline("ring", 6.0, 3.0, others=two) == 6 + 12 * 3 + 2 * 6
    # where each has one, it is copied once
    assert timeline("ring", 60.0, 3.0, others=three) == 60 + 12 * 3
    # tokens pass on through host memory, over two links
    assert timeline("ring", 2.0, 30.0, others=one, tokens=1) == 2 + 12 * 30 + 11 * 2
    # swap copies what it needs when it needs it
    assert timeline("swap", 2.0, 3.0, others=one) == 12 * (2 + 3)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (2.0, 6 * 7),  # both links at their full rate
        (1.4, 12 * 5),  # the host takes 5 for a copy
        (1.0, 12 * 7),  # no faster than one link
    ],
)
def test_the_memory_of_the_host_serves_all_links(host, expected):
    """Two devices that only copy, each for 7 on its own link."""
    rates = Rates(1, 1, host=host)
    assert timeline("ring", 7.0, 0.0, rates, others=(rates,)) == pytest.approx(expected)


def test_reuse_of_k_and_v_saves_copies_and_groups_save_products():
    work, slow_link, slow_device = square(1024), Rates(1e20, 25e9), Rates(50e12, 1e20)
    plan = plan_of(Memory(schedule="ring"), work)

    def denoise(policy: KVPolicy, rates: Rates) -> float:
        return seconds(plan, square(1024, kv=policy), SIZES, rates)["denoise"]

    whole = STORAGE.nbytes("transformer", "layers.0")
    light = sum(
        leaf.size * 2
        for path, leaf in components.units(TURBO, "transformer")["layers.0"].items()
        if not path.endswith(("to_k.kernel", "to_v.kernel", "norm_k.scale"))
    )
    # three of six early NFEs and one of two late ones reuse
    saved = denoise(KVPolicy(), slow_link) - denoise(KVPolicy(reuse=2), slow_link)
    assert saved == pytest.approx(4 * 30 * (whole - light) / slow_link.link, rel=1e-6)
    # 4,096 of 4,160 keys become 1,024 in 30 blocks and 8 NFEs
    saved = denoise(KVPolicy(), slow_device) - denoise(KVPolicy(group=(2, 2)), slow_device)
    assert saved == pytest.approx(8 * 30 * 4160 * 4 * 3072 * 3840 / slow_device.flops, rel=1e-6)


def test_operations_are_those_the_compiler_counts():
    work, config = Work(1, 1, 32, 16, 24, one_phase(1)), small.CONFIGS["eight_heads"]

    def as_arrays(module):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), module)

    x = jax.ShapeDtypeStruct((1, work.tokens, config.transformer.dim), jnp.float32)
    side = dit.inputs(config.transformer, work.h, work.w, np.full(1, 32), 32).joint
    block = as_arrays(dit.spec(config.transformer).layers[0])
    time = jax.ShapeDtypeStruct((1, config.transformer.adaln_dim), jnp.float32)
    run = jax.jit(lambda b, x, t: dit.apply_blocks([b], x, side._replace(time=t), Attend()))
    counted = run.lower(block, x, time).cost_analysis()
    plan = Plan(nfes=1, choices={}, arrays_by_stage={})
    timing = Timing(plan, work, Sizes(uniform(config, "float32"), 4), Rates(1, 1))
    ours = timing.block("transformer", "layers.0", 1, work.tokens, width=config.transformer.dim)
    assert ours == pytest.approx(counted["flops"], rel=0.25)  # ours count products alone
    latents = jax.ShapeDtypeStruct((1, work.h, work.w, 16), jnp.float32)
    counted = jax.jit(vae.decode).lower(as_arrays(vae.spec(config.vae)), latents).cost_analysis()
    decoder = components.spec(config, "vae").decoder
    products = sum(n for n, _ in vae_strips.layer_costs(decoder, latents.shape))
    assert 2 * products == pytest.approx(counted["flops"], rel=0.25)


def test_seconds_of_a_picture():
    work, rates = square(1024), Rates(100e12, 25e9)
    by_schedule = {
        name: seconds(plan_of(Memory(schedule=name), work), work, SIZES, rates)
        for name in ("resident", "hybrid", "ring", "swap")
    }
    assert all(
        set(stages) == {"text", "context", "denoise", "decode"} for stages in by_schedule.values()
    )
    denoise = {name: stages["denoise"] for name, stages in by_schedule.items()}
    # eight NFEs of 32 blocks over 4,160 tokens: 59 TFLOP each; two refiner blocks do not hide the
    # copy of eight
    assert denoise["ring"] == pytest.approx(8 * 59e12 / rates.flops, rel=0.15)
    assert max(denoise["ring"], denoise["hybrid"], denoise["resident"]) < 0.75 * denoise["swap"]
    text_on_host = plan_of(Memory(text_encoder="host"), work)
    assert "text" not in seconds(text_on_host, work, SIZES, rates)


def test_what_bounds_a_plan():
    work, plan = square(1024), plan_of(Memory(schedule="ring"), square(1024))
    assert bound_by(plan, work, SIZES, Rates(100e12, 25e9)) == "compute"
    assert bound_by(plan, work, SIZES, Rates(100e12, 2e9)) == "link"
    slow_disk = Rates(100e12, 25e9, disk=1e9)
    assert bound_by(plan, work, SIZES, slow_disk) == "compute", "nothing is read"
    window = plan_of(Memory(schedule="ring", host_bytes=6 * GIB), work)
    assert bound_by(window, work, SIZES, slow_disk) == "disk"
    assert bound_by(window, work, SIZES, Rates(100e12, 2e9, disk=9e9)) == "link"
    assert bound_by(window, work, SIZES, Rates(1e12, 25e9, disk=9e9)) == "compute"


def test_strips_cross_the_link_with_their_maps():
    work, rates = square(1024), Rates(1e20, 1e9)
    whole, strips = (
        seconds(plan_of(m, work), work, SIZES, rates)["decode"]
        for m in (Memory(), Memory(low_vram=True))
    )
    assert strips > 3 * whole


@pytest.mark.parametrize(
    "case",
    every([(512, "rtx-4090"), (1024, "rtx-4060"), (2048, "rtx-3060")], [(512, "rtx-4090")]),
)
def test_a_larger_budget_is_not_slower(case):
    side, card = case
    rates, found = cards.find(card).rates, []
    for gib in (1.5, 2, 3, 4, 6, 8, 12, 20):
        plan = planner(card).plan(square(side), Memory(), int(gib * GIB))
        found.append(seconds(plan, square(side), SIZES, rates)["denoise"])
    assert found == pytest.approx(sorted(found, reverse=True), rel=0.02)


# -- from disk -------------------------------------------------------------------------------------

SHORT = Work.of(TURBO, 512, 512, Trajectory.of(2, 3.0), KVPolicy(), jnp.bfloat16, bucket=64)
SCHEDULES = ("resident", "hybrid", "ring", "swap")


def total(plan, rates: Rates, stored_as: str = "bfloat16") -> float:
    return sum(seconds(plan, SHORT, Sizes(uniform(TURBO, stored_as), 2), rates).values())


@functools.cache
def short_plan(name: str, window: int | None):
    resident = 4 if name == "hybrid" else None
    memory = Memory(schedule=name, chunks=10, resident_chunks=resident, host_bytes=window)
    return plan_of(memory, SHORT)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from([None, 2 * GIB, 5 * GIB]),
    st.tuples(*(st.floats(1e9, 1e15) for _ in range(3))),
    st.booleans(),
    st.sampled_from(["flops", "link", "disk"]),
    st.floats(1, 1000),
)
def test_seconds_never_fall_when_a_rate_falls(name, window, speeds, overlaps, slower, factor):
    flops, link, disk = speeds
    rates, plan = Rates(flops, link, overlaps, disk=disk), short_plan(name, window)
    less = rates._replace(**{slower: getattr(rates, slower) / factor})
    assert total(plan, less) >= total(plan, rates) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SCHEDULES), st.floats(1e6, 1e12))
def test_a_disk_bound_plan_takes_its_bytes_over_the_disks_speed(name, disk):
    plan = short_plan(name, 5 * GIB)
    link_bytes = total(plan, Rates(math.inf, 1.0))
    assert total(plan, Rates(math.inf, math.inf, disk=disk)) == pytest.approx(link_bytes / disk)
    wide = total(plan, Rates(math.inf, math.inf, disk=disk), "float32")
    assert wide == pytest.approx(2 * link_bytes / disk)


@pytest.mark.parametrize("name", ["resident", "ring", "swap"])
def test_a_larger_window_is_not_slower_and_host_memory_is_fastest(name):
    """Not so for hybrid: what is read ahead holds up what stays."""
    rates = Rates(50e12, 12e9, disk=3e9)
    windows = [int(gib * GIB) for gib in (1.5, 2.2, 4, 20)] + [None]
    found = [total(short_plan(name, window), rates) for window in windows]
    assert found == sorted(found, reverse=True)
    assert found[-2] > found[-1]


def test_a_reused_block_is_read_whole():
    """The reader does not know which NFE a block is for."""
    rates = Rates(math.inf, math.inf, disk=1e9)
    plain, reused = (
        seconds(plan_of(memory, square(512)), square(512, kv=policy), SIZES, rates)
        for memory in [Memory(schedule="ring", host_bytes=6 * GIB)]
        for policy in (KVPolicy(), KVPolicy(reuse=2))
    )
    assert reused["denoise"] == pytest.approx(plain["denoise"])


def test_a_window_smaller_than_a_chunk():
    with pytest.raises(
        UsageError, match=r"--host-memory 1\.00 GiB is smaller than a chunk of 1\.01 GiB"
    ):
        total(short_plan("ring", GIB), Rates(1e12, 1e9))


@pytest.mark.parametrize("name", SCHEDULES)
def test_host_bytes(name):
    """All of the model but the VAE's encoder, or the window and the embedding table."""
    table = STORAGE.nbytes("text_encoder", "embed_tokens")
    whole = sum(
        STORAGE.nbytes(component, unit)
        for component in components.COMPONENTS
        for unit in STORAGE.units(component)
        if unit != "encoder"
    )
    plan = short_plan(name, None)
    assert host_bytes(plan, STORAGE) == (table if plan.kept else whole)
    if name != "resident":
        assert host_bytes(short_plan(name, 2 * GIB), STORAGE) == table + 2 * GIB


# -- formats --------------------------------------------------------------------------------------


def in_format(form: str, work, rates: Rates, **memory) -> dict[str, float]:
    storage = parse(TURBO, form)
    planner = Planner(STAGES, storage, 2, StoredCosts(storage, cards.sheet("rtx-4090")))
    plan = planner.plan(work, Memory(**memory), 4 * GIB)
    return seconds(plan, work, Sizes(storage, 2), rates)


def test_fewer_bytes_pay_where_the_link_is_the_limit():
    slow_link, slow_device = Rates(1e20, 1e9, memory=1e12), Rates(1e13, 1e12, memory=1e12)
    work = square(512)
    plain, lossless, int8 = (
        in_format(form, work, slow_link, schedule="ring", chunks=30)["denoise"]
        for form in ("bfloat16", "lossless", "int8")
    )
    assert lossless / plain == pytest.approx(0.752, abs=0.01)
    assert int8 / plain == pytest.approx(0.511, abs=0.01)
    plain, lossless = (
        in_format(form, work, slow_device, schedule="ring", chunks=30)["denoise"]
        for form in ("bfloat16", "lossless")
    )
    # 32 blocks decode 179 million weights each: 1.5 bytes read and 2 written
    assert lossless - plain == pytest.approx(8 * 32 * 179e6 * 3.5 / 1e12, rel=0.02)


def test_a_matrix_is_decoded_for_every_run_of_tokens():
    storage = parse(TURBO, "lossless")
    found = {}
    for side in (512, 1024, 2048):
        work = square(side)
        plan = plan_of(Memory(schedule="ring"), work)
        fast = Timing(plan, work, Sizes(storage, 2), Rates(math.inf, 1, memory=1e12))
        found[side] = fast.block("transformer", "layers.0", 1, work.tokens, width=3840)
    assert found[1024] == pytest.approx(2 * found[512])
    assert found[2048] == pytest.approx(8 * found[512])


def test_jobs_in_flight_together_share_the_copies():
    """Sixteen of 512x512 on an rtx-4090 with 1.5 GiB: nearly what a device that holds all computes."""
    work, memory, budget = square(512), Memory(), int(1.5 * GIB)
    rates, alone = cards.find("rtx-4090").rates, plan_of(memory, work, budget)
    plans = planner().most_together(work, alone, memory, budget, 16)
    assert len(plans) == 16
    assert alone.schedule == "hybrid"
    assert plans[0].peak_bytes <= budget
    together = sum(seconds(plans[0], work, SIZES, rates, 16).values())
    resident = plan_of(Memory(schedule="resident"), work)
    assert resident.kept
    computing = sum(seconds(resident, work, SIZES, rates._replace(link=math.inf)).values())
    assert 16 * computing / together > 0.9
    assert sum(seconds(alone, work, SIZES, rates).values()) / computing > 3, "the link bounds one"


@pytest.mark.parametrize("more", every([0, 150 * MIB, 4 * GIB], [150 * MIB]))
def test_as_many_fly_together_as_the_budget_holds(more):
    work, memory = square(2048), Memory(low_vram=True)
    least = plan_of(memory, work).peak_bytes
    alone = plan_of(memory, work, least + more)
    plans = planner().most_together(work, alone, memory, least + more, 8)
    assert {0: len(plans) == 1, 150 * MIB: 1 < len(plans) < 8, 4 * GIB: len(plans) == 8}[more]
    assert plans[0].peak_bytes <= least + more
