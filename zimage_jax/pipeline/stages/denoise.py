"""Noise to latents under a plan: sweeps over the chunks, one per NFE, or the one program of `scan`.

Axes: B pictures, G contexts (B, or 2 B with guidance), h, w latent rows and columns, C latent
channels, L caption tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float, Int

from ...model import dit, kv, sampling
from ...model.kv import KV, KVFormat, Nfe, Phase
from ...planning.planner import Plan, Work
from ...runtime.compiled import Programs
from ...runtime.ledger import Ledger
from ...runtime.staging import Stream, Tiers
from ...weights import components
from ...weights.components import tree_bytes

Held = list[tuple[KV, ...]]  # of a chunk: for each micro-batch the K and V of its blocks


@dataclass(frozen=True)
class Denoiser:
    """One job's noise to latents. `observe(index, latents)` is called after every NFE."""

    programs: Programs
    tiers: Tiers
    plan: Plan
    work: Work
    host_bytes: int | None
    ledger: Ledger
    observe: Callable[[int, np.ndarray], None]

    def scan(
        self,
        noise: Float[np.ndarray, "B h w C"],
        sigmas: Float[np.ndarray, "levels"],
        context: Float[np.ndarray, "G L D"],
        sides: dit.Inputs,
        captions: Int[np.ndarray, "G"],
        guidance: float,
    ) -> Float[np.ndarray, "B h w C"]:
        """One compiled program for all NFEs. What `observe` raises is raised when it has ended."""
        config, work = self.programs.config, self.work
        units = list(components.units(config, "transformer"))
        leaves = dict(zip(units, self.tiers.pin("transformer", units, self.ledger), strict=True))
        model = components.assemble(config, "transformer", leaves)
        keys = tuple(self._keys(phase.kv_format, captions) for phase in work.phases)
        self.ledger.hold("activations", (noise, context, sides, keys))
        rest = sampling.times(sigmas), context, sides, keys, np.float32(guidance)
        assert self.programs.observer is not None
        with self.programs.observer.shows(self.observe):
            return np.asarray(self.programs.sampler(work)(self.ledger, model, noise, sigmas, *rest))

    def sweep(
        self,
        noise: Float[np.ndarray, "B h w C"],
        sigmas: Float[np.ndarray, "levels"],
        context: Float[np.ndarray, "G L D"],
        sides: dit.Inputs,
        captions: Int[np.ndarray, "G"],
        guidance: float,
    ) -> Float[np.ndarray, "B h w C"]:
        """The driver's loop; its parts are those of sampling.sample. Every chunk serves all
        micro-batches while it is there."""
        work, ledger, programs = self.work, self.ledger, self.programs
        enter = programs(sampling.enter, is_guided=work.is_guided, dtype=programs.dtype)
        join, leave = (
            programs(dit.join),
            programs(sampling.leave, donate=(3,), is_guided=work.is_guided),
        )
        groups = self._micro_batches()
        latents = [jax.device_put(noise[g[: work.micro_batch]]) for g in groups]
        contexts = [jax.device_put(context[g]) for g in groups]
        image, joint = ([_rows(side, g) for g in groups] for side in (sides.image, sides.joint))
        (stem,) = self.tiers.pin("transformer", ["stem"], ledger)
        stem = jax.tree.unflatten(programs.tree("transformer", "stem"), stem)
        refine = self._static(attend=programs.attend(len(groups[0]), work.image_tokens))
        times, index = sampling.times(sigmas), 0
        with self._stream() as stream:
            for phase in work.phases:
                keys = [_rows(self._keys(phase.kv_format, captions[g]), slice(None)) for g in groups]
                with self._cache(phase, len(groups)) as cache:
                    for nfe in phase.nfes():
                        entered = [enter(ledger, stem, x, times[index]) for x in latents]
                        xs, ts = (list(column) for column in zip(*entered, strict=True))
                        beside = [
                            (side._replace(time=t),) for side, t in zip(image, ts, strict=True)
                        ]
                        for _ in range(self.plan.refiner_chunks):
                            xs = stream.visit(xs, beside, **refine)
                        xs = [join(ledger, x, c) for x, c in zip(xs, contexts, strict=True)]
                        ledger.hold("activations", (xs, ts, contexts, latents, image, joint, keys))
                        each = zip(joint, ts, keys, strict=True)
                        beside = [(side._replace(time=t, keys=k),) for side, t, k in each]
                        xs = self._main_chunks(stream, nfe, cache, xs, beside, len(groups[0]))
                        now = sigmas[index], sigmas[index + 1], np.float32(guidance)
                        latents = [
                            leave(ledger, stem, x, t, z, *now)
                            for x, t, z in zip(xs, ts, latents, strict=True)
                        ]
                        self.observe(index, np.concatenate(latents))
                        index += 1
        return np.concatenate(latents)

    def _main_chunks(
        self,
        stream: Stream,
        nfe: Nfe,
        cache: "Cache | None",
        xs: list,
        beside: list[tuple],
        contexts: int,
    ) -> list:
        static = self._static(
            attend=self.programs.attend(contexts, self.work.tokens, nfe.kv_format), kv_format=nfe.kv_format
        )
        for chunk in range(len(self.plan.main_sizes)):
            if cache is None or not (nfe.keeps or nfe.reuses):
                xs = stream.visit(xs, beside, **static)
                continue
            carried = list(zip(xs, cache.take(chunk), strict=True))
            cached = static | {"run": dit.run_cached, "reuses": nfe.reuses}
            xs, held = (
                list(column)
                for column in zip(*stream.visit(carried, beside, **cached), strict=True)
            )
            cache.put(chunk, held, made=nfe.keeps)
        return xs

    def _static(self, **static) -> dict:
        return {"tree": self.programs.tree("transformer", "layers.0"), "run": dit.run, **static}

    def _stream(self) -> Stream:
        plan, nfes = self.plan.denoise, self.work.nfes
        return self.tiers.stream(
            "transformer",
            plan.chunks,
            plan.schedule,
            self.work.steps,
            self.host_bytes,
            self.ledger,
            lightly=lambda chunk, sweep: plan.lightly(chunk, nfes[sweep]),
        )

    def _keys(self, kv_format: KVFormat, captions: Int[np.ndarray, "G"]) -> dit.KeyTable | None:
        work = self.work
        return dit.grouped_keys(
            self.programs.config.transformer, work.h, work.w, captions, work.bucket, kv_format
        )

    @contextmanager
    def _cache(self, phase: Phase, groups: int) -> Iterator["Cache | None"]:
        """Room for the K and V of a phase that reuses them."""
        if not phase.caches:
            yield None
            return
        config = self.programs.config.transformer
        each = self.work.contexts // groups, self.work.tokens, config.n_heads, config.head_dim
        cache = Cache(
            phase.kv_format, each, groups, self.plan.main_sizes, self.plan.kv_on_host, self.ledger
        )
        try:
            yield cache
        finally:
            cache.clear()

    def _micro_batches(self) -> list[np.ndarray]:
        """Rows of the contexts that each micro-batch computes: its prompts', then with guidance
        their negatives'."""
        work = self.work
        rows = np.arange(work.batch).reshape(-1, work.micro_batch)
        return [np.concatenate([r, r + work.batch]) if work.is_guided else r for r in rows]


