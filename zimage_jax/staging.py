"""Runs programs on the device and keeps the account of its memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


class Ledger:
    """Device bytes held by name, their peak by stage, and the seconds each stage took."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.peak_by_stage: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage = "load"

    @property
    def peak(self) -> int:
        return max(self.peak_by_stage.values(), default=0)

    def hold(self, name: str, tree) -> None:
        self.held[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        self.mark()

    def mark(self, more: int = 0) -> None:
        """Note the bytes held now, and `more` that a running program takes."""
        now = sum(self.held.values()) + more
        self.peak_by_stage[self._stage] = max(self.peak_by_stage.get(self._stage, 0), now)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self._stage = self._stage, name
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self._stage = outer


class Program:
    """A function compiled once per shape, with the device memory the compiler says it takes.

    `static` arguments go to the function as keywords and belong to the program.
    """

    def __init__(self, function: Callable, **static):
        self._jitted = jax.jit(lambda *args: function(*args, **static))
        self._compiled: dict = {}
        self.compile_seconds = 0.0

    def __call__(self, ledger: Ledger, *args):
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if key not in self._compiled:
            began = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - began
        program = self._compiled[key]
        memory = program.memory_analysis()
        if memory is not None:
            ledger.mark(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        return jax.block_until_ready(program(*args))


def allocator_peak() -> int | None:
    """The peak the device's own allocator saw in this process; None on a CPU, which keeps no such count."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
