"""The plan of one stream: how the blocks of a stage reach the device, and what is run then. Pure."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

from ..model.kv import Nfe
from ..weights import components
from ..weights.formats import Storage
from . import schedule
from .schedule import Kinds, Schedule

Place = tuple[str, str, int]  # component, unit, device


class VisitKind(NamedTuple):
    """What distinguishes the programs of visits: each kind of visit is compiled once."""

    units: int  # blocks or halves of the chunk
    copied: int  # blocks or halves of another chunk that are copied during the visit
    without_kv: bool = False  # the copy leaves out the parameters that make K and V
    nfe: Nfe | None = None  # how main blocks store K and V; None for other blocks
    shape: Hashable = 0  # of the chunk, in StreamPlan.shapes
    copied_shape: Hashable = 0
    half: str | None = None  # of the chunk, if it is half a block
    unused: int = 0  # bytes that the chunk leaves free in a slot of every kind
    run: int = 0  # of the chunk: StreamPlan.run_of


@dataclass(frozen=True)
class StreamPlan:
    """How the blocks of one stage reach the device: their chunks, and a schedule of these.

    A sweep has runs of chunks, of which the last has the main blocks: all blocks of a run have the
    same inputs. A unit may be in two runs.
    """

    component: str
    chunks: tuple[tuple[str, ...], ...]  # the units of each chunk, or halves of blocks
    schedule: Schedule
    kinds: Kinds  # the kind of each chunk: chunks of one kind may use the same slot
    nbytes_of_units: tuple[tuple[int, ...], ...]  # of each chunk
    # of each chunk: those of one shape with as many units run the same programs
    shapes: Kinds = ()
    runs: tuple[int, ...] = ()  # chunks of each run; empty: all are one
    owners: tuple[int, ...] = ()  # the device of each chunk, of several
    devices: int = 1
    # of what one device has of a stream: the numbers of its chunks there
    numbers: tuple[int, ...] = ()

    @cached_property
    def nbytes(self) -> tuple[int, ...]:
        """Of each chunk."""
        return tuple(map(sum, self.nbytes_of_units))

    @cached_property
    def lanes(self) -> tuple["StreamPlan", ...]:
        """What each device has of the stream: a stream of its own chunks."""
        if self.devices == 1:
            return (self,)
        return tuple(self._lane(device) for device in range(self.devices))

    def _lane(self, device: int) -> "StreamPlan":
        own = tuple(chunk for chunk, owner in enumerate(self.owners) if owner == device)
        runs = [self.run_of(chunk) for chunk in own]
        resident = frozenset(i for i, chunk in enumerate(own) if chunk in self.schedule.resident)
        return replace(
            self,
            chunks=_at(self.chunks, own),
            schedule=replace(self.schedule, resident=resident),
            kinds=_at(self.kinds, own),
            nbytes_of_units=_at(self.nbytes_of_units, own),
            shapes=_at(self.shapes or self.kinds, own),
            runs=tuple(map(runs.count, range(len(self.runs)))),
            owners=(),
            devices=1,
            numbers=own,
        )

    def owner(self, chunk: int) -> int:
        """The device of a chunk."""
        return self.owners[chunk] if self.owners else 0

    def number(self, chunk: int) -> int:
        """The number of a chunk among those of all devices."""
        return self.numbers[chunk] if self.numbers else chunk

    @property
    def places(self) -> frozenset[Place]:
        """Where each unit is when it is on a device."""
        return frozenset(
            (self.component, unit, self.owner(chunk))
            for chunk, units in enumerate(self.chunks)
            for unit in units
        )

    @property
    def is_resident(self) -> bool:
        return len(self.schedule.resident) == len(self.chunks)

    @property
    def is_halved(self) -> bool:
        """Whether blocks are in halves."""
        return any(components.half_of(units[0]) for units in self.chunks)

    @property
    def streamed(self) -> list[int]:
        """The chunks that are copied into slots."""
        return [chunk for chunk in range(len(self.chunks)) if chunk not in self.schedule.resident]

    @cached_property
    def slot_kinds(self) -> tuple[Hashable, ...]:
        """The kind of chunk that each slot takes."""
        return self.schedule.slot_kinds(self.kinds)

    @property
    def slots(self) -> tuple[tuple[str, ...], ...]:
        """The largest chunk that each slot holds."""
        return tuple(map(self.slot_of, self.slot_kinds))

    def slot_of(self, kind: Hashable) -> tuple[str, ...]:
        """The units whose arrays a slot for chunks of a kind has: the largest of the streamed chunks
        in each place. A slot of every kind has those of the largest."""
        return tuple(unit for unit, _ in self._widest(kind))

    def slot_for(self, chunk: tuple[str, ...]) -> tuple[str, ...]:
        """The units of a slot for this chunk."""
        return self.slot_of(self.kinds[self.chunks.index(chunk)])

    def _widest(self, kind: Hashable) -> list[tuple[str, int]]:
        """Unit and bytes for each place in a slot."""
        if kind is schedule.ANY:
            kinds = dict.fromkeys(self.kinds[chunk] for chunk in self.streamed)
            return self._widest(max(kinds, key=self.slot_bytes))
        fitting = [chunk for chunk in self.streamed if self.kinds[chunk] == kind]
        fitting.sort(key=lambda chunk: -self.nbytes[chunk])
        widest: list[tuple[str, int]] = []
        for chunk in fitting:
            units = zip(self.chunks[chunk], self.nbytes_of_units[chunk], strict=True)
            for place, unit in enumerate(units):
                if place == len(widest):
                    widest.append(unit)
                elif unit[1] > widest[place][1]:
                    widest[place] = unit
        return widest

    def slot_bytes(self, kind: Hashable) -> int:
        """Device bytes of a slot for chunks of a kind."""
        return sum(nbytes for _, nbytes in self._widest(kind))

    def like(self, shape: Hashable, units: int) -> tuple[str, ...]:
        """A chunk of a shape with so many units: all these run the same programs."""
        shapes = self.shapes or self.kinds
        return next(
            chunk
            for chunk, of in zip(self.chunks, shapes, strict=True)
            if of == shape and len(chunk) == units
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes copied per sweep after the first: the streamed chunks, unless all are in slots."""
        if self.devices > 1:
            return sum(lane.copied_bytes for lane in self.lanes)
        streamed = self.streamed
        copies = len(streamed) > len(self.slot_kinds)
        return sum(self.nbytes[c] for c in streamed) if copies else 0

    @property
    def waits(self) -> bool:
        """Whether compute waits for those copies: with one slot nothing overlaps."""
        return self.copied_bytes > 0 and self.schedule.slots == 1 and not self.schedule.takes_turns

    @property
    def device_arrays(self) -> dict[str, int]:
        """Device bytes of the resident chunks and of each slot, by name."""
        resident = self.schedule.resident
        found = {"resident chunks": sum(self.bytes_of(resident).values())} if resident else {}
        for slot, kind in enumerate(self.slot_kinds):
            first, *rest = self.slot_of(kind)
            units = f"{first} and {len(rest)} more" if rest else first
            found[f"slot {slot} (as large as {units})"] = self.slot_bytes(kind)
        return found

    def bytes_of(self, chunks: Iterable[int]) -> dict[str, int]:
        """Unit -> bytes, of these chunks; a unit that is in two of them counts once."""
        return {
            unit: nbytes
            for chunk in chunks
            for unit, nbytes in zip(self.chunks[chunk], self.nbytes_of_units[chunk], strict=True)
        }

    @property
    def device_bytes(self) -> int:
        """Device bytes of the resident chunks and the slots."""
        return sum(self.device_arrays.values())

    def unused(self, chunk: int) -> int:
        """Bytes of a slot of every kind that are free while it holds a chunk."""
        of = self.schedule
        if of.slots != 1 or of.takes_turns or chunk in of.resident:
            return 0
        return self.slot_bytes(schedule.ANY) - self.slot_bytes(self.kinds[chunk])

    def run_of(self, chunk: int) -> int:
        """The run that a chunk belongs to."""
        ends = accumulate(self.runs or (len(self.chunks),))
        return next(run for run, end in enumerate(ends) if chunk < end)

    def is_main(self, chunk: int) -> bool:
        """Whether a chunk is in the last run."""
        return self.run_of(chunk) == max(0, len(self.runs) - 1)

    def without_kv(self, chunk: int, nfe: Nfe | None) -> bool:
        """Whether the copy of a chunk for `nfe` leaves out the parameters that make K and V."""
        return nfe is not None and nfe.reuses and self.is_main(chunk)

    def visits(self, nfes: Sequence[Nfe | None] = (None,)) -> Iterator[tuple[int, int, VisitKind]]:
        """(sweep, chunk, kind of visit) of each visit, one sweep per NFE.

        Where all NFEs are alike, later sweeps repeat the first ones and are left out.
        """
        if len(set(nfes)) == 1:
            nfes = nfes[: self.schedule.slots + 1 if self.schedule.slots else 1]
        found = schedule.actions(self.schedule, self.kinds, len(nfes))
        visits = (action for action in found if isinstance(action, schedule.Visit))
        for index, (chunk, _, then) in enumerate(visits):
            sweep = index // len(self.chunks)
            copied = len(self.chunks[then.chunk]) if then else 0
            without_kv = then is not None and self.without_kv(then.chunk, nfes[then.sweep])
            nfe = nfes[sweep] if self.is_main(chunk) else None
            of = self.shapes or self.kinds
            shapes = of[chunk], of[then.chunk] if then else 0
            units = self.chunks[chunk]
            half = components.half_of(units[0]) if len(units) == 1 else None
            unused, run = self.unused(chunk), self.run_of(chunk)
            kind = VisitKind(len(units), copied, without_kv, nfe, *shapes, half, unused, run)
            yield sweep, chunk, kind

    @property
    def visit_kinds(self) -> frozenset[VisitKind]:
        """The kinds of visit in one sweep of blocks that store no K and V."""
        return frozenset(visit for *_, visit in self.visits())


