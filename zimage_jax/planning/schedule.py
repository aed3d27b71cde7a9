"""Memory schedules as data: which chunk is on the device when. Pure arithmetic; no device is used.

A component's blocks are cut into chunks. A sweep visits every chunk once, in order. The denoise
stage makes one sweep per NFE, the text stage one per job. A schedule keeps some chunks resident and
streams the others through its slots.

Chunks whose blocks have the same shapes are of one kind and may use the same slot. A slot that is
alone takes chunks of every kind in turn.

Several devices share out the chunks (`owners`). Each has a schedule of its own chunks, and takes
turns with the others.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import UsageError
from ..units import size

CHUNKS = 4
ANY = None  # the kind of a slot that is alone

Kinds = Sequence[Hashable]  # the kind of each chunk, in order


class Pin(NamedTuple):
    """Copy a resident chunk to the device, once per job."""

    chunk: int


class Load(NamedTuple):
    """Copy a streamed chunk into a slot; `sweep` is the first that uses it."""

    chunk: int
    slot: int
    sweep: int


class Visit(NamedTuple):
    """Run a chunk, resident (slot None) or in a slot, and copy `then` at the same time."""

    chunk: int
    slot: int | None
    then: Load | None


class Free(NamedTuple):
    """A chunk is no longer needed. Its slot keeps the memory for the next chunk."""

    chunk: int
    slot: int | None


Action = Pin | Load | Visit | Free


@dataclass(frozen=True)
class Schedule:
    """The `resident` chunks are copied once; the others stream through `slots` slots.

    `slots` - 1 chunks are copied ahead of use. A device that `takes_turns` with others copies into
    every slot while the others compute, and so `slots` chunks ahead.
    """

    name: str
    slots: int
    resident: frozenset[int] = frozenset()
    takes_turns: bool = False

    def __post_init__(self):
        if self.slots < 0:
            raise UsageError(f"a schedule has 0 slots or more, got {self.slots}")

    @property
    def ahead(self) -> int:
        """Chunks copied ahead of use."""
        return self.slots if self.takes_turns else max(0, self.slots - 1)

    def after(self, others: int) -> "Schedule":
        """The same schedule with `others` streamed chunks before its own."""
        return replace(self, resident=frozenset(chunk + others for chunk in self.resident))

    def with_pins(self, pins: Mapping[int, str], first: int, chunks: int) -> "Schedule":
        """The schedule with single chunks made "resident" or "streamed".

        `pins` counts chunks from `first`; `chunks` is the number of all chunks.

        Raises UsageError for a chunk that does not exist.
        """
        resident = set(self.resident)
        for index, how in pins.items():
            if not 0 <= index < chunks - first:
                raise UsageError(
                    f"chunk {index} does not exist: expected 0 to {chunks - first - 1}"
                )
            if how == "resident":
                resident.add(first + index)
            elif how == "streamed":
                resident.discard(first + index)
            else:
                raise UsageError(f"chunk {index}={how}: expected resident or streamed")
        slots = 0 if len(resident) == chunks else self.slots or 2
        return replace(self, resident=frozenset(resident), slots=slots)

    def slot_kinds(self, kinds: Kinds) -> tuple[Hashable, ...]:
        """The kind of chunk that each slot takes.

        Each kind gets the largest number of its chunks among any `slots` successive streamed ones.
        """
        streamed = [kind for chunk, kind in enumerate(kinds) if chunk not in self.resident]
        if self.slots == 1 and streamed and not self.takes_turns:
            return (ANY,)
        if len(streamed) <= self.slots:
            return tuple(streamed)
        most: Counter[Hashable] = Counter()
        for start in range(len(streamed)):
            most |= Counter(streamed[(start + i) % len(streamed)] for i in range(self.slots))
        return tuple(most.elements())


# -- the schedules by name -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A schedule by name. To add one, add a Row to ROWS, which all other code reads.

    `resident(n)`: how many of n chunks the planner may make resident, the fastest number first.
    `ahead`: chunks copied ahead, or None where --prefetch sets it. `summary`: text for the start
    line, after the number of chunks.
    """

    name: str
    resident: Callable[[int], Sequence[int]]
    ahead: int | None
    summary: str
    is_automatic: bool = True  # `auto` tries it
    is_one_program: bool = False  # the whole sampler is one program, and nothing is copied

    def slots(self, prefetch: int | None, *, takes_turns: bool = False) -> int:
        ahead = self.ahead if self.ahead is not None else 1 if prefetch is None else prefetch
        return max(1, ahead) if takes_turns else ahead + 1

    def takes_turns(self, prefetch: int | None) -> bool:
        """Whether one of several devices copies its next chunks while the others compute."""
        return self.keeps_all or (self.ahead is None and prefetch != 0)

    def admits(self, prefetch: int | None) -> bool:
        """Whether the schedule copies `prefetch` chunks ahead, or has nothing to copy."""
        return prefetch is None or self.ahead is None or self.ahead == prefetch or self.keeps_all

    @property
    def keeps_all(self) -> bool:
        return tuple(self.resident(2)) == (2,)


