"""Memory options, stages with their options, and the plan made of them. Pure.

A stage offers options; the planner takes one option of each stage. `Option.choice` is an instance
of the stage's own subclass of Choice.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.kv import Nfe
from ..weights import components
from ..weights.formats import Storage
from . import schedule
from .schedule import Kinds, Row, Schedule
from .work import Work

SMALLEST_TILE = 64  # pixels of a VAE tile: 8 latents
MAIN = "layers."  # prefix of the main blocks' units


Budget = int | tuple[int, ...]  # bytes of the device, or of each of several


def each(value: Budget) -> tuple[int, ...]:
    """A number of each device: one device's is given alone."""
    return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The user's options about memory. None lets the planner choose.

    `pins` overrules the schedule for single chunks: pairs of a chunk's number or a block's name,
    and "resident" or "streamed".

    Raises UsageError for a value that is out of range, and for options that contradict each other.
    """

    schedule: str = "auto"
    chunks: int | None = None
    resident_chunks: int | None = None
    prefetch: int | None = None  # chunks copied ahead of use
    max_chunk_bytes: int | None = None
    max_vram_bytes: int | tuple[int, ...] | None = None  # one for all devices, or one for each
    low_vram: bool = False  # the smallest plan, however much memory is free
    text_encoder: str = "auto"  # device, staged or host
    # bytes of a window through which blocks are read from disk; None: they stay in host memory
    host_bytes: int | None = None
    vae_tile: int | None = None  # side in pixels; tiles change the picture
    pins: tuple[tuple[int | str, str], ...] = ()

    def __post_init__(self):
        if self.text_encoder not in ("auto", "device", "staged", "host"):
            raise UsageError(
                f"text encoder {self.text_encoder!r}: expected one of auto, device, staged, host"
            )
        least = dict.fromkeys(("chunks", "max_chunk_bytes", "max_vram_bytes", "host_bytes"), 1)
        least |= {"resident_chunks": 0, "prefetch": 0, "vae_tile": SMALLEST_TILE}
        for name, smallest in least.items():
            given = getattr(self, name)
            for value in () if given is None else each(given):
                if value < smallest:
                    raise UsageError(
                        f"{name.replace('_', ' ')}: expected {smallest} or more, got {value}"
                    )
        if self.chunks and self.max_chunk_bytes:
            raise UsageError(
                "--chunks and --max-chunk-memory both set the size of a chunk: give one of them"
            )
        if self.schedule != "auto":
            self._check_row(schedule.row(self.schedule))

    def _check_row(self, row: Row) -> None:
        """Raises UsageError for an option that the schedule named leaves without effect."""
        if self.resident_chunks is not None and len(row.resident(8)) == 1:
            raise UsageError(
                f"--resident-chunks: schedule {row.name} leaves no choice; hybrid does"
            )
        if self.prefetch is not None and row.ahead not in (None, self.prefetch):
            raise UsageError(
                f"--prefetch {self.prefetch}: schedule {row.name} copies {row.ahead} chunks ahead"
            )
        if row.is_one_program and any(how == "streamed" for _, how in self.pins):
            raise UsageError(f"--chunk: schedule {row.name} keeps every chunk on the device")


# -- streams of blocks -----------------------------------------------------------------------------


class VisitKind(NamedTuple):
    """What distinguishes the programs of visits: each kind of visit is compiled once."""

    units: int  # blocks or halves of the chunk
    copied: int  # blocks or halves of another chunk that are copied during the visit
    without_kv: bool = False  # the copy leaves out the parameters that make K and V
    nfe: Nfe | None = None  # how main blocks store K and V; None for other blocks
    kind: Hashable = 0  # of the chunk, in StreamPlan.kinds
    copied_kind: Hashable = 0
    half: str | None = None  # of the chunk, if it is half a block
    unused: int = 0  # bytes that the chunk leaves free in a slot of every kind


@dataclass(frozen=True)
class StreamPlan:
    """How the blocks of one stage reach the device: their chunks, and a schedule of these."""

    component: str
    chunks: tuple[tuple[str, ...], ...]  # the units of each chunk, or halves of blocks
    schedule: Schedule
    kinds: Kinds  # the kind of each chunk: chunks of one kind may use the same slot
    nbytes: tuple[int, ...]  # of each chunk
    owners: tuple[int, ...] = ()  # the device of each chunk, of several
    devices: int = 1
    # of what one device has of a stream: the numbers of its chunks there
    numbers: tuple[int, ...] = ()

    @cached_property
    def lanes(self) -> tuple["StreamPlan", ...]:
        """What each device has of the stream: a stream of its own chunks."""
        if self.devices == 1:
            return (self,)
        return tuple(self._lane(device) for device in range(self.devices))

    def _lane(self, device: int) -> "StreamPlan":
        own = tuple(chunk for chunk, owner in enumerate(self.owners) if owner == device)
        resident = frozenset(i for i, chunk in enumerate(own) if chunk in self.schedule.resident)
        return StreamPlan(
            self.component,
            tuple(self.chunks[chunk] for chunk in own),
            replace(self.schedule, resident=resident),
            tuple(self.kinds[chunk] for chunk in own),
            tuple(self.nbytes[chunk] for chunk in own),
            numbers=own,
        )

    def owner(self, chunk: int) -> int:
        """The device of a chunk."""
        return self.owners[chunk] if self.owners else 0

    def number(self, chunk: int) -> int:
        """The number of a chunk among those of all devices."""
        return self.numbers[chunk] if self.numbers else chunk

    @property
    def places(self) -> frozenset["Place"]:
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
        """The largest streamed chunk of a kind: a slot that holds any of them has its arrays."""
        return self.chunks[self._largest(kind)]

    def _largest(self, kind: Hashable) -> int:
        fitting = (c for c in self.streamed if kind in (schedule.ANY, self.kinds[c]))
        return max(fitting, key=self.nbytes.__getitem__)

    def like(self, kind: Hashable, units: int) -> tuple[str, ...]:
        """A chunk of a kind with so many units: all of these have the same shapes."""
        return next(
            chunk
            for chunk, of in zip(self.chunks, self.kinds, strict=True)
            if of == kind and len(chunk) == units
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
        found = {"resident chunks": sum(self.nbytes[c] for c in resident)} if resident else {}
        for slot, kind in enumerate(self.slot_kinds):
            largest = self._largest(kind)
            first, *rest = self.chunks[largest]
            units = f"{first} and {len(rest)} more" if rest else first
            found[f"slot {slot} (as large as {units})"] = self.nbytes[largest]
        return found

    @property
    def device_bytes(self) -> int:
        """Device bytes of the resident chunks and the slots."""
        return sum(self.device_arrays.values())

    def unused(self, chunk: int) -> int:
        """Bytes of a slot of every kind that are free while it holds a chunk."""
        of = self.schedule
        if of.slots != 1 or of.takes_turns or chunk in of.resident:
            return 0
        largest, own = (self._largest(kind) for kind in (schedule.ANY, self.kinds[chunk]))
        return self.nbytes[largest] - self.nbytes[own]

    def is_main(self, chunk: int) -> bool:
        return self.chunks[chunk][0].startswith(MAIN)

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
            kinds = self.kinds[chunk], self.kinds[then.chunk] if then else 0
            units = self.chunks[chunk]
            half = components.half_of(units[0]) if len(units) == 1 else None
            kind = VisitKind(len(units), copied, without_kv, nfe, *kinds, half, self.unused(chunk))
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
    owners: tuple[int, ...] = (),
    devices: int = 1,
) -> StreamPlan:
    """A stream of `chunks`. `owners`: the device of each, of several `devices`.

    Chunks whose blocks all have the same stored leaves are of one kind, however long they are. A
    chunk whose blocks differ is of one kind with those that differ in the same way.
    """
    nbytes = tuple(storage.nbytes(component, *chunk) for chunk in chunks)
    numbers = iter(storage.alike(component, [unit for chunk in chunks for unit in chunk]))
    blocks = [tuple(islice(numbers, len(chunk))) for chunk in chunks]
    shapes = [of_chunk if len(set(of_chunk)) > 1 else of_chunk[:1] for of_chunk in blocks]
    kinds = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
    return StreamPlan(
        component, chunks, of, tuple(kinds[shape] for shape in shapes), nbytes, owners, devices
    )


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


# -- stages and plans ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's stored units, and of arrays in the compute dtype."""

    storage: Storage
    compute_bytes: int  # per number in the compute dtype
    # ways to share out chunks: a weight of each device
    shares: tuple[tuple[float, ...], ...] = ((1.0,),)

    @property
    def devices(self) -> int:
        return len(self.shares[0])

    @property
    def config(self) -> ModelConfig:
        return self.storage.config

    def units(self, component: str, *groups: str) -> tuple[str, ...]:
        """The blocks of `groups` in order: group "layers" has "layers.0", "layers.1" and so on."""
        units = self.storage.units(component)
        return tuple(unit for group in groups for unit in units if unit.startswith(group + "."))

    def inputs(self, contexts: int, tokens: int, lengths: int) -> int:
        """Bytes of float32 rotations of `tokens` tokens, and of `lengths` int32s, per context."""
        return contexts * (tokens * self.config.transformer.head_dim * 4 + lengths * 4)

    def tokens(self, contexts: int, tokens: int, width: int) -> int:
        """Bytes of `tokens` tokens of `width` channels, per context."""
        return contexts * tokens * width * self.compute_bytes


