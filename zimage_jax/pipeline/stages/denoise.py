"""Noise to latents: one sweep over the transformer's chunks per NFE, or the one program of `scan`.

Axes: B pictures, G contexts (B, or 2 B with guidance), h, w latent rows and columns, C latent
channels, L caption tokens, D width, A adaLN width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ...model import dit, kv, sampling
from ...model.kv import KVFormat, Nfe, Phase
from ...planning import schedule
from ...planning.plan import MAIN, Choice, Memory, Option, Sizes, StreamPlan, VisitKind
from ...planning.planner import streams
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.work import Work
from ...runtime.programs import Programs
from ...runtime.stream import Stream
from ...weights import components
from ..attempt import Attempt
from .context import Context
from .kv_cache import KVCache, kv_cache

COMPONENT = "transformer"


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
    def refiner_chunks(self) -> int:
        return sum(not self.blocks.is_main(chunk) for chunk in range(len(self.blocks.chunks)))

    @property
    def main_chunks(self) -> tuple[tuple[str, ...], ...]:
        return self.blocks.chunks[self.refiner_chunks :]

    @property
    def attentions(self) -> tuple[int, ...]:
        """How many attentions each main chunk has: as many K and V."""
        return tuple(sum(map(components.has_attention, units)) for units in self.main_chunks)

    @property
    def resident_chunks(self) -> int:
        """How many main chunks are resident."""
        return sum(self.blocks.is_main(chunk) for chunk in self.blocks.schedule.resident)

    def __str__(self) -> str:
        chunks, of = self.main_chunks, self.blocks.schedule
        words = schedule.row(of.name).summary.format(
            resident=self.resident_chunks, ahead=max(0, of.slots - 1)
        )
        plural = "s" if len(chunks) > 1 else ""
        return f"{of.name}, {len(chunks)} chunk{plural} of {_length(chunks)}, {words}"


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
        refiner, main = (sizes.units(COMPONENT, group) for group in ("noise_refiner", "layers"))
        between = {
            "latents": work.batch * work.h * work.w * config.in_channels * 4,
            "context": sizes.tokens(work, work.bucket, config.dim),
            "rotations": sizes.inputs(work, work.image_tokens + work.tokens, 1),
        }
        stem = {"stem": storage.nbytes(COMPONENT, "stem")}
        caches = any(phase.caches for phase in work.phases)
        choices = []
        for stream in streams(sizes, COMPONENT, refiner, main, memory):
            choices.append(DenoiseChoice(stream))
            if caches and not choices[-1].is_one_program:
                choices.append(DenoiseChoice(stream, kv_on_host=True))
        # K and V on the host are faster than a schedule that waits for its copies
        for choice in sorted(choices, key=lambda c: (c.blocks.waits, c.kv_on_host)):
            if choice.is_one_program:  # its tokens are scratch, its arguments have all inputs
                keys = sum(_keys_bytes(sizes, work, phase) for phase in work.phases)
                of_caption = keys + sizes.inputs(work, work.bucket, 1)
                activations = between | {"rotations": between["rotations"] + of_caption}
            else:
                activations = between | {"tokens": _tokens_bytes(sizes, work)}
            weights = stem | choice.blocks.device_arrays
            units = ("stem", *refiner, *main)
            stays = frozenset((COMPONENT, u) for u in units) if choice.blocks.is_resident else None
            yield Option(choice, weights, activations, stays)

    def compiled(self, programs: Programs, work: Work, choice: DenoiseChoice) -> int:
        if choice.is_one_program:
            return self._sampler(programs, work)
        config = programs.config.transformer
        contexts = work.micro_batch * work.contexts // work.batch
        image, joint = (programs.tokens(contexts, n) for n in (work.image_tokens, work.tokens))
        time = jax.ShapeDtypeStruct((contexts, config.adaln_dim), jnp.float32)
        latents = jax.ShapeDtypeStruct(
            (work.micro_batch, work.h, work.w, config.in_channels), jnp.float32
        )
        context = programs.like(contexts, work.bucket, config.dim)
        number, stem = np.float32(0), programs.module(COMPONENT, "stem")
        ends = _Ends(programs, work)
        sizes = Sizes(programs.storage, programs.dtype.itemsize)
        # `join` and `leave` run beside the last chunk, the first `enter` beside a whole slot
        unused = choice.blocks.unused(len(choice.blocks.chunks) - 1)
        scratch = [
            ends.enter.compiled(stem, latents, number)[1],
            ends.join.compiled(image, context)[1] - unused,
            ends.leave.compiled(stem, joint, time, latents, number, number, number)[1] - unused,
        ]
        visit = partial(self._visit, programs, work, contexts)
        return max(
            held + max(*scratch, programs.most(choice.blocks, kinds, visit))
            for held, kinds in _by_phase(sizes, work, choice)
        )

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
        if kind.nfe is None:
            static = {
                "apply": dit.apply_blocks,
                "attend": programs.attend(work),
            }
            x = programs.tokens(contexts, work.image_tokens)
            return x, (inputs.image._replace(time=time),), static  # type: ignore[arg-type]
        kv_format, keeps, reuses = kind.nfe
        attentions = sum(map(components.has_attention, units))
        static = {"apply": dit.apply_blocks, "attend": programs.attend(work)}
        if attentions:
            static["kv_format"] = kv_format
        keys = programs.keys(work, contexts, kv_format)
        of_joint = inputs.joint._replace(time=time, keys=keys)  # type: ignore[arg-type]
        x = programs.tokens(contexts, work.tokens)
        if not attentions or not (keeps or reuses):
            return x, (of_joint,), static
        shape = contexts, work.tokens, config.n_heads, config.head_dim
        room = jax.eval_shape(lambda: kv.empty(kv_format, *shape))
        static |= {"apply": dit.apply_blocks_cached, "reuses": reuses}
        return (x, (room,) * attentions), (of_joint,), static

    def _sampler(self, programs: Programs, work: Work) -> int:
        config, storage = programs.config.transformer, programs.storage
        units = storage.units(COMPONENT)
        model = storage.assemble(
            COMPONENT, {unit: storage.specs(COMPONENT, unit) for unit in units}
        )
        noise = jax.ShapeDtypeStruct((work.batch, work.h, work.w, config.in_channels), jnp.float32)
        sigmas = sampling.sigmas(work.steps, programs.config.scheduler.shift)
        context = programs.like(work.contexts, work.bucket, config.dim)
        keys = tuple(programs.keys(work, work.contexts, phase.kv_format) for phase in work.phases)
        rest = (
            sampling.times(sigmas),
            context,
            programs.inputs(work, work.contexts),
            keys,
            np.float32(0),
        )
        return programs.sampler(work).compiled(model, noise, sigmas, *rest)[1]

    def stored(self, figures: Figures, work: Work, choice: DenoiseChoice) -> int:
        sizes, contexts = Sizes(figures.storage, 2), work.micro_batch * work.contexts // work.batch
        if choice.is_one_program:
            caches = any(phase.caches for phase in work.phases)
            kept = work.kv_bytes(sizes.config.transformer) if caches else 0
            return (
                figures.at("scan", work.contexts * work.tokens) + kept + figures.decoded(COMPONENT)
            )

        def most(kinds: frozenset[VisitKind]) -> int:
            refiner = frozenset(kind for kind in kinds if kind.nfe is None)
            return max(
                figures.blocks(self.name, refiner, contexts * work.image_tokens),
                figures.blocks(self.name, kinds - refiner, contexts * work.tokens),
            )

        return max(held + most(kinds) for held, kinds in _by_phase(sizes, work, choice))

    # -- seconds -----------------------------------------------------------------------------------

    def seconds(self, timing: Timing, choice: DenoiseChoice) -> float:
        work, width = timing.work, timing.sizes.config.transformer.dim
        groups = work.batch // work.micro_batch
        block = partial(timing.block, COMPONENT, width=width)

        contexts = work.contexts // groups

        @cache  # a sweep asks as often as the picture has NFEs
        def run(unit: str, nfe: Nfe | None) -> float:
            if not unit.startswith(MAIN):
                return block(unit, contexts, work.image_tokens)
            keys = nfe.kv_format.keys(work.tokens) if nfe else work.tokens
            reuses = nfe is not None and nfe.reuses
            return block(unit, contexts, work.tokens, keys=keys, reuses=reuses)

        stem = 0.0 if timing.plan.kept else timing.unit(COMPONENT, "stem")
        cached = timing.kv_cache() if choice.kv_on_host else 0.0
        return stem + timing.stream(choice.blocks, run, nfes=work.nfes, groups=groups) + cached

    # -- the run -----------------------------------------------------------------------------------

    def run(self, attempt: Attempt) -> Float[np.ndarray, "B h w C"]:
        job, work, config = attempt.job, attempt.work, attempt.config
        noise_of, channels = sampling.NOISE[job.noise], config.transformer.in_channels
        noise = np.stack([noise_of(seed, work.h, work.w, channels) for seed in job.seeds])
        sigmas = sampling.sigmas(job.steps, config.scheduler.shift)
        kind = _Scan if attempt.plan.denoise.is_one_program else _Sweep
        return kind(attempt, attempt.results["context"], sigmas).draw(noise)


class _Ends:
    """The programs before and after the blocks of an NFE."""

    def __init__(self, programs: Programs, work: Work):
        self.enter = programs(enter, is_guided=work.is_guided, dtype=programs.dtype)
        self.join = programs(join)
        self.leave = programs(leave, donate=(3,), is_guided=work.is_guided)


# Between programs tokens are a dit.Halfway: a chunk may end inside a block


def enter(
    stem: dit.Stem, latents: Float[Array, "B h w C"], t: Float[Array, ""], **static
) -> tuple[dit.Halfway, Float[Array, "G A"]]:
    """sampling.before_blocks, with tokens for the noise refiner, and the time embeddings."""
    x, time = sampling.before_blocks(stem, latents, t, **static)
    return dit.Halfway.before(x), time


def join(image: dit.Halfway, context: Float[Array, "G L D"]) -> dit.Halfway:
    """dit.join, with tokens for the main blocks."""
    return dit.Halfway.before(dit.join(image.x, context))


def leave(stem: dit.Stem, tokens: dit.Halfway, *rest: Array, **static) -> Float[Array, "B h w C"]:
    """sampling.after_blocks; `rest` are its arguments after the tokens."""
    return sampling.after_blocks(stem, tokens.x, *rest, **static)


@dataclass
class _Sampler:
    attempt: Attempt
    context: Context
    sigmas: Float[np.ndarray, "levels"]

    @property
    def guidance(self) -> np.float32:
        return np.float32(self.attempt.job.guidance)

    def keys(self, kv_format: KVFormat, rows=slice(None)) -> dit.KeyTable | None:
        work, config = self.attempt.work, self.attempt.config.transformer
        lengths = self.context.lengths[rows]
        return dit.grouped_keys(config, work.h, work.w, lengths, work.bucket, kv_format)


class _Scan(_Sampler):
    """One compiled program for all NFEs."""

    def draw(self, noise: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, "B h w C"]:
        """An error in the attempt's `observe` is raised when the program has ended."""
        attempt, programs = self.attempt, self.attempt.programs
        units = programs.storage.units(COMPONENT)
        leaves = dict(zip(units, attempt.loan.pin(COMPONENT, units), strict=True))
        model = programs.storage.assemble(COMPONENT, leaves)
        keys = tuple(self.keys(phase.kv_format) for phase in attempt.work.phases)
        context, inputs, _ = self.context
        attempt.hold(noise, context, inputs, keys)
        rest = sampling.times(self.sigmas), context, inputs, keys, self.guidance
        assert programs.observer is not None
        with programs.observer.shows(attempt.observe):
            return np.asarray(
                programs.sampler(attempt.work)(attempt.ledger, model, noise, self.sigmas, *rest)
            )


