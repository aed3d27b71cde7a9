"""The run of the denoise stage: a sweep over the transformer's chunks per NFE, or one program.

Axes: B pictures, V views (pictures, or the regions of all), m views of a micro-batch, G contexts
(V, or 2 V with guidance), H, W latent rows and columns of a picture, h, w those of a view, C latent
channels, L caption tokens, D width, A adaLN width.
"""

from collections.abc import Generator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ...model import control, dit, sampling
from ...model.config import ModelConfig
from ...model.kv import KVFormat, Nfe
from ...model.regions import Regions
from ...planning.work import Work
from ...runtime.programs import Programs
from ...runtime.stream import Call, Sweeps
from ...units import tree_bytes
from ...weights.formats import Storage
from ..attempt import Attempt
from .kv_cache import KVCache, kv_cache

COMPONENT = "transformer"


class Whole(NamedTuple):
    """What the sampler goes on from, on the host: all it needs for the NFEs after the first `done`.

    Kept in the attempt, so that a run that lost its arrays on the device begins again from here.
    """

    done: int
    latents: Float[np.ndarray, "B h w C"]  # of whole pictures
    # the sampler's memory of the last NFE, by micro-batch; None if it has none, or none yet
    memories: list[Float[np.ndarray, "m h w C"]] | None
    kept: sampling.Kept | None  # of views
    # of views, one draw for each step that adds noise
    noises: Float[np.ndarray, "nfes V h w C"] | None

    @classmethod
    def first(cls, attempt: Attempt) -> "Whole":
        """Noise, or the latents that the job begins from, with noise up to the first level."""
        job, work, path = attempt.job, attempt.work, attempt.trajectory
        shape = work.h, work.w, attempt.config.transformer.in_channels

        def draw(index: int) -> Float[np.ndarray, "B h w C"]:
            return np.stack([sampling.NOISE[job.noise](seed, *shape, index) for seed in job.seeds])

        def of_views(pictures: np.ndarray) -> np.ndarray:
            return pictures if work.regions is None else work.regions.split(pictures)

        noise, kept, noises = draw(0), None, None
        latents = noise
        if job.canvas is not None:
            picture = attempt.first
            level = np.float32(path.start)
            latents = level * noise + (1 - level) * picture
            if work.update.kept is not None:
                of_picture = job.canvas.latent_mask(attempt.config.vae.scale)
                assert of_picture is not None
                mask = np.broadcast_to(of_picture[..., None], (*noise.shape[:3], 1))
                kept = sampling.Kept(*map(of_views, (picture, noise, mask)))
        if work.update.noise is not None:
            noises = np.stack([of_views(draw(index + 1)) for index in range(path.nfes)])
        return cls(0, latents, None, kept, noises)


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


def runs_of(config: ModelConfig, work: Work) -> tuple[control.Run, ...]:
    """The blocks of an NFE by name: those over image tokens, then those over all tokens."""
    if work.control_layers:
        assert config.control is not None
        return control.runs(config.transformer, config.control)
    c = config.transformer
    counts = {"noise_refiner": c.n_refiner_layers, "layers": c.n_layers}
    return tuple(
        control.Run(tuple(f"{group}.{i}" for i in range(count))) for group, count in counts.items()
    )


def units_of_scan(storage: Storage, work: Work) -> list[str]:
    """The units that one program for all NFEs takes."""
    units = storage.units(COMPONENT)
    if work.control_layers:
        return [unit for unit in units if unit != "control_embedder"]
    return [unit for unit in units if not control.is_of_branch(unit)]


def carried(programs: Programs, work: Work, contexts: int) -> tuple[Any, Any]:
    """What blocks carry over image tokens, and over all tokens, abstract."""
    image, joint = (programs.tokens(contexts, n) for n in (work.image_tokens, work.tokens))
    if not work.control_layers:
        return image, joint
    of = programs.config.control
    assert of is not None
    seen = None if of.refiner == "none" else image
    return control.Tokens(image, image, seen), control.Tokens(joint, joint, None)


