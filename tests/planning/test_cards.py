"""The table of cards against published figures, and cards that were measured."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.jobs import SIZES, STORAGE, planner, square
from zimage_jax.errors import UsageError
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.planning import cards
from zimage_jax.planning.cards import CARDS, MeasuredCard
from zimage_jax.planning.plan import Memory
from zimage_jax.planning.planner import Planner
from zimage_jax.planning.seconds import seconds
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.units import GIB

# TFLOP/s of dense bf16 products that are summed in float32. Of GeForce 40 and 50: the white papers'
# tensor figures, or the published AI TOPS over 8 (sparse int8) and over 16 (sparse FP4); of the RTX
# 3060: 101 tensor TFLOPS (sparse, summed in float16) over 4; of the L4 and the RTX 6000 Ada: 242
# and 1457 (sparse FP8) over 2 and 4; of Turing, which has no bf16: float16's
# that are summed in float32
PUBLISHED = {
    "rtx-2060": 51.6 / 2,
    "rtx-2070": 59.7 / 2,
    "t4": 65,
    "rtx-3060": 101 / 4,
    "a10": 125,
    "a100-40gb": 312,
    "a100-80gb": 312,
    "rtx-4060": 242 / 8,
    "rtx-4070": 466 / 8,
    "rtx-4080": 97.5,
    "rtx-4090": 165.2,
    "l4": 242 / 2,
    "rtx-6000-ada": 1457 / 4,
    "h100": 989.4,
    "h200": 989,
    "rtx-5060-ti": 759 / 16,
    "rtx-5070": 988 / 16,
    "rtx-5080": 112.6,
    "rtx-5090": 209.5,
}
# the published range of boost clocks, GHz
LAPTOPS = {
    "rtx-3050-ti-laptop": (1.035, 1.695),
    "rtx-3060-laptop": (1.283, 1.703),
    "rtx-4050-laptop": (1.605, 2.370),
    "rtx-4060-laptop": (1.470, 2.370),
    "rtx-4070-laptop": (1.230, 2.175),
    "rtx-4080-laptop": (1.350, 2.280),
    "rtx-4090-laptop": (1.455, 2.040),
    "rtx-5070-laptop": (1.425, 2.347),
    "rtx-5090-laptop": (1.590, 2.160),
}


def test_every_card_is_compared_with_a_published_figure():
    assert CARDS.keys() == PUBLISHED.keys() | LAPTOPS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_dense_tflops_are_the_published_ones(name):
    assert CARDS[name].peak_flops == pytest.approx(PUBLISHED[name] * 1e12, rel=0.03)


@pytest.mark.parametrize("name", LAPTOPS)
def test_a_laptops_clock_is_in_the_middle_of_its_range(name):
    low, high = LAPTOPS[name]
    assert CARDS[name].clock == pytest.approx((low + high) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("rtx-4050-laptop", 194),
        ("rtx-4060-laptop", 233),
        ("rtx-4070-laptop", 321),
        ("rtx-4080-laptop", 542),
    ],
)
def test_a_laptops_ai_tops_are_those_of_its_highest_clock(name, tops):
    """AI TOPS are 8 times the dense bf16 figure. Those of the RTX 4090 and 50 laptops are published
    for a clock above their range."""
    card = CARDS[name]
    peak = card.peak_flops * LAPTOPS[name][1] / card.clock
    assert peak == pytest.approx(tops / 8 * 1e12, rel=0.03)


def test_links_and_what_is_achieved():
    """PCIe 4.0 with 16 lanes is 31.5 GB/s one way, 3.0 half of that."""
    assert CARDS["rtx-4090"].rates.link == pytest.approx(cards.ACHIEVED_LINK * 31.5e9)
    assert CARDS["rtx-4090"].rates.flops == cards.ACHIEVED_FLOPS * CARDS["rtx-4090"].peak_flops
    assert CARDS["t4"].pcie == CARDS["rtx-4060"].pcie == 15.75e9
    assert CARDS["rtx-5060-ti"].pcie == 31.5e9
    assert CARDS["rtx-5090"].pcie == 63e9


def test_the_context_fits_beside_what_jax_takes():
    for card in CARDS.values():
        assert 300 * 2**20 <= card.context_bytes <= 500 * 2**20
        assert card.usable + card.context_bytes < card.memory
    assert cards.context_bytes((10, 0)) == 500 * 2**20, "of a chip that is not listed, the most"


def test_an_unknown_card():
    with pytest.raises(UsageError, match=r"card 'voodoo-2': expected one of rtx-2060, .*rtx-5090"):
        cards.find("voodoo-2")


def test_a_device_is_a_card_by_its_exact_name():
    assert cards.of_device("NVIDIA GeForce RTX 4090") == cards.find("rtx-4090")
    assert cards.of_device("NVIDIA H100 80GB HBM3") == cards.find("h100")
    assert cards.of_device("NVIDIA A100 80GB PCIe") == cards.find("a100-80gb")
    assert cards.of_device("Tesla T4") == cards.find("t4")
    for other in (
        "cpu",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4070 Ti",
        "NVIDIA H100 PCIe",
    ):
        assert cards.of_device(other) is None
    devices = [device for card in CARDS.values() for device in card.devices]
    assert len(devices) == len(set(devices))


@pytest.mark.parametrize("name", CARDS)
def test_every_card_draws_512_and_says_where_its_figures_come_from(name):
    card = cards.find(name)
    costs = StoredCosts(STORAGE, card)
    plan = planner(name).plan(square(512), Memory(), card.usable)
    assert 0 < plan.peak_bytes <= card.usable
    assert costs.source.startswith("stored, compiled for sm_")
    assert ("nearest" in costs.source) == ("sm_{}{}".format(*card.capability) not in costs.source)


# -- measured cards --------------------------------------------------------------------------------

MINE = MeasuredCard(
    name="mine",
    device="NVIDIA GeForce RTX 4060 Laptop GPU",
    capability=(8, 9),
    memory=8 * GIB,
    context_bytes=412 * 2**20,
    flops=2.1e13,
    link=1.2e10,
    disk=2.5e9,
    host_read=6e9,
    dispatch_seconds=1e-4,
    date="2026-11-25",
    by="python -m scripts.bench.gpu --card-out mine.json",
    versions={"jax": "0.11.2", "driver": "580.95"},
)


def written(folder: Path, told) -> str:
    path = folder / "mine.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return str(path)


def test_a_measured_card_is_what_was_written(tmp_path):
    card = cards.find(written(tmp_path, MINE.as_json()))
    assert card == MINE
    assert isinstance(card, MeasuredCard)
    assert card.usable == 6 * GIB
    assert card.source == f"measured on {MINE.device}, 2026-11-25, by {MINE.by}"
    assert StoredCosts(STORAGE, card).source.startswith("stored, compiled for sm_89")


@pytest.mark.parametrize(
    ("disk", "host_read", "used", "source"),
    [
        (2.5e9, 6e9, 2.5e9, "measured"),
        (8e9, 6e9, 6e9, "measured"),
        (None, 1e9, 1e9, "assumed: an NVMe drive"),
        (None, None, 3e9, "assumed: an NVMe drive"),
    ],
)
def test_blocks_from_disk_come_at_the_slower_of_disk_and_host(
    tmp_path, disk, host_read, used, source
):
    told = MINE.as_json()
    told["rates"] |= {"disk": disk, "host_read": host_read}
    card = cards.load_card(Path(written(tmp_path, told)))
    assert (card.rates.disk, card.disk_source) == (used, source)


@given(st.floats(1e9, 1e18), st.floats(1e6, 1e15), st.floats(0, 1))
def test_a_loaded_card_predicts_from_its_rates(tmp_path_factory, flops, link, dispatch):
    told = MINE.as_json()
    told["rates"] |= {"flops": flops, "link": link, "dispatch_seconds": dispatch}
    card = cards.load_card(Path(written(tmp_path_factory.getbasetemp(), told)))
    assert card.rates[:4] == (flops, link, True, dispatch)


def test_half_the_rates_take_twice_as_long(tmp_path):
    told, work = MINE.as_json(), square(512)
    told["rates"] |= {"flops": MINE.flops / 2, "link": MINE.link / 2, "dispatch_seconds": 2e-4}
    plan = Planner(STAGES, STORAGE, 2, StoredCosts(STORAGE, MINE)).plan(work, Memory(), MINE.usable)
    fast, slow = (
        sum(seconds(STAGES, plan, work, SIZES, card.rates).values())
        for card in (MINE, cards.find(written(tmp_path, told)))
    )
    assert slow == pytest.approx(2 * fast)


def with_rates(**rates) -> dict:
    told = MINE.as_json()
    return told | {"rates": told["rates"] | rates}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 10_000, "cannot be read as JSON"),
        ([], "expected the keys format, name"),
        (MINE.as_json() | {"format": "other"}, 'format: expected "zimage_jax card 1", got "other"'),
        (MINE.as_json() | {"more": 1}, "expected the keys format, name"),
        ({"format": cards.FORMAT}, "expected the keys format, name"),
        (MINE.as_json() | {"name": "a\nb"}, "name: expected a line of text"),
        (MINE.as_json() | {"by": ""}, "by: expected a line of text"),
        (MINE.as_json() | {"capability": "8.9"}, "capability: expected [major, minor]"),
        (MINE.as_json() | {"capability": [8, True]}, "capability: expected [major, minor]"),
        (
            MINE.as_json() | {"memory_bytes": 0},
            "memory_bytes: expected a whole number from 1, got 0",
        ),
        (
            MINE.as_json() | {"context_bytes": 1.5},
            "context_bytes: expected a whole number from 1, got 1.5",
        ),
        (MINE.as_json() | {"rates": {}}, "expected the keys flops, link, disk"),
        (with_rates(flops=0), "rates.flops: expected a number above 0, got"),
        (with_rates(flops=10**400), "rates.flops: expected a number above 0, got"),
        (with_rates(link=None), "rates.link: expected a number above 0, got null"),
        (with_rates(disk="3"), "rates.disk: expected a number above 0, or null"),
        (with_rates(flops=math.nan), "rates.flops: expected a number above 0, got"),
        (with_rates(host_read=math.inf), "rates.host_read: expected a number above 0, or null"),
        (with_rates(dispatch_seconds=-1), "rates.dispatch_seconds: expected a number from 0"),
        (MINE.as_json() | {"versions": {"jax": 1}}, "versions: expected lines of text by name"),
        (" " * 70_000, "a file of at most 64 KiB"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, told, said):
    path = written(tmp_path, told)
    with pytest.raises(UsageError) as raised:
        cards.find(path)
    assert str(raised.value).startswith(f"card {path}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="expected a file of at most 64 KiB"):
        cards.find(str(tmp_path / "none.json"))