@dataclass(frozen=True)
class Choice:
    """How a stage is run. `stream` is None where the stage moves no blocks to the device."""

    stream: StreamPlan | None = None


Place = tuple[str, str, int]  # component, unit, device


class Held(NamedTuple):
    """What a stage holds on one device: bytes by name, of parameters and of other arrays between
    programs."""

    weights: Mapping[str, int]
    activations: Mapping[str, int]


class Option(NamedTuple):
    """One way to run a stage, with its device bytes by name.

    `weights`, `activations`: what it holds on the first device; `others`: on each further one.
    `stays`: all its parameters, which may stay for the next picture; None where some are streamed.
    `always`: they do stay, whatever the other stages need.
    """

    choice: Any
    weights: Mapping[str, int]
    activations: Mapping[str, int]
    stays: frozenset[Place] | None = None
    always: bool = False
    others: tuple[Held, ...] = ()


@runtime_checkable
class Stage(Protocol):
    """A part of a job. pipeline/stages lists them in the order they run."""

    name: str

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        """The options that `memory` allows, the fastest first."""

    def compiled(self, programs: Any, work: Work, choice: Any, device: int = 0) -> int:
        """Scratch bytes of its `programs` (runtime.programs.Programs) on a device, from the
        compiler."""

    def stored(self, figures: Any, work: Work, choice: Any, device: int = 0) -> int:
        """Scratch bytes of its programs on a device, from its card's stored figures
        (stored.Figures)."""

    def seconds(self, timing: Any, choice: Any) -> float | None:
        """Predicted seconds (timing: seconds.Timing); None if a rate is unknown."""

    def run(self, attempt: Any) -> Any:
        """Run the stage. The pipeline puts the result into `attempt.results` under `name`."""


