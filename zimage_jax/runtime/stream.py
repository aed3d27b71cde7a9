"""Runs chunks of blocks on the device by the actions of a schedule.

This file knows units, chunks and slots, not layers. A block's leaves are a tuple of arrays; the
structure of its module turns them into the module. Programs take plain tuples because flattening a
module in Python costs 0.1 ms each time.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ..model.kv import Nfe
from ..planning.plan import StreamPlan
from ..planning.schedule import Load, Pin, Visit, actions, loads
from ..units import tree_bytes
from ..weights.formats import Storage
from .program import Program
from .reader import Chunk, Leaves, Reader
from .recorder import Recorder


def run_chunk(chunk: Chunk, x, *inputs, trees: tuple, apply: Callable, **static):
    """Run a chunk over one micro-batch: `apply(blocks, x, *inputs)`; x is a tree of arrays.

    `trees` has the structure of each block's module.
    """
    return apply(list(map(jax.tree.unflatten, trees, chunk)), x, *inputs, **static)


def ring_step(chunk: Chunk, spare: Chunk, following: Chunk, x, *inputs, **static):
    """Like `run_chunk`, and copy the host's leaves `following` over the donated leaves `spare`."""
    return run_chunk(chunk, x, *inputs, **static), fill(spare, following)


def fill(spare: Chunk, following: Chunk) -> Chunk:
    """The host's leaves `following` in the memory of the leaves `spare`, of the same shapes."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), following)


def replaced_by(spare: tuple, following: tuple) -> tuple:
    """The leaves of a slot that `following` replaces; None for the others."""
    pairs = zip(spare, following, strict=False)
    return tuple(
        tuple(old if leaf is not None else None for old, leaf in zip(*blocks, strict=False))
        for blocks in pairs
    )


def with_leaves(slot: Chunk, filled: Chunk) -> Chunk:
    """A slot with the leaves of `filled` that are not None. A block may have fewer than its place."""

    def block(old: Leaves, new: Leaves) -> Leaves:
        pairs = zip(old, new, strict=False)
        return (*(o if leaf is None else leaf for o, leaf in pairs), *old[len(new) :])

    blocks = (block(*of) for of in zip(slot, filled, strict=False))
    return (*blocks, *slot[len(filled) :])


def parts(following: tuple, count: int) -> list[tuple]:
    """The leaves of a chunk in at most `count` parts of about the same bytes. A part has None for
    the leaves of the others."""
    total, before, number = tree_bytes(following), 0, []
    for leaf in (leaf for block in following for leaf in block):
        number.append(min(count - 1, before * count // max(total, 1)))
        before += tree_bytes(leaf)
    found = []
    for part in range(count):
        numbers = iter(number)
        own = tuple(
            tuple(leaf if next(numbers) == part else None for leaf in block) for block in following
        )
        if jax.tree.leaves(own):
            found.append(own)
    return found


class Call(NamedTuple):
    """What one job runs on a chunk: micro-batches `xs` with their `inputs`, and the static
    arguments of its programs."""

    xs: list
    inputs: list[tuple]
    static: dict[str, Any]


class Sweeps(NamedTuple):
    """What a stage of a job still needs of its stream: a sweep for each NFE; None where the stage
    has no NFEs.

    A stage's `run` yields this between two sweeps and a Call for each chunk, whose `xs` it gets
    back. A job that is closed where it yielded Sweeps has nothing on the device, or goes on later.
    """

    nfes: tuple[Nfe | None, ...] = (None,)


@runtime_checkable
class Pinned(Protocol):
    """A resident unit on its way to the device."""

    def result(self) -> Leaves: ...


@runtime_checkable
class Opens(Protocol):
    """A source of a stream's chunks."""

    def open(self, order: Sequence[tuple[str, ...]], recorder: Recorder) -> Reader: ...


class CallError(Exception):
    """The program of one call failed: its place among the calls, and the `fault`."""

    def __init__(self, index: int, fault: Exception):
        super().__init__(index, fault)
        self.index, self.fault = index, fault


