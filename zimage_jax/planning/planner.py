"""Job, budget and costs to a plan: what lies where and when, its peak of device bytes and its
seconds. Pure.

The planner knows shapes and sizes; what a compiled program takes beside its arguments it asks of
`Costs`: the compiler itself for the machine's own device, or stored figures for a card that is not
there.

Levers that leave the picture as it is are used freely, in this order: what stays on the device, the
size of chunks, the text encoder staged, the VAE in strips of rows. Nothing that changes the picture
is touched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import OutOfMemoryError, UsageError
from ..model import dit, kv, sampling
from ..model.config import DiTConfig, ModelConfig
from ..model.kv import KVPolicy, Nfe, Phase
from ..weights import components
from . import schedule
from .schedule import Schedule

MICRO_TOKENS = 8192  # a micro-batch takes as many pictures as keep its tokens under this
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """What the user says of memory. None is for the planner to choose."""

    schedule: str = "auto"
    chunks: int | None = None
    resident_chunks: int | None = None
    max_chunk_bytes: int | None = None
    max_vram_bytes: int | None = None
    low_vram: bool = False  # the least that works, whatever is free
    text_encoder: str = "auto"  # device, staged or host
    host_bytes: int | None = (
        None  # a window on the checkpoint; None: the streamed blocks stay in host memory
    )
    vae_tile: int | None = None  # pixels; inexact
    pins: tuple[tuple[int, str], ...] = ()

    def __post_init__(self):
        if self.schedule not in ("auto", *schedule.NAMES):
            raise UsageError(
                f"schedule {self.schedule!r}: expected one of auto, {', '.join(schedule.NAMES)}"
            )
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
        if self.chunks and self.max_chunk_bytes:
            raise UsageError("chunks and the size of a chunk say the same thing: give one of them")


@dataclass(frozen=True)
class Work:
    """The shapes of one job.

    Axes: B pictures, G contexts (B, or 2 B with guidance), L caption tokens, I image tokens, T = I
    + L, P distinct prompts, h, w latent rows and columns."""

    batch: int
    is_guided: bool
    prompts: int
    bucket: int  # L
    h: int
    w: int
    phases: tuple[Phase, ...]  # of the K/V policy; their NFEs are the job's

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        width: int,
        height: int,
        steps: int,
        policy: KVPolicy,
        compute,
        *,
        bucket: int,
        batch: int = 1,
        is_guided: bool = False,
        prompts: int = 1,
    ) -> "Work":
        """Pictures of a size in pixels, computed in a dtype."""
        h, w = height // config.vae.scale, width // config.vae.scale
        times = 1000 * sampling.sigmas(steps, config.scheduler.shift)[:-1]
        return cls(
            batch, is_guided, prompts, bucket, h, w, policy.phases(times, compute, h // 2, w // 2)
        )

    @property
    def nfes(self) -> tuple[Nfe, ...]:
        return tuple(nfe for phase in self.phases for nfe in phase.nfes())

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def contexts(self) -> int:
        return self.batch * (2 if self.is_guided else 1)

    @property
    def image_tokens(self) -> int:
        return dit.padded(self.h * self.w // 4)

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.bucket

    def without_policy(self, compute) -> "Work":
        """The same with K and V whole, in the compute dtype, of every NFE its own."""
        return replace(self, phases=(Phase(kv.plain(compute), self.steps),))

    def kv_bytes_by_nfe(self, config: DiTConfig) -> list[int]:
        """Of the K and V of one main block, in every NFE, for all contexts."""
        shape = self.contexts, self.tokens, config.n_heads, config.head_dim
        return [phase.kv_format.nbytes(*shape) for phase in self.phases for _ in range(phase.steps)]

    def kv_bytes(self, config: DiTConfig) -> int:
        """The most K and V held at once: those of every main block where they are reused, else of
        the one that runs."""
        shape = self.tokens, config.n_heads, config.head_dim
        running = self.contexts * self.micro_batch // self.batch
        return max(
            p.kv_format.nbytes(self.contexts, *shape) * config.n_layers
            if p.caches
            else p.kv_format.nbytes(running, *shape)
            for p in self.phases
        )

    @property
    def micro_batch(self) -> int:
        """Pictures computed at once: the largest divisor of B that keeps its tokens under
        MICRO_TOKENS. It changes last bits, so it follows from the job alone, never from the
        budget."""
        per_picture = self.tokens * (2 if self.is_guided else 1)
        fitting = (
            m
            for m in range(2, self.batch + 1)
            if self.batch % m == 0 and m * per_picture <= MICRO_TOKENS
        )
        return max(fitting, default=1)


class Visit(NamedTuple):
    """A kind of run of a chunk: each is a program of its own."""

    blocks: int
    copied: int  # blocks copied meanwhile
    lightly: bool = False  # without what makes K and V
    nfe: Nfe | None = None  # what becomes of K and V in the DiT's main blocks


@runtime_checkable
class Costs(Protocol):
    """Device bytes that programs take beside their arguments: the most of any program of a
    stage."""

    def text(self, work: Work, visits: frozenset[Visit], slot: int) -> int: ...
    def context(self, work: Work, visits: frozenset[Visit], slot: int) -> int: ...
    def denoise(
        self, work: Work, refiner: frozenset[Visit], main: frozenset[Visit], slot: int
    ) -> int: ...
    def decode(self, work: Work, rows: int | None, tile: int | None) -> int: ...
    def scan(self, work: Work) -> int: ...


@dataclass(frozen=True)
class StreamPlan:
    """How the blocks of one stage come to the device: their chunks (units each), and the schedule
    over those."""

    chunks: tuple[tuple[str, ...], ...]
    schedule: Schedule

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(chunk) for chunk in self.chunks)

    @property
    def is_resident(self) -> bool:
        return len(self.schedule.pinned) == len(self.chunks)

    @property
    def device_blocks(self) -> int:
        return self.schedule.device_blocks(self.sizes)

    @property
    def slot_blocks(self) -> int:
        return max(
            (n for c, n in enumerate(self.sizes) if c not in self.schedule.pinned), default=0
        )

    @property
    def copied_blocks(self) -> int:
        """Blocks copied in every sweep but the first: all that do not stay, unless the slots hold
        them all."""
        streamed = [n for c, n in enumerate(self.sizes) if c not in self.schedule.pinned]
        return sum(streamed) if len(streamed) > self.schedule.slots else 0

    @property
    def waits(self) -> bool:
        """Whether those copies are waited for: with one slot nothing overlaps."""
        return self.copied_blocks > 0 and self.schedule.slots == 1

    def is_main(self, chunk: int) -> bool:
        return self.chunks[chunk][0].startswith("layers.")

    def lightly(self, chunk: int, nfe: Nfe | None) -> bool:
        """Whether a chunk is copied for an NFE without what makes K and V."""
        return nfe is not None and nfe.reuses and self.is_main(chunk)

    def visits(self, nfes: Sequence[Nfe | None] = (None,)) -> Iterator[tuple[int, int, Visit]]:
        """(sweep, chunk, kind of run) for a sweep per NFE, of all sweeps or of as many as
        differ."""
        if len(set(nfes)) == 1:
            nfes = nfes[:3]
        runs = schedule.steps(self.schedule, len(self.chunks), len(nfes))
        for index, step in enumerate(step for step in runs if isinstance(step, schedule.Run)):
            sweep, then = index // len(self.chunks), step.then
            copied = self.sizes[then.chunk] if then else 0
            lightly = then is not None and self.lightly(then.chunk, nfes[then.sweep])
            nfe = nfes[sweep] if self.is_main(step.chunk) else None
            yield sweep, step.chunk, Visit(self.sizes[step.chunk], copied, lightly, nfe)

    @property
    def kinds(self) -> frozenset[Visit]:
        """The kinds of run of a single sweep over blocks that hold no K and V."""
        return frozenset(visit for *_, visit in self.visits())


@dataclass(frozen=True)
class Plan:
    """A schedule with all its numbers filled in for one job."""

    schedule: str
    nfes: int
    text: StreamPlan | None  # None: the text encoder runs on the host
    context: StreamPlan
    denoise: StreamPlan
    kept: bool  # every component stays on the device between pictures
    vae_rows: int | None  # rows of pixels in a strip; None: the whole picture at once
    vae_tile: int | None
    peak_bytes_by_stage: dict[str, int]
    kv_on_host: bool = False  # K and V that later NFEs reuse lie there between visits
    seconds_by_stage: dict[str, float] | None = None  # where the card is known: cards.seconds

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_by_stage is None else sum(self.seconds_by_stage.values())

    @property
    def peak_bytes(self) -> int:
        return max(self.peak_bytes_by_stage.values())

    @property
    def refiner_chunks(self) -> int:
        return sum(chunk[0].startswith("noise_refiner.") for chunk in self.denoise.chunks)

    @property
    def main_sizes(self) -> tuple[int, ...]:
        return self.denoise.sizes[self.refiner_chunks :]

    @property
    def resident_chunks(self) -> int:
        return sum(chunk >= self.refiner_chunks for chunk in self.denoise.schedule.pinned)


# -- the plan of a job -----------------------------------------------------------------------------


class _Option(NamedTuple):
    """One way to do a stage: its parameters on the device, its other arrays there, and what its
    programs take beside."""

    choice: Any
    weights: int
    activations: int
    own: Callable[[], int]  # asks the compiler: called for options that may fit, and no others

    @property
    def held(self) -> int:
        return self.weights + self.activations

    @property
    def peak(self) -> int:
        return self.held + self.own()


class Planner:
    """Plans for one model.

    `dtype` is what the parameters are stored in, `compute_bytes` the size of the dtype that is
    computed in."""

    def __init__(self, config: ModelConfig, dtype: str, compute_bytes: int, costs: Costs):
        self._config, self._dtype, self._compute_bytes, self._costs = (
            config,
            dtype,
            compute_bytes,
            costs,
        )

    def plan(self, work: Work, memory: Memory, budget: int) -> Plan:
        """The fastest plan whose predicted peak is within `budget` bytes; with `low_vram` the
        smallest.

        Raises OutOfMemoryError with the smallest budget that would do when none is.
        """
        stages = {
            "text": list(self._text(work, memory)),
            "context": list(self._context(work)),
            "denoise": list(self._denoise(work, memory)),
            "decode": list(self._decode(work, memory)),
        }
        largest = {name: options[0] for name, options in stages.items()}
        together = sum(option.weights for option in largest.values()) - self._nbytes(
            "transformer", "stem"
        )
        streams = [largest["text"].choice, largest["context"].choice, largest["denoise"].choice[0]]
        if (
            together <= budget
            and not memory.low_vram
            and all(s is not None and s.is_resident for s in streams)
        ):
            peaks = {
                name: together + option.activations + option.own()
                for name, option in largest.items()
            }
            if max(peaks.values()) <= budget:
                return self._filled(work, largest, memory, peaks, kept=True)
        chosen = {
            name: _first_that_fits(options, budget, memory.low_vram)
            for name, options in stages.items()
        }
        peaks = {name: option.peak for name, option in chosen.items()}
        worst = max(peaks, key=peaks.__getitem__)
        if peaks[worst] > budget:
            raise OutOfMemoryError(
                f"the smallest plan needs {peaks[worst] / GIB:.3f} GiB of device memory, in its stage {worst}; "
                f"{budget / GIB:.3f} GiB may be used",
                peaks[worst],
            )
        return self._filled(work, chosen, memory, peaks, kept=False)

    def _filled(
        self,
        work: Work,
        chosen: dict[str, _Option],
        memory: Memory,
        peaks: dict[str, int],
        *,
        kept: bool,
    ) -> Plan:
        denoise, kv_on_host = chosen["denoise"].choice
        name = "scan" if memory.schedule == "scan" else denoise.schedule.name
        rows, tile = chosen["decode"].choice
        return Plan(
            name,
            work.steps,
            chosen["text"].choice,
            chosen["context"].choice,
            denoise,
            kept,
            rows,
            tile,
            peaks,
            kv_on_host,
        )

    # -- bytes -------------------------------------------------------------------------------------

    def _nbytes(self, component: str, *units: str) -> int:
        return sum(components.nbytes(self._config, component, unit, self._dtype) for unit in units)

    def _blocks(self, component: str, *groups: str) -> tuple[str, ...]:
        units = components.units(self._config, component)
        return tuple(unit for group in groups for unit in units if unit.startswith(group + "."))

    def _stream_bytes(self, component: str, stream: StreamPlan) -> int:
        return stream.device_blocks * self._nbytes(component, stream.chunks[0][0])

    def _side_bytes(self, work: Work, tokens: int, lengths: int) -> int:
        """Rotations of so many tokens of each context in float32, and masks by length."""
        return work.contexts * (tokens * self._config.transformer.head_dim * 4 + lengths * 4)

    def _tokens_bytes(self, work: Work, tokens: int, width: int) -> int:
        return work.contexts * tokens * width * self._compute_bytes

    # -- the ways to do each stage, the fastest first ----------------------------------------------

    def _text(self, work: Work, memory: Memory) -> Iterator[_Option]:
        if memory.text_encoder == "host":
            yield _Option(None, 0, 0, lambda: 0)
            return
        blocks = self._blocks("text_encoder", "layers")
        activations = (
            work.prompts * work.bucket * self._config.text_encoder.hidden_size * self._compute_bytes
        )
        if memory.text_encoder == "device":  # whatever the transformer's schedule
            memory = replace(memory, schedule="resident")
        for stream in self._streams((), blocks, memory, staged=memory.text_encoder == "staged"):
            yield _Option(
                stream,
                self._stream_bytes("text_encoder", stream),
                activations,
                partial(self._text_own, work, stream),
            )

    def _text_own(self, work: Work, stream: StreamPlan) -> int:
        return self._costs.text(work, stream.kinds, stream.slot_blocks)

    def _context(self, work: Work) -> Iterator[_Option]:
        blocks = self._blocks("transformer", "context_refiner")
        width, features = self._config.transformer.dim, self._config.text_encoder.hidden_size
        activations = self._side_bytes(work, work.bucket, 1) + self._tokens_bytes(
            work, work.bucket, width + features
        )
        whole = StreamPlan((blocks,), schedule.make("resident", 1))
        single = StreamPlan(tuple((b,) for b in blocks), schedule.make("swap", len(blocks)))
        for stream in (whole, single):
            yield _Option(
                stream,
                self._nbytes("transformer", "stem") + self._stream_bytes("transformer", stream),
                activations,
                partial(self._costs.context, work, stream.kinds, stream.slot_blocks),
            )

    def _denoise(self, work: Work, memory: Memory) -> Iterator[_Option]:
        config = self._config.transformer
        refiner, main = (
            self._blocks("transformer", group) for group in ("noise_refiner", "layers")
        )
        latents = work.batch * work.h * work.w * config.in_channels * 4
        context = self._tokens_bytes(work, work.bucket, config.dim)
        joint = self._side_bytes(work, work.image_tokens + work.tokens, 1)
        tokens = (
            self._tokens_bytes(work, work.tokens, config.dim) + work.contexts * config.adaln_dim * 4
        )
        for stream, kv_on_host in self._with_cache(
            self._streams(refiner, main, memory), work, memory
        ):
            if (
                memory.schedule == "scan"
            ):  # one program: its tokens are temporaries, its arguments hold all sides
                keys = sum(self._keys_bytes(work, phase) for phase in work.phases)
                activations = (
                    latents + context + joint + keys + self._side_bytes(work, work.bucket, 1)
                )
                own = partial(self._costs.scan, work)
            else:
                activations = latents + context + joint + tokens
                own = partial(self._denoise_own, work, stream, kv_on_host)
            weights = self._nbytes("transformer", "stem") + self._stream_bytes(
                "transformer", stream
            )
            yield _Option((stream, kv_on_host), weights, activations, own)

    def _with_cache(
        self, streams: Iterator[StreamPlan], work: Work, memory: Memory
    ) -> Iterator[tuple[StreamPlan, bool]]:
        """Each with whether K and V that are reused lie on the host between visits: rather that
        than wait for blocks."""
        caches = any(phase.caches for phase in work.phases) and memory.schedule != "scan"
        ways = [
            (stream, on_host)
            for stream in streams
            for on_host in ((False, True) if caches else (False,))
        ]
        return iter(sorted(ways, key=lambda way: (way[0].waits, way[1])))

    def _keys_bytes(self, work: Work, phase: Phase) -> int:
        """Rotations and masks of keys that are not the tokens' own."""
        return (
            0
            if phase.kv_format.grid is None
            else self._side_bytes(work, phase.kv_format.keys(work.tokens), 1)
        )

    def _cache_bytes(self, work: Work, phase: Phase, stream: StreamPlan, on_host: bool) -> int:
        """K and V on the device between programs: of every main block, or of the largest chunk."""
        if not phase.caches:
            return 0
        config, sizes = (
            self._config.transformer,
            [n for c, n in enumerate(stream.sizes) if stream.is_main(c)],
        )
        of_block = phase.kv_format.nbytes(work.contexts, work.tokens, config.n_heads, config.head_dim)
        return of_block * (max(sizes) if on_host else sum(sizes))

    def _decode(self, work: Work, memory: Memory) -> Iterator[_Option]:
        weights, latents = (
            self._nbytes("vae", "decoder"),
            work.h * work.w * self._config.vae.latent_channels * 4,
        )
        if memory.vae_tile:
            yield _Option(
                (None, memory.vae_tile),
                weights,
                latents,
                partial(self._costs.decode, work, None, memory.vae_tile),
            )
            return
        yield _Option((None, None), weights, latents, partial(self._costs.decode, work, None, None))
        rows = work.h * self._config.vae.scale // 2
        while rows >= self._config.vae.scale:
            # feature maps lie on the host, latents with them
            yield _Option((rows, None), weights, 0, partial(self._costs.decode, work, rows, None))
            rows //= 2

    def _denoise_own(self, work: Work, stream: StreamPlan, kv_on_host: bool) -> int:
        """The most of any phase: its programs', with the keys and the cached K and V that lie there
        meanwhile."""
        own, first, visits = [], 0, list(stream.visits(work.nfes))
        for phase in work.phases:
            within = range(first, first + phase.steps)
            refiner, main = (
                frozenset(
                    visit
                    for sweep, chunk, visit in visits
                    if sweep in within and stream.is_main(chunk) == is_main
                )
                for is_main in (False, True)
            )
            held = self._keys_bytes(work, phase) + self._cache_bytes(
                work, phase, stream, kv_on_host
            )
            own.append(held + self._costs.denoise(work, refiner, main, stream.slot_blocks))
            first = within.stop
        return max(own)

    def _streams(
        self,
        refiner: tuple[str, ...],
        main: tuple[str, ...],
        memory: Memory,
        *,
        staged: bool = False,
    ) -> Iterator[StreamPlan]:
        """Partitions and schedules that the user's words admit, the fastest first: those that wait
        for no copy, and of these the ones that copy least.

        The refiner's blocks are chunks of their own, before the main ones and no longer than they
        are."""
        found: dict[StreamPlan, None] = {}
        for count in self._chunk_counts(main, memory):
            sizes = schedule.partition(len(main), count)
            early = (
                schedule.partition(len(refiner), -(-len(refiner) // sizes[0])) if refiner else ()
            )
            chunks = _cut(refiner, early) + _cut(main, sizes)
            for name, resident in self._schedules(count, memory, staged):
                if name == "resident":
                    plan = schedule.make(name, len(chunks))
                else:
                    plan = schedule.make(name, count, resident).after(len(early))
                if refiner:
                    plan = plan.with_pins(dict(memory.pins), len(early), len(chunks))
                found.setdefault(StreamPlan(chunks, plan))
        # of two that copy the same, the one with fewer chunks
        return iter(sorted(found, key=lambda s: (s.waits, s.copied_blocks, len(s.chunks))))

    def _chunk_counts(self, main: tuple[str, ...], memory: Memory) -> list[int]:
        blocks = len(main)
        if memory.chunks:
            return [min(memory.chunks, blocks)]
        least = 1
        if memory.max_chunk_bytes:
            component = (
                "transformer" if main == self._blocks("transformer", "layers") else "text_encoder"
            )
            least = schedule.chunks_under(
                blocks, self._nbytes(component, main[0]), memory.max_chunk_bytes
            )
            return [least]
        # the default, and finer ones down to a chunk per block, each half as long or so
        counts = [min(schedule.CHUNKS, blocks)]
        while counts[-1] < blocks:
            counts.append(min(blocks, counts[-1] * 3 // 2 + 1))
        return counts

    @staticmethod
    def _schedules(count: int, memory: Memory, staged: bool) -> Iterator[tuple[str, int]]:
        """(name, resident chunks) admitted for a partition of `count` chunks."""
        if memory.schedule in ("auto", "resident", "scan") and not staged:
            yield "resident", count
        if memory.schedule in ("auto", "hybrid"):
            if memory.resident_chunks is not None:
                yield "hybrid", min(memory.resident_chunks, count)
            else:
                least = 0 if memory.schedule == "hybrid" else 1  # with none it is the ring
                yield from (("hybrid", k) for k in range(count - 1, least - 1, -1))
        if memory.schedule in ("auto", "ring") or (
            memory.schedule in ("resident", "scan") and staged
        ):
            yield "ring", 0
        if memory.schedule in ("auto", "swap"):
            yield "swap", 0


def _cut(units: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    ends = list(accumulate(sizes))
    return tuple(units[end - size : end] for size, end in zip(sizes, ends, strict=True))


def _first_that_fits(options: list[_Option], budget: int, smallest: bool) -> _Option:
    """The first option within the budget, or else the one that holds least."""
    if not smallest:
        for option in options:
            if option.held <= budget and option.peak <= budget:
                return option
    return min(reversed(options), key=lambda option: option.held)
