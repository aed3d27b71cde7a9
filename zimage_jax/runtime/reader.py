"""Reads blocks into host memory: one source for all jobs, one reader per job."""

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
from ..weights import components
from ..weights.checkpoint import ModelFiles
from .placement import DEVICE, HOST, Placement
from .recorder import Recorder

Leaves = tuple[Array | None, ...]  # of one unit; None for a leaf that an NFE does not need
Chunk = tuple[Leaves, ...]
Key = TypeVar("Key")

WINDOW_CHUNKS = 3  # without --host-memory: the chunk in use and two ahead
# threads: one alone filled new page-locked memory at 0.8 GB/s (host of an H100)
READERS = min(4, os.cpu_count() or 1)


def read_units(
    checkpoint: ModelFiles, component: str, units: Iterable[str], placement: Placement, kind: str
) -> dict[str, Leaves]:
    """Unit -> its leaves in the module's order, in DEVICE or HOST memory."""

    def read(unit: str) -> Leaves:
        # on a CPU the arrays use the buffer itself, so each needs a new one. Elsewhere they are
        # copies, and reading into a used buffer is 1.6 times as fast as into a new one
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
    checkpoint: ModelFiles, component: str, placement: Placement | None = None, kind: str = DEVICE
):
    """A whole component's module, in DEVICE or HOST memory."""
    leaves = read_units(
        checkpoint, component, checkpoint.units(component), placement or Placement.on(), kind
    )
    return checkpoint.storage.assemble(component, leaves)


_thread = threading.local()


def _buffer(nbytes: int) -> np.ndarray:
    """This thread's buffer, of at least `nbytes`."""
    if getattr(_thread, "buffer", np.empty(0)).nbytes < nbytes:
        _thread.buffer = np.empty(nbytes, np.uint8)
    return _thread.buffer


@runtime_checkable
class Reader(Protocol):
    """Gives one job its streamed chunks, in the order of its loads."""

    def take(self, *, without_kv: bool = False) -> Chunk:
        """The next chunk, in host memory. `without_kv`: without the parameters that make K and
        V."""

    def used(self) -> None:
        """The last chunk was given to a program; its memory is free when that program is done."""

    def close(self) -> None:
        """Stop reading."""


class HostSource:
    """Keeps a component's units in host memory for all jobs; each is read once, as a whole.

    Page-locked memory belongs to one device: a unit that another plan gives to another device is
    read again, in place of the first.
    """

    def __init__(self, checkpoint: ModelFiles, component: str):
        self._checkpoint, self._component = checkpoint, component
        self._kept: dict[str, Future[Leaves]] = {}
        self._placed: dict[str, Placement] = {}  # unit -> for which device
        self._lock = threading.Lock()

    @property
    def host_bytes(self) -> int:
        """Bytes that are kept in host memory between jobs."""
        kept = [unit for unit, leaves in list(self._kept.items()) if _is_done(leaves)]
        return self._checkpoint.storage.nbytes(self._component, *kept)

    def open(
        self, order: Sequence[tuple[str, ...]], recorder: Recorder, placement: Placement
    ) -> "HostReader":
        """A job's reader. It starts to read all units of `order`, in that order."""
        return HostReader(self, order, recorder, placement)

    def unit(
        self,
        unit: str,
        recorder: Recorder,
        placement: Placement,
        pool: ThreadPoolExecutor | None = None,
    ) -> Future[Leaves]:
        """A unit's leaves, for a device. One that was not read yet is read by `pool`, or else by the
        caller."""
        with self._lock:
            future = self._kept.get(unit) if self._placed.get(unit) == placement else None
            if future is not None and (not future.done() or _is_done(future)):
                return future
            future, self._placed[unit] = Future[Leaves](), placement
            self._kept[unit] = future
        if pool is None:
            self._fill(future, unit, recorder, placement)
        else:
            pool.submit(self._fill, future, unit, recorder, placement)
        return future

    def of_half(self, name: str, leaves: Leaves) -> Leaves:
        """The leaves of a half, or of a unit, out of those of its unit."""
        if components.half_of(name) is None:
            return leaves
        return self._checkpoint.storage.of_half(self._component, name, leaves)

    def _fill(
        self, future: Future[Leaves], unit: str, recorder: Recorder, placement: Placement
    ) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            checkpoint, component = self._checkpoint, self._component
            with recorder.event("tier", f"read {unit}", checkpoint.storage.nbytes(component, unit)):
                leaves = read_units(checkpoint, component, [unit], placement, HOST)
                future.set_result(leaves[unit])
        except BaseException as fault:
            future.set_exception(fault)

    def without_kv(self, unit: str, leaves: Leaves) -> Leaves:
        return self._checkpoint.storage.without_kv(self._component, unit, leaves)