class Stream:
    """Streams the blocks of one component through the device, for the jobs of one stage.

    `visit` runs the next chunk in order over every micro-batch of every job. `pin(units)` copies a
    resident chunk to the device. `without_kv(chunk, sweep)`: whether a copy leaves out the
    parameters that make K and V. `spread`: over how many programs a chunk's copy is spread. Use it
    as a context manager: on exit it frees its slots; the caller of `pin` frees resident chunks.
    """

    def __init__(
        self,
        source: Opens,
        plan: StreamPlan,
        storage: Storage,
        sweeps: int,
        *,
        program: Callable[..., Program],
        recorder: Recorder,
        pin: Callable[[tuple[str, ...]], Sequence[Pinned]],
        without_kv: Callable[[int, int], bool],
        spread: int,
    ):
        self._plan, self._storage, self._spread = plan, storage, spread
        self._program, self._recorder = program, recorder
        self._pin, self._without_kv = pin, without_kv
        self._actions = actions(plan.schedule, plan.kinds, sweeps)
        self._trees = [storage.trees(plan.component, chunk) for chunk in plan.chunks]
        self._pinned: dict[int, Sequence[Pinned]] = {}
        self._slots, self._kinds = dict[int, Chunk](), dict[int, Hashable]()
        self._allocate()
        order = [plan.chunks[load.chunk] for load in loads(plan.schedule, plan.kinds, sweeps)]
        self._reader = source.open(order, recorder)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *fault) -> None:
        try:
            if fault[0] is None:
                self._recorder.settle()  # a slot is free when the program that reads it is done
        finally:
            self._pinned.clear()
            for slot in list(self._slots):
                del self._slots[slot]
                self._recorder.drop(self._slot_name(slot))
            self._reader.close()

    def visit(self, calls: Sequence[Call]) -> list[list]:
        """Run the next chunk over each micro-batch of each call. Raises CallError."""
        for action in self._actions:
            if isinstance(action, Visit):
                return self._visit(action, calls)
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
        filled = self._program(fill, donate=(0,))(
            self._recorder, replaced_by(spare, following), following, copied=copied
        )
        self._slots[load.slot] = with_leaves(spare, filled)
        self._reader.used()

    def _take(self, load: Load) -> Chunk:
        without_kv = self._without_kv(load.chunk, load.sweep)
        chunk = self._reader.take(without_kv=without_kv)
        if without_kv:
            whole = self._storage.nbytes(self._plan.component, *self._plan.chunks[load.chunk])
            self._recorder.saved(whole - tree_bytes(chunk))
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
        self._recorder.hold(self._slot_name(slot), self._slots[slot])

    def _spare(self, load: Load) -> Chunk:
        """The arrays of the slot of a load. A slot of every kind gets those of the chunk's kind, in
        place of its own."""
        kind = self._plan.kinds[load.chunk]
        if self._kinds[load.slot] != kind:
            self._recorder.settle()  # the last program has used the old ones
            del self._slots[load.slot]
            self._fill_with_zeros(load.slot, kind)
        return self._slots[load.slot]

    def _visit(self, visit: Visit, calls: Sequence[Call]) -> list[list]:
        if visit.slot is None:
            chunk = tuple(leaves.result() for leaves in self._pinned[visit.chunk])
        else:
            counts = [tree.num_leaves for tree in self._trees[visit.chunk]]
            slot = self._slots[visit.slot]
            chunk = tuple(leaves[:n] for leaves, n in zip(slot, counts, strict=False))
        copies: list[Chunk] = []
        if visit.then is not None:
            # under all programs of the visit, not under the first alone: eight pictures of 512x512
            # on an rtx-4090 compute for 34 ms, the first of them for 4, and a block's copy takes 15
            programs = sum(len(call.xs) for call in calls)
            copies = parts(self._take(visit.then), min(self._spread, programs))
        found = []
        for index, call in enumerate(calls):
            static = call.static | {"trees": self._trees[visit.chunk]}
            done: list = []
            try:
                for x, inputs in zip(call.xs, call.inputs, strict=True):
                    following = copies.pop(0) if copies else None
                    done.append(self._run(visit, chunk, following, x, inputs, static))
            except Exception as fault:
                raise CallError(index, fault) from fault
            found.append(done)
        if visit.then is not None:
            self._reader.used()
        return found

    def _run(
        self, visit: Visit, chunk: Chunk, following: Chunk | None, x, inputs: tuple, static: dict
    ):
        """Run a chunk over a micro-batch, and copy leaves of the chunk that comes after."""
        name = self._name(visit.chunk)
        if following is None:
            plain = self._program(run_chunk, donate=(1,), **static)
            return plain(self._recorder, chunk, x, *inputs, name=name)
        assert visit.then is not None
        ring = self._program(ring_step, donate=(1, 3), **static)
        slot, copied = self._spare(visit.then), self._name(visit.then.chunk)
        x, filled = ring(
            self._recorder,
            chunk,
            replaced_by(slot, following),
            following,
            x,
            *inputs,
            name=name,
            copied=(copied, tree_bytes(following)),
        )
        self._slots[visit.then.slot] = with_leaves(slot, filled)
        return x