ROWS = [
    Row("resident", lambda n: (n,), 0, "all resident"),
    Row("ring", lambda n: (0,), None, "{ahead} copied ahead"),
    Row(
        "hybrid", lambda n: range(n - 1, -1, -1), None, "{resident} resident, {ahead} copied ahead"
    ),
    Row("swap", lambda n: (0,), 0, "each copied when it is needed"),
    Row(
        "scan",
        lambda n: (n,),
        0,
        "all resident, in one program",
        is_automatic=False,
        is_one_program=True,
    ),
]


def names() -> tuple[str, ...]:
    return tuple(row.name for row in ROWS)


def row(name: str) -> Row:
    """The Row called `name`. Raises UsageError if ROWS has none."""
    found = next((row for row in ROWS if row.name == name), None)
    if found is None:
        raise UsageError(f"schedule {name!r}: expected one of auto, {', '.join(names())}")
    return found


def make(
    name: str,
    chunks: int,
    resident_chunks: int = 0,
    prefetch: int | None = None,
    owners: Sequence[int] = (),
) -> Schedule:
    """The schedule `name` for `chunks` chunks; `resident_chunks` counts unless all are resident.

    `owners`: the device of each chunk, if there are several.

    Raises UsageError for an unknown name, or for a number that is out of range.
    """
    found, is_split = row(name), any(owners)
    takes_turns = is_split and found.takes_turns(prefetch)
    if found.keeps_all:
        return Schedule(name, 0, frozenset(range(chunks)), takes_turns)
    if not 0 <= resident_chunks <= chunks:
        raise UsageError(f"{resident_chunks} resident chunks of {chunks}: expected 0 to {chunks}")
    resident = spread_over(resident_chunks, owners) if is_split else spread(resident_chunks, chunks)
    slots = found.slots(prefetch, takes_turns=takes_turns)
    return Schedule(name, slots, frozenset(resident), takes_turns)