def _is_done(future: Future) -> bool:
    """Whether a future has its result."""
    return future.done() and not future.cancelled() and not future.exception()


class HostReader:
    """A job's reader of a HostSource."""

    def __init__(
        self,
        source: HostSource,
        order: Sequence[tuple[str, ...]],
        recorder: Recorder,
        placement: Placement,
    ):
        self._source, self._order = source, iter(order)
        self._pool = ThreadPoolExecutor(READERS)
        units = dict.fromkeys(map(components.unit_of, itertools.chain.from_iterable(order)))
        self._units = {unit: source.unit(unit, recorder, placement, self._pool) for unit in units}

    def take(self, *, without_kv: bool = False) -> Chunk:
        blocks = {
            name: self._source.of_half(name, self._units[components.unit_of(name)].result())
            for name in next(self._order)
        }
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
    """Reads a component's units from disk for every use, through a window of host memory.

    The window of `nbytes` holds the chunk in use and the next ones that fit; if `nbytes` is None,
    the next two. Each of several `devices` has an equal part of it.
    """

    host_bytes = 0  # nothing is kept between jobs

    def __init__(self, checkpoint: ModelFiles, component: str, devices: int, nbytes: int | None):
        self.checkpoint, self.component = checkpoint, component
        self._nbytes = None if nbytes is None else nbytes // devices

    def open(
        self, order: Sequence[tuple[str, ...]], recorder: Recorder, placement: Placement
    ) -> "WindowReader":
        """A job's reader. Raises UsageError if the window is smaller than a chunk."""
        bytes_of = self.checkpoint.storage.nbytes
        largest = max((bytes_of(self.component, *units) for units in order), default=1)
        depth = WINDOW_CHUNKS if self._nbytes is None else read_ahead(self._nbytes, largest)
        return WindowReader(self, order, depth, recorder, placement)


class WindowReader:
    """A job's reader of a WindowSource."""

    def __init__(
        self,
        source: WindowSource,
        order: Sequence[tuple[str, ...]],
        depth: int,
        recorder: Recorder,
        placement: Placement,
    ):
        self._source, self._order, self._recorder = source, iter(order), recorder
        self._placement = placement
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
        self._recorder.settle()
        self._read_ahead()

    def close(self) -> None:
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        units = next(self._order, None)
        if units is not None:
            self._ahead.append(self._pool.submit(self._read, units))

    def _read(self, units: tuple[str, ...]) -> dict[str, Leaves]:
        checkpoint, component = self._source.checkpoint, self._source.component
        nbytes = checkpoint.storage.nbytes(component, *units)
        with self._recorder.event("tier", f"read {units[0]}", nbytes):
            return read_units(checkpoint, component, units, self._placement, HOST)


Source = HostSource | WindowSource


def settled(futures: dict[Key, Future]) -> dict[Key, Future]:
    """Cancel futures that have not started, await the others, return those that succeeded."""
    for future in futures.values():
        future.cancel()
    wait(futures.values())
    return {key: future for key, future in futures.items() if _is_done(future)}
