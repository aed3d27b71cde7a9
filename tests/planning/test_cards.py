"""Cards, the stored figures, the seconds of a plan; and what the planner promises whatever the
programs take."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from zimage_jax.errors import OutOfMemoryError, UsageError
from zimage_jax.model import dit, vae, vae_strips
from zimage_jax.model.config import PRESETS, TURBO
from zimage_jax.model.kv import KVFormat, KVPolicy, Phase
from zimage_jax.planning import cards, schedule
from zimage_jax.planning.cards import CARDS, Rates, StoredCosts, bound_by, seconds
from zimage_jax.planning.planner import GIB, Memory, Planner, StreamPlan, Visit, Work
from zimage_jax.weights import components

FIVE = small.CONFIGS["five_blocks"]


def square(side: int, bucket: int = 64, kv: KVPolicy = KVPolicy()) -> Work:  # noqa: B008
    return Work.of(TURBO, side, side, 8, kv, jnp.bfloat16, bucket=bucket)


def one_phase(steps: int, reuse: int = 1) -> tuple[Phase, ...]:
    return (Phase(KVFormat("bf16"), steps, reuse),)


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


# -- cards -----------------------------------------------------------------------------------------


def test_an_unknown_card():
    with pytest.raises(
        UsageError, match=r"card 'voodoo-2': expected one of rtx-3060-laptop, rtx-3060, .*h200"
    ):
        cards.find("voodoo-2")


def test_figures_of_a_data_sheet():
    """NVIDIA's own: 165.2 and 989 dense bf16 TFLOP/s, PCIe 4.0 with 16 lanes."""
    assert cards.find("rtx-4090").rates.flops == pytest.approx(
        cards.ACHIEVED_FLOPS * 165.2e12, rel=0.01
    )
    assert cards.find("h100").rates.flops == pytest.approx(cards.ACHIEVED_FLOPS * 989e12, rel=0.01)
    assert cards.find("rtx-4090").rates.link == pytest.approx(cards.ACHIEVED_LINK * 31.5e9)


def test_a_device_is_a_card_by_its_exact_name():
    assert cards.of_device("NVIDIA GeForce RTX 4090") == cards.find("rtx-4090")
    assert cards.of_device("NVIDIA H100 80GB HBM3") == cards.find("h100")
    for other in (
        "cpu",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4070 Ti",
        "NVIDIA H100 PCIe",
    ):
        assert cards.of_device(other) is None


@pytest.mark.parametrize("name", CARDS)
def test_every_card_draws_512_and_says_where_its_figures_come_from(name):
    card = cards.find(name)
    costs = StoredCosts(TURBO, card)
    plan = Planner(TURBO, "bfloat16", 2, costs).plan(square(512), Memory(), card.usable)
    assert 0 < plan.peak_bytes <= card.usable
    assert costs.source.startswith("stored, compiled for sm_")
    assert ("nearest" in costs.source) == ("sm_{}{}".format(*card.capability) not in costs.source)


@pytest.mark.parametrize("name", CARDS)
def test_low_vram_draws_the_published_size_in_1_5_gib(name):
    plan = Planner(TURBO, "bfloat16", 2, StoredCosts(TURBO, cards.find(name))).plan(
        square(1024), Memory(low_vram=True), 2**40
    )
    assert plan.peak_bytes <= 1.5 * GIB, plan.peak_bytes_by_stage


# -- stored figures --------------------------------------------------------------------------------


def stored() -> dict:
    return json.loads(cards.TEMPORARIES.read_text())["capabilities"]["8.9"]


def test_a_stored_point_is_given_back():
    costs, figures = StoredCosts(TURBO, cards.find("rtx-4090")), stored()
    for n, m in ((1, 1), (8, 8), (8, 0)):
        for side in (512, 1024, 2048):
            value = dict(figures["denoise"][f"{n},{m}"])[square(side).tokens]
            assert costs.denoise(square(side), frozenset(), frozenset([Visit(n, m)]), m) == value
    assert costs.decode(square(1024), None, None) == dict(figures["decode"])[1024 * 1024]
    assert costs.decode(square(2048), None, 1024) == dict(figures["decode"])[1024 * 1024]
    assert costs.text(square(512), frozenset([Visit(1, 1)]), 1) == dict(figures["text"]["1,1"])[64]