def _rows(tree, rows):
    """These rows of every array, on the device."""
    return jax.device_put(jax.tree.map(lambda a: a[rows], tree))


class Cache:
    """K and V that later NFEs reuse, by chunk: on the device, or on the host between visits."""

    NAME = "kv cache"

    def __init__(
        self,
        kv_format: KVFormat,
        shape: tuple[int, int, int, int],
        groups: int,
        sizes: tuple[int, ...],
        on_host: bool,
        ledger: Ledger,
    ):
        """`shape`: contexts of a micro-batch, tokens, heads, head width. `sizes`: blocks of each
        chunk."""
        self._ledger = ledger
        self._room: Callable[[int], Held] = lambda chunk: [
            tuple(kv.empty(kv_format, *shape) for _ in range(sizes[chunk])) for _ in range(groups)
        ]
        device = jax.local_devices()[0]
        self._host = SingleDeviceSharding(device, memory_kind="pinned_host") if on_host else None
        self._device = SingleDeviceSharding(device)
        self._held: dict[int, Held] = (
            {} if on_host else {chunk: self._room(chunk) for chunk in range(len(sizes))}
        )
        ledger.hold(self.NAME, self._held)

    def take(self, chunk: int) -> Held:
        """What is held for a chunk, or room for it; the caller may donate it."""
        if self._host is None:
            return self._held.pop(chunk)
        if chunk not in self._held:
            held = self._room(chunk)
        else:
            with self._ledger.event(
                "copy", f"{self.NAME} chunk {chunk}", tree_bytes(self._held[chunk])
            ):
                held = jax.block_until_ready(jax.device_put(self._held[chunk], self._device))
        self._ledger.hold(self.NAME, held)
        return held

    def put(self, chunk: int, held: Held, *, made: bool) -> None:
        """`held` after the chunk ran, `made` anew or as it was taken."""
        if self._host is None:
            self._held[chunk] = held
            return
        if made:
            self._held[chunk] = jax.block_until_ready(jax.device_put(held, self._host))
        self._ledger.drop(self.NAME)

    def clear(self) -> None:
        self._held.clear()
        self._ledger.drop(self.NAME)
