"""Runs chunks of blocks on the devices by the actions of their schedules.

This file knows units, chunks and slots, not layers. A block's leaves are a tuple of arrays; the
structure of its module turns them into the module. Programs take plain tuples because flattening a
module in Python costs 0.1 ms each time.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ..model.kv import Nfe
from ..planning.schedule import Load, Pin, Visit, actions, loads
from ..planning.stream_plan import StreamPlan
from ..units import tree_bytes
from ..weights.formats import Storage
from .placement import Placement
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
    blocks = (_block_with_leaves(*of) for of in zip(slot, filled, strict=False))
    return (*blocks, *slot[len(filled) :])


def _block_with_leaves(old: Leaves, new: Leaves) -> Leaves:
    pairs = zip(old, new, strict=False)
    return (*(o if leaf is None else leaf for o, leaf in pairs), *old[len(new) :])


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


AWAY = "tokens and inputs of jobs in flight"


class Call(NamedTuple):
    """What one job runs on a chunk: micro-batches `xs` with their `inputs`, and the static
    arguments of its programs. `away`: the arrays that it takes on each device but the first."""

    xs: list
    inputs: list[tuple]
    static: dict[str, Any]
    away: Any = ()


class Sweeps(NamedTuple):
    """What a stage of a job still needs of its stream: a sweep for each NFE; None where the stage
    has no NFEs.

    A stage's `run` yields this between two sweeps and a Call for each chunk, whose `xs` it gets
    back. A job that is closed where it yielded Sweeps has nothing on the device, or goes on later.
    """

    nfes: tuple[Nfe | None, ...] = (None,)

    def may_stop(self, index: int) -> bool:
        """Whether the job can go on from the host at this NFE: it reuses no K and V."""
        nfe = self.nfes[index] if index < len(self.nfes) else None
        return nfe is None or not nfe.reuses


@runtime_checkable
class Pinned(Protocol):
    """A resident unit on its way to the device."""

    def result(self) -> Leaves: ...


@runtime_checkable
class Opens(Protocol):
    """A source of a stream's chunks."""

    def open(
        self, order: Sequence[tuple[str, ...]], recorder: Recorder, placement: Placement
    ) -> Reader: ...


class CallError(Exception):
    """The program of one call failed: its place among the calls, and the `fault`."""

    def __init__(self, index: int, fault: Exception):
        super().__init__(index, fault)
        self.index, self.fault = index, fault