class Ends:
    """The programs before and after the blocks of an NFE."""

    def __init__(self, programs: Programs, work: Work):
        static = {"is_guided": work.is_guided, "dtype": programs.dtype}
        self.enter, self.join = programs(enter, **static), programs(join)
        if work.control_layers:
            assert programs.config.control is not None
            refiner = programs.config.control.refiner
            self.enter = programs(enter_controlled, refiner=refiner, **static)
            self.join = programs(control.join)
        self.leave = programs(leave, donate=(3,))
        self.blend = programs(blend, regions=work.regions)


# Between programs tokens are a dit.Halfway: a chunk may end inside a block


def enter(
    stem: dit.Stem, latents: Float[Array, "B h w C"], t: Float[Array, ""], **static
) -> tuple[dit.Halfway, Float[Array, "G A"]]:
    """sampling.before_blocks, with tokens for the noise refiner, and the time embeddings."""
    x, time = sampling.before_blocks(stem, latents, t, **static)
    return dit.Halfway.before(x), time


def enter_controlled(
    stem: dit.Stem,
    latents: Float[Array, "B h w C"],
    t: Float[Array, ""],
    tokens: Float[Array, "G I D"],
    *,
    refiner: str,
    **static,
) -> tuple[control.Tokens, Float[Array, "G A"]]:
    """sampling.before_blocks, with control tokens, and the time embeddings."""
    x, time = sampling.before_blocks(stem, latents, t, **static)
    return control.enter(x, tokens, refiner), time


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


def _keys(attempt: Attempt, kv_format: KVFormat, rows=slice(None)) -> dit.KeyTable | None:
    work, config = attempt.work, attempt.config.transformer
    lengths = attempt.results["context"].lengths[rows]
    return dit.grouped_keys(config, *work.view, lengths, work.bucket, kv_format)


def scan(attempt: Attempt) -> Float[np.ndarray, "B h w C"]:
    """All NFEs in one compiled program. An error in the attempt's `observe` is raised when the
    program has ended."""
    programs = attempt.programs
    work = attempt.work
    units = units_of_scan(programs.storage, work)
    leaves = dict(zip(units, attempt.loan.pin(COMPONENT, units), strict=True))
    model = programs.storage.assemble(COMPONENT, leaves)
    keys = tuple(_keys(attempt, phase.kv_format) for phase in attempt.work.phases)
    whole, (context, inputs, _) = attempt.whole, attempt.results["context"]
    controlled: tuple = ()
    if work.control_layers:
        controlled = ((_control(attempt), np.float32(attempt.job.control_scale)),)
    attempt.hold(
        whole.latents, context, inputs, keys, whole.kept, whole.noises, *(c[0] for c in controlled)
    )
    rest = attempt.trajectory.update, context, inputs, keys, whole.noises, whole.kept, *controlled
    assert programs.observer is not None
    with programs.observer.shows(attempt.observe):
        sampler = programs.sampler(attempt.work)
        return np.asarray(sampler(attempt.recorder, model, whole.latents, *rest))