class _Sweep(_Sampler):
    """One sweep per NFE, with the parts of sampling.sample. A visit runs all micro-batches."""

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Each micro-batch's rows of contexts: its prompts', then with guidance its negatives'."""
        work = self.attempt.work
        rows = np.arange(work.batch).reshape(-1, work.micro_batch)
        return [np.concatenate([r, r + work.batch]) if work.is_guided else r for r in rows]

    def _rows(self, tree, rows):
        """The given rows of every array in `tree`, on the device."""
        return self.attempt.placement.put(jax.tree.map(lambda a: a[rows], tree))

    def draw(self, noise: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, "B h w C"]:
        attempt, work, groups = self.attempt, self.attempt.work, self.groups
        latents = [self._rows(noise, g[: work.micro_batch]) for g in groups]
        self._contexts = [self._rows(self.context.context, g) for g in groups]
        inputs = self.context.inputs
        self._image = [self._rows(inputs.image, g) for g in groups]
        self._joint = [self._rows(inputs.joint, g) for g in groups]
        self._stem = attempt.loan.module(COMPONENT, "stem")
        self._ends = _Ends(attempt.programs, work)
        self._room = self._tokens()
        choice, nfes, index = attempt.plan.denoise, work.nfes, 0

        def without_kv(chunk: int, sweep: int) -> bool:
            return choice.blocks.without_kv(chunk, nfes[sweep])

        with attempt.stream(choice.blocks, work.steps, without_kv=without_kv) as stream:
            for phase in work.phases:
                keys = [self._rows(self.keys(phase.kv_format, g), slice(None)) for g in groups]
                with kv_cache(attempt, phase, len(groups)) as cache:
                    for nfe in phase.nfes():
                        latents = self._nfe(stream, index, nfe, cache, keys, latents)
                        attempt.observe(index, np.concatenate(latents))
                        index += 1
        return np.concatenate(latents)

    def _tokens(self) -> list:
        """The tokens and time embeddings of every micro-batch, abstract: the ledger counts them from
        an NFE's beginning to its end."""
        attempt, width = self.attempt, self.attempt.config.transformer.adaln_dim
        tokens = attempt.programs.tokens
        return [
            (
                tokens(len(rows), attempt.work.tokens),
                jax.ShapeDtypeStruct((len(rows), width), jnp.float32),
            )
            for rows in self.groups
        ]

    def _nfe(
        self, stream: Stream, index: int, nfe: Nfe, cache: KVCache | None, keys: list, latents: list
    ) -> list:
        attempt, ledger, ends = self.attempt, self.attempt.ledger, self._ends
        t = sampling.times(self.sigmas)[index]
        sigma, sigma_next = self.sigmas[index : index + 2]
        attempt.hold(self._room, self._contexts, latents, self._image, self._joint, keys)
        entered = [ends.enter(ledger, self._stem, x, t) for x in latents]
        xs, times = (list(column) for column in zip(*entered, strict=True))
        of_image = [
            (inputs._replace(time=time),) for inputs, time in zip(self._image, times, strict=True)
        ]
        refine = self._static(attend=attempt.programs.attend(attempt.work))
        for _ in range(attempt.plan.denoise.refiner_chunks):
            xs = stream.visit(xs, of_image, **refine)
        xs = [ends.join(ledger, x, c) for x, c in zip(xs, self._contexts, strict=True)]
        of_joint = [
            (inputs._replace(time=time, keys=k),)
            for inputs, time, k in zip(self._joint, times, keys, strict=True)
        ]
        xs = self._main_chunks(stream, nfe, cache, xs, of_joint)
        levels = sigma, sigma_next, self.guidance
        return [
            ends.leave(ledger, self._stem, x, time, z, *levels)
            for x, time, z in zip(xs, times, latents, strict=True)
        ]

    def _main_chunks(
        self, stream: Stream, nfe: Nfe, cache: KVCache | None, xs: list, inputs: list[tuple]
    ) -> list:
        attempt, taken = self.attempt, 0
        static = self._static(attend=attempt.programs.attend(attempt.work))
        for attentions in attempt.plan.denoise.attentions:
            if not attentions:
                xs = stream.visit(xs, inputs, **static)
                continue
            attending = static | {"kv_format": nfe.kv_format}
            if cache is None or not (nfe.keeps or nfe.reuses):
                xs = stream.visit(xs, inputs, **attending)
                continue
            carried = list(zip(xs, cache.take(taken, reads=nfe.reuses), strict=True))
            cached = attending | {"apply": dit.apply_blocks_cached, "reuses": nfe.reuses}
            xs, held = (
                list(column)
                for column in zip(*stream.visit(carried, inputs, **cached), strict=True)
            )
            cache.put(taken, held, made=nfe.keeps)
            taken += 1
        return xs

    def _static(self, **static) -> dict:
        return {"apply": dit.apply_blocks, **static}