def for_chunks_on_device(count: int, chunks: int) -> tuple[str, int]:
    """The schedule with at most `count` chunks on the device, and its resident chunks."""
    if count >= chunks:
        return "resident", chunks
    if count > 2:
        return "hybrid", count - 2
    return ("ring", 0) if count == 2 else ("swap", 0)


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced, so that copies are spread evenly over compute."""
    return [i * total // count for i in range(count)]


def share_out(chunks: int, weights: Sequence[float]) -> tuple[int, ...]:
    """The device of each chunk. Devices get chunks in proportion to their weights, evenly spaced.

    With equal weights, chunk c goes to device c mod n.
    """
    owners, owed = list[int](), [0.0] * len(weights)
    for _ in range(chunks):
        owed = [due + weight / sum(weights) for due, weight in zip(owed, weights, strict=True)]
        # rounded: thirds add up to a little more or less than one
        owners.append(max(range(len(owed)), key=lambda device: round(owed[device], 6)))
        owed[owners[-1]] -= 1
    return tuple(owners)


def spread_over(count: int, owners: Sequence[int]) -> list[int]:
    """`count` chunks, of each device in proportion to all it owns, and evenly spaced among these."""
    found, before = list[int](), 0
    for device in range(max(owners) + 1):
        own = [chunk for chunk, owner in enumerate(owners) if owner == device]
        first, last = (count * n // len(owners) for n in (before, before + len(own)))
        found += [own[i] for i in spread(last - first, len(own))]
        before += len(own)
    return found


# -- partitions ------------------------------------------------------------------------------------


def partition(blocks: int, chunks: int) -> tuple[int, ...]:
    """Blocks per chunk, the longer chunks first: 30 in 4 are 8, 8, 7, 7.

    Raises UsageError unless 1 <= chunks <= blocks.
    """
    if not 1 <= chunks <= blocks:
        raise UsageError(f"{chunks} chunks of {blocks} blocks: expected 1 to {blocks}")
    length, longer = divmod(blocks, chunks)
    return (length + 1,) * longer + (length,) * (chunks - longer)


def chunks_under(blocks: int, block_bytes: int, half_bytes: int | None, largest_chunk: int) -> int:
    """The smallest number of chunks of at most `largest_chunk` bytes each.

    `half_bytes`: of the larger half of a block; None if blocks are not halved.

    Raises UsageError if the smallest chunk is larger.
    """
    if block_bytes <= largest_chunk:
        return -(-blocks // (largest_chunk // block_bytes))
    if half_bytes is not None and half_bytes <= largest_chunk:
        return 2 * blocks
    least = f"half a block, {size(half_bytes)}" if half_bytes else f"one block, {size(block_bytes)}"
    raise UsageError(
        f"a chunk is at least {least}; --max-chunk-memory allows {size(largest_chunk)}"
    )


# -- the actions -----------------------------------------------------------------------------------


def actions(schedule: Schedule, kinds: Kinds, sweeps: int) -> Iterator[Action]:
    """All actions of `sweeps` sweeps, in order. Each load is freed exactly once.

    A chunk on the device is not loaded again. With two slots or more, each visit also copies the
    next chunk that is not on the device, if a slot's chunk is not needed earlier; this continues
    into the next sweep. Before the first visit of a streamed chunk, `slots` - 1 chunks are loaded.
    A device that takes turns loads into all slots at first, and into one after each visit.
    """
    for chunk in sorted(schedule.resident):
        yield Pin(chunk)
    chunks = len(kinds)
    visits = [chunk for _ in range(sweeps) for chunk in range(chunks)]
    slots = schedule.slot_kinds(kinds)
    held: dict[int, int] = {}  # slot -> chunk
    for i, chunk in enumerate(visits):
        # no earlier visit could copy this chunk ahead
        is_missing = chunk not in schedule.resident and chunk not in held.values()
        if is_missing or (schedule.takes_turns and i == 0):
            for _ in range(len(slots) if schedule.takes_turns else max(1, schedule.slots - 1)):
                load = _next_load(schedule, slots, kinds, held, visits, i)
                if load is not None:
                    yield from _freed(held, load)
                    yield load
        slot = next((s for s, c in held.items() if c == chunk), None)
        copies = schedule.slots > 1 and not schedule.takes_turns
        then = _next_load(schedule, slots, kinds, held, visits, i) if copies else None
        if then is not None:
            yield from _freed(held, then)
        yield Visit(chunk, slot, then)
        if schedule.takes_turns:
            after = _next_load(schedule, slots, kinds, held, visits, i + 1)
            if after is not None:
                yield from _freed(held, after)
                yield after
        elif (
            schedule.slots == 1
            and slot is not None
            and _next_streamed(schedule, visits, i) != chunk
        ):
            yield Free(held.pop(slot), slot)
    for slot, chunk in sorted(held.items()):
        yield Free(chunk, slot)
    for chunk in sorted(schedule.resident):
        yield Free(chunk, None)


def _freed(held: dict[int, int], load: Load) -> Iterator[Free]:
    """Assign the load's slot to its chunk; free the chunk that was in it."""
    if load.slot in held:
        yield Free(held[load.slot], load.slot)
    held[load.slot] = load.chunk


def _next_streamed(schedule: Schedule, visits: list[int], now: int) -> int | None:
    return next((chunk for chunk in visits[now + 1 :] if chunk not in schedule.resident), None)


def _next_load(
    schedule: Schedule,
    slots: tuple[Hashable, ...],
    kinds: Kinds,
    held: dict[int, int],
    visits: list[int],
    now: int,
) -> Load | None:
    """The load of the next chunk that is not on the device, from visit `now` on.

    None if every slot it fits has a chunk that is needed earlier.
    """
    needed: set[int] = set()
    for index in range(now, len(visits)):
        chunk = visits[index]
        if chunk in schedule.resident or chunk in held.values():
            needed.add(chunk)
            continue
        fitting = [slot for slot, kind in enumerate(slots) if kind in (ANY, kinds[chunk])]
        free = [slot for slot in fitting if held.get(slot) not in needed]
        empty = [slot for slot in free if slot not in held]
        return Load(chunk, (empty or free)[0], index // len(kinds)) if free else None
    return None


def loads(schedule: Schedule, kinds: Kinds, sweeps: int) -> Iterator[Load]:
    """All loads in order: the order in which a reader reads chunks."""
    for action in actions(schedule, kinds, sweeps):
        if isinstance(action, Load):
            yield action
        elif isinstance(action, Visit) and action.then is not None:
            yield action.then
