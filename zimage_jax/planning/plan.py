"""Memory options, stages with their options, and the plan made of them. Pure.

A stage offers options; the planner takes one option of each stage. `Option.choice` is an instance
of the stage's own subclass of Choice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import UsageError
from ..model.config import ModelConfig
from ..weights.formats import Storage
from . import schedule
from .schedule import Row
from .stream_plan import Place, StreamPlan
from .work import Work

SMALLEST_TILE = 64  # pixels of a VAE tile: 8 latents


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
    chunks_on_device: int | None = None  # the most at once, resident or in slots
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
        least = dict.fromkeys(
            ("chunks", "max_chunk_bytes", "chunks_on_device", "max_vram_bytes", "host_bytes"), 1
        )
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
    read, and what LoRAs have beside the model. Parameters that are on the device for one stage only
    are kept as well, unless the device's memory is the host's (`shares_memory`).
    """
    own = storage.without_loras
    beside = sum(
        storage.nbytes(component, unit) - own.nbytes(component, unit)
        for component in ("transformer", "text_encoder")
        for unit in storage.units(component)
    )
    resident = own.nbytes("transformer", "stem") + storage.nbytes("vae", "decoder")
    if plan.choices.keys() & {"encode", "control"}:
        resident += storage.nbytes("vae", "encoder")
    if "control" in plan.choices:
        resident += storage.nbytes("transformer", "control_embedder", "control_before")
    streamed = 0
    for stream in (choice.stream for choice in plan.choices.values() if choice.stream is not None):
        of_stream = {unit for chunk in stream.chunks for unit in chunk}
        stay = {unit for chunk in stream.schedule.resident for unit in stream.chunks[chunk]}
        resident += own.nbytes(stream.component, *stay)
        streamed += own.nbytes(stream.component, *(of_stream - stay))
    table = storage.nbytes("text_encoder", "embed_tokens")
    if plan.host_window is not None:
        return table + beside + min(plan.host_window, streamed)
    gives_back = not plan.kept and not shares_memory
    return table + beside + streamed + (resident if gives_back else 0)