@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.integers(1, 40),
    st.integers(0, 40),
    st.sampled_from([32, 64, 512]),
)
def test_no_figure_is_below_that_of_the_next_smaller_point(h, w, blocks, copied, bucket):
    work, figures = Work(1, False, 1, bucket, 2 * h, 2 * w, one_phase(8)), stored()
    costs, visits = StoredCosts(TURBO, cards.find("rtx-4070")), frozenset([Visit(blocks, copied)])
    found = costs.denoise(work, frozenset(), visits, copied)
    same = {
        int(k.split(",")[0]): p
        for k, p in figures["denoise"].items()
        if (k[-1] != "0") == (copied > 0)
    }
    smaller = [n for n in same if n <= max(blocks, copied)]
    points = [y for x, y in same[max(smaller)] if x <= work.tokens] or [same[max(smaller)][0][1]]
    assert found >= points[-1]


def test_between_and_beyond_points_it_is_linear():
    points = [(10, 100), (20, 300), (40, 200)]
    assert [cards._at(points, x) for x in (1, 10, 15, 20, 30, 40)] == [100, 100, 200, 300, 300, 200]
    assert cards._at([(10, 100), (20, 300)], 25) == 400
    assert cards._at([(10, 100)], 99) == 100


def test_another_number_of_blocks_has_figures_and_another_width_has_none():
    StoredCosts(PRESETS["turbo-24"], cards.find("rtx-4090"))
    with pytest.raises(UsageError, match="figures are stored for Z-Image's published widths only"):
        StoredCosts(FIVE, cards.find("rtx-4090"))


# -- seconds ---------------------------------------------------------------------------------------


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
    # a second micro-batch only computes
    assert timeline("ring", 7.0, 5.0, groups=2) == 7 + 11 * 7 + 5 + 12 * 5
    # every program takes its time to start: the first load's and the runs', of each micro-batch
    assert (
        timeline("ring", 7.0, 5.0, Rates(1, 1, dispatch=1.0), groups=2)
        == 7 + 11 * 7 + 5 + 12 * 5 + 1 + 2 * 12
    )


def timeline(
    name: str, copy: float, run: float, rates: Rates = Rates(1, 1), groups: int = 1
) -> float:
    """Of four chunks of a block over three sweeps."""
    stream = StreamPlan(tuple((f"layers.{i}",) for i in range(4)), schedule.make(name, 4))
    return cards._timeline(
        stream, lambda unit, lightly: copy, lambda unit, nfe: run, rates, (None,) * 3, groups
    )


def test_reuse_of_k_and_v_saves_copies_and_groups_save_products():
    work, slow_link, slow_device = square(1024), Rates(1e20, 25e9), Rates(50e12, 1e20)
    plan = plan_of(Memory(schedule="ring"), work)

    def denoise(policy: KVPolicy, rates: Rates) -> float:
        return seconds(plan, square(1024, kv=policy), TURBO, "bfloat16", rates)["denoise"]

    whole = components.nbytes(TURBO, "transformer", "layers.0", "bfloat16")
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


def plan_of(memory: Memory, work: Work, budget: int = 2**40):
    return Planner(TURBO, "bfloat16", 2, StoredCosts(TURBO, cards.find("rtx-4090"))).plan(
        work, memory, budget
    )


