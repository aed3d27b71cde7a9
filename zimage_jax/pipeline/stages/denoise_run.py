"""The run of the denoise stage: a sweep over the transformer's chunks per NFE, or one program.

Axes: B pictures, V views (pictures, or the regions of all), m views of a micro-batch, G contexts
(V, or 2 V with guidance), H, W latent rows and columns of a picture, h, w those of a view, C latent
channels, L caption tokens, D width, A adaLN width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ...model import dit, sampling
from ...model.kv import KVFormat, Nfe
from ...model.regions import Regions
from ...model.samplers import Trajectory
from ...planning.work import Work
from ...runtime.programs import Programs
from ...runtime.stream import Stream
from ..attempt import Attempt
from .context import Context
from .kv_cache import KVCache, kv_cache

COMPONENT = "transformer"


class Start(NamedTuple):
    """The arrays that a sampler begins from, on the host."""

    latents: Float[np.ndarray, "B h w C"]  # of whole pictures
    kept: sampling.Kept | None  # of views
    # of views, one draw for each step that adds noise
    noises: Float[np.ndarray, "nfes V h w C"] | None


def start_of(attempt: Attempt) -> Start:
    """The first latents: noise, or the picture's latents with noise up to the first level."""
    job, work, path = attempt.job, attempt.work, attempt.trajectory
    shape = work.h, work.w, attempt.config.transformer.in_channels

    def draw(index: int) -> Float[np.ndarray, "B h w C"]:
        return np.stack([sampling.NOISE[job.noise](seed, *shape, index) for seed in job.seeds])

    def of_views(pictures: np.ndarray) -> np.ndarray:
        return pictures if work.regions is None else work.regions.split(pictures)

    noise, kept, noises = draw(0), None, None
    latents = noise
    if work.encodes:
        picture = np.broadcast_to(attempt.results["encode"], noise.shape)
        level = np.float32(path.start)
        latents = level * noise + (1 - level) * picture
        if work.update.kept is not None:
            assert job.canvas is not None
            of_picture = job.canvas.latent_mask(attempt.config.vae.scale)
            assert of_picture is not None
            mask = np.broadcast_to(of_picture[None, :, :, None], (*noise.shape[:3], 1))
            kept = sampling.Kept(*map(of_views, (picture, noise, mask)))
    if work.update.noise is not None:
        noises = np.stack([of_views(draw(index + 1)) for index in range(path.nfes)])
    return Start(latents, kept, noises)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract(work: Work, views: int, channels: int) -> tuple:
    """Of `views` pictures or regions: the state, a step's noise, and what a mask keeps."""
    update, latents = work.update, floats(views, *work.view, channels)
    mask = floats(views, *work.view, 1)
    return (
        sampling.State(latents, None if update.carry is None else latents),
        None if update.noise is None else latents,
        None if update.kept is None else sampling.Kept(latents, latents, mask),
    )


class Ends:
    """The programs before and after the blocks of an NFE."""

    def __init__(self, programs: Programs, work: Work):
        self.enter = programs(enter, is_guided=work.is_guided, dtype=programs.dtype)
        self.join = programs(join)
        self.leave = programs(leave, donate=(3,))
        self.blend = programs(blend, regions=work.regions)


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


def leave(stem: dit.Stem, tokens: dit.Halfway, *rest) -> sampling.State:
    """sampling.after_blocks; `rest` are its arguments after the tokens."""
    return sampling.after_blocks(stem, tokens.x, *rest)


def blend(
    parts: list[Float[Array, "m h w C"]], *, regions: Regions
) -> tuple[Float[Array, "B H W C"], list[Float[Array, "m h w C"]]]:
    """Whole pictures from the micro-batches of their regions, and the regions cut from them."""
    canvas = regions.blend(jnp.concatenate(parts))
    return canvas, jnp.split(regions.split(canvas), len(parts))


@dataclass
class _Run:
    """What both ways to run all NFEs share."""

    attempt: Attempt
    context: Context
    trajectory: Trajectory
    start: Start

    def keys(self, kv_format: KVFormat, rows=slice(None)) -> dit.KeyTable | None:
        work, config = self.attempt.work, self.attempt.config.transformer
        lengths = self.context.lengths[rows]
        return dit.grouped_keys(config, *work.view, lengths, work.bucket, kv_format)


