"""Noise to latents: one sweep over the transformer's chunks per NFE, or the one program of `scan`.

Axes: B pictures, h, w latent rows and columns, C latent channels.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ...errors import UsageError
from ...model import control, dit, kv
from ...model.kv import Nfe, Phase
from ...planning import schedule
from ...planning.plan import Choice, Held, Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.stream_plan import StreamPlan, VisitKind
from ...planning.streams import streams
from ...planning.work import Work
from ...runtime.programs import Programs
from ...runtime.stream import Call, Sweeps
from ...weights import components
from ..attempt import Attempt
from .denoise_run import (
    COMPONENT,
    Ends,
    Run,
    Whole,
    abstract,
    carried,
    floats,
    runs_of,
    scan,
    units_of_scan,
)


@dataclass(frozen=True)
class DenoiseChoice(Choice):
    kv_on_host: bool = False  # K and V that later NFEs reuse are on the host between visits

    @property
    def blocks(self) -> StreamPlan:
        assert self.stream is not None
        return self.stream

    @property
    def is_one_program(self) -> bool:
        return schedule.row(self.blocks.schedule.name).is_one_program

    @property
    def refiner_chunks(self) -> tuple[int, ...]:
        """Chunks of each run before the main blocks."""
        return self.blocks.runs[:-1]

    @property
    def main_chunks(self) -> tuple[tuple[str, ...], ...]:
        return self.blocks.chunks[sum(self.refiner_chunks) :]

    @property
    def attentions(self) -> tuple[int, ...]:
        """How many attentions each main chunk has: as many K and V."""
        return tuple(sum(map(components.has_attention, units)) for units in self.main_chunks)

    @property
    def attending(self) -> tuple[tuple[int, int], ...]:
        """Of each main chunk with attentions: how many, and its device."""
        owners = (
            self.blocks.owner(sum(self.refiner_chunks) + n) for n in range(len(self.main_chunks))
        )
        return tuple(of for of in zip(self.attentions, owners, strict=True) if of[0])

    @property
    def resident_chunks(self) -> int:
        """How many main chunks are resident."""
        return sum(self.blocks.is_main(chunk) for chunk in self.blocks.schedule.resident)

    def __str__(self) -> str:
        chunks, of = self.main_chunks, self.blocks.schedule
        words = schedule.row(of.name).summary.format(resident=self.resident_chunks, ahead=of.ahead)
        plural = "s" if len(chunks) > 1 else ""
        where = f" on {self.blocks.devices} devices" if self.blocks.devices > 1 else ""
        return f"{of.name}, {len(chunks)} chunk{plural} of {_length(chunks)}{where}, {words}"


def _length(chunks: tuple[tuple[str, ...], ...]) -> str:
    """How long chunks are, in words."""
    halves = [any(map(components.half_of, units)) for units in chunks]
    if any(halves):
        return "half a block" if all(halves) else "half a block or a block"
    least, most = min(map(len, chunks)), max(map(len, chunks))
    if least == most:
        return f"{most} block{'s' if most > 1 else ''}"
    return f"{least} or {most} blocks"


class Denoise:
    name = "denoise"

    # -- bytes -------------------------------------------------------------------------------------

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        config, storage = sizes.config.transformer, sizes.storage
        *early, main = (run.units for run in runs_of(sizes.config, work))
        if not work.phases:  # the picture stays as it is
            return
        between = {
            "context": sizes.tokens(work.contexts, work.bucket, config.dim),
            "rotations": sizes.inputs(work.contexts, work.image_tokens + work.tokens, 1),
        }
        ends = ["stem"]
        if work.control_layers:
            ends.append("control_before")
            between["control"] = sizes.tokens(work.contexts, work.image_tokens, config.dim)
        stem = {unit: storage.nbytes(COMPONENT, unit) for unit in ends}
        caches = any(phase.caches for phase in work.phases)
        if sizes.devices > 1 and memory.schedule == "scan":
            raise UsageError("schedule scan is one program, of one device: it cannot be split")
        choices = []
        for stream in streams(sizes, COMPONENT, early, main, memory):
            choices.append(DenoiseChoice(stream))
            if caches and not choices[-1].is_one_program and sizes.devices == 1:
                choices.append(DenoiseChoice(stream, kv_on_host=True))
        # K and V on the host are faster than a schedule that waits for its copies
        for choice in sorted(choices, key=lambda c: (c.blocks.waits, c.kv_on_host)):
            if choice.is_one_program:  # its tokens are scratch, its arguments have all inputs
                keys = sum(_keys_bytes(sizes, work, phase) for phase in work.phases)
                of_caption = keys + sizes.inputs(work.contexts, work.bucket, 1)
                activations = between | {"rotations": between["rotations"] + of_caption}
            else:
                activations = between | {"tokens": _tokens_bytes(sizes, work)}
            activations["latents"] = work.latents_bytes(
                config.in_channels, in_one_program=choice.is_one_program
            )
            first, *others = choice.blocks.lanes
            of_ends = {(COMPONENT, unit, 0) for unit in ends}
            stays = choice.blocks.places | of_ends if choice.blocks.is_resident else None
            # what passes from device to device, and the inputs of all blocks
            away = {name: activations.get(name, 0) for name in ("tokens", "rotations")}
            held = tuple(Held(of.device_arrays, away if of.chunks else {}) for of in others)
            weights = stem | first.device_arrays
            yield Option(choice, weights, activations, stays, others=held)

    def compiled(
        self, programs: Programs, work: Work, choice: DenoiseChoice, device: int = 0
    ) -> int:
        if choice.is_one_program:
            return self._sampler(programs, work)
        sizes, contexts = Sizes(programs.storage, programs.dtype.itemsize), _contexts(work)
        visit = partial(self._visit, programs, work, contexts)
        ends = [0] if device else self._ends(programs, work, choice)
        lane = choice.blocks.lanes[device]
        return max(
            held + max(*ends, programs.most(lane, kinds, visit, device))
            for held, kinds in _by_phase(sizes, work, choice, device)
        )

    def _ends(self, programs: Programs, work: Work, choice: DenoiseChoice) -> list[int]:
        """Scratch bytes of the programs before and after the blocks, beside what a slot leaves
        unused."""
        config = programs.config.transformer
        contexts = _contexts(work)
        image, joint = (programs.tokens(contexts, n) for n in (work.image_tokens, work.tokens))
        of_image, _ = carried(programs, work, contexts)
        time = jax.ShapeDtypeStruct((contexts, config.adaln_dim), jnp.float32)
        context = programs.like(contexts, work.bucket, config.dim)
        stem = programs.module(COMPONENT, "stem")
        state, *rest = abstract(work, work.micro_batch, config.in_channels)
        ends = Ends(programs, work)
        # `join` and `leave` run beside the last chunk, the first `enter` beside a whole slot
        lane = choice.blocks.lanes[0]
        unused = lane.unused(len(lane.chunks) - 1)
        arguments: tuple = stem, state.latents, work.update.t
        joined: tuple = of_image, context
        if work.control_layers:
            arguments = *arguments, image.x
            joined = programs.module(COMPONENT, "control_before"), *joined
        scratch = [
            ends.enter.compiled(*arguments)[1],
            ends.join.compiled(*joined)[1] - unused,
            ends.leave.compiled(stem, joint, time, state, work.update, *rest)[1] - unused,
        ]
        if work.regions is not None:
            parts = [state.latents] * (work.views // work.micro_batch)
            scratch.append(ends.blend.compiled(parts)[1] - unused)
        return scratch

    def _visit(
        self,
        programs: Programs,
        work: Work,
        contexts: int,
        kind: VisitKind,
        units: tuple[str, ...],
    ) -> tuple:
        """x, inputs and static arguments of a visit of `kind` to `units`."""
        config, inputs = programs.config.transformer, programs.inputs(work, contexts)
        time = jax.ShapeDtypeStruct((contexts, config.adaln_dim), jnp.float32)
        of_image, of_joint = carried(programs, work, contexts)
        blocks = control if work.control_layers else dit
        scale: tuple = ()
        if work.control_layers:
            adds = runs_of(programs.config, work)[kind.run].adds
            scale = (floats() if adds else None,)
        if kind.nfe is None:
            static = {"apply": blocks.apply_blocks, "attend": programs.attend(work)}
            return of_image, (inputs.image._replace(time=time), *scale), static  # type: ignore[arg-type]
        kv_format, keeps, reuses = kind.nfe
        attentions = sum(map(components.has_attention, units))
        static = {"apply": blocks.apply_blocks, "attend": programs.attend(work)}
        if attentions:
            static["kv_format"] = kv_format
        keys = programs.keys(work, contexts, kv_format)
        given = inputs.joint._replace(time=time, keys=keys), *scale  # type: ignore[arg-type]
        if not attentions or not (keeps or reuses):
            return of_joint, given, static
        shape = contexts, work.tokens, config.n_heads, config.head_dim
        room = jax.eval_shape(lambda: kv.empty(kv_format, *shape))
        static |= {"apply": blocks.apply_blocks_cached, "reuses": reuses}
        return (of_joint, (room,) * attentions), given, static

    def _sampler(self, programs: Programs, work: Work) -> int:
        config, storage = programs.config.transformer, programs.storage
        units = units_of_scan(storage, work)
        model = storage.assemble(
            COMPONENT, {unit: storage.specs(COMPONENT, unit) for unit in units}
        )
        latents = floats(work.batch, work.h, work.w, config.in_channels)
        updates = jax.tree.map(lambda _: np.zeros(work.steps, np.float32), work.update)
        _, noise, kept = abstract(work, work.views, config.in_channels)
        noises = None if noise is None else floats(work.steps, *noise.shape)
        context = programs.like(work.contexts, work.bucket, config.dim)
        keys = tuple(programs.keys(work, work.contexts, phase.kv_format) for phase in work.phases)
        inputs = programs.inputs(work, work.contexts)
        arguments: tuple = model, latents, updates, context, inputs, keys, noises, kept
        if work.control_layers:
            image = programs.like(work.contexts, work.image_tokens, config.dim)
            arguments = *arguments, (image, floats())
        return programs.sampler(work).compiled(*arguments)[1]

    def stored(self, figures: Figures, work: Work, choice: DenoiseChoice, device: int = 0) -> int:
        sizes, contexts = Sizes(figures.storage, 2), _contexts(work)
        if choice.is_one_program:
            caches = any(phase.caches for phase in work.phases)
            kept = work.kv_bytes(sizes.config.transformer) if caches else 0
            tokens = work.contexts * work.tokens
            beside = figures.beside(COMPONENT, tokens)
            return figures.at("scan", tokens) + kept + figures.decoded(COMPONENT) + beside

        # what control blocks add, in float32 and as tokens
        width = sizes.config.transformer.dim if work.control_layers else 0
        added = contexts * work.tokens * width * (4 + sizes.compute_bytes)

        def most(kinds: frozenset[VisitKind]) -> int:
            refiner = frozenset(kind for kind in kinds if kind.nfe is None)
            return max(
                figures.blocks(self.name, refiner, contexts * work.image_tokens),
                figures.blocks(self.name, kinds - refiner, contexts * work.tokens),
            )

        return added + max(
            held + most(kinds) for held, kinds in _by_phase(sizes, work, choice, device)
        )

    # -- seconds -----------------------------------------------------------------------------------

    def seconds(self, timing: Timing, choice: DenoiseChoice) -> float:
        work, width = timing.work, timing.sizes.config.transformer.dim
        groups = work.views // work.micro_batch
        contexts = work.contexts // groups

        @cache  # a sweep asks as often as the picture has NFEs
        def run(device: int, unit: str, nfe: Nfe | None) -> float:
            block = partial(timing.on(device).block, COMPONENT, width=width)
            if nfe is None:
                return block(unit, contexts, work.image_tokens)
            keys = nfe.kv_format.keys(work.tokens)
            return block(unit, contexts, work.tokens, keys=keys, reuses=nfe.reuses)

        ends = ("stem", "control_before") if work.control_layers else ("stem",)
        stem = 0.0 if timing.plan.kept else sum(timing.unit(COMPONENT, unit) for unit in ends)
        cached = timing.kv_cache() if choice.kv_on_host else 0.0
        tokens = timing.sizes.tokens(work.contexts, work.tokens, width)
        nfes, blocks = work.nfes, choice.blocks
        return stem + timing.stream(blocks, run, nfes, groups, tokens) + cached

    # -- the run -----------------------------------------------------------------------------------

    def run(self, attempt: Attempt) -> Generator[Sweeps | Call, list, Float[np.ndarray, "B h w C"]]:
        if attempt.whole is None:
            attempt.whole = Whole.first(attempt)
        if attempt.plan.denoise.is_one_program:
            return scan(attempt)
        return (yield from Run(attempt).draw())


def _contexts(work: Work) -> int:
    """Contexts of a micro-batch."""
    return work.micro_batch * work.contexts // work.views


def _tokens_bytes(sizes: Sizes, work: Work) -> int:
    """Bytes of all tokens between programs (dit.Halfway), and of the time embeddings."""
    config = sizes.config.transformer
    halfway = 2 * config.dim * 4
    image, joint = (
        sizes.tokens(work.contexts, n, config.dim) + work.contexts * halfway
        for n in (work.image_tokens, work.tokens)
    )
    most = joint
    if work.control_layers:
        control = sizes.config.control
        assert control is not None
        most = max((2 if control.refiner == "none" else 3) * image, 2 * joint)
    return most + work.contexts * config.adaln_dim * 4


def _keys_bytes(sizes: Sizes, work: Work, phase: Phase) -> int:
    """Bytes of the key table of a phase, if its keys are groups of tokens."""
    if phase.kv_format.grid is None:
        return 0
    return sizes.inputs(work.contexts, phase.kv_format.keys(work.tokens), 1)


def _cache_bytes(sizes: Sizes, work: Work, phase: Phase, choice: DenoiseChoice, device: int) -> int:
    """Bytes of K and V on a device between programs, if the phase reuses them.

    All main blocks'; with K and V on the host, those of two successive chunks: one runs, one is
    copied.
    """
    if not phase.caches:
        return 0
    config = sizes.config.transformer
    chunks = [n for n, owner in choice.attending if owner == device]
    of_block = phase.kv_format.nbytes(work.contexts, work.tokens, config.n_heads, config.head_dim)
    pairs = [sum(chunks[i : i + 2]) for i in range(max(1, len(chunks) - 1))]
    return of_block * (max(pairs) if choice.kv_on_host else sum(chunks))


def _by_phase(
    sizes: Sizes, work: Work, choice: DenoiseChoice, device: int
) -> Iterator[tuple[int, frozenset[VisitKind]]]:
    """For each phase: bytes of its key table and K/V cache, and its kinds of visit, on a device."""
    visits, first = list(choice.blocks.lanes[device].visits(work.nfes)), 0
    for phase in work.phases:
        sweeps = range(first, first + phase.steps)
        held = _keys_bytes(sizes, work, phase) + _cache_bytes(sizes, work, phase, choice, device)
        yield held, frozenset(kind for sweep, _, kind in visits if sweep in sweeps)
        first = sweeps.stop