class Lane:
    """Streams one device's share of a component's blocks through it, for the jobs of one stage.

    `visit` runs the device's next chunk over every micro-batch of every job. `pin(units)` copies a
    resident chunk to the device. `without_kv(chunk, sweep)`: whether a copy leaves out the
    parameters that make K and V. `close` frees its slots; the caller of `pin` frees resident chunks.
    """

    def __init__(
        self,
        source: Opens,
        plan: StreamPlan,
        storage: Storage,
        sweeps: int,
        *,
        placement: Placement,
        program: Callable[..., Program],
        recorder: Recorder,
        pin: Callable[[tuple[str, ...]], Sequence[Pinned]],
        without_kv: Callable[[int, int], bool],
    ):
        self._plan, self._storage, self.placement = plan, storage, placement
        self._program, self._recorder = program, recorder
        self._pin, self._without_kv = pin, without_kv
        self._actions = actions(plan.schedule, plan.kinds, sweeps)
        self._next: Visit | None = None
        self._is_unused = False  # the last chunk was copied, and its reader does not know yet
        self._trees = [storage.trees(plan.component, chunk) for chunk in plan.chunks]
        self._pinned: dict[int, Sequence[Pinned]] = {}
        self._slots, self._kinds = dict[int, Chunk](), dict[int, Hashable]()
        self._allocate()
        order = [plan.chunks[load.chunk] for load in loads(plan.schedule, plan.kinds, sweeps)]
        self._reader = source.open(order, recorder, placement)

    def close(self, *, settles: bool) -> None:
        """Free the slots. `settles`: await the programs that read them."""
        try:
            if settles:
                self._recorder.settle()
        finally:
            self._pinned.clear()
            for slot in list(self._slots):
                del self._slots[slot]
                self._recorder.drop(self._slot_name(slot))
            self._reader.close()

    def visit(self, calls: Sequence[Call]) -> list[list]:
        """Run the next chunk over each micro-batch of each call. Raises CallError."""
        self.prepare()
        visit, self._next = self._next, None
        if visit is None:
            raise RuntimeError("visit was called more often than the schedule has visits")
        return self._visit(visit, calls)

    def prepare(self) -> None:
        """Copy what the next visit needs, and what can be copied before it."""
        while self._next is None and (action := next(self._actions, None)) is not None:
            if isinstance(action, Visit):
                self._next = action
            elif isinstance(action, Pin):
                self._pinned[action.chunk] = self._pin(self._plan.chunks[action.chunk])
            elif isinstance(action, Load):
                self._load(action)

    def _name(self, chunk: int) -> str:
        return f"{self._plan.component} chunk {self._plan.number(chunk)}"

    def _slot_name(self, slot: int) -> str:
        return f"{self._plan.component} slot {slot}"

    def _load(self, load: Load) -> None:
        if self._is_unused:
            self._reader.used()
        following = self._take(load)
        spare, copied = self._spare(load), (self._name(load.chunk), tree_bytes(following))
        filled = self._program(fill, donate=(0,))(
            self._recorder, replaced_by(spare, following), following, copied=copied
        )
        self._slots[load.slot] = with_leaves(spare, filled)
        # the reader of a window waits for the copy: other devices must not
        self._is_unused = self._plan.schedule.takes_turns
        if not self._is_unused:
            self._reader.used()

    def _take(self, load: Load) -> Chunk:
        without_kv = self._without_kv(self._plan.number(load.chunk), load.sweep)
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
        self._kinds[slot], device = kind, self.placement.sharding()
        self._slots[slot] = tuple(
            tuple(jnp.zeros(a.shape, a.dtype, device=device) for a in block) for block in blocks
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
            copies = parts(self._take(visit.then), min(self.placement.spread, programs))
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


class Stream:
    """The lanes of all devices, for the jobs of one stage. Use it as a context manager.

    The chunks are visited in order, each on its own device. Several devices take turns: what a
    visit computes passes on at once, and the device copies its next chunk while others compute.
    """

    def __init__(self, plan: StreamPlan, lanes: Sequence[Lane], recorder: Recorder):
        self._lanes, self._recorder = lanes, recorder
        self._order = itertools.cycle(map(plan.owner, range(len(plan.chunks))))
        self._takes_turns = plan.schedule.takes_turns
        # by device and call: a call's inputs, and those inputs on the device
        self._inputs: dict[tuple[int, int], tuple[list, list]] = {}

    def __enter__(self) -> "Stream":
        if self._takes_turns:
            for lane in self._lanes:
                lane.prepare()
        return self

    def __exit__(self, *fault) -> None:
        try:
            for lane in self._lanes:
                lane.close(settles=fault[0] is None)
        finally:
            self._inputs.clear()
            for recorder in self._recorder.each[1:]:
                recorder.drop(AWAY)
            for lane in self._lanes:
                lane.placement.gate.forget_placed()

    def visit(self, calls: Sequence[Call]) -> list[list]:
        """Run the next chunk over each micro-batch of each call. Raises CallError."""
        device = next(self._order)
        lane = self._lanes[device]
        if len(self._lanes) > 1:
            calls = self._brought(device, calls)
        found = lane.visit(calls)
        if self._takes_turns:
            lane.prepare()
        return found

    def _brought(self, device: int, calls: Sequence[Call]) -> list[Call]:
        """The calls on a device. A further device holds a copy of their inputs."""
        here = self._lanes[device].placement
        if device:
            self._recorder.each[device].hold(AWAY, [call.away for call in calls])
        found = []
        for number, call in enumerate(calls):
            given, inputs = self._inputs.get((device, number), (None, []))
            if given is not call.inputs:
                inputs = here.brought(call.inputs)
                self._inputs[device, number] = call.inputs, inputs
            found.append(call._replace(xs=here.brought(call.xs), inputs=inputs))
        return found
