"""The parameters of one model: on the devices, in host memory, or on disk."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from ..planning.plan import Plan
from ..planning.stream_plan import Place, StreamPlan
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
from .stream import Lane, Pinned, Stream

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
        self.device: dict[Place, Future[Leaves]] = {}
        self.beside: dict[Place, Future[OfPath]] = {}  # of LoRAs, on the devices
        self.loras: Loras | None = None
        self._host: dict[tuple[str, str], tuple[np.ndarray, ...]] = {}
        self._sources: dict[tuple[str, int | None], Source] = {}
        self._lock = threading.Lock()

    def lend(
        self,
        recorder: Recorder,
        *,
        kept: frozenset[Place],
        host_bytes: int | None,
        loras: Loras | None = None,
    ) -> "Loan":
        """The loan of the jobs in flight.

        `kept`: the places of units that their plans keep on the devices. `host_bytes`: read blocks
        through a window of this size instead of keeping them in host memory.
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

    def drop_beside(self, places: Container[Place], recorder: Recorder) -> None:
        """Drop what is beside these units from the devices, and what is not there yet."""
        there = settled(self.beside)
        kept = {place: future for place, future in there.items() if place not in places}
        for component, unit, device in self.beside.keys() - kept.keys():
            recorder.each[device].drop(f"{component} {unit}, LoRA")
        self.beside = kept

    def read_ahead(self, budget: int, host_bytes: int | None, recorder: Recorder) -> None:
        """Start to read blocks into host memory, so that they are read while programs compile.

        Only if the blocks exceed `budget` and must stream from host memory; and for one device,
        because the plan says to which of several a block belongs.
        """
        if self.placement.others:
            return
        components = ("text_encoder", "transformer")
        total = sum(self.checkpoint.nbytes(component) for component in components)
        if self.placement.shares_memory or host_bytes is not None or total <= budget:
            return
        for component in components:
            source = self.source(component, None)
            if isinstance(source, HostSource):
                for unit in self.checkpoint.units(component):
                    if "." in unit:  # a block
                        source.unit(unit, recorder, self.placement, self.readers)

    def read(self, stream: StreamPlan, host_bytes: int | None) -> int:
        """Read a stream's blocks into host memory, where they stay. Returns their bytes: none that
        are read through a window."""
        source, reading = self.source(stream.component, host_bytes), dict[str, Future[Leaves]]()
        if not isinstance(source, HostSource):
            return 0
        for chunk in stream.streamed:
            placement = self.placement.each[stream.owner(chunk)]
            for unit in map(components.unit_of, stream.chunks[chunk]):
                if unit not in reading:
                    reading[unit] = source.unit(unit, Recorder(), placement, self.readers)
        for future in reading.values():
            future.result()
        return self.checkpoint.storage.nbytes(stream.component, *reading)

    def clear(self, recorder: Recorder) -> None:
        """Drop all parameters from the devices."""
        settled(self.device)
        for component, unit, device in self.device:
            recorder.each[device].drop(f"{component} {unit}")
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
                made: Source = HostSource(self.checkpoint, component)
            else:
                devices = len(self.placement.each)
                made = WindowSource(self.checkpoint, component, devices, host_bytes)
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

    def free_device_bytes(self) -> tuple[int, ...]:
        """Bytes of each device that a plan may use: the free ones, and those of parameters there."""
        sides = self.loras.sides if self.loras is not None else None
        there = Counter[int]()
        for place in list(self.device):
            there[place[2]] += self.nbytes(place)
        if sides is not None:
            for component, unit, device in list(self.beside):
                beside = sides.of(component, unit, self.placement.each[device])
                there[device] += tree_bytes(beside)
        return tuple(
            placement.free_bytes() + there[device]
            for device, placement in enumerate(self.placement.each)
        )

    def nbytes(self, place: Place) -> int:
        component, unit, _ = place
        return self.checkpoint.storage.nbytes(component, unit)


