"""The compiled programs of a pipeline, and what they take of the device according to the compiler.

Axes: B pictures, G contexts (B, or 2 B with guidance), P distinct prompts, L caption tokens, I
image tokens, T = I + L."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..model import dit, kv, sampling, text_encoder, vae
from ..model.config import ModelConfig
from ..model.kv import KVFormat
from ..model.ops import Attend
from ..model.vae_strips import strip_programs
from ..planning.planner import Visit, Work
from ..weights import components
from ..weights.components import tree_bytes
from .staging import Program, ring_step, run_chunk


class Observer:
    """What the scan's program calls after every NFE: one for all jobs, or each would be compiled
    anew."""

    def __init__(self) -> None:
        self._see: Callable[[int, np.ndarray], None] | None = None
        self._fault: BaseException | None = None

    def __call__(self, index: jax.Array, latents: jax.Array) -> None:
        try:
            if self._see is not None:
                self._see(int(index), np.asarray(latents))
        except BaseException as fault:
            self._see, self._fault = None, fault

    @contextmanager
    def shows(self, see: Callable[[int, np.ndarray], None]) -> Iterator[None]:
        """While a program runs. What `see` raises is raised when the program has ended: it cannot
        be stopped from within."""
        self._see, self._fault = see, None
        try:
            yield
        finally:
            self._see = None
        if self._fault is not None:
            raise self._fault


class Programs:
    """One Program per function and static arguments, for one model and compute dtype."""

    observer: Observer | None

    def __init__(self, config: ModelConfig, stored: str, dtype):
        self.config, self.stored, self.dtype = config, stored, jnp.dtype(dtype)
        self._programs: dict[tuple, Program] = {}
        self.observer = Observer()

    def __call__(self, function: Callable, *, donate: tuple[int, ...] = (), **static) -> Program:
        key = (function, donate, *sorted(static.items()))
        if key not in self._programs:
            precision = "float32" if self.dtype == jnp.float32 else None
            self._programs[key] = Program(function, donate=donate, precision=precision, **static)
        return self._programs[key]

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._programs.values())

    @property
    def compilations(self) -> int:
        return sum(program.compilations for program in self._programs.values())

    def attend(self, batch: int, tokens: int, hold: KVFormat | None = None) -> Attend:
        """How so many tokens of so many contexts attend, to K and V that are held as they are or in
        some other way."""
        dtype, keys = (
            (hold.attention_dtype(self.dtype), hold.keys(tokens)) if hold else (self.dtype, tokens)
        )
        return Attend.choose(
            jax.default_backend(), dtype, batch, tokens, keys, self.config.transformer.n_heads
        )

    def sampler(self, work: Work) -> Program:
        """The whole sampler as one program, which tells the observer of every NFE."""
        phases = tuple(
            (phase, self.attend(work.contexts, work.tokens, phase.kv_format)) for phase in work.phases
        )
        attend = self.attend(work.contexts, work.image_tokens)
        return self(
            sampling.sample,
            is_guided=work.is_guided,
            attend=attend,
            phases=phases,
            on_step=self.observer,
        )

    def tree(self, component: str, unit: str):
        """The structure that turns a unit's leaves into its module."""
        return jax.tree.structure(components.unit_spec(self.config, component, unit))