@runtime_checkable
class Costs(Protocol):
    """The source of scratch bytes: the compiler, or stored figures."""

    def scratch(self, stage: Stage, work: Work, choice: Any, device: int = 0) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a job uses the device: a choice for every stage, with the predicted bytes and seconds."""

    nfes: int
    choices: Mapping[str, Any]  # by the stage's name
    # the units that stay on the device between pictures: mostly all that the job needs, or none
    kept: frozenset[Place] = frozenset()
    # bytes of the window through which blocks are read from disk; None: they stay in host memory
    host_window: int | None = None
    # stage -> array -> its bytes on the first device when the stage takes most
    arrays_by_stage: Mapping[str, Mapping[str, int]]
    others: tuple[Mapping[str, Mapping[str, int]], ...] = ()  # the same of each further device
    seconds_by_stage: Mapping[str, float] | None = None  # None if a rate is unknown

    @property
    def denoise(self) -> Any:
        """The denoise stage's choice: its stream has the job's schedule. None without NFEs."""
        return self.choices.get("denoise")

    @property
    def schedule(self) -> str:
        return "none" if self.denoise is None else self.denoise.stream.schedule.name

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_by_stage is None else sum(self.seconds_by_stage.values())

    @property
    def arrays_by_device(self) -> tuple[Mapping[str, Mapping[str, int]], ...]:
        return self.arrays_by_stage, *self.others

    @property
    def peaks_by_device(self) -> tuple[int, ...]:
        return tuple(max(self.peaks_on(device).values()) for device in range(1 + len(self.others)))

    def peaks_on(self, device: int) -> dict[str, int]:
        """The peak on a device, by stage."""
        return {stage: sum(of.values()) for stage, of in self.arrays_by_device[device].items()}

    @property
    def peak_bytes_by_stage(self) -> dict[str, int]:
        """Of several devices, on the one with the highest peak in each stage."""
        return {
            stage: max(sum(of.get(stage, {}).values()) for of in self.arrays_by_device)
            for stage in self.arrays_by_stage
        }

    @property
    def peak_bytes(self) -> int:
        """Of several devices, on the one with the highest peak."""
        return max(self.peak_bytes_by_stage.values())


def host_bytes(plan: Plan, storage: Storage, *, shares_memory: bool = False) -> int:
    """Bytes of parameters that a plan keeps in host memory.

    These are the embedding table, and all streamed blocks or the window through which they are
    read. Parameters that are on the device for one stage only are kept as well, unless the device's
    memory is the host's (`shares_memory`).
    """
    resident = storage.nbytes("transformer", "stem") + storage.nbytes("vae", "decoder")
    if "encode" in plan.choices:
        resident += storage.nbytes("vae", "encoder")
    streamed = 0
    for stream in (choice.stream for choice in plan.choices.values() if choice.stream is not None):
        for index, nbytes in enumerate(stream.nbytes):
            if index in stream.schedule.resident:
                resident += nbytes
            else:
                streamed += nbytes
    table = storage.nbytes("text_encoder", "embed_tokens")
    if plan.host_window is not None:
        return table + min(plan.host_window, streamed)
    gives_back = not plan.kept and not shares_memory
    return table + streamed + (resident if gives_back else 0)