def cut(units: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """`units` in order, as chunks of the given `sizes`."""
    ends = list(accumulate(sizes))
    return tuple(units[end - length : end] for length, end in zip(sizes, ends, strict=True))


def chunked(component: str, units: tuple[str, ...], chunks: int) -> tuple[tuple[str, ...], ...]:
    """`units` in order, as so many chunks; of halves where there are more chunks than units.

    Raises UsageError for a number that is out of range.
    """
    if chunks <= len(units):
        return cut(units, schedule.partition(len(units), chunks))
    halves = [components.halves(component, unit) for unit in units]
    parts = cut(tuple(chain(*halves)), schedule.partition(2 * len(units), chunks))
    whole = dict(zip(halves, units, strict=True))
    return tuple((whole[part],) if part in whole else part for part in parts)


def stream_plan(
    storage: Storage,
    component: str,
    chunks: tuple[tuple[str, ...], ...],
    of: Schedule,
    runs: tuple[int, ...] = (),
    owners: tuple[int, ...] = (),
    devices: int = 1,
) -> StreamPlan:
    """A stream of `chunks`, so many of them in each run. `owners`: the device of each, of several
    `devices`.

    Chunks whose blocks all have the same stored leaves are of one kind, however long they are. A
    chunk whose blocks differ is of one kind with those that differ in the same way. A block whose
    leaves are the first of another's counts as that one: it takes a part of its slot.
    """
    nbytes = tuple(tuple(storage.nbytes(component, unit) for unit in chunk) for chunk in chunks)
    units = [unit for chunk in chunks for unit in chunk]
    alike = dict(zip(units, storage.alike(component, units), strict=True))
    leaves = {number: storage.specs(component, unit) for unit, number in alike.items()}

    def holder(number: int) -> int:
        """The number of the units with the most leaves that begin with these."""
        mine = leaves[number]
        fitting = [other for other, of in leaves.items() if of[: len(mine)] == mine]
        return max(fitting, key=lambda other: len(leaves[other]))

    holders = {number: holder(number) for number in leaves}
    # blocks of two classes may have leaves of equal shapes
    own = dict(zip(units, storage.trees(component, units), strict=True))
    shapes = _numbered([tuple((alike[unit], own[unit]) for unit in chunk) for chunk in chunks])
    kinds = _numbered([tuple(holders[alike[unit]] for unit in chunk) for chunk in chunks])
    return StreamPlan(component, chunks, of, kinds, nbytes, shapes, runs, owners, devices)


def _numbered(chunks: Sequence[tuple[Hashable, ...]]) -> tuple[int, ...]:
    """A number for each chunk: equal for those of blocks that are all alike, however many, and for
    those that differ in the same way."""
    shapes = [blocks if len(set(blocks)) > 1 else blocks[:1] for blocks in chunks]
    numbers = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
    return tuple(numbers[shape] for shape in shapes)


def _at(of: Sequence, chunks: tuple[int, ...]) -> tuple:
    return tuple(of[chunk] for chunk in chunks)


def mixed(picks: Sequence[StreamPlan]) -> StreamPlan:
    """The stream in which each device keeps the chunks that it keeps in its own pick.

    `picks`: one of each device; they differ in resident chunks alone.
    """
    first = picks[0]
    resident = frozenset(
        chunk for chunk, owner in enumerate(first.owners) if chunk in picks[owner].schedule.resident
    )
    most = max((pick.schedule for pick in picks), key=lambda of: of.slots)
    is_ring = most.takes_turns and most.name in ("ring", "hybrid")
    name = ("hybrid" if resident else "ring") if is_ring else most.name
    return replace(first, schedule=replace(most, name=name, resident=resident))
