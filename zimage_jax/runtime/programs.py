"""The compiled programs of a model: one per function and static arguments, shared by all jobs.

Axes: B pictures, G contexts (B, or 2 B with guidance), L caption tokens, I image tokens, T = I + L.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..model import dit, sampling
from ..model.attention import Attend, Target
from ..model.config import ModelConfig
from ..model.kv import KVFormat
from ..planning.plan import Stage
from ..planning.stream_plan import StreamPlan, VisitKind
from ..planning.work import Work
from ..weights.formats import Storage
from .placement import HOST, Placement, require_cudnn
from .program import Program, Recent
from .stream import replaced_by, ring_step, run_chunk

# executables that a model keeps: a size takes about thirty, and sixteen may be in flight
MOST_EXECUTABLES = 1024


class Observer:
    """The callback of the scan's program, called after every NFE.

    All jobs share one, because a program with another callback would be compiled anew.
    """

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
        """Call `see` after every NFE of a program that runs inside the `with` block.

        A program cannot be stopped: an error in `see` is raised when the program has ended.
        """
        self._see, self._fault = see, None
        try:
            yield
        finally:
            self._see = None
        if self._fault is not None:
            raise self._fault


class Programs:
    """One Program per function, static arguments and device, for one model and compute dtype."""

    observer: Observer | None

    def __init__(self, storage: Storage, dtype, placement: Placement):
        self.storage, self.dtype, self.placement = storage, jnp.dtype(dtype), placement
        self._programs: dict[tuple, Program] = {}
        self._recent = Recent(MOST_EXECUTABLES)
        self._lock = threading.Lock()
        self.observer = Observer()

    def of(self, storage: Storage) -> "Programs":
        """The programs of this model stored otherwise; what both need is compiled once."""
        found = copy.copy(self)
        found.storage = storage
        return found

    @property
    def config(self) -> ModelConfig:
        return self.storage.config

    def __call__(
        self, function: Callable, *, donate: tuple[int, ...] = (), device: int = 0, **static
    ) -> Any:
        """The program of a function, for one of the placement's devices."""
        key = (function, donate, device, *sorted(static.items()))
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._make(function, donate, device, static)
            return self._programs[key]

    def _make(self, function: Callable, donate: tuple[int, ...], device: int, static: dict) -> Any:
        precision = "float32" if self.dtype == jnp.float32 else None
        return Program(
            self.placement.each[device],
            function,
            donate=donate,
            precision=precision,
            recent=self._recent,
            **static,
        )

    @property
    def compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._programs.values())

    @property
    def compilations(self) -> int:
        return sum(program.compilations for program in self._programs.values())

    @property
    def target(self) -> Target:
        """The kind of device that programs are compiled for."""
        return self.placement.target

    def attend(self, work: Work) -> Attend:
        """A job's attention on this device. Raises UsageError if it needs cuDNN and there is
        none."""
        if work.attention == "cudnn":
            require_cudnn()
        return Attend(work.attention, self.target)

    def attention_names(self, work: Work) -> str:
        """The kernels that compute the main blocks' attention, in the order of the phases."""
        attend, width = self.attend(work), self.config.transformer.head_dim
        names = [
            attend.implementation(
                kv_format.attention_dtype(self.dtype), width, biased=kv_format.grid is not None
            )
            for kv_format in (phase.kv_format for phase in work.phases)
        ]
        return ", ".join(dict.fromkeys(names))

    def sampler(self, work: Work) -> Program:
        """The whole sampler as one program, which calls the observer after every NFE."""
        return self(
            sampling.sample,
            attend=self.attend(work),
            phases=work.phases,
            regions=work.regions,
            parts=(self.config.transformer, self.config.control) if work.control_layers else None,
            on_step=self.observer,
        )

    # -- abstract arguments ------------------------------------------------------------------------

    def module(self, component: str, unit: str) -> Any:
        """A unit's module, with ShapeDtypeStructs for arrays."""
        return self.storage.module(component, unit)

    def like(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def tokens(self, contexts: int, tokens: int, *, modulated: bool = True) -> dit.Halfway:
        """The transformer's tokens between programs."""
        x = self.like(contexts, tokens, self.config.transformer.dim)
        return jax.eval_shape(functools.partial(dit.Halfway.before, modulated=modulated), x)

    def inputs(self, work: Work, contexts: int) -> dit.Inputs:
        return _inputs(self.config, *work.view, contexts, work.bucket)

    def keys(self, work: Work, contexts: int, kv_format: KVFormat) -> dit.KeyTable | None:
        lengths = np.full(contexts, work.bucket, np.int32)
        return dit.grouped_keys(
            self.config.transformer, *work.view, lengths, work.bucket, kv_format
        )

    def most(
        self,
        plan: StreamPlan,
        kinds: Iterable[VisitKind],
        call: Callable[[VisitKind, tuple[str, ...]], tuple],
        device: int = 0,
    ) -> int:
        """The largest scratch of `kinds` of visit, for the `plan` of a device. `call(kind, units)`:
        x, inputs, static arguments."""
        storage, component = self.storage, plan.component
        host = self.placement.each[device].sharding(HOST)

        def on_host(unit: str, without_kv: bool) -> tuple:
            leaves = storage.specs(component, unit)
            away = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host) for a in leaves]
            return storage.without_kv(component, unit, away) if without_kv else tuple(away)

        def on_device(units: tuple[str, ...]) -> tuple:
            return tuple(storage.specs(component, unit) for unit in units)

        scratch = [0]
        for kind in kinds:
            units = plan.like(kind.shape, kind.units)
            x, inputs, static = call(kind, units)
            chunk, static = on_device(units), static | {"trees": storage.trees(component, units)}
            if kind.copied:
                ring = self(ring_step, donate=(1, 3), device=device, **static)
                copied = plan.like(kind.copied_shape, kind.copied)
                following = tuple(on_host(unit, kind.without_kv) for unit in copied)
                spare = replaced_by(on_device(plan.slot_for(copied)), following)
                compiled = ring.compiled(chunk, spare, following, x, *inputs)
            else:
                plain = self(run_chunk, donate=(1,), device=device, **static)
                compiled = plain.compiled(chunk, x, *inputs)
            scratch.append(compiled[1] - kind.unused)
        return max(scratch)


class CompiledCosts:
    """Scratch bytes from compiling the same programs that will run: a planning.plan.Costs."""

    def __init__(self, programs: Programs):
        self._programs = programs

    def scratch(self, stage: Stage, work: Work, choice: Any, device: int = 0) -> int:
        return stage.compiled(self._programs, work, choice, device)


@functools.lru_cache(maxsize=4)
def _inputs(config: ModelConfig, h: int, w: int, contexts: int, bucket: int) -> dit.Inputs:
    """Cached: a plan asks once per kind of visit, and a table of rotations takes milliseconds."""
    # only shapes matter here; captions that fill the bucket could exceed axes_lens
    return dit.inputs(config.transformer, h, w, np.ones(contexts, np.int32), bucket)
