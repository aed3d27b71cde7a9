"""Runs chunks of blocks on the device as a schedule says.

It knows units, chunks and slots, not layers: a block is a tuple of arrays, and `tree`, the
structure of its module, turns it into what is called. Blocks cross program boundaries as plain
tuples, for flattening a module in Python costs 0.1 ms each time."""

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from ..planning.schedule import Load, Pin, Run, Schedule, loads, steps
from ..planning.seconds import read_ahead
from ..weights import components
from ..weights.checkpoint import Checkpoint
from ..weights.components import tree_bytes
from .ledger import Ledger
from .placement import GATE, free_device_bytes, free_host_bytes, shares_memory

Block = tuple[Array | None, ...]  # the leaves of one block; None for what an NFE does without
Chunk = tuple[Block, ...]
Key = TypeVar("Key")

DISK_CHUNKS = 3  # a window of no stated size: the chunk in use and two ahead
READERS = min(
    4, os.cpu_count() or 1
)  # threads: one alone filled new pinned memory at 0.8 GB/s (host of an H100)

# Without the latency-hiding scheduler a GPU copies after it computes; the limit must exceed the
# arrays of one step, or the first copies are awaited before compute starts
OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_async_compute_limit": 1024,
}


# -- programs --------------------------------------------------------------------------------------


EXHAUSTED, BEYOND = "RESOURCE_EXHAUSTED", 1 << 50  # what XLA says of it; bytes that no device has


def is_exhausted(fault: jax.errors.JaxRuntimeError) -> bool:
    """Whether the device ran out of memory."""
    return EXHAUSTED in str(fault)


class Program:
    """A function compiled once per set of shapes, with the device memory the compiler says it
    takes.

    `static` arguments go to the function as keywords and belong to the program.
    """

    def __init__(
        self,
        function: Callable,
        *,
        donate: tuple[int, ...] = (),
        precision: str | None = None,
        **static,
    ):
        """`precision` of products of float32: a GPU's own default is TF32."""

        def with_token(*args):
            # what the ledger waits for: the next program may have been given the result itself
            return function(*args, **static), jnp.zeros((), jnp.int8)

        self.name = function.__name__.strip("_")
        options = OVERLAP if jax.default_backend() == "gpu" else None
        self._jitted = jax.jit(
            with_token, donate_argnums=donate, keep_unused=True, compiler_options=options
        )
        self._compiled: dict = {}
        self._precision, self._has_run = precision, set[int]()
        self.compile_seconds = 0.0

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def compiled(self, *args):
        """The executable for arguments of these shapes (arrays or ShapeDtypeStructs), and the
        device bytes it takes beside its arguments; None and BEYOND where the device had no memory
        to compile it in."""
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            began = time.perf_counter()
            try:
                with GATE.alone(), jax.default_matmul_precision(self._precision):
                    executable = self._jitted.lower(*args).compile()
            except (
                jax.errors.JaxRuntimeError
            ) as fault:  # a GPU's compiler runs what it chooses between
                if not is_exhausted(fault):
                    raise
                self._compiled[key] = None, BEYOND
            else:
                memory = executable.memory_analysis()
                self._compiled[key] = executable, 0 if memory is None else own_bytes(memory)
            self.compile_seconds += time.perf_counter() - began
        return self._compiled[key]

    def __call__(
        self, ledger: Ledger, *args, name: str = "", copied: tuple[str, int] | None = None
    ):
        """`name` what is computed, and `copied` the name and bytes of what is copied to the device
        meanwhile."""
        executable, extra = self.compiled(*args)
        if executable is None:
            raise jax.errors.JaxRuntimeError(
                f"{EXHAUSTED}: {self.name} could not be compiled in the device's memory"
            )
        ledger.mark(extra)
        kinds = [("compute", name or self.name, 0), *([("copy", *copied)] if copied else [])]
        if id(executable) in self._has_run:
            result, token = executable(*args)
            ledger.launched(token, *kinds)
            return result
        ledger.settle()
        with GATE.alone():
            result, token = executable(*args)
            ledger.launched(token, *kinds)
            ledger.settle()
        self._has_run.add(id(executable))
        return result


def own_bytes(memory) -> int:
    """Device bytes an executable takes beside its arguments: temporaries, and results that land in
    no donated one."""
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


# -- where blocks come from ------------------------------------------------------------------------


