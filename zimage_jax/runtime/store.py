"""The parameters of one model: on the device, in host memory, or on disk."""

import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from ..planning.plan import Plan, StreamPlan
from ..units import tree_bytes
from ..weights import components
from ..weights.adapters import Adapters, Merged
from ..weights.checkpoint import ModelFiles
from ..weights.formats import Storage
from .placement import DEVICE, Placement, free_host_bytes
from .program import Program
from .reader import READERS, HostSource, Leaves, Source, WindowSource, read_units, settled
from .recorder import Recorder
from .sides import OfPath, SidedSource, Sides
from .stream import Pinned, Stream

Unit = tuple[str, str]  # component, unit
# of a block in place, by layout: scripts/results/other_files.md
WINDOW_COST = "10 to 40 times the CPU time of a native checkpoint"


@dataclass(frozen=True)
class Loras:
    """LoRAs that jobs in flight use: `sides` beside the model's layers, or merged into them."""

    adapters: Adapters
    sides: Sides | None  # None: merged


class ParameterStore:
    """A model's parameters on the device and in host memory, kept between jobs.

    The jobs in flight use it through one `Loan`. They have the same LoRAs: those beside the layers
    come and go without the model's own parameters; where LoRAs are merged, all are read anew.
    """

    def __init__(
        self, checkpoint: ModelFiles, placement: Placement, program: Callable[..., Program]
    ):
        self._own = self.checkpoint = checkpoint
        self.placement, self.program = placement, program
        # a pin waits for a read: in one pool, pins before their reads would wait for ever
        self.readers, self.pinners = ThreadPoolExecutor(READERS), ThreadPoolExecutor(READERS)
        self.device: dict[Unit, Future[Leaves]] = {}
        self.beside: dict[Unit, Future[OfPath]] = {}  # of LoRAs, on the device
        self.loras: Loras | None = None
        self._host: dict[Unit, tuple[np.ndarray, ...]] = {}
        self._sources: dict[tuple[str, int | None], Source] = {}
        self._lock = threading.Lock()

    def lend(
        self,
        recorder: Recorder,
        *,
        kept: frozenset[Unit],
        host_bytes: int | None,
        loras: Loras | None = None,
    ) -> "Loan":
        """The loan of the jobs in flight.

        `kept`: the units that their plans keep on the device. `host_bytes`: read blocks through a
        window of this size instead of keeping them in host memory.
        """
        if loras is not self.loras:
            self._change(loras, recorder)
        return Loan(self, recorder, kept=kept, host_bytes=host_bytes)

    def _change(self, loras: Loras | None, recorder: Recorder) -> None:
        """From now on jobs use these LoRAs."""
        self.drop_beside(self.beside, recorder)
        merged = loras if loras is not None and loras.sides is None else None
        if merged is not None or self.checkpoint is not self._own:
            self.clear(recorder)
            with self._lock:
                self.checkpoint = self._own if merged is None else Merged(merged.adapters)
                self._sources, self._host = {}, {}
        self.loras = loras

    def drop_beside(self, units: Container[Unit], recorder: Recorder) -> None:
        """Drop what is beside these units from the device, and what is not there yet."""
        there = settled(self.beside)
        kept = {unit: future for unit, future in there.items() if unit not in units}
        for component, unit in self.beside.keys() - kept.keys():
            recorder.drop(f"{component} {unit}, LoRA")
        self.beside = kept

    def read_ahead(self, budget: int, host_bytes: int | None, recorder: Recorder) -> None:
        """Start to read blocks into host memory, so that they are read while programs compile.

        Only if the blocks exceed `budget` and must stream from host memory.
        """
        components = ("text_encoder", "transformer")
        total = sum(self.checkpoint.nbytes(component) for component in components)
        if self.placement.shares_memory or host_bytes is not None or total <= budget:
            return
        for component in components:
            source = self.source(component, None)
            if isinstance(source, HostSource):
                for unit in self.checkpoint.units(component):
                    if "." in unit:  # a block
                        source.unit(unit, recorder, self.readers)

    def read(self, units: Sequence[tuple[str, tuple[str, ...]]], host_bytes: int | None) -> int:
        """Read blocks into host memory, where they stay. Returns their bytes: none that are read
        through a window.

        `units`: component and units, or halves, of each chunk.
        """
        reading = dict[Unit, Future[Leaves]]()
        for component, chunk in units:
            source = self.source(component, host_bytes)
            if isinstance(source, HostSource):
                for unit in map(components.unit_of, chunk):
                    if (component, unit) not in reading:
                        future = source.unit(unit, Recorder(), self.readers)
                        reading[component, unit] = future
        for future in reading.values():
            future.result()
        return sum(map(self.nbytes, reading))

    def clear(self, recorder: Recorder) -> None:
        """Drop all parameters from the device."""
        settled(self.device)
        for component, unit in self.device:
            recorder.drop(f"{component} {unit}")
        self.device = {}
        self.drop_beside(list(self.beside), recorder)

    def on_host(self, component: str, unit: str) -> tuple[np.ndarray, ...]:
        """A unit that is used on the host only; it is read once."""
        if (component, unit) not in self._host:
            self._host[component, unit] = tuple(self.checkpoint.read(component, unit).values())
        return self._host[component, unit]

    def source(self, component: str, host_bytes: int | None) -> Source:
        """The source of a component's streamed blocks.

        Blocks are kept in host memory if they take at most 80 % of it. The transformer has
        priority, because it is streamed once per NFE and the text encoder once per job.
        """
        with self._lock:
            return self._source(component, host_bytes)

    def _source(self, component: str, host_bytes: int | None) -> Source:
        if (component, host_bytes) not in self._sources:
            first = ("transformer",) if component == "transformer" else ("transformer", component)
            nbytes = sum(self.checkpoint.nbytes(c) for c in first)
            if host_bytes is None and nbytes <= 0.8 * (free_host_bytes() + self.host_bytes):
                made: Source = HostSource(self.checkpoint, component, self.placement)
            else:
                made = WindowSource(self.checkpoint, component, self.placement, host_bytes)
            self._sources[component, host_bytes] = made
        return self._sources[component, host_bytes]

    def remarks(self, plan: Plan) -> list[str]:
        """What a user should know of a plan: that it makes blocks anew at every use."""
        streams = [c.stream for c in plan.choices.values() if c.stream and c.stream.streamed]
        sources = [self.source(stream.component, plan.host_window) for stream in streams]
        if not self.checkpoint.is_in_place or not any(isinstance(s, WindowSource) for s in sources):
            return []
        return [
            f"{self.checkpoint.path}: its blocks are read in place through a window of host memory, "
            f"and made anew at every use, which takes {WINDOW_COST}; convert it with "
            "python -m checkpoints_convert"
        ]

    @property
    def host_bytes(self) -> int:
        """Bytes that are kept in host memory between jobs."""
        sides = self.loras.sides if self.loras is not None else None
        return (
            sum(source.host_bytes for source in self._sources.values())
            + tree_bytes(list(self._host.values()))
            + (0 if sides is None else sides.host_bytes)
        )

    def free_device_bytes(self) -> int:
        """Device bytes that a plan may use: the free ones, and those of parameters there."""
        sides = self.loras.sides if self.loras is not None else None
        beside = 0 if sides is None else sum(tree_bytes(sides.of(*u)) for u in list(self.beside))
        return self.placement.free_bytes() + beside + sum(map(self.nbytes, list(self.device)))

    def nbytes(self, unit: Unit) -> int:
        return self.checkpoint.storage.nbytes(*unit)