def _control(attempt: Attempt) -> Float[np.ndarray, "G I D"]:
    """The control tokens of each context, on the host."""
    tokens = attempt.results["control"]  # of one picture's views
    return np.tile(tokens, (attempt.work.contexts // len(tokens), 1, 1))


class Run:
    """The NFEs of one attempt, with the parts of sampling.sample: each is a sweep, in which all
    micro-batches are called on each chunk."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Each micro-batch's rows of contexts: its prompts', then with guidance its negatives'."""
        work = self.attempt.work
        rows = np.arange(work.views).reshape(-1, work.micro_batch)
        return [np.concatenate([r, r + work.views]) if work.is_guided else r for r in rows]

    def _rows(self, tree, rows):
        """The given rows of every array in `tree`, on the device."""
        return self.attempt.placement.put(jax.tree.map(lambda a: a[rows], tree))

    def draw(self) -> Generator[Sweeps | Call, list, Float[np.ndarray, "B h w C"]]:
        """Yields as `Sweeps` says, and returns the last latents."""
        attempt, work, index = self.attempt, self.attempt.work, self.attempt.whole.done
        yield Sweeps(work.nfes[index:])
        states, latents, end = self._begin(), attempt.whole.latents, 0
        for phase in work.phases:
            begin, end = end, end + phase.steps
            if index >= end:
                continue
            keys = [
                self._rows(_keys(attempt, phase.kv_format, g), slice(None)) for g in self.groups
            ]
            with kv_cache(attempt, phase, len(self.groups)) as cache:
                for nfe in list(phase.nfes())[index - begin :]:
                    states = yield from self._nfe(index, nfe, cache, keys, states)
                    latents, states = self._together(states)
                    latents.flags.writeable = False  # a callback sees the sampler's own
                    index += 1
                    self._keep(index, latents, states)
                    attempt.observe(index - 1, latents)
                    if index < work.steps:
                        yield Sweeps(work.nfes[index:])
        return latents

    def _begin(self) -> list[sampling.State]:
        """Put on the device what every NFE needs. Returns the micro-batches' states."""
        attempt, work, groups = self.attempt, self.attempt.work, self.groups
        whole, (context, inputs, _) = attempt.whole, attempt.results["context"]
        pictures = [g[: work.micro_batch] for g in groups]
        self._kept = [self._rows(whole.kept, g) for g in pictures]
        self._contexts = [self._rows(context, g) for g in groups]
        self._image = [self._rows(inputs.image, g) for g in groups]
        self._joint = [self._rows(inputs.joint, g) for g in groups]
        self._stem = attempt.loan.module(COMPONENT, "stem")
        self._controls, self._scale = [None] * len(groups), None
        if work.control_layers:
            tokens, self._scale = _control(attempt), np.float32(attempt.job.control_scale)
            self._controls = [self._rows(tokens, g) for g in groups]
            self._before = attempt.loan.module(COMPONENT, "control_before")
        self._ends = Ends(attempt.programs, work)
        self._room = self._tokens()
        latents = whole.latents
        parts = latents if work.regions is None else work.regions.split(latents)
        states = [sampling.State.first(self._rows(parts, g), work.update) for g in pictures]
        if whole.memories is None:
            return states
        memories = attempt.placement.put(whole.memories)
        return [s._replace(memory=m) for s, m in zip(states, memories, strict=True)]

    def _keep(self, index: int, latents: np.ndarray, states: list[sampling.State]) -> None:
        """Go on from here if the device's arrays are lost; not if the next NFE needs this one's K
        and V."""
        attempt, nfes = self.attempt, self.attempt.work.nfes
        if index < len(nfes) and not nfes[index].reuses:
            has_memory = attempt.work.update.carry is not None
            memories = [np.array(state.memory) for state in states] if has_memory else None
            attempt.whole = attempt.whole._replace(done=index, latents=latents, memories=memories)

    def _together(self, states: list) -> tuple[Float[np.ndarray, "B h w C"], list]:
        """The latents of whole pictures on the host, and the states to go on with."""
        parts = [state.latents for state in states]
        if self.attempt.work.regions is None:
            return np.concatenate(parts), states
        canvas, parts = self._ends.blend(self.attempt.recorder, parts)
        states = [s._replace(latents=part) for s, part in zip(states, parts, strict=True)]
        return np.asarray(canvas), states

    def _tokens(self) -> list:
        """The tokens and time embeddings of every micro-batch, abstract: they are counted from an
        NFE's beginning to its end."""
        attempt, width = self.attempt, self.attempt.config.transformer.adaln_dim
        programs, work = attempt.programs, attempt.work
        return [
            (
                max(carried(programs, work, len(rows)), key=tree_bytes),
                jax.ShapeDtypeStruct((len(rows), width), jnp.float32),
            )
            for rows in self.groups
        ]

    def _nfe(
        self, index: int, nfe: Nfe, cache: KVCache | None, keys: list, states: list
    ) -> Generator[Call, list, list[sampling.State]]:
        attempt, recorder, ends = self.attempt, self.attempt.recorder, self._ends
        update, noises = attempt.trajectory.step(index), self._noises(index)
        of_step = states, noises, self._kept
        attempt.hold(
            self._room, self._contexts, self._controls, of_step, self._image, self._joint, keys
        )
        is_controlled, controls = bool(attempt.work.control_layers), self._controls
        entered = [
            ends.enter(
                recorder, self._stem, s.latents, update.t, *([tokens] if is_controlled else [])
            )
            for s, tokens in zip(states, controls, strict=True)
        ]
        xs, times = (list(column) for column in zip(*entered, strict=True))
        away = self._room, self._image, self._joint, keys
        static = {
            "apply": (control if is_controlled else dit).apply_blocks,
            "attend": attempt.programs.attend(attempt.work),
        }
        chunks = attempt.plan.denoise.refiner_chunks
        runs = runs_of(attempt.config, attempt.work)
        for count, run in zip(chunks, runs[:-1], strict=True):
            scale = self._scales(adds=run.adds)
            of_image = [
                (inputs._replace(time=time), *scale)
                for inputs, time in zip(self._image, times, strict=True)
            ]
            for _ in range(count):
                xs = yield Call(xs, of_image, static, away)
        xs = attempt.placement.brought(xs)
        before = [self._before] if is_controlled else []
        xs = [ends.join(recorder, *before, x, c) for x, c in zip(xs, self._contexts, strict=True)]
        of_joint = [
            (inputs._replace(time=time, keys=k), *self._scales(adds=True))
            for inputs, time, k in zip(self._joint, times, keys, strict=True)
        ]
        call = Call(xs, of_joint, static, away)
        xs = attempt.placement.brought((yield from self._main_chunks(nfe, cache, call)))
        xs = [x.trunk for x in xs] if is_controlled else xs
        return [
            ends.leave(recorder, self._stem, x, time, state, update, noise, kept)
            for x, time, state, noise, kept in zip(xs, times, *of_step, strict=True)
        ]

    def _scales(self, *, adds: bool) -> tuple:
        """The input of control blocks that says how much they add, where there are any."""
        if not self.attempt.work.control_layers:
            return ()
        return (self._scale if adds else None,)

    def _noises(self, index: int) -> list:
        """The noise that a step adds, by micro-batch."""
        noises, count = self.attempt.whole.noises, self.attempt.work.micro_batch
        if noises is None:
            return [None] * len(self.groups)
        return [self._rows(noises[index], rows[:count]) for rows in self.groups]

    def _main_chunks(
        self, nfe: Nfe, cache: KVCache | None, call: Call
    ) -> Generator[Call, list, list]:
        """The tokens after all main chunks. `call`: that of the first, without K and V."""
        taken, (xs, _, static, _) = 0, call
        for attentions in self.attempt.plan.denoise.attentions:
            if not attentions:
                xs = yield call._replace(xs=xs)
                continue
            attending = static | {"kv_format": nfe.kv_format}
            if cache is None or not (nfe.keeps or nfe.reuses):
                xs = yield call._replace(xs=xs, static=attending)
                continue
            carried = list(zip(xs, cache.take(taken, reads=nfe.reuses), strict=True))
            of = control if self.attempt.work.control_layers else dit
            cached = attending | {"apply": of.apply_blocks_cached, "reuses": nfe.reuses}
            visited = yield call._replace(xs=carried, static=cached)
            xs, held = (list(column) for column in zip(*visited, strict=True))
            cache.put(taken, held, made=nfe.keeps)
            taken += 1
        return xs
