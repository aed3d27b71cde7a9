"""A function compiled once per set of shapes, with the device memory that the compiler says it takes."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .ledger import Ledger
from .placement import EXHAUSTED, Placement, is_exhausted

# How a GPU's programs are compiled
OPTIONS = {
    # without this scheduler a GPU copies after it computes; the limit must exceed the arrays of one step, or the first
    # copies are awaited before compute starts
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_async_compute_limit": 1024,
    # the same kernels, so the same bits, in every process and under every schedule: autotuning chooses by measured time
    # and varies (openxla/xla#15229), cuBLASLt's own choice does not. Without autotuning Triton's tiles are untuned
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    # XLA joins matrices that multiply the same tokens into a copy: 28 MiB of a ring step at 512x512 (sm_89)
    "xla_gpu_dot_merger_threshold_mb": 0,
}

BEYOND = 1 << 50  # bytes that no device has


class Program:
    """A function compiled once per set of shapes for one device.

    `static` arguments go to the function as keywords and belong to the program. `precision` is that of products of
    float32: a GPU's own default is TF32.
    """

    def __init__(
        self, placement: Placement, function: Callable, *, donate: tuple[int, ...] = (), precision: str | None = None,
        **static,
    ):  # fmt: skip
        def with_token(*args):
            # what the ledger waits for: the next program may have been given the result itself
            return function(*args, **static), jnp.zeros((), jnp.int8)

        self.name = function.__name__.strip("_")
        self._placement, self._precision = placement, precision
        options = None if placement.shares_memory else OPTIONS
        self._jitted = jax.jit(
            with_token, donate_argnums=donate, keep_unused=True, compiler_options=options
        )
        self._compiled: dict[Any, tuple[Any, int]] = {}
        self._lock, self._locks = threading.Lock(), dict[Any, threading.Lock]()
        self._has_run = set[int]()
        self.compile_seconds = 0.0

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def compiled(self, *args) -> tuple[Any, int]:
        """The executable for arguments of these shapes (arrays or ShapeDtypeStructs), and its scratch: the device bytes it
        takes beside its arguments. None and BEYOND where the device had no memory to compile it in."""
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # several stages may ask at once
            if key not in self._compiled:
                self._compiled[key] = self._compile(args)
        return self._compiled[key]

    def _compile(self, args: tuple) -> tuple[Any, int]:
        began = time.perf_counter()
        try:
            with (
                jax.default_device(self._placement.device),
                jax.default_matmul_precision(self._precision),
            ):
                executable = self._jitted.lower(*args).compile()
        except jax.errors.JaxRuntimeError as fault:  # a GPU's compiler may load what it compiled
            if not is_exhausted(fault):
                raise
            return None, BEYOND
        finally:
            self.compile_seconds += time.perf_counter() - began
        memory = executable.memory_analysis()
        return executable, 0 if memory is None else scratch_bytes(memory)

    def __call__(
        self, ledger: Ledger, *args, name: str = "", copied: tuple[str, int] | None = None
    ):
        """`name`: what the ledger calls this run. `copied`: name and bytes of what is copied to the device meanwhile."""
        executable, scratch = self.compiled(*args)
        if executable is None:
            raise jax.errors.JaxRuntimeError(
                f"{EXHAUSTED}: {self.name} could not be compiled in the device's memory"
            )
        ledger.mark(scratch)
        kinds = [("compute", name or self.name, 0), *([("copy", *copied)] if copied else [])]
        if id(executable) in self._has_run:
            result, token = executable(*args)
            ledger.launched(token, *kinds)
            return result
        ledger.settle()
        args = self._placement.settled(args)
        with self._placement.gate.alone():
            result, token = executable(*args)
            ledger.launched(token, *kinds)
            ledger.settle()
        self._has_run.add(id(executable))
        return result


def scratch_bytes(memory) -> int:
    """Device bytes that an executable takes beside its arguments: temporaries, and results in no donated buffer."""
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
