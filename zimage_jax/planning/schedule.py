"""Memory schedules as data: which chunk is in which tier when. Pure arithmetic; nothing here
touches a device.

A model's blocks are cut into chunks. A sweep visits every chunk in order; a job makes one sweep per
NFE, or one in all for a text encoder. A schedule pins some chunks to the device and lets the rest
take turns in its slots."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import UsageError

CHUNKS = 4


class Pin(NamedTuple):
    """Copy a chunk to the device, to stay."""

    chunk: int


class Load(NamedTuple):
    """Copy a chunk into a slot, first to be used in a sweep."""

    chunk: int
    slot: int
    sweep: int


class Run(NamedTuple):
    """Compute a chunk, pinned (slot None) or in a slot; `then` is copied meanwhile."""

    chunk: int
    slot: int | None
    then: Load | None


class Free(NamedTuple):
    """What was loaded is needed no more; a slot keeps its memory for the next chunk."""

    chunk: int
    slot: int | None


Step = Pin | Load | Run | Free


@dataclass(frozen=True)
class Schedule:
    """`pinned` chunks are loaded once and stay; the others take turns in `slots`. With one slot
    nothing overlaps."""

    name: str
    slots: int
    pinned: frozenset[int] = frozenset()

    def __post_init__(self):
        if self.slots not in (0, 1, 2):
            raise UsageError(f"a schedule has no, one or two slots, got {self.slots}")

    def device_blocks(self, sizes: tuple[int, ...]) -> int:
        """The most blocks on the device at once: the pinned chunks, and slots that each hold the
        largest other."""
        streamed = [size for chunk, size in enumerate(sizes) if chunk not in self.pinned]
        pinned = sum(size for chunk, size in enumerate(sizes) if chunk in self.pinned)
        return pinned + min(self.slots, len(streamed)) * max(streamed, default=0)

    def after(self, others: int) -> "Schedule":
        """The same for these chunks when `others` are streamed before them."""
        return replace(self, pinned=frozenset(chunk + others for chunk in self.pinned))

    def with_pins(self, pins: Mapping[int, str], first: int, chunks: int) -> "Schedule":
        """Single chunks overruled: index, counted from chunk `first` of all `chunks`, -> "resident"
        or "streamed".

        Raises UsageError for a chunk that is not there.
        """
        pinned = set(self.pinned)
        for index, how in pins.items():
            if not 0 <= index < chunks - first:
                raise UsageError(f"chunk {index} is not there: expected 0 to {chunks - first - 1}")
            if how not in ("resident", "streamed"):
                raise UsageError(f"chunk {index}={how}: expected resident or streamed")
            (pinned.add if how == "resident" else pinned.discard)(first + index)
        slots = 0 if len(pinned) == chunks else self.slots or 2
        return replace(self, pinned=frozenset(pinned), slots=slots)


# name -> slots, and how many of n chunks stay
_TABLE = {
    "resident": (0, lambda n, k: n),
    "swap": (1, lambda n, k: 0),
    "ring": (2, lambda n, k: 0),
    "hybrid": (2, lambda n, k: k),
}
NAMES = (*_TABLE, "scan")  # scan is one compiled program: nothing moves while it runs


def make(name: str, chunks: int, resident_chunks: int = 0) -> Schedule:
    """A schedule by name for so many chunks, of which hybrid keeps `resident_chunks`.

    Raises UsageError for an unknown name or a number that is out of range.
    """
    if name not in _TABLE:
        raise UsageError(f"schedule {name!r}: expected one of {', '.join(NAMES)}")
    if not 0 <= resident_chunks <= chunks:
        raise UsageError(f"{resident_chunks} resident chunks of {chunks}: expected 0 to {chunks}")
    slots, staying = _TABLE[name]
    return Schedule(name, slots, frozenset(spread(staying(chunks, resident_chunks), chunks)))


def spread(count: int, total: int) -> list[int]:
    """`count` indices of `total`, evenly apart, so that copies lie evenly under compute."""
    return [i * total // count for i in range(count)]


# -- partitions ------------------------------------------------------------------------------------


def partition(blocks: int, chunks: int) -> tuple[int, ...]:
    """Blocks per chunk, the longer chunks first: 30 in 4 are 8, 8, 7, 7.

    Raises UsageError unless 1 <= chunks <= blocks.
    """
    if not 1 <= chunks <= blocks:
        raise UsageError(f"{chunks} chunks of {blocks} blocks: expected 1 to {blocks}")
    size, longer = divmod(blocks, chunks)
    return (size + 1,) * longer + (size,) * (chunks - longer)


def chunks_under(blocks: int, block_bytes: int, largest_chunk: int) -> int:
    """The fewest chunks of which none is over `largest_chunk` bytes.

    Raises UsageError when a single block is.
    """
    if block_bytes > largest_chunk:
        raise UsageError(
            f"a chunk is at least one block, {block_bytes / 2**30:.2f} GiB; {largest_chunk / 2**30:.2f} GiB were allowed"
        )
    return -(-blocks // (largest_chunk // block_bytes))


# -- the steps -------------------------------------------------------------------------------------


def steps(schedule: Schedule, chunks: int, sweeps: int) -> Iterator[Step]:
    """Everything the driver does, in order. Each load is freed once; a chunk that is there is not
    loaded again.

    With two slots, each visit copies the next chunk that is not on the device into the slot that is
    not needed before it, across the end of a sweep too."""
    for chunk in sorted(schedule.pinned):
        yield Pin(chunk)
    visits = [chunk for _ in range(sweeps) for chunk in range(chunks)]
    held: dict[int, int] = {}  # slot -> chunk
    for i, chunk in enumerate(visits):
        if chunk in schedule.pinned:
            slot = None
        else:
            if chunk not in held.values():  # nothing could be copied ahead
                slot = next(s for s in range(schedule.slots) if s not in held)
                yield (load := Load(chunk, slot, i // chunks))
                held[load.slot] = chunk
            slot = next(s for s, c in held.items() if c == chunk)
        then = _copy_ahead(schedule, held, visits, i, chunks) if schedule.slots == 2 else None
        if then is not None:
            if then.slot in held:
                yield Free(held[then.slot], then.slot)
            held[then.slot] = then.chunk
        yield Run(chunk, slot, then)
        if (
            schedule.slots == 1
            and slot is not None
            and _next_streamed(schedule, visits, i) != chunk
        ):
            yield Free(held.pop(slot), slot)
    for slot, chunk in sorted(held.items()):
        yield Free(chunk, slot)
    for chunk in sorted(schedule.pinned):
        yield Free(chunk, None)


def _next_streamed(schedule: Schedule, visits: list[int], now: int) -> int | None:
    return next((chunk for chunk in visits[now + 1 :] if chunk not in schedule.pinned), None)


def _copy_ahead(
    schedule: Schedule, held: dict[int, int], visits: list[int], now: int, chunks: int
) -> Load | None:
    """What to copy during visit `now`: the next chunk not on the device, where a slot is free of
    earlier needs."""
    needed = {visits[now]}
    for index in range(now + 1, len(visits)):
        chunk = visits[index]
        if chunk in schedule.pinned or chunk in held.values():
            needed.add(chunk)
            continue
        for slot in range(2):
            if held.get(slot) not in needed:
                return Load(chunk, slot, index // chunks)
        return None
    return None


def loads(schedule: Schedule, chunks: int, sweeps: int) -> Iterator[Load]:
    """The copies in order: what a source of chunks reads ahead."""
    for step in steps(schedule, chunks, sweeps):
        if isinstance(step, Load):
            yield step
        elif isinstance(step, Run) and step.then is not None:
            yield step.then
