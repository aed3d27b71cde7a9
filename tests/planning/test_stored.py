"""The stored figures of the compiler, and the compiler itself where it is installed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from tests.planning.jobs import one_phase, square
from zimage_jax.errors import UsageError
from zimage_jax.model.config import PRESETS, TURBO
from zimage_jax.planning import cards
from zimage_jax.planning import stored as stored_module
from zimage_jax.planning.planner import Visit, Work
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.weights import components

FIVE = small.CONFIGS["five_blocks"]


def stored() -> dict:
    return json.loads(stored_module.TEMPORARIES.read_text())["capabilities"]["8.9"]


def test_a_stored_point_is_given_back():
    costs, figures = StoredCosts(TURBO, cards.sheet("rtx-4090")), stored()
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
    costs, visits = StoredCosts(TURBO, cards.sheet("rtx-4070")), frozenset([Visit(blocks, copied)])
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
    assert [stored_module._at(points, x) for x in (1, 10, 15, 20, 30, 40)] == [
        100,
        100,
        200,
        300,
        300,
        200,
    ]
    assert stored_module._at([(10, 100), (20, 300)], 25) == 400
    assert stored_module._at([(10, 100)], 99) == 100


def test_another_number_of_blocks_has_figures_and_another_width_has_none():
    StoredCosts(PRESETS["turbo-24"], cards.sheet("rtx-4090"))
    with pytest.raises(UsageError, match="figures are stored for Z-Image's published widths only"):
        StoredCosts(FIVE, cards.sheet("rtx-4090"))


# -- the compiler for a card that is not there -----------------------------------------------------


def test_stored_ring_steps_copy_while_they_compute():
    for figures in json.loads(stored_module.TEMPORARIES.read_text())["capabilities"].values():
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

    card, work = cards.sheet("rtx-4090"), square(512)
    visits = frozenset(Visit(1, 1, nfe=nfe) for nfe in work.nfes)
    programs = CardPrograms(TURBO, "bfloat16", "bfloat16", card)
    none: frozenset = frozenset()
    own = CompiledCosts(programs).denoise(work, none, visits, 1)
    assert own == StoredCosts(TURBO, card).denoise(work, none, visits, 1)
    steps = programs.executables(ring_step)
    assert len(steps) == 2, "K and V in bfloat16, then in float16"
    for step in steps:
        assert_overlaps(order(step))