def _tokens_bytes(sizes: Sizes, work: Work) -> int:
    """Bytes of all tokens between programs (dit.Halfway), and of the time embeddings."""
    config = sizes.config.transformer
    per_context = (2 * config.dim + config.adaln_dim) * 4
    return sizes.tokens(work, work.tokens, config.dim) + work.contexts * per_context


def _keys_bytes(sizes: Sizes, work: Work, phase: Phase) -> int:
    """Bytes of the key table of a phase, if its keys are groups of tokens."""
    if phase.kv_format.grid is None:
        return 0
    return sizes.inputs(work, phase.kv_format.keys(work.tokens), 1)


def _cache_bytes(sizes: Sizes, work: Work, phase: Phase, choice: DenoiseChoice) -> int:
    """Bytes of K and V on the device between programs, if the phase reuses them.

    All main blocks'; with K and V on the host, those of two successive chunks: one runs, one is
    copied.
    """
    if not phase.caches:
        return 0
    config, chunks = sizes.config.transformer, [n for n in choice.attentions if n]
    of_block = phase.kv_format.nbytes(work.contexts, work.tokens, config.n_heads, config.head_dim)
    pairs = [sum(chunks[i : i + 2]) for i in range(max(1, len(chunks) - 1))]
    return of_block * (max(pairs) if choice.kv_on_host else sum(chunks))


def _by_phase(
    sizes: Sizes, work: Work, choice: DenoiseChoice
) -> Iterator[tuple[int, frozenset[VisitKind]]]:
    """For each phase: bytes of its key table and K/V cache, and its kinds of visit."""
    visits, first = list(choice.blocks.visits(work.nfes)), 0
    for phase in work.phases:
        sweeps = range(first, first + phase.steps)
        held = _keys_bytes(sizes, work, phase) + _cache_bytes(sizes, work, phase, choice)
        yield held, frozenset(kind for sweep, _, kind in visits if sweep in sweeps)
        first = sweeps.stop
