"""Blocks from the checkpoint into host memory: a source shared by all jobs, and a reader of its own for each job."""

import collections
import itertools
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jax import Array

from ..planning.seconds import read_ahead
from ..weights.checkpoint import Checkpoint
from .ledger import Ledger
from .placement import DEVICE, HOST, Placement

Leaves = tuple[Array | None, ...]  # of one unit; None for a leaf that an NFE does without
Chunk = tuple[Leaves, ...]
Key = TypeVar("Key")

WINDOW_CHUNKS = 3  # a window of no stated size: the chunk in use and two ahead
READERS = min(
    4, os.cpu_count() or 1
)  # threads: one alone filled new pinned memory at 0.8 GB/s (host of an H100)


def read_units(
    checkpoint: Checkpoint, component: str, units: Iterable[str], placement: Placement, kind: str
) -> dict[str, Leaves]:
    """Unit -> its leaves in the module's order, in DEVICE or HOST memory."""

    def read(unit: str) -> Leaves:
        # on a CPU the arrays are the buffer; elsewhere they are copies of it, and memory that was written before is
        # filled 1.6 times as fast as new memory
        buffer = (
            None
            if placement.platform == "cpu"
            else _buffer(checkpoint.buffer_bytes(component, unit))
        )
        return tuple(placement.put(list(checkpoint.read(component, unit, buffer).values()), kind))

    names = list(units)
    if len(names) == 1:
        return {names[0]: read(names[0])}
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def load(
    checkpoint: Checkpoint, component: str, placement: Placement | None = None, kind: str = DEVICE
):
    """A whole component as its module, in DEVICE or HOST memory."""
    leaves = read_units(
        checkpoint, component, checkpoint.units(component), placement or Placement.on(), kind
    )
    return checkpoint.storage.assemble(component, leaves)


_thread = threading.local()


def _buffer(nbytes: int) -> np.ndarray:
    """This thread's buffer, of `nbytes` at least."""
    if getattr(_thread, "buffer", np.empty(0)).nbytes < nbytes:
        _thread.buffer = np.empty(nbytes, np.uint8)
    return _thread.buffer


@runtime_checkable
class Reader(Protocol):
    """One job's chunks in the order in which it wants them."""

    def take(self, *, without_kv: bool = False) -> Chunk:
        """The next chunk of the order, in host memory; `without_kv` for an NFE that reuses K and V."""

    def used(self) -> None:
        """The chunk taken last has been given to a program: its place is free when that program is done."""

    def close(self) -> None:
        """Stop reading."""


class HostSource:
    """A component's units in host memory, each read once and kept for all jobs."""

    def __init__(self, checkpoint: Checkpoint, component: str, placement: Placement):
        self._checkpoint, self._component, self._placement = checkpoint, component, placement
        self._kept: dict[str, Future[Leaves]] = {}
        self._lock = threading.Lock()

    @property
    def host_bytes(self) -> int:
        """What is kept in host memory between jobs."""
        return self._checkpoint.storage.nbytes(self._component, *list(self._kept))

    def open(self, order: Sequence[tuple[str, ...]], ledger: Ledger) -> "HostReader":
        """A reader of its own for a job. Units are read in the order given, while earlier ones compute."""
        return HostReader(self, order, ledger)

    def unit(
        self, unit: str, ledger: Ledger, pool: ThreadPoolExecutor | None = None
    ) -> Future[Leaves]:
        """A unit that is kept, or is read now, by `pool` or by the caller."""
        with self._lock:
            future = self._kept.get(unit)
            if future is not None and not (
                future.cancelled() or (future.done() and future.exception())
            ):
                return future
            future = self._kept[unit] = Future()
        if pool is None:
            self._fill(future, unit, ledger)
        else:
            pool.submit(self._fill, future, unit, ledger)
        return future

    def _fill(self, future: Future[Leaves], unit: str, ledger: Ledger) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            with ledger.event(
                "tier", f"read {unit}", self._checkpoint.storage.nbytes(self._component, unit)
            ):
                future.set_result(
                    read_units(self._checkpoint, self._component, [unit], self._placement, HOST)[
                        unit
                    ]
                )
        except BaseException as fault:
            future.set_exception(fault)

    def without_kv(self, unit: str, leaves: Leaves) -> Leaves:
        return self._checkpoint.storage.without_kv(self._component, unit, leaves)


