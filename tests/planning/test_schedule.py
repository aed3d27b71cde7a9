"""Schedules as data: whatever the partition and the schedule, every step is possible and none is
wasted."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.errors import UsageError
from zimage_jax.planning import schedule
from zimage_jax.planning.schedule import Free, Load, Pin, Visit

NAMES = st.sampled_from([row.name for row in schedule.ROWS if not row.is_one_program])
PINS = st.dictionaries(st.integers(0, 8), st.sampled_from(["resident", "streamed"]), max_size=3)
# of one kind, or of two that alternate as the halves of blocks do
KINDS = st.integers(1, 9).flatmap(
    lambda n: st.sampled_from([("block",) * n, ("attention", "feed forward") * n])
)
PREFETCH = st.sampled_from([None, 0, 1, 2, 3])
TURNS = st.booleans()  # whether the device takes turns with another, which owns a chunk as well
schedules = given(NAMES, KINDS, st.integers(0, 9), PREFETCH, PINS, st.integers(1, 4), TURNS)


def build(name, kinds, resident, prefetch, pins, turns) -> schedule.Schedule:
    chunks = len(kinds)
    made = schedule.make(name, chunks, min(resident, chunks), prefetch)
    if turns and schedule.row(name).takes_turns(prefetch):
        slots = schedule.row(name).slots(prefetch, takes_turns=True)
        made = replace(made, slots=min(slots, made.slots), takes_turns=True)
    return made.with_pins({c: how for c, how in pins.items() if c < chunks}, 0, chunks)


@schedules
def test_every_chunk_is_on_the_device_when_it_runs(
    name, kinds, resident, prefetch, pins, sweeps, turns
):
    made = build(name, kinds, resident, prefetch, pins, turns)
    slots: dict[int, int] = {}
    layout = made.slot_kinds(kinds)
    pinned: set[int] = set()
    ran = []
    for step in schedule.actions(made, kinds, sweeps):
        match step:
            case Pin(chunk):
                assert chunk not in pinned
                pinned.add(chunk)
            case Load(chunk, slot):
                assert slot not in slots, "a load overwrites nothing that is still there"
                assert chunk not in slots.values(), "no load of what is already there"
                assert layout[slot] in (schedule.ANY, kinds[chunk]), "a slot takes its kind alone"
                slots[slot] = chunk
            case Visit(chunk, slot, then):
                assert chunk in pinned if slot is None else slots[slot] == chunk
                ran.append(chunk)
                if then is not None:
                    assert then.slot != slot, "nothing is copied over what computes"
                    assert then.slot not in slots
                    assert then.chunk not in slots.values() and then.chunk not in pinned  # noqa: PT018
                    assert layout[then.slot] == kinds[then.chunk]
                    assert not made.takes_turns, "its copies are programs of their own"
                    slots[then.slot] = then.chunk
            case Free(chunk, None):
                pinned.remove(chunk)
            case Free(chunk, slot):
                assert slots.pop(slot) == chunk
        assert len(slots) <= len(layout)
    assert ran == list(range(len(kinds))) * sweeps
    assert not slots and not pinned, "everything is freed at the end"  # noqa: PT018


@schedules
def test_a_load_names_the_sweep_that_first_needs_it(
    name, kinds, resident, prefetch, pins, sweeps, turns
):
    made, runs, fresh = build(name, kinds, resident, prefetch, pins, turns), 0, {}
    for step in schedule.actions(made, kinds, sweeps):
        if isinstance(step, Load):
            fresh[step.chunk] = step.sweep
        elif isinstance(step, Visit):
            assert fresh.pop(step.chunk, runs // len(kinds)) == runs // len(kinds)
            runs += 1
            if step.then is not None:
                fresh[step.then.chunk] = step.then.sweep
    assert not fresh


@schedules
def test_each_load_is_freed_once(name, kinds, resident, prefetch, pins, sweeps, turns):
    case = build(name, kinds, resident, prefetch, pins, turns), kinds, sweeps
    steps = list(schedule.actions(*case))
    loaded = Counter(load.chunk for load in schedule.loads(*case)) + Counter(
        s.chunk for s in steps if isinstance(s, Pin)
    )
    assert loaded == Counter(s.chunk for s in steps if isinstance(s, Free))


@given(st.integers(3, 9), st.integers(1, 4))
def test_the_ring_copies_each_chunk_once_a_sweep_and_waits_for_the_first_alone(chunks, sweeps):
    ring = schedule.make("ring", chunks)
    assert len(list(schedule.loads(ring, (0,) * chunks, sweeps))) == chunks * sweeps
    waits = [
        step for step in schedule.actions(ring, (0,) * chunks, sweeps) if isinstance(step, Load)
    ]
    assert waits == [Load(0, 0, 0)], (
        "every other copy is made while a chunk computes, across the end of a sweep too"
    )


@given(st.integers(0, 3), st.integers(5, 9), st.integers(1, 3))
def test_as_many_chunks_as_prefetch_says_are_copied_ahead(prefetch, chunks, sweeps):
    made, kinds = schedule.make("ring", chunks, prefetch=prefetch), (0,) * chunks
    on_device, ahead = 0, []
    for action in schedule.actions(made, kinds, sweeps):
        match action:
            case Load():
                on_device += 1
            case Visit(_, _, then):
                on_device += then is not None
                ahead.append(on_device - 1)
            case Free():
                on_device -= 1
    assert max(ahead) == prefetch
    assert ahead[: chunks * sweeps - prefetch] == [prefetch] * (chunks * sweeps - prefetch)


WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(st.integers(1, 60), WEIGHTS)
def test_devices_get_chunks_in_proportion(chunks, weights):
    owners = schedule.share_out(chunks, [float(weight) for weight in weights])
    for device, weight in enumerate(weights):
        for first in range(chunks):  # up to any chunk
            due = (first + 1) * weight / sum(weights)
            assert abs(owners[: first + 1].count(device) - due) < len(weights)
    if len(set(weights)) == 1:
        assert owners == tuple(chunk % len(weights) for chunk in range(chunks))


@given(st.integers(1, 40), WEIGHTS, st.data())
def test_so_many_chunks_are_resident_over_all_devices(chunks, weights, data):
    owners = schedule.share_out(chunks, [float(weight) for weight in weights])
    count = data.draw(st.integers(0, chunks))
    resident = schedule.spread_over(count, owners)
    assert len(set(resident)) == len(resident) == count
    for device in set(owners):
        own = [chunk for chunk in resident if owners[chunk] == device]
        assert abs(len(own) - count * owners.count(device) / chunks) <= 1


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 4))
def test_a_device_that_takes_turns_copies_ahead_of_every_visit(chunks, slots, sweeps):
    """Its slots are full before each visit, and one is filled again after it."""
    made, held, visits = schedule.Schedule("ring", slots, takes_turns=True), 0, 0
    for action in schedule.actions(made, (0,) * chunks, sweeps):
        if isinstance(action, Load):
            held += 1
        elif isinstance(action, Free):
            held -= 1
        else:
            left = chunks * sweeps - visits
            assert held >= min(slots, chunks, left)
            visits += 1
    assert visits == chunks * sweeps


@given(st.integers(2, 8), st.integers(1, 3))
def test_halves_of_blocks_take_a_slot_each_and_hide_every_copy(blocks, sweeps):
    kinds = ("attention", "feed forward") * blocks
    ring = schedule.make("ring", len(kinds))
    assert sorted(ring.slot_kinds(kinds)) == ["attention", "feed forward"]
    waits = [a for a in schedule.actions(ring, kinds, sweeps) if isinstance(a, Load)]
    assert len(waits) == 1


@given(st.integers(2, 8), st.integers(1, 3))
def test_a_slot_that_is_alone_takes_each_half_in_turn(blocks, sweeps):
    kinds = ("attention", "feed forward") * blocks
    swap = schedule.make("swap", len(kinds))
    assert swap.slot_kinds(kinds) == (schedule.ANY,)
    assert len(list(schedule.loads(swap, kinds, sweeps))) == len(kinds) * sweeps


def test_a_bound_below_a_block_is_met_by_halves():
    assert schedule.chunks_under(30, 100, 60, 99) == 60
    assert schedule.chunks_under(30, 100, 60, 100) == 30


@given(st.integers(3, 12), st.data(), st.integers(2, 4))
def test_hybrid_copies_what_does_not_stay(chunks, data, sweeps):
    staying = data.draw(st.integers(0, chunks - 3))
    made = schedule.make("hybrid", chunks, staying)
    assert len(made.resident) == staying
    assert len(list(schedule.loads(made, (0,) * chunks, sweeps))) == (chunks - staying) * sweeps


@given(st.integers(1, 2), st.integers(1, 4))
def test_what_fits_the_slots_is_copied_once(chunks, sweeps):
    assert len(list(schedule.loads(schedule.make("ring", chunks), (0,) * chunks, sweeps))) == chunks


@given(st.integers(1, 60), st.data())
def test_a_partition_is_whole_and_even(blocks, data):
    sizes = schedule.partition(blocks, data.draw(st.integers(1, blocks)))
    assert sum(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


def test_the_published_partitions():
    assert schedule.partition(30, 4) == (8, 8, 7, 7)
    assert schedule.partition(24, 4) == (6, 6, 6, 6)
    assert schedule.partition(30, 30) == (1,) * 30


@given(st.integers(1, 60), st.integers(1, 10**9), st.floats(1, 70))
def test_a_bound_on_chunks_holds_and_is_not_overdone(blocks, block_bytes, factor):
    bound = int(block_bytes * factor)
    count = schedule.chunks_under(blocks, block_bytes, None, bound)
    assert max(schedule.partition(blocks, count)) * block_bytes <= bound
    if count > 1:
        assert max(schedule.partition(blocks, count - 1)) * block_bytes > bound


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: schedule.make("magic", 4),
            "schedule 'magic': expected one of auto, resident, ring, hybrid, swap, scan",
        ),
        (lambda: schedule.make("hybrid", 4, 5), "5 resident chunks of 4"),
        (lambda: schedule.partition(30, 31), "31 chunks of 30 blocks: expected 1 to 30"),
        (lambda: schedule.partition(30, 0), "0 chunks of 30 blocks"),
        (lambda: schedule.chunks_under(30, 100, None, 99), "a chunk is at least one block"),
        (lambda: schedule.chunks_under(30, 100, 60, 59), "a chunk is at least half a block"),
        (
            lambda: schedule.make("ring", 4).with_pins({4: "resident"}, 0, 4),
            "chunk 4 does not exist: expected 0 to 3",
        ),
        (
            lambda: schedule.make("ring", 4).with_pins({1: "away"}, 0, 4),
            "chunk 1=away: expected resident or streamed",
        ),
    ],
)
def test_words_that_are_wrong(call, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        call()
