"""What the user says of memory, and a plan: how every stage of a job uses the device. Pure.

A stage offers options; the planner takes one of each. An option's choice is a value of the stage's own class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.kv import Nfe
from ..weights.formats import Storage
from . import schedule
from .schedule import Kinds, Schedule
from .work import Work

MAIN = "layers."  # the units of the transformer's blocks that a schedule cuts into chunks


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the user says of memory. None leaves it to the planner.

    `pins` overrules single chunks: (number of a chunk or name of a block, "resident" or "streamed").
    """

    schedule: str = "auto"
    chunks: int | None = None
    resident_chunks: int | None = None
    prefetch: int | None = None  # chunks copied ahead of use
    max_chunk_bytes: int | None = None
    max_vram_bytes: int | None = None
    low_vram: bool = False  # the least that works, whatever is free
    text_encoder: str = "auto"  # device, staged or host
    host_bytes: int | None = (
        None  # a window on the checkpoint; None: streamed blocks stay in host memory
    )
    vae_tile: int | None = None  # pixels; inexact
    pins: tuple[tuple[int | str, str], ...] = ()

    def __post_init__(self):
        if self.schedule != "auto":
            schedule.row(self.schedule)
        if self.text_encoder not in ("auto", "device", "staged", "host"):
            raise UsageError(
                f"text encoder {self.text_encoder!r}: expected one of auto, device, staged, host"
            )
        for name in ("chunks", "max_chunk_bytes", "max_vram_bytes", "host_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"{name.replace('_', ' ')}: expected a positive number, got {value}"
                )
        if self.prefetch is not None and self.prefetch < 0:
            raise UsageError(f"prefetch: expected 0 chunks or more, got {self.prefetch}")
        if self.schedule != "auto":
            row = schedule.row(self.schedule)
            if self.resident_chunks is not None and len(row.resident(8)) == 1:
                raise UsageError(
                    f"--resident-chunks: schedule {row.name} leaves no choice; hybrid does"
                )
            if self.prefetch is not None and row.ahead not in (None, self.prefetch):
                raise UsageError(
                    f"--prefetch {self.prefetch}: schedule {row.name} copies {row.ahead} chunks ahead"
                )
        if self.chunks and self.max_chunk_bytes:
            raise UsageError(
                "--chunks and --max-chunk-memory both set the size of a chunk: give one of them"
            )


# -- how blocks come to the device ------------------------------------------------------------------------------------


class VisitKind(NamedTuple):
    """A kind of visit to a chunk: each is a program of its own."""

    blocks: int
    copied: int  # blocks copied meanwhile
    without_kv: bool = False  # what is copied lacks the parameters that make K and V
    nfe: Nfe | None = None  # how the DiT's main blocks hold K and V


@dataclass(frozen=True)
class StreamPlan:
    """How the blocks of one stage come to the device: their chunks (units each), and the schedule over those."""

    component: str
    chunks: tuple[tuple[str, ...], ...]
    schedule: Schedule
    kinds: Kinds  # of each chunk: chunks of one kind may use the same slot

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(chunk) for chunk in self.chunks)

    @property
    def is_resident(self) -> bool:
        return len(self.schedule.resident) == len(self.chunks)

    @property
    def streamed(self) -> list[int]:
        """The chunks that take turns in slots."""
        return [chunk for chunk in range(len(self.chunks)) if chunk not in self.schedule.resident]

    @property
    def slots(self) -> tuple[tuple[str, ...], ...]:
        """The largest chunk that each slot holds."""
        largest: dict[Any, tuple[str, ...]] = {}
        for chunk in self.streamed:
            kind = self.kinds[chunk]
            largest[kind] = max(largest.get(kind, ()), self.chunks[chunk], key=len)
        return tuple(largest[kind] for kind in self.schedule.slot_kinds(self.kinds))

    @property
    def slot_blocks(self) -> int:
        return max((len(slot) for slot in self.slots), default=0)

    @property
    def copied_blocks(self) -> int:
        """Blocks copied in every sweep but the first: all that are streamed, unless the slots hold them all."""
        streamed = self.streamed
        return sum(self.sizes[c] for c in streamed) if len(streamed) > len(self.slots) else 0

    @property
    def waits(self) -> bool:
        """Whether those copies are waited for: with one slot nothing overlaps."""
        return self.copied_blocks > 0 and self.schedule.slots == 1

    def device_bytes(self, storage: Storage) -> int:
        """Bytes of the resident chunks and the slots."""
        resident = [self.chunks[chunk] for chunk in self.schedule.resident]
        return sum(storage.nbytes(self.component, *units) for units in (*resident, *self.slots))

    def is_main(self, chunk: int) -> bool:
        return self.chunks[chunk][0].startswith(MAIN)

    def without_kv(self, chunk: int, nfe: Nfe | None) -> bool:
        """Whether a chunk is copied for an NFE without the parameters that make K and V."""
        return nfe is not None and nfe.reuses and self.is_main(chunk)

    def visits(self, nfes: Sequence[Nfe | None] = (None,)) -> Iterator[tuple[int, int, VisitKind]]:
        """(sweep, chunk, kind of visit) for a sweep per NFE: of all sweeps, or of as many as differ."""
        if len(set(nfes)) == 1:
            nfes = nfes[: self.schedule.slots + 1 if self.schedule.slots else 1]
        found = schedule.actions(self.schedule, self.kinds, len(nfes))
        visits = (action for action in found if isinstance(action, schedule.Visit))
        for index, (chunk, _, then) in enumerate(visits):
            sweep = index // len(self.chunks)
            copied = self.sizes[then.chunk] if then else 0
            without_kv = then is not None and self.without_kv(then.chunk, nfes[then.sweep])
            nfe = nfes[sweep] if self.is_main(chunk) else None
            yield sweep, chunk, VisitKind(self.sizes[chunk], copied, without_kv, nfe)

    @property
    def visit_kinds(self) -> frozenset[VisitKind]:
        """The kinds of visit of a single sweep over blocks that hold no K and V."""
        return frozenset(visit for *_, visit in self.visits())