class HostReader:
    """A job's chunks from host memory."""

    def __init__(self, source: HostSource, order: Sequence[tuple[str, ...]], ledger: Ledger):
        self._source, self._order = source, iter(order)
        self._pool = ThreadPoolExecutor(READERS)
        units = dict.fromkeys(itertools.chain.from_iterable(order))
        self._units = {unit: source.unit(unit, ledger, self._pool) for unit in units}

    def take(self, *, without_kv: bool = False) -> Chunk:
        blocks = {unit: self._units[unit].result() for unit in next(self._order)}
        if without_kv:
            return tuple(self._source.without_kv(unit, leaves) for unit, leaves in blocks.items())
        return tuple(blocks.values())

    def used(self) -> None:
        pass

    def close(self) -> None:
        for future in self._units.values():
            future.cancel()
        self._pool.shutdown(wait=True)


class WindowSource:
    """A component's units read anew for every use, through a window of host memory.

    The window holds the chunk in use and as many of the coming ones as fit into `nbytes`, or two where that is None.
    """

    host_bytes = 0  # nothing is kept between jobs

    def __init__(
        self, checkpoint: Checkpoint, component: str, placement: Placement, nbytes: int | None
    ):
        self.checkpoint, self.component, self.placement, self._nbytes = (
            checkpoint,
            component,
            placement,
            nbytes,
        )

    def open(self, order: Sequence[tuple[str, ...]], ledger: Ledger) -> "WindowReader":
        """A reader of its own for a job. Raises UsageError when the window is smaller than a chunk."""
        bytes_of = self.checkpoint.storage.nbytes
        largest = max((bytes_of(self.component, *units) for units in order), default=1)
        depth = WINDOW_CHUNKS if self._nbytes is None else read_ahead(self._nbytes, largest)
        return WindowReader(self, order, depth, ledger)


class WindowReader:
    """A job's chunks through a window."""

    def __init__(
        self, source: WindowSource, order: Sequence[tuple[str, ...]], depth: int, ledger: Ledger
    ):
        self._source, self._order, self._ledger = source, iter(order), ledger
        self._pool = ThreadPoolExecutor(READERS)
        self._ahead: collections.deque[Future[dict[str, Leaves]]] = collections.deque()
        for _ in range(min(depth, len(order))):
            self._read_ahead()

    def take(self, *, without_kv: bool = False) -> Chunk:
        blocks = self._ahead.popleft().result()
        if without_kv:
            storage, component = self._source.checkpoint.storage, self._source.component
            return tuple(
                storage.without_kv(component, unit, leaves) for unit, leaves in blocks.items()
            )
        return tuple(blocks.values())

    def used(self) -> None:
        self._ledger.settle()
        self._read_ahead()

    def close(self) -> None:
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        units = next(self._order, None)
        if units is not None:
            self._ahead.append(self._pool.submit(self._read, units))

    def _read(self, units: tuple[str, ...]) -> dict[str, Leaves]:
        of, component = self._source.checkpoint, self._source.component
        with self._ledger.event("tier", f"read {units[0]}", of.storage.nbytes(component, *units)):
            return read_units(of, component, units, self._source.placement, HOST)


Source = HostSource | WindowSource


def settled(futures: dict[Key, Future]) -> dict[Key, Future]:
    """The futures that succeeded; the others are cancelled, or awaited, and left out."""
    for future in futures.values():
        future.cancel()
    wait(futures.values())
    return {
        key: future
        for key, future in futures.items()
        if not future.cancelled() and not future.exception()
    }
