"""The stored figures of the compiler."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from tests.planning.jobs import SIZES, STORAGE, one_phase, square
from zimage_jax.errors import UsageError
from zimage_jax.model.config import PRESETS, TURBO
from zimage_jax.pipeline.stages.decode import Decode
from zimage_jax.pipeline.stages.denoise import Denoise, DenoiseChoice
from zimage_jax.pipeline.stages.text import Text, TextChoice
from zimage_jax.pipeline.stages.vae_stage import VAEChoice
from zimage_jax.planning import cards, schedule
from zimage_jax.planning import stored as stored_module
from zimage_jax.planning.stored import Figures, StoredCosts
from zimage_jax.planning.stream_plan import VisitKind, stream_plan
from zimage_jax.planning.work import Work
from zimage_jax.units import MIB
from zimage_jax.weights.formats import parse, uniform

FIVE = small.CONFIGS["five_blocks"]


def stored() -> dict:
    return json.loads(stored_module.TEMPORARIES.read_text())["capabilities"]["8.9"]


def test_a_stored_point_is_given_back():
    figures, points = Figures(STORAGE, cards.sheet("rtx-4090")), stored()
    for n, m in ((1, 1), (8, 8), (8, 0)):
        for side in (512, 1024, 2048):
            value = dict(points["denoise"][f"1,{min(m, 1)}"])[square(side).tokens]
            kinds = frozenset([VisitKind(n, m)])
            assert figures.blocks("denoise", kinds, square(side).tokens) == value


def test_stages_ask_for_their_own_points():
    costs, points = StoredCosts(STORAGE, cards.sheet("rtx-4090")), stored()

    def asked(stage, side: int, choice) -> int:
        return costs.scratch(stage, square(side), choice)

    of_megapixel = dict(points["decode"])[1024 * 1024]
    assert asked(Decode(), 1024, VAEChoice()) == of_megapixel
    assert asked(Decode(), 2048, VAEChoice(tile=1024)) == of_megapixel
    text = stream_plan(STORAGE, *blocks("text_encoder", "layers"), schedule.make("ring", 35))
    assert asked(Text(), 512, TextChoice(text)) == dict(points["text"]["1,1"])[64]
    assert asked(Text(), 512, TextChoice()) == 0
    of_dit = blocks("transformer", "noise_refiner", "layers")
    tokens = square(512).tokens
    ring, scan = (stream_plan(STORAGE, *of_dit, schedule.make(n, 32)) for n in ("ring", "scan"))
    assert asked(Denoise(), 512, DenoiseChoice(ring)) == dict(points["denoise"]["1,1"])[tokens]
    assert asked(Denoise(), 512, DenoiseChoice(scan)) == dict(points["scan"])[tokens]


def blocks(component: str, *groups: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """Of these groups, each a chunk."""
    return component, tuple((unit,) for unit in SIZES.units(component, *groups))


@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.integers(1, 40),
    st.integers(0, 40),
    st.sampled_from([32, 64, 512]),
)
def test_no_figure_is_below_that_of_the_next_smaller_point(h, w, blocks, copied, bucket):
    work, figures = Work(1, 1, bucket, 2 * h, 2 * w, one_phase(8)), stored()
    kinds = frozenset([VisitKind(blocks, copied)])
    found = Figures(STORAGE, cards.sheet("rtx-4070")).blocks("denoise", kinds, work.tokens)
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
    StoredCosts(uniform(PRESETS["turbo-24"], "bfloat16"), cards.sheet("rtx-4090"))
    with pytest.raises(UsageError, match="figures are stored for Z-Image's published widths only"):
        StoredCosts(uniform(FIVE, "float32"), cards.sheet("rtx-4090"))


@pytest.mark.parametrize(("form", "added"), [("bfloat16", 0), ("lossless", 77), ("int8", 77)])
def test_an_encoded_model_holds_a_decoded_matrix_more(form, added):
    card = cards.sheet("rtx-4090")
    plain, figures = Figures(STORAGE, card), Figures(parse(TURBO, form), card)
    kinds = frozenset([VisitKind(1, 1)])
    assert figures.decoded("transformer") == added * MIB
    of = [f.blocks("denoise", kinds, 1088) for f in (plain, figures)]
    assert of[1] - of[0] == added * MIB
    of = [f.blocks("text", kinds, 64) for f in (plain, figures)]
    assert of[1] - of[0] == (0 if not added else 2 * 2560 * 9728 + 2 * MIB)