def cut(units: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Successive units in runs of these sizes."""
    ends = list(accumulate(sizes))
    return tuple(units[end - length : end] for length, end in zip(sizes, ends, strict=True))


def stream_plan(
    storage: Storage, component: str, chunks: tuple[tuple[str, ...], ...], of: Schedule
) -> StreamPlan:
    """Chunks whose blocks have the same stored leaves are of one kind."""
    shapes = [storage.specs(component, chunk[0]) for chunk in chunks]
    kinds = {shape: number for number, shape in enumerate(dict.fromkeys(shapes))}
    return StreamPlan(component, chunks, of, tuple(kinds[shape] for shape in shapes))


# -- stages and plans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A model's bytes: of its stored units, and of arrays in the dtype that is computed in."""

    storage: Storage
    compute_bytes: int  # of one number

    @property
    def config(self) -> ModelConfig:
        return self.storage.config

    def units(self, component: str, *groups: str) -> tuple[str, ...]:
        """The blocks of these groups in order: "layers" has "layers.0", "layers.1" and so on."""
        units = self.storage.units(component)
        return tuple(unit for group in groups for unit in units if unit.startswith(group + "."))

    def inputs(self, work: Work, tokens: int, lengths: int) -> int:
        """Rotations of `tokens` tokens of each context in float32, and int32 lengths."""
        return work.contexts * (tokens * self.config.transformer.head_dim * 4 + lengths * 4)

    def tokens(self, work: Work, tokens: int, width: int) -> int:
        return work.contexts * tokens * width * self.compute_bytes


@dataclass(frozen=True)
class Choice:
    """How a stage is done. `stream` is None where no blocks come to the device one after the other."""

    stream: StreamPlan | None = None


class Option(NamedTuple):
    """One way to do a stage: bytes of parameters on the device, and of other arrays between programs.

    `stays` names the parameters (component, unit) that may stay for the next picture; None where some are streamed.
    """

    choice: Any
    weights: int
    activations: int
    stays: frozenset[tuple[str, str]] | None = None


@runtime_checkable
class Stage(Protocol):
    """A part of a job. Stages are listed in pipeline/stages, in the order they run."""

    name: str

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        """The ways to do it that the user's words allow, the fastest first."""

    def compiled(self, programs: Any, work: Work, choice: Any) -> int:
        """Scratch: device bytes that its programs take beside their arguments, by the compiler."""

    def stored(self, figures: Any, work: Work, choice: Any) -> int:
        """The same by stored figures of a card."""

    def seconds(self, timing: Any, choice: Any) -> float | None:
        """Predicted seconds (timing: seconds.Timing); None where they cannot be predicted."""

    def run(self, attempt: Any) -> Any:
        """Do it. The result is in `attempt.results` under the stage's name."""


@runtime_checkable
class Costs(Protocol):
    """Where scratch bytes come from: the compiler, or stored figures."""

    def scratch(self, stage: Stage, work: Work, choice: Any) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a job uses the device: a choice for every stage, by the stage's name."""

    nfes: int
    choices: Mapping[str, Any]
    kept: bool  # every parameter stays on the device between pictures
    host_window: int | None = (
        None  # bytes through which blocks are read from disk; None: they stay in host memory
    )
    peak_bytes_by_stage: Mapping[str, int]
    seconds_by_stage: Mapping[str, float] | None = None  # where the device's rates are known

    @property
    def denoise(self) -> Any:
        """The choice that the schedule is about."""
        return self.choices["denoise"]

    @property
    def schedule(self) -> str:
        return self.denoise.stream.schedule.name

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_by_stage is None else sum(self.seconds_by_stage.values())

    @property
    def peak_bytes(self) -> int:
        return max(self.peak_bytes_by_stage.values())


def host_bytes(plan: Plan, storage: Storage, *, shares_memory: bool = False) -> int:
    """Bytes of parameters that a plan keeps in host memory: the embedding table, and all streamed blocks or the window
    they are read through. Where no parameter stays on the device, also those that the device holds for one stage and
    gives back, unless device memory is the host's (`shares_memory`)."""
    resident = storage.nbytes("transformer", "stem") + storage.nbytes("vae", "decoder")
    streamed = 0
    for stream in (choice.stream for choice in plan.choices.values() if choice.stream is not None):
        for index, chunk in enumerate(stream.chunks):
            nbytes = storage.nbytes(stream.component, *chunk)
            if index in stream.schedule.resident:
                resident += nbytes
            else:
                streamed += nbytes
    table = storage.nbytes("text_encoder", "embed_tokens")
    if plan.host_window is not None:
        return table + min(plan.host_window, streamed)
    gives_back = not plan.kept and not shares_memory
    return table + streamed + (resident if gives_back else 0)