class CompiledCosts:
    """What the planner asks, answered by compiling the very programs that will run.
    (planner.Costs)"""

    def __init__(self, programs: Programs):
        self._programs, self._config = programs, programs.config

    def text(self, work: Work, visits: frozenset[Visit], slot: int) -> int:
        x = self._like(work.prompts, work.bucket, self._config.text_encoder.hidden_size)
        return self._most(
            visits, slot, "text_encoder", "layers.0", lambda _: (text_encoder.run, x, (), {})
        )

    def context(self, work: Work, visits: frozenset[Visit], slot: int) -> int:
        features = self._like(work.contexts, work.bucket, self._config.text_encoder.hidden_size)
        x = self._like(work.contexts, work.bucket, self._config.transformer.dim)
        lengths = np.zeros(work.contexts, np.int32)
        side, static = (
            self._sides(work, work.contexts).caption,
            {"attend": self._programs.attend(*x.shape[:2])},
        )
        embed = self._programs(dit.embed_caption).compiled(self._stem(), features, lengths)[1]
        group = "context_refiner.0"
        return max(
            embed,
            self._most(visits, slot, "transformer", group, lambda _: (dit.run, x, (side,), static)),
        )

    def denoise(
        self, work: Work, refiner: frozenset[Visit], main: frozenset[Visit], slot: int
    ) -> int:
        config, own = self._config.transformer, []
        contexts = work.micro_batch * work.contexts // work.batch
        sides = self._sides(work, contexts)
        image, joint = (
            self._like(contexts, n, config.dim) for n in (work.image_tokens, work.tokens)
        )
        time = jax.ShapeDtypeStruct((contexts, config.adaln_dim), jnp.float32)
        latents = jax.ShapeDtypeStruct(
            (work.micro_batch, work.h, work.w, config.in_channels), jnp.float32
        )
        number, is_guided = np.float32(0), work.is_guided
        enter = self._programs(sampling.enter, is_guided=is_guided, dtype=self._programs.dtype)
        own.append(enter.compiled(self._stem(), latents, number)[1])
        context = self._like(contexts, work.bucket, config.dim)
        own.append(self._programs(dit.join).compiled(image, context)[1])
        leave = self._programs(sampling.leave, donate=(3,), is_guided=is_guided)
        own.append(leave.compiled(self._stem(), joint, time, latents, number, number, number)[1])

        def of_refiner(_: Visit) -> tuple:
            static = {"attend": self._programs.attend(contexts, work.image_tokens)}
            return dit.run, image, (sides.image._replace(time=time),), static  # type: ignore[arg-type]

        def of_main(visit: Visit) -> tuple:
            hold, keeps, reuses = visit.nfe  # type: ignore[misc]
            static = {"attend": self._programs.attend(contexts, work.tokens, hold), "hold": hold}
            side = sides.joint._replace(time=time, keys=self._keys(work, contexts, hold))  # type: ignore[arg-type]
            if not (keeps or reuses):
                return dit.run, joint, (side,), static
            room = jax.eval_shape(
                lambda: kv.empty(hold, contexts, work.tokens, config.n_heads, config.head_dim)
            )
            return (
                dit.run_cached,
                (joint, (room,) * visit.blocks),
                (side,),
                static | {"reuses": reuses},
            )

        own.append(self._most(refiner, slot, "transformer", "noise_refiner.0", of_refiner))
        own.append(self._most(main, slot, "transformer", "layers.0", of_main))
        return max(own)

    def scan(self, work: Work) -> int:
        config, sides = self._config.transformer, self._sides(work, work.contexts)
        model = components.assemble(
            self._config,
            "transformer",
            {
                u: self._leaves("transformer", u)
                for u in components.units(self._config, "transformer")
            },
        )
        noise = jax.ShapeDtypeStruct((work.batch, work.h, work.w, config.in_channels), jnp.float32)
        sigmas = sampling.sigmas(work.steps, self._config.scheduler.shift)
        context = self._like(work.contexts, work.bucket, config.dim)
        keys = tuple(self._keys(work, work.contexts, phase.kv_format) for phase in work.phases)
        run = self._programs.sampler(work)
        return run.compiled(
            model, noise, sigmas, sampling.times(sigmas), context, sides, keys, np.float32(0)
        )[1]

    def decode(self, work: Work, rows: int | None, tile: int | None) -> int:
        config, dtype = self._config.vae, vae.compute_dtype(self._programs.dtype)
        decoder = components.assemble(
            self._config, "vae", {"decoder": self._leaves("vae", "decoder")}
        )
        if rows is not None:
            shape = (1, work.h, work.w, config.latent_channels)
            calls = strip_programs(decoder.decoder, shape, dtype, rows)
            return max(
                self._programs(c.function, **c.static).compiled(*c.arguments)[1]
                + tree_bytes(c.arguments[1:])
                for c in calls
            )
        side = tile // config.scale if tile else None
        h, w = (min(n, side) if side else n for n in (work.h, work.w))
        latents = jax.ShapeDtypeStruct((1, h, w, config.latent_channels), jnp.float32)
        return self._programs(vae.decode, dtype=dtype).compiled(decoder, latents)[1]

    # -- abstract arguments ------------------------------------------------------------------------

    def _like(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self._programs.dtype)

    def _leaves(self, component: str, unit: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        return components.leaves(self._config, component, unit, self._programs.stored)

    def _stem(self):
        return jax.tree.unflatten(
            self._programs.tree("transformer", "stem"), self._leaves("transformer", "stem")
        )

    def _sides(self, work: Work, contexts: int) -> dit.Inputs:
        lengths = np.full(contexts, work.bucket, np.int32)
        return dit.inputs(self._config.transformer, work.h, work.w, lengths, work.bucket)

    def _keys(self, work: Work, contexts: int, hold: KVFormat) -> dit.KeyTable | None:
        lengths = np.full(contexts, work.bucket, np.int32)
        return dit.grouped_keys(
            self._config.transformer, work.h, work.w, lengths, work.bucket, hold
        )

    def _most(
        self,
        visits: Iterable[Visit],
        slot: int,
        component: str,
        unit: str,
        call: Callable[[Visit], tuple],
    ) -> int:
        """The most that any of these visits takes. `call` gives what runs the blocks, its x, side
        and static arguments."""
        leaves, tree = self._leaves(component, unit), self._programs.tree(component, unit)
        host = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        away = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host) for a in leaves)
        own = [0]
        for visit in visits:
            run, x, side, static = call(visit)
            static |= {"tree": tree, "run": run}
            chunk = (leaves,) * visit.blocks
            if visit.copied:
                ring = self._programs(ring_step, donate=(1, 3), **static)
                block = (
                    components.without_keys_values(self._config, unit, away)
                    if visit.lightly
                    else away
                )
                args = chunk, (leaves,) * slot, (block,) * visit.copied, x, *side
                own.append(ring.compiled(*args)[1])
            else:
                plain = self._programs(run_chunk, donate=(1,), **static)
                own.append(plain.compiled(chunk, x, *side)[1])
        return max(own)
