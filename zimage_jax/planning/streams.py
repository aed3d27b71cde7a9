"""Streams of blocks: the partitions, shares and schedules that the user's options allow. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, product

from ..errors import UsageError
from ..weights import components
from . import schedule
from .plan import Memory, Sizes
from .stream_plan import StreamPlan, chunked, stream_plan


def streams(
    sizes: Sizes,
    component: str,
    early: Sequence[tuple[str, ...]],
    main: tuple[str, ...],
    memory: Memory,
) -> Iterator[StreamPlan]:
    """Partitions and schedules that `memory` allows, the fastest first.

    Streams that never wait for a copy come first, then those of whole blocks, then those that copy
    the fewest bytes.
    The runs of `early` blocks form chunks of their own before the `main` chunks, and no larger than
    these.

    Raises UsageError for a number of chunks, a number of resident chunks, or a pin that does not
    exist.
    """
    found: dict[tuple, StreamPlan] = {}
    counts = _chunk_counts(sizes, component, main, memory)
    for count, weights in product(counts, sizes.shares):
        # what stays on the device is not halved: the next job may keep it, whatever its chunks
        mains = [chunked(component, main, n) for n in (count, min(count, len(main)))]
        # their kinds and bytes, whatever the schedule
        plans = [_shared_out(sizes, component, early, of_main, weights) for of_main in mains]
        for row, resident in _rows(memory, count):
            plan = plans[row.keeps_all]
            chunks, before = plan.chunks, sum(plan.runs[:-1])
            made = schedule.make(
                row.name,
                len(chunks) if row.keeps_all else count,
                resident,
                memory.prefetch,
                plan.owners if row.keeps_all else plan.owners[before:],
            )
            made = made if row.keeps_all else made.after(before)
            made = made.with_pins(_pins(memory, chunks, before), before, len(chunks))
            key = chunks, plan.owners, made.slots, made.resident, made.takes_turns
            found.setdefault(key, replace(plan, schedule=made))
    if not found and memory.chunks_on_device is not None:
        raise UsageError(
            f"chunks on device: {memory.chunks_on_device} are too few for schedule {memory.schedule}"
        )
    if not found or (memory.resident_chunks or 0) > counts[-1]:
        raise UsageError(
            f"--resident-chunks {memory.resident_chunks}: expected 0 to {counts[-1] - 1}, "
            "fewer than the chunks"
        )

    # Halves come last: where the link is the slower for one half alone, they take longer than their
    # blocks. Where two copy the same bytes, the one with fewer chunks is faster
    def rank(stream: StreamPlan) -> tuple:
        return stream.waits, stream.is_halved, stream.copied_bytes, len(stream.chunks)

    return iter(sorted(found.values(), key=rank))


def _shared_out(
    sizes: Sizes,
    component: str,
    early: Sequence[tuple[str, ...]],
    main: tuple[tuple[str, ...], ...],
    weights: tuple[float, ...],
) -> StreamPlan:
    """A stream of the runs of `early` blocks and the `main` chunks, shared out among the devices by
    `weights`; its schedule is to come.

    A block that is in two runs has one device: the early ones are cut as the main chunks are.
    """
    is_split = len(weights) > 1
    cut = _cut_as if is_split else _early
    of_runs = (*(cut(component, run, main) for run in early), main)
    chunks, runs = tuple(chain(*of_runs)), tuple(map(len, of_runs))
    made = schedule.make("swap", len(chunks))
    if not is_split:
        return stream_plan(sizes.storage, component, chunks, made, runs)
    owners = schedule.share_out(len(chunks), weights)
    of_main = {u: owner for of, owner in zip(main, owners[-len(main) :], strict=True) for u in of}
    owners = tuple(
        next((of_main[unit] for unit in chunk if unit in of_main), owner)
        for chunk, owner in zip(chunks, owners, strict=True)
    )
    return stream_plan(sizes.storage, component, chunks, made, runs, owners, len(weights))


def _early(
    component: str, early: tuple[str, ...], main: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], ...]:
    """`early` blocks in chunks no larger than the largest of `main`."""
    if not early:
        return ()
    if all(len(units) == 1 and components.half_of(units[0]) for units in main):
        return chunked(component, early, 2 * len(early))
    return chunked(component, early, -(-len(early) // max(map(len, main))))


def _cut_as(
    component: str, early: tuple[str, ...], main: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], ...]:
    """Like `_early`; of `early` blocks that `main` chunks have too, a chunk ends where theirs does."""
    homes = {unit: number for number, units in enumerate(main) for unit in units}
    found: list[tuple[str, ...]] = []
    for chunk in _early(component, early, main):
        begin, before = 0, None
        for end, unit in enumerate(chunk):
            home = homes.get(unit, before)
            if before is not None and home != before:
                found.append(chunk[begin:end])
                begin = end
            before = home
        found.append(chunk[begin:])
    return tuple(found)


def _chunk_counts(sizes: Sizes, component: str, main: tuple[str, ...], memory: Memory) -> list[int]:
    blocks, nbytes = len(main), sizes.storage.nbytes
    halves = [half for unit in main for half in components.halves(component, unit)]
    if memory.chunks:
        most = len(halves) or blocks
        if memory.chunks > most:
            what = "two to a block" if halves else "the number of blocks"
            raise UsageError(f"--chunks {memory.chunks}: expected 1 to {most}, {what}")
        return [memory.chunks]
    if memory.max_chunk_bytes:
        block = max(nbytes(component, unit) for unit in main)
        half = max((nbytes(component, half) for half in halves), default=None)
        return [schedule.chunks_under(blocks, block, half, memory.max_chunk_bytes)]
    # the default number, then each about half as many again, up to one chunk per block; then halves
    counts = [min(schedule.CHUNKS, blocks)]
    while counts[-1] < blocks:
        counts.append(min(blocks, counts[-1] * 3 // 2 + 1))
    return [*counts, len(halves)] if halves else counts


def _rows(memory: Memory, count: int) -> Iterator[tuple[schedule.Row, int]]:
    """(schedule, resident chunks) that `memory` allows for a partition of `count` chunks."""
    for row in schedule.ROWS:
        is_tried = memory.schedule == "auto" and row.is_automatic and row.admits(memory.prefetch)
        if row.name != memory.schedule and not is_tried:
            continue
        allowed = row.resident(count)
        if memory.chunks_on_device is not None:
            slots = 0 if row.keeps_all else row.slots(memory.prefetch)
            most = memory.chunks_on_device - slots
            allowed = [resident for resident in allowed if resident <= most]
        if memory.resident_chunks is None:
            yield from ((row, resident) for resident in allowed)
        elif row.keeps_all:
            continue
        elif memory.resident_chunks in allowed:
            yield row, memory.resident_chunks


def _pins(memory: Memory, chunks: tuple[tuple[str, ...], ...], first: int) -> dict[int, str]:
    """`memory.pins` by the number of a main chunk; `first` is the index of the first main chunk.

    Raises UsageError for a block that is in no chunk.
    """
    found: dict[int, str] = {}
    blocks = [[components.unit_of(name) for name in chunk] for chunk in chunks[first:]]
    for which, how in memory.pins:
        if isinstance(which, str):
            numbers = [c for c, units in enumerate(blocks) if which in units]
            if not numbers:
                raise UsageError(
                    f"{which}: no such block; expected {blocks[0][0]} to {blocks[-1][-1]}"
                )
            found |= dict.fromkeys(numbers, how)
        else:
            found[which] = how
    return found