class Loan:
    """One job's use of the store's parameters, recorded in its recorder."""

    def __init__(
        self,
        store: ParameterStore,
        recorder: Recorder,
        *,
        kept: frozenset[Place],
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
        """The leaves of units on the first device, where they stay until `release`."""
        return tuple(leaves.result() for leaves in self.pin_ahead(component, units))

    def pin_ahead(self, component: str, units: Sequence[str], device: int = 0) -> Sequence[Pinned]:
        """Like `pin`, but returns futures at once. The ledger counts their bytes from now on."""
        store, places = self.store, [(component, unit, device) for unit in units]
        for place in places:
            if place not in store.device:
                _, unit, _ = place
                self._recorder.each[device].hold(
                    f"{component} {unit}", store.checkpoint.storage.specs(component, unit)
                )
                store.device[place] = store.pinners.submit(self._read, place)
        if self._sides is None:
            return [store.device[place] for place in places]
        return [self._with_sides(self._sides, place) for place in places]

    def _with_sides(self, sides: Sides, place: Place) -> Pinned:
        """A pinned unit's leaves together with what is beside it, which is pinned too."""
        store, (component, unit, device) = self.store, place
        placement, recorder = store.placement.each[device], self._recorder.each[device]
        found = sides.of(component, unit, placement)
        if not found:
            return store.device[place]
        if place not in store.beside:
            name = f"{component} {unit}, LoRA"
            recorder.hold(name, list(found.values()))

            def copy() -> OfPath:
                with recorder.event("copy", name, tree_bytes(found)):
                    return placement.put(found)

            store.beside[place] = store.pinners.submit(copy)
        return _Together(sides, place, store.device[place], store.beside[place])

    def leaves_of(self, component: str, unit: str, own: Leaves, placement: Placement) -> Leaves:
        """A unit's leaves on another device, together with what is beside it."""
        if self._sides is None:
            return own
        beside = self._sides.of(component, unit, self.store.placement.each[0])
        return self._sides.together(component, unit, own, placement.put(beside))

    def _read(self, place: Place) -> Leaves:
        store, (component, unit, device) = self.store, place
        placement, recorder = store.placement.each[device], self._recorder.each[device]
        name, nbytes = f"{component} {unit}", store.nbytes(place)
        source = store.source(component, None) if self._pins_from_host else None
        if isinstance(source, HostSource):
            of_unit = source.unit(components.unit_of(unit), recorder, placement).result()
            leaves = source.of_half(unit, of_unit)
            with recorder.event("copy", name, nbytes):
                return placement.put(leaves)
        with recorder.event("tier", name, nbytes), recorder.event("copy", name, nbytes):
            return read_units(store.checkpoint, component, [unit], placement, DEVICE)[unit]

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
        of_chunks = (
            source if self._sides is None else SidedSource(source, self._sides, plan.component)
        )

        def lane(device: int, of: StreamPlan) -> Lane:
            return Lane(
                of_chunks,
                of,
                self.storage,
                sweeps,
                placement=store.placement.each[device],
                program=functools.partial(store.program, device=device),
                recorder=self._recorder.each[device],
                pin=lambda units: self.pin_ahead(plan.component, units, device),
                without_kv=without_kv,
            )

        lanes: list[Lane] = []
        try:
            for device, of in enumerate(plan.lanes):
                lanes.append(lane(device, of))
        except BaseException:  # one device lacks memory: the others get theirs back
            for made in lanes:
                made.close(settles=False)
            raise
        return Stream(plan, lanes, self._recorder)

    def release(self, *, wanted: Container[Place] = (), room: Sequence[int] = ()) -> None:
        """Drop parameters from the devices, but for those that the plan keeps.

        Of the `wanted` units, those stay that were pinned first and take at most so many bytes of
        `room` on their device.
        """
        kept, left, nbytes = {}, list(room), self.storage.nbytes
        for of, future in settled(self.store.device).items():
            component, unit, device = of
            if of in self._kept:
                kept[of] = future
            elif of in wanted and nbytes(component, unit) <= left[device]:
                left[device] -= nbytes(component, unit)
                kept[of] = future
        for component, unit, device in self.store.device.keys() - kept.keys():
            self._recorder.each[device].drop(f"{component} {unit}")
        self.store.drop_beside(self.store.beside.keys() - kept.keys(), self._recorder)
        self.store.device = kept


@dataclass(frozen=True)
class _Together:
    """A unit's leaves that are on their way to the device, and what is beside them."""

    sides: Sides
    place: Place
    own: Future[Leaves]
    beside: Future[OfPath]

    def result(self) -> Leaves:
        component, unit, _ = self.place
        return self.sides.together(component, unit, self.own.result(), self.beside.result())