def test_operations_are_those_the_compiler_counts():
    work, config = Work(1, False, 1, 32, 16, 24, one_phase(1)), small.CONFIGS["eight_heads"]

    def as_arrays(module):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), module)

    x = jax.ShapeDtypeStruct((1, work.tokens, config.transformer.dim), jnp.float32)
    side = dit.inputs(config.transformer, work.h, work.w, np.full(1, 32), 32).joint
    block = as_arrays(dit.spec(config.transformer).layers[0])
    time = jax.ShapeDtypeStruct((1, config.transformer.adaln_dim), jnp.float32)
    run = jax.jit(lambda b, x, t: dit.run([b], x, side._replace(time=t), dit.Attend()))
    counted = run.lower(block, x, time).cost_analysis()
    each = {"width": config.transformer.dim, "rates": Rates(1.0, 1.0)}
    ours = cards._block_seconds(config, "transformer", 1, work.tokens, **each)
    assert ours == pytest.approx(counted["flops"], rel=0.25)  # ours count products alone
    latents = jax.ShapeDtypeStruct((1, work.h, work.w, 16), jnp.float32)
    counted = jax.jit(vae.decode).lower(as_arrays(vae.spec(config.vae)), latents).cost_analysis()
    decoder = components.unit_spec(config, "vae", "decoder")
    products = sum(n for n, _ in vae_strips.layer_costs(decoder, latents.shape))
    assert 2 * products == pytest.approx(counted["flops"], rel=0.25)


def test_seconds_of_a_picture():
    work, rates = square(1024), Rates(100e12, 25e9)
    by_schedule = {
        name: seconds(plan_of(Memory(schedule=name), work), work, TURBO, "bfloat16", rates)
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
    assert "text" not in seconds(text_on_host, work, TURBO, "bfloat16", rates)


def test_what_bounds_a_plan():
    work, plan = square(1024), plan_of(Memory(schedule="ring"), square(1024))
    assert bound_by(plan, work, TURBO, "bfloat16", Rates(100e12, 25e9)) == "compute"
    assert bound_by(plan, work, TURBO, "bfloat16", Rates(100e12, 2e9)) == "link"


def test_strips_cross_the_link_with_their_maps():
    work, rates = square(1024), Rates(1e20, 1e9)
    whole, strips = (
        seconds(plan_of(m, work), work, TURBO, "bfloat16", rates)["decode"]
        for m in (Memory(), Memory(low_vram=True))
    )
    assert strips > 3 * whole


@pytest.mark.parametrize(
    ("side", "card"), [(512, "rtx-4090"), (1024, "rtx-4060"), (2048, "rtx-3060")]
)
def test_a_larger_budget_is_not_slower(side, card):
    rates, found = cards.find(card).rates, []
    planner = Planner(TURBO, "bfloat16", 2, StoredCosts(TURBO, cards.find(card)))
    for gib in (1.5, 2, 3, 4, 6, 8, 12, 20):
        plan = planner.plan(square(side), Memory(), int(gib * GIB))
        found.append(seconds(plan, square(side), TURBO, "bfloat16", rates)["denoise"])
    assert found == pytest.approx(sorted(found, reverse=True), rel=0.02)


# -- the compiler for a card that is not there -----------------------------------------------------


def test_stored_ring_steps_copy_while_they_compute():
    for figures in json.loads(cards.TEMPORARIES.read_text())["capabilities"].values():
        assert_overlaps(figures["ring_order"])


def assert_overlaps(order) -> None:
    """Every matrix's copy starts before the first product and is awaited after the last."""
    matrices = sum(
        leaf.ndim > 1 for leaf in components.units(TURBO, "transformer")["layers.0"].values()
    )
    assert [kind for kind, _ in order] == ["start", "compute", "done"]
    assert order[0][1] == order[2][1] == matrices


def test_a_ring_step_compiled_for_a_card_copies_while_it_computes(gpu_compiler):
    from zimage_jax.runtime.compiled import CompiledCosts
    from zimage_jax.runtime.deviceless import CardPrograms, order
    from zimage_jax.runtime.staging import ring_step

    card, work = cards.find("rtx-4090"), square(512)
    visits = frozenset(Visit(1, 1, nfe=nfe) for nfe in work.nfes)
    programs = CardPrograms(TURBO, "bfloat16", "bfloat16", card)
    none: frozenset = frozenset()
    own = CompiledCosts(programs).denoise(work, none, visits, 1)
    assert own == StoredCosts(TURBO, card).denoise(work, none, visits, 1)
    steps = programs.executables(ring_step)
    assert len(steps) == 2, "K and V in bfloat16, then in float16"
    for step in steps:
        assert_overlaps(order(step))