class Loan:
    """One job's use of the store's parameters, recorded in its recorder."""

    def __init__(
        self,
        store: ParameterStore,
        recorder: Recorder,
        *,
        kept: frozenset[Unit],
        host_bytes: int | None,
    ):
        self.store, self._recorder, self._kept, self._host_bytes = store, recorder, kept, host_bytes
        self._sides = store.loras.sides if store.loras is not None else None
        # units that are dropped from the device stay in host memory, so that the next job need not
        # read them. Not if the device's memory is the host's
        self._pins_from_host = not kept and host_bytes is None and not store.placement.shares_memory

    @property
    def storage(self) -> Storage:
        """Of the model, with what LoRAs have beside it."""
        return self.store.checkpoint.storage if self._sides is None else self._sides.storage

    def pin(self, component: str, units: Sequence[str]) -> tuple[Leaves, ...]:
        """The leaves of units on the device, where they stay until `release`."""
        return tuple(leaves.result() for leaves in self.pin_ahead(component, units))

    def pin_ahead(self, component: str, units: Sequence[str]) -> list[Pinned]:
        """Like `pin`, but returns futures at once. The ledger counts their bytes from now on."""
        store = self.store
        for unit in units:
            if (component, unit) not in store.device:
                self._recorder.hold(
                    f"{component} {unit}", store.checkpoint.storage.specs(component, unit)
                )
                store.device[component, unit] = store.pinners.submit(self._read, component, unit)
        if self._sides is None:
            return [store.device[component, unit] for unit in units]
        return [self._with_sides(self._sides, component, unit) for unit in units]

    def _with_sides(self, sides: Sides, component: str, unit: str) -> Pinned:
        """A pinned unit's leaves together with what is beside it, which is pinned too."""
        store, key = self.store, (component, unit)
        found = sides.of(component, unit)
        if not found:
            return store.device[key]
        if key not in store.beside:
            name = f"{component} {unit}, LoRA"
            self._recorder.hold(name, list(found.values()))

            def copy() -> OfPath:
                with self._recorder.event("copy", name, tree_bytes(found)):
                    return store.placement.put(found)

            store.beside[key] = store.pinners.submit(copy)
        return _Together(sides, key, store.device[key], store.beside[key])

    def leaves_of(self, component: str, unit: str, own: Leaves, placement: Placement) -> Leaves:
        """A unit's leaves on another device, together with what is beside it."""
        if self._sides is None:
            return own
        beside = placement.put(self._sides.of(component, unit))
        return self._sides.together(component, unit, own, beside)

    def _read(self, component: str, unit: str) -> Leaves:
        store, name = self.store, f"{component} {unit}"
        nbytes = store.nbytes((component, unit))
        source = store.source(component, None) if self._pins_from_host else None
        if isinstance(source, HostSource):
            of_unit = source.unit(components.unit_of(unit), self._recorder).result()
            leaves = source.of_half(unit, of_unit)
            with self._recorder.event("copy", name, nbytes):
                return store.placement.put(leaves)
        with self._recorder.event("tier", name, nbytes), self._recorder.event("copy", name, nbytes):
            return read_units(store.checkpoint, component, [unit], store.placement, DEVICE)[unit]

    def module(self, component: str, unit: str):
        """A unit's module, on the device until `release`."""
        (leaves,) = self.pin(component, [unit])
        (tree,) = self.storage.trees(component, [unit])
        return jax.tree.unflatten(tree, leaves)

    def on_host(self, component: str, unit: str) -> tuple[np.ndarray, ...]:
        return self.store.on_host(component, unit)

    def stream(
        self,
        plan: StreamPlan,
        sweeps: int,
        without_kv: Callable[[int, int], bool] = lambda chunk, sweep: False,
    ) -> Stream:
        """A stream of a stage's blocks under its schedule."""
        store, source = self.store, self.store.source(plan.component, self._host_bytes)
        return Stream(
            source if self._sides is None else SidedSource(source, self._sides, plan.component),
            plan,
            self.storage,
            sweeps,
            program=store.program,
            recorder=self._recorder,
            pin=lambda units: self.pin_ahead(plan.component, units),
            without_kv=without_kv,
            spread=store.placement.spread,
        )

    def release(self, *, wanted: Container[Unit] = (), room: int = 0) -> None:
        """Drop parameters from the device, but for those that the plan keeps.

        Of the `wanted` units, those stay that were pinned first and take at most `room` bytes.
        """
        kept, nbytes = {}, self.storage.nbytes
        for of, future in settled(self.store.device).items():
            if of in self._kept:
                kept[of] = future
            elif of in wanted and nbytes(*of) <= room:
                room -= nbytes(*of)
                kept[of] = future
        for component, unit in self.store.device.keys() - kept.keys():
            self._recorder.drop(f"{component} {unit}")
        self.store.drop_beside(self.store.beside.keys() - kept.keys(), self._recorder)
        self.store.device = kept


@dataclass(frozen=True)
class _Together:
    """A unit's leaves that are on their way to the device, and what is beside them."""

    sides: Sides
    key: Unit
    own: Future[Leaves]
    beside: Future[OfPath]

    def result(self) -> Leaves:
        return self.sides.together(*self.key, self.own.result(), self.beside.result())