class Scan(_Run):
    """One compiled program for all NFEs."""

    def draw(self) -> Float[np.ndarray, "B h w C"]:
        """An error in the attempt's `observe` is raised when the program has ended."""
        attempt, programs = self.attempt, self.attempt.programs
        units = programs.storage.units(COMPONENT)
        leaves = dict(zip(units, attempt.loan.pin(COMPONENT, units), strict=True))
        model = programs.storage.assemble(COMPONENT, leaves)
        keys = tuple(self.keys(phase.kv_format) for phase in attempt.work.phases)
        (latents, kept, noises), (context, inputs, _) = self.start, self.context
        attempt.hold(latents, context, inputs, keys, kept, noises)
        rest = self.trajectory.update, context, inputs, keys, noises, kept
        assert programs.observer is not None
        with programs.observer.shows(attempt.observe):
            return np.asarray(programs.sampler(attempt.work)(attempt.ledger, model, latents, *rest))


class Sweep(_Run):
    """One sweep per NFE, with the parts of sampling.sample. A visit runs all micro-batches."""

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Each micro-batch's rows of contexts: its prompts', then with guidance its negatives'."""
        work = self.attempt.work
        rows = np.arange(work.views).reshape(-1, work.micro_batch)
        return [np.concatenate([r, r + work.views]) if work.is_guided else r for r in rows]

    def _rows(self, tree, rows):
        """The given rows of every array in `tree`, on the device."""
        return self.attempt.placement.put(jax.tree.map(lambda a: a[rows], tree))

    def draw(self) -> Float[np.ndarray, "B h w C"]:
        attempt, work, groups = self.attempt, self.attempt.work, self.groups
        pictures = [g[: work.micro_batch] for g in groups]
        latents = self.start.latents
        parts = latents if work.regions is None else work.regions.split(latents)
        states = [sampling.State.first(self._rows(parts, g), work.update) for g in pictures]
        self._kept = [self._rows(self.start.kept, g) for g in pictures]
        self._contexts = [self._rows(self.context.context, g) for g in groups]
        inputs = self.context.inputs
        self._image = [self._rows(inputs.image, g) for g in groups]
        self._joint = [self._rows(inputs.joint, g) for g in groups]
        self._stem = attempt.loan.module(COMPONENT, "stem")
        self._ends = Ends(attempt.programs, work)
        self._room = self._tokens()
        choice, nfes, index = attempt.plan.denoise, work.nfes, 0

        def without_kv(chunk: int, sweep: int) -> bool:
            return choice.blocks.without_kv(chunk, nfes[sweep])

        with attempt.stream(choice.blocks, work.steps, without_kv=without_kv) as stream:
            for phase in work.phases:
                keys = [self._rows(self.keys(phase.kv_format, g), slice(None)) for g in groups]
                with kv_cache(attempt, phase, len(groups)) as cache:
                    for nfe in phase.nfes():
                        states = self._nfe(stream, index, nfe, cache, keys, states)
                        latents, states = self._together(states)
                        attempt.observe(index, latents)
                        index += 1
        return latents

    def _together(self, states: list) -> tuple[Float[np.ndarray, "B h w C"], list]:
        """The latents of whole pictures on the host, and the states to go on with."""
        parts = [state.latents for state in states]
        if self.attempt.work.regions is None:
            return np.concatenate(parts), states
        canvas, parts = self._ends.blend(self.attempt.ledger, parts)
        states = [s._replace(latents=part) for s, part in zip(states, parts, strict=True)]
        return np.asarray(canvas), states

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
        self, stream: Stream, index: int, nfe: Nfe, cache: KVCache | None, keys: list, states: list
    ) -> list:
        attempt, ledger, ends = self.attempt, self.attempt.ledger, self._ends
        update, noises = self.trajectory.step(index), self._noises(index)
        of_step = states, noises, self._kept
        attempt.hold(self._room, self._contexts, of_step, self._image, self._joint, keys)
        entered = [ends.enter(ledger, self._stem, s.latents, update.t) for s in states]
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
        return [
            ends.leave(ledger, self._stem, x, time, state, update, noise, kept)
            for x, time, state, noise, kept in zip(xs, times, *of_step, strict=True)
        ]

    def _noises(self, index: int) -> list:
        """The noise that a step adds, by micro-batch."""
        noises, count = self.start.noises, self.attempt.work.micro_batch
        if noises is None:
            return [None] * len(self.groups)
        return [self._rows(noises[index], rows[:count]) for rows in self.groups]

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