class Source:
    """The blocks of a component in host memory: all of them, or a window that is read ahead from
    the checkpoint.

    `open` says which chunks will be asked for, in order; `take` gives the next. They are read in
    that order by a thread, so that the first is computed while the others are read. A window holds
    the chunk in use and as many of the coming ones as fit."""

    def __init__(
        self, checkpoint: Checkpoint, component: str, *, kept: bool, window_bytes: int | None = None
    ):
        self._checkpoint, self._component, self._window = checkpoint, component, window_bytes
        self._kept: dict[str, Future[dict[str, Block]]] | None = {} if kept else None
        self._order: Iterator[tuple[str, ...]] = iter(())
        self._ahead: collections.deque[Future] = collections.deque()
        self._pool: ThreadPoolExecutor | None = None
        self._ledger = Ledger()

    @property
    def host_bytes(self) -> int:
        """What is kept in host memory between uses."""
        return self._bytes(list(self._kept or ()))  # readers may be adding to it

    def open(self, order: Sequence[tuple[str, ...]], ledger: Ledger) -> None:
        """Raises UsageError when the window is smaller than a chunk."""
        self.close()
        self._order, self._ledger, self._pool = iter(order), ledger, ThreadPoolExecutor(READERS)
        if self._kept is not None:
            for unit in itertools.chain.from_iterable(order):
                if unit not in self._kept:
                    self._kept[unit] = self._pool.submit(self._read, (unit,), ledger)
            return
        largest = max((self._bytes(units) for units in order), default=1)
        depth = DISK_CHUNKS if self._window is None else read_ahead(self._window, largest)
        for _ in range(min(depth, len(order))):
            self._read_ahead()

    def take(self, *, lightly: bool = False) -> Chunk:
        """The next chunk of the order, in `pinned_host` memory; `lightly` for an NFE that reuses K
        and V."""
        if self._kept is not None:
            blocks = {unit: self._kept[unit].result()[unit] for unit in next(self._order)}
        else:
            blocks = self._ahead.popleft().result()
        if lightly:
            config = self._checkpoint.config
            return tuple(
                components.without_keys_values(config, unit, block)
                for unit, block in blocks.items()
            )
        return tuple(blocks.values())

    def unit(self, unit: str, ledger: Ledger) -> Block:
        """A unit that is kept in host memory, read when first asked for."""
        assert self._kept is not None
        if unit not in self._kept:
            self._kept[unit] = Future()
            self._kept[unit].set_result(self._read((unit,), ledger))
        return self._kept[unit].result()[unit]

    def used(self) -> None:
        """The chunk taken last is being copied: after that its place in the window is free."""
        if self._kept is None:
            self._ledger.settle()
            self._read_ahead()

    def close(self) -> None:
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._kept is not None:
            self._kept = settled(self._kept)

    def leaves(self, unit: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a unit's arrays."""
        return components.leaves(
            self._checkpoint.config, self._component, unit, self._checkpoint.dtype
        )

    def _read_ahead(self) -> None:
        units = next(self._order, None)
        if units is not None and self._pool is not None:
            self._ahead.append(self._pool.submit(self._read, units, self._ledger))

    def _read(self, units: tuple[str, ...], ledger: Ledger) -> dict[str, Block]:
        with ledger.event("tier", f"read {units[0]}", self._bytes(units)):
            return read_blocks(self._checkpoint, self._component, units, "pinned_host")

    @property
    def keeps(self) -> bool:
        """Whether units stay in host memory, once read."""
        return self._kept is not None

    def _bytes(self, units: Iterable[str]) -> int:
        return sum(self._checkpoint.nbytes(self._component, unit) for unit in units)


def settled(futures: dict[Key, Future]) -> dict[Key, Future]:
    """Those that have their value. The others are cancelled, or waited for, and left out."""
    for future in futures.values():
        future.cancel()
    wait(futures.values())
    return {
        key: future
        for key, future in futures.items()
        if not future.cancelled() and not future.exception()
    }


def read_blocks(
    checkpoint: Checkpoint, component: str, units: Sequence[str], memory_kind: str, device=None
) -> dict[str, Block]:
    """Unit -> its arrays in the order of the model's leaves."""
    arrays = checkpoint.restore(component, units, memory_kind=memory_kind, device=device)
    paths = components.units(checkpoint.config, component)
    return {unit: tuple(arrays[path] for path in paths[unit]) for unit in units}


# -- the driver ------------------------------------------------------------------------------------


def run_chunk(chunk: Chunk, x, *side, tree, run: Callable, **static):
    """A chunk over one micro-batch. `run` applies blocks to x, which may be any tree of arrays."""
    return run([jax.tree.unflatten(tree, block) for block in chunk], x, *side, **static)


def ring_step(chunk: Chunk, spare: Chunk, following: Chunk, x, *side, **static):
    """The same, while the chunk that follows is copied from the host into the donated spare slot. A
    chunk shorter than its slot leaves the slot's other blocks as they are."""
    return run_chunk(chunk, x, *side, **static), fill(spare, following)


def fill(spare: Chunk, following: Chunk) -> Chunk:
    """The slot with a chunk of the host copied into its first blocks; what a block comes without
    stays as it was."""

    def moved(old: Array | None, leaf: Array | None) -> Array | None:
        return old if leaf is None else jax.device_put(leaf, jax.memory.Space.Device)

    filled = (tuple(map(moved, *blocks)) for blocks in zip(spare, following, strict=False))
    return (*filled, *spare[len(following) :])


class Stream:
    """The blocks of one component on their way over the device, for one job.

    `visit` runs the next chunk in order over every micro-batch. `lightly(chunk, sweep)` says which
    visits do without the parameters that make K and V. Use as a context manager: it leaves the
    device as it found it, but for pinned chunks that the owner keeps."""

    def __init__(
        self,
        source: Source,
        chunks: Sequence[tuple[str, ...]],
        schedule: Schedule,
        sweeps: int,
        *,
        program: Callable[..., Program],
        ledger: Ledger,
        pin: Callable[[tuple[str, ...]], list[Future[Block]]],
        label: str,
        lightly: Callable[[int, int], bool],
    ):
        self._source, self._chunks, self._schedule, self._lightly = (
            source,
            chunks,
            schedule,
            lightly,
        )
        self._program, self._ledger, self._pin, self._label = program, ledger, pin, label
        self._steps = steps(schedule, len(chunks), sweeps)
        self._pinned: dict[int, list[Future[Block]]] = {}
        self._slots: dict[int, Chunk] = {}
        order = [chunks[load.chunk] for load in loads(schedule, len(chunks), sweeps)]
        source.open(order, ledger)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._pinned.clear()
        for slot in list(self._slots):
            del self._slots[slot]
            self._ledger.drop(f"{self._label} slot {slot}")
        self._source.close()

    def visit(self, xs: list, sides: list[tuple], **static) -> list:
        """Run the next chunk over each micro-batch x with its own side arguments."""
        for step in self._steps:
            if isinstance(step, Run):
                return self._run(step, xs, sides, static)
            if isinstance(step, Pin):
                self._pinned[step.chunk] = self._pin(self._chunks[step.chunk])
            elif isinstance(step, Load):
                self._load(step)
        raise RuntimeError("more chunks were visited than the schedule has")

    def _load(self, step: Load) -> None:
        following = self._take(step)
        spare, copied = (
            self._slot(step.slot),
            (f"{self._label} chunk {step.chunk}", tree_bytes(following)),
        )
        self._slots[step.slot] = self._program(fill, donate=(0,))(
            self._ledger, spare, following, copied=copied
        )
        self._source.used()

    def _take(self, load: Load) -> Chunk:
        lightly = self._lightly(load.chunk, load.sweep)
        chunk = self._source.take(lightly=lightly)
        if lightly:
            whole = sum(tree_bytes(self._source.leaves(unit)) for unit in self._chunks[load.chunk])
            self._ledger.saved_bytes += whole - tree_bytes(chunk)
        return chunk

    def _slot(self, slot: int) -> Chunk:
        """The slot's arrays, allocated on first use for the largest chunk that is streamed."""
        if slot not in self._slots:
            largest = max(
                (c for i, c in enumerate(self._chunks) if i not in self._schedule.pinned), key=len
            )
            blocks = [self._source.leaves(unit) for unit in largest]
            self._slots[slot] = tuple(
                tuple(jnp.zeros(a.shape, a.dtype) for a in block) for block in blocks
            )
            self._ledger.hold(f"{self._label} slot {slot}", self._slots[slot])
        return self._slots[slot]

    def _run(self, step: Run, xs: list, sides: list[tuple], static: dict) -> list:
        size = len(self._chunks[step.chunk])
        if step.slot is None:
            chunk = tuple(block.result() for block in self._pinned[step.chunk])
        else:
            chunk = self._slots[step.slot][:size]
        name = f"{self._label} chunk {step.chunk}"
        plain = self._program(run_chunk, donate=(1,), **static)
        done = []
        if step.then is not None:
            ring = self._program(ring_step, donate=(1, 3), **static)
            following = self._take(step.then)
            spare = self._slot(step.then.slot)
            copied = f"{self._label} chunk {step.then.chunk}", tree_bytes(following)
            x, filled = ring(
                self._ledger, chunk, spare, following, xs[0], *sides[0], name=name, copied=copied
            )
            self._slots[step.then.slot] = filled
            self._source.used()
            done.append(x)
        for x, side in list(zip(xs, sides, strict=True))[len(done) :]:
            done.append(plain(self._ledger, chunk, x, *side, name=name))
        return done


class Tiers:
    """Where the parameters of one model lie: what is pinned to the device, and what streams to it
    from host or disk."""

    def __init__(self, checkpoint: Checkpoint, program: Callable[..., Program]):
        self._checkpoint, self._program = checkpoint, program
        self._device: dict[tuple[str, str], Future[Block]] = {}  # (component, unit)
        self._readers = ThreadPoolExecutor(READERS)
        self._host: dict[tuple[str, str], tuple[np.ndarray, ...]] = {}
        self._sources: dict[tuple[str, int | None], Source] = {}
        self._pins_from_host = False

    def begin(self, ledger: Ledger, *, kept: bool, host_bytes: int | None) -> None:
        """A new job: what is on the device stays there if the job's plan keeps it. What a job gives
        back stays in host memory, so that the next one need not read it again; not where device
        memory is the host's own."""
        self.clear(ledger, unless=kept)
        ledger.held |= {
            f"{component} {unit}": self._bytes((component, unit))
            for component, unit in self._device
        }
        self._pins_from_host = not kept and host_bytes is None and not shares_memory()

    def pin(self, component: str, units: Sequence[str], ledger: Ledger) -> tuple[Block, ...]:
        """Units on the device, to stay there until `clear`."""
        return tuple(block.result() for block in self.pin_ahead(component, units, ledger))

    def pin_ahead(
        self, component: str, units: Sequence[str], ledger: Ledger
    ) -> list[Future[Block]]:
        """The same, and not waited for: units are read in the order they were asked for. Their
        bytes count from now on."""
        source = self._source(component, None) if self._pins_from_host else None
        for unit in units:
            if (component, unit) not in self._device:
                leaves = components.leaves(
                    self._checkpoint.config, component, unit, self._checkpoint.dtype
                )
                ledger.hold(f"{component} {unit}", leaves)
                self._device[component, unit] = self._readers.submit(
                    self._read, component, unit, source, ledger
                )
        return [self._device[component, unit] for unit in units]

    def _read(self, component: str, unit: str, source: Source | None, ledger: Ledger) -> Block:
        name, size = f"{component} {unit}", self._checkpoint.nbytes(component, unit)
        if source is not None and source.keeps:
            block = source.unit(unit, ledger)
            with ledger.event("copy", name, size), GATE.together():
                return jax.block_until_ready(
                    jax.device_put(block, SingleDeviceSharding(jax.local_devices()[0]))
                )
        with ledger.event("tier", name, size), ledger.event("copy", name, size):
            return read_blocks(self._checkpoint, component, [unit], "device")[unit]

    def on_host(self, component: str, unit: str) -> tuple[np.ndarray, ...]:
        """A unit that never reaches the device, read when first asked for."""
        if (component, unit) not in self._host:
            self._host[component, unit] = tuple(self._checkpoint.read(component, unit).values())
        return self._host[component, unit]

    def stream(
        self,
        component: str,
        chunks: Sequence[tuple[str, ...]],
        schedule: Schedule,
        sweeps: int,
        host_bytes: int | None,
        ledger: Ledger,
        lightly: Callable[[int, int], bool] = lambda chunk, sweep: False,
    ) -> Stream:
        """The blocks of a component under a schedule. `host_bytes`: a window on the checkpoint in
        place of host memory."""
        return Stream(
            self._source(component, host_bytes),
            chunks,
            schedule,
            sweeps,
            program=self._program,
            ledger=ledger,
            pin=lambda units: self.pin_ahead(component, units, ledger),
            label=component,
            lightly=lightly,
        )

    def _source(self, component: str, host_bytes: int | None) -> Source:
        """Blocks stay in host memory when the transformer's, and after them the text encoder's,
        take 80 % of it at most; a sweep over the transformer is made for every NFE, one over the
        text encoder for every job."""
        if (component, host_bytes) not in self._sources:
            first = ("transformer",) if component == "transformer" else ("transformer", component)
            size = sum(self._checkpoint.nbytes(c) for c in first)
            fits = host_bytes is None and size <= 0.8 * (free_host_bytes() + self.host_bytes)
            self._sources[component, host_bytes] = Source(
                self._checkpoint, component, kept=fits, window_bytes=host_bytes
            )
        return self._sources[component, host_bytes]

    def clear(self, ledger: Ledger, *, unless: bool = False) -> None:
        """The device without parameters, `unless` they are to stay for the next picture."""
        kept = settled(self._device)
        for component, unit in self._device.keys() - kept.keys() if unless else self._device:
            ledger.drop(f"{component} {unit}")
        self._device = kept if unless else {}

    @property
    def host_bytes(self) -> int:
        """What is kept in host memory between jobs."""
        return sum(source.host_bytes for source in self._sources.values()) + tree_bytes(
            list(self._host.values())
        )

    def free_device_bytes(self) -> int:
        """Device bytes a plan may use: what is free, and what is pinned and could be given back."""
        return free_device_bytes() + sum(map(self._bytes, self._device))

    def _bytes(self, key: tuple[str, str]) -> int:
        return self._checkpoint.nbytes(*key)
