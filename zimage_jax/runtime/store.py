"""Where the parameters of one model are: what stays on the device, what streams to it from host memory or disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..planning.plan import StreamPlan
from ..units import tree_bytes
from ..weights.checkpoint import Checkpoint
from .ledger import Ledger
from .placement import DEVICE, Placement, free_host_bytes
from .program import Program
from .reader import READERS, HostSource, Leaves, Source, WindowSource, read_units, settled
from .stream import Stream

Unit = tuple[str, str]  # component, unit


class ParameterStore:
    """A model's parameters on the device and in host memory, between jobs.

    One job at a time uses it; what belongs to that job is in its `Loan`.
    """

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, program: Callable[..., Program]
    ):
        self.checkpoint, self.placement, self.program = checkpoint, placement, program
        self.readers = ThreadPoolExecutor(READERS)
        self.device: dict[Unit, Future[Leaves]] = {}
        self._host: dict[Unit, tuple[np.ndarray, ...]] = {}
        self._sources: dict[tuple[str, int | None], Source] = {}

    def lend(self, ledger: Ledger, *, kept: bool, host_bytes: int | None) -> "Loan":
        """The parameters for a job: those on the device stay there if its plan keeps them. `host_bytes`: a window on the
        checkpoint in place of host memory."""
        loan = Loan(self, ledger, kept=kept, host_bytes=host_bytes)
        loan.release()
        ledger.held |= {
            f"{component} {unit}": self.nbytes((component, unit)) for component, unit in self.device
        }
        return loan

    def read_ahead(self, budget: int, host_bytes: int | None, ledger: Ledger) -> None:
        """Start to read blocks into host memory, while programs compile, where no plan within `budget` bytes can keep
        them on the device."""
        components = ("text_encoder", "transformer")
        total = sum(self.checkpoint.nbytes(component) for component in components)
        if self.placement.shares_memory or host_bytes is not None or total <= budget:
            return
        for component in components:
            source = self.source(component, None)
            if isinstance(source, HostSource):
                for unit in self.checkpoint.units(component):
                    if "." in unit:  # a block
                        source.unit(unit, ledger, self.readers)

    def clear(self) -> None:
        """Take everything from the device."""
        settled(self.device)
        self.device = {}

    def on_host(self, component: str, unit: str) -> tuple[np.ndarray, ...]:
        """A unit that never reaches the device, read when first asked for."""
        if (component, unit) not in self._host:
            self._host[component, unit] = tuple(self.checkpoint.read(component, unit).values())
        return self._host[component, unit]

    def source(self, component: str, host_bytes: int | None) -> Source:
        """Blocks stay in host memory when the transformer's, and after them the text encoder's, take 80 % of it at most: a
        sweep over the transformer is made for every NFE, one over the text encoder for every job."""
        if (component, host_bytes) not in self._sources:
            first = ("transformer",) if component == "transformer" else ("transformer", component)
            nbytes = sum(self.checkpoint.nbytes(c) for c in first)
            if host_bytes is None and nbytes <= 0.8 * (free_host_bytes() + self.host_bytes):
                made: Source = HostSource(self.checkpoint, component, self.placement)
            else:
                made = WindowSource(self.checkpoint, component, self.placement, host_bytes)
            self._sources[component, host_bytes] = made
        return self._sources[component, host_bytes]

    @property
    def host_bytes(self) -> int:
        """What is kept in host memory between jobs."""
        return sum(source.host_bytes for source in self._sources.values()) + tree_bytes(
            list(self._host.values())
        )

    def free_device_bytes(self) -> int:
        """Device bytes that a plan may use: what is free, and what is resident and could be given back."""
        return self.placement.free_bytes() + sum(map(self.nbytes, self.device))

    def nbytes(self, unit: Unit) -> int:
        return self.checkpoint.storage.nbytes(*unit)


class Loan:
    """The parameters as one job uses them, accounted in its ledger."""

    def __init__(
        self, store: ParameterStore, ledger: Ledger, *, kept: bool, host_bytes: int | None
    ):
        self.store, self._ledger, self._kept, self._host_bytes = store, ledger, kept, host_bytes
        # What a job gives back stays in host memory, so that the next one need not read it again; not where device memory
        # is the host's own
        self._pins_from_host = not kept and host_bytes is None and not store.placement.shares_memory

    def pin(self, component: str, units: Sequence[str]) -> tuple[Leaves, ...]:
        """Units on the device, where they stay until `release`."""
        return tuple(leaves.result() for leaves in self.pin_ahead(component, units))

    def pin_ahead(self, component: str, units: Sequence[str]) -> list[Future[Leaves]]:
        """Like `pin`, but returns futures at once; units are read in the order given. Their bytes count from now on."""
        store = self.store
        for unit in units:
            if (component, unit) not in store.device:
                self._ledger.hold(
                    f"{component} {unit}", store.checkpoint.storage.specs(component, unit)
                )
                store.device[component, unit] = store.readers.submit(self._read, component, unit)
        return [store.device[component, unit] for unit in units]

    def _read(self, component: str, unit: str) -> Leaves:
        store, name, nbytes = (
            self.store,
            f"{component} {unit}",
            self.store.nbytes((component, unit)),
        )
        source = store.source(component, None) if self._pins_from_host else None
        if isinstance(source, HostSource):
            leaves = source.unit(unit, self._ledger).result()
            with self._ledger.event("copy", name, nbytes):
                return store.placement.put(leaves)
        with self._ledger.event("tier", name, nbytes), self._ledger.event("copy", name, nbytes):
            return read_units(store.checkpoint, component, [unit], store.placement, DEVICE)[unit]

    def module(self, component: str, unit: str):
        """One unit on the device, as its module."""
        (leaves,) = self.pin(component, [unit])
        import jax

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
        """The blocks of a stage under its schedule."""
        store = self.store
        return Stream(
            store.source(plan.component, self._host_bytes),
            plan,
            store.checkpoint.storage,
            sweeps,
            program=store.program,
            ledger=self._ledger,
            pin=lambda units: self.pin_ahead(plan.component, units),
            without_kv=without_kv,
        )

    def release(self, *, everything: bool = False) -> None:
        """Give back what is on the device, but for parameters that the job's plan keeps."""
        done = settled(self.store.device)
        kept = done if self._kept and not everything else {}
        for component, unit in self.store.device.keys() - kept.keys():
            self._ledger.drop(f"{component} {unit}")
        self.store.device = kept
