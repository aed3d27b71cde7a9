"""The parameters of one model: on the devices, in host memory, or on disk."""

import functools
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from ..planning.plan import Place, StreamPlan
from ..units import tree_bytes
from ..weights import components
from ..weights.checkpoint import Checkpoint
from .placement import DEVICE, Placement, free_host_bytes
from .program import Program
from .reader import READERS, HostSource, Leaves, Source, WindowSource, read_units, settled
from .recorder import Recorder
from .stream import Lane, Stream


class ParameterStore:
    """A model's parameters on the device and in host memory, kept between jobs.

    The jobs in flight use it through one `Loan`.
    """

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, program: Callable[..., Program]
    ):
        self.checkpoint, self.placement, self.program = checkpoint, placement, program
        # a pin waits for a read: in one pool, pins before their reads would wait for ever
        self.readers, self.pinners = ThreadPoolExecutor(READERS), ThreadPoolExecutor(READERS)
        self.device: dict[Place, Future[Leaves]] = {}
        self._host: dict[tuple[str, str], tuple[np.ndarray, ...]] = {}
        self._sources: dict[tuple[str, int | None], Source] = {}
        self._lock = threading.Lock()

    def lend(self, recorder: Recorder, *, kept: frozenset[Place], host_bytes: int | None) -> "Loan":
        """The loan of the jobs in flight.

        `kept`: the places of units that their plans keep on the device. `host_bytes`: read blocks through a
        window of this size instead of keeping them in host memory.
        """
        return Loan(self, recorder, kept=kept, host_bytes=host_bytes)

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

    @property
    def host_bytes(self) -> int:
        """Bytes that are kept in host memory between jobs."""
        return sum(source.host_bytes for source in self._sources.values()) + tree_bytes(
            list(self._host.values())
        )

    def free_device_bytes(self) -> tuple[int, ...]:
        """Bytes of each device that a plan may use: the free ones, and those of parameters there."""
        there = list(self.device)
        return tuple(
            placement.free_bytes() + sum(self.nbytes(of) for of in there if of[2] == device)
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
        # units that are dropped from the device stay in host memory, so that the next job need not
        # read them. Not if the device's memory is the host's
        self._pins_from_host = not kept and host_bytes is None and not store.placement.shares_memory

    def pin(self, component: str, units: Sequence[str]) -> tuple[Leaves, ...]:
        """The leaves of units on the first device, where they stay until `release`."""
        return tuple(leaves.result() for leaves in self.pin_ahead(component, units))

    def pin_ahead(
        self, component: str, units: Sequence[str], device: int = 0
    ) -> list[Future[Leaves]]:
        """Like `pin`, but returns futures at once. The ledger counts their bytes from now on."""
        store, places = self.store, [(component, unit, device) for unit in units]
        for place in places:
            if place not in store.device:
                _, unit, _ = place
                self._recorder.each[device].hold(
                    f"{component} {unit}", store.checkpoint.storage.specs(component, unit)
                )
                store.device[place] = store.pinners.submit(self._read, place)
        return [store.device[place] for place in places]

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
        (tree,) = self.store.checkpoint.storage.trees(component, [unit])
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
        store = self.store

        def lane(device: int, of: StreamPlan) -> Lane:
            return Lane(
                store.source(plan.component, self._host_bytes),
                of,
                store.checkpoint.storage,
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
        kept, left = {}, list(room)
        for of, future in settled(self.store.device).items():
            *_, device = of
            if of in self._kept:
                kept[of] = future
            elif of in wanted and self.store.nbytes(of) <= left[device]:
                left[device] -= self.store.nbytes(of)
                kept[of] = future
        for component, unit, device in self.store.device.keys() - kept.keys():
            self._recorder.each[device].drop(f"{component} {unit}")
        self.store.device = kept
