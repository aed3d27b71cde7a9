"""Runs chunks of blocks on the device by the actions of a schedule.

This file knows units, chunks and slots, not layers. A block's leaves are a tuple of arrays; the
structure of its module turns them into the module. Programs take plain tuples because flattening a
module in Python costs 0.1 ms each time.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future

import jax
import jax.numpy as jnp
from jax import Array

from ..planning.plan import StreamPlan
from ..planning.schedule import Load, Pin, Visit, actions, loads
from ..units import tree_bytes
from ..weights.formats import Storage
from .ledger import Ledger
from .program import Program
from .reader import Chunk, Leaves, Source


def run_chunk(chunk: Chunk, x, *inputs, trees: tuple, apply: Callable, **static):
    """Run a chunk over one micro-batch: `apply(blocks, x, *inputs)`; x is a tree of arrays.

    `trees` has the structure of each block's module.
    """
    return apply(list(map(jax.tree.unflatten, trees, chunk)), x, *inputs, **static)


def ring_step(chunk: Chunk, spare: Chunk, following: Chunk, x, *inputs, **static):
    """Like `run_chunk`, and copy the host's chunk `following` into the donated slot `spare`."""
    return run_chunk(chunk, x, *inputs, **static), fill(spare, following)


def fill(spare: Chunk, following: Chunk) -> Chunk:
    """The slot `spare` with the chunk `following` copied into its first blocks.

    Missing leaves (None) and missing blocks keep the slot's old arrays.
    """

    def moved(old: Array | None, leaf: Array | None) -> Array | None:
        return old if leaf is None else jax.device_put(leaf, jax.memory.Space.Device)

    filled = (tuple(map(moved, *blocks)) for blocks in zip(spare, following, strict=False))
    return (*filled, *spare[len(following) :])


class Stream:
    """Streams the blocks of one component through the device, for one job.

    `visit` runs the next chunk in order over every micro-batch. `pin(units)` copies a resident
    chunk to the device. `without_kv(chunk, sweep)`: whether a copy leaves out the parameters that
    make K and V. Use it as a context manager: on exit it frees its slots; the caller of `pin` frees
    resident chunks.
    """

    def __init__(
        self,
        source: Source,
        plan: StreamPlan,
        storage: Storage,
        sweeps: int,
        *,
        program: Callable[..., Program],
        ledger: Ledger,
        pin: Callable[[tuple[str, ...]], list[Future[Leaves]]],
        without_kv: Callable[[int, int], bool],
    ):
        self._plan, self._storage = plan, storage
        self._program, self._ledger, self._pin, self._without_kv = program, ledger, pin, without_kv
        self._actions = actions(plan.schedule, plan.kinds, sweeps)
        self._trees = [storage.trees(plan.component, chunk) for chunk in plan.chunks]
        self._pinned: dict[int, list[Future[Leaves]]] = {}
        self._slots, self._kinds = dict[int, Chunk](), dict[int, Hashable]()
        self._allocate()
        order = [plan.chunks[load.chunk] for load in loads(plan.schedule, plan.kinds, sweeps)]
        self._reader = source.open(order, ledger)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._pinned.clear()
        for slot in list(self._slots):
            del self._slots[slot]
            self._ledger.drop(self._slot_name(slot))
        self._reader.close()

    def visit(self, xs: list, inputs: list[tuple], **static) -> list:
        """Run the next chunk over each micro-batch x with its own inputs."""
        for action in self._actions:
            if isinstance(action, Visit):
                return self._visit(action, xs, inputs, static)
            if isinstance(action, Pin):
                self._pinned[action.chunk] = self._pin(self._plan.chunks[action.chunk])
            elif isinstance(action, Load):
                self._load(action)
        raise RuntimeError("visit was called more often than the schedule has visits")

    def _name(self, chunk: int) -> str:
        return f"{self._plan.component} chunk {chunk}"

    def _slot_name(self, slot: int) -> str:
        return f"{self._plan.component} slot {slot}"

    def _load(self, load: Load) -> None:
        following = self._take(load)
        spare, copied = self._spare(load), (self._name(load.chunk), tree_bytes(following))
        self._slots[load.slot] = self._program(fill, donate=(0,))(
            self._ledger, spare, following, copied=copied
        )
        self._reader.used()

    def _take(self, load: Load) -> Chunk:
        without_kv = self._without_kv(load.chunk, load.sweep)
        chunk = self._reader.take(without_kv=without_kv)
        if without_kv:
            whole = self._storage.nbytes(self._plan.component, *self._plan.chunks[load.chunk])
            self._ledger.saved_bytes += whole - tree_bytes(chunk)
        return chunk

    def _allocate(self) -> None:
        """Give every slot arrays for the largest chunk in it.

        They are allocated before any activation and the largest first, so that the allocator leaves
        no gaps between them.
        """
        plan = self._plan
        kinds = plan.slot_kinds
        sizes = [self._storage.nbytes(plan.component, *units) for units in plan.slots]
        for slot in sorted(range(len(kinds)), key=lambda slot: -sizes[slot]):
            self._fill_with_zeros(slot, kinds[slot])

    def _fill_with_zeros(self, slot: int, kind: Hashable) -> None:
        blocks = [
            self._storage.specs(self._plan.component, unit) for unit in self._plan.slot_of(kind)
        ]
        self._kinds[slot] = kind
        self._slots[slot] = tuple(
            tuple(jnp.zeros(a.shape, a.dtype) for a in block) for block in blocks
        )
        self._ledger.hold(self._slot_name(slot), self._slots[slot])

    def _spare(self, load: Load) -> Chunk:
        """The arrays of the slot of a load. A slot of every kind gets those of the chunk's kind, in
        place of its own."""
        kind = self._plan.kinds[load.chunk]
        if self._kinds[load.slot] != kind:
            self._ledger.settle()  # the last program has used the old ones
            del self._slots[load.slot]
            self._fill_with_zeros(load.slot, kind)
        return self._slots[load.slot]

    def _visit(self, visit: Visit, xs: list, inputs: list[tuple], static: dict) -> list:
        size, name = len(self._plan.chunks[visit.chunk]), self._name(visit.chunk)
        static = static | {"trees": self._trees[visit.chunk]}
        if visit.slot is None:
            chunk = tuple(leaves.result() for leaves in self._pinned[visit.chunk])
        else:
            chunk = self._slots[visit.slot][:size]
        plain = self._program(run_chunk, donate=(1,), **static)
        done = []
        if visit.then is not None:
            ring = self._program(ring_step, donate=(1, 3), **static)
            following = self._take(visit.then)
            spare = self._spare(visit.then)
            copied = self._name(visit.then.chunk), tree_bytes(following)
            x, filled = ring(
                self._ledger, chunk, spare, following, xs[0], *inputs[0], name=name, copied=copied
            )
            self._slots[visit.then.slot] = filled
            self._reader.used()
            done.append(x)
        for x, own in list(zip(xs, inputs, strict=True))[len(done) :]:
            done.append(plain(self._ledger, chunk, x, *own, name=name))
        return done
