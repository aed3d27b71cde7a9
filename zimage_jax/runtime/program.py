"""A function compiled once per set of shapes, with the scratch bytes that the compiler reports."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .placement import EXHAUSTED, Placement, is_exhausted
from .recorder import Recorder

# How a GPU's programs are compiled
OPTIONS = {
    # without this scheduler a GPU copies only after it has computed. The limit must exceed the
    # number of arrays that one visit copies, or the first copies are awaited before compute starts
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_async_compute_limit": 1024,
    # the same kernels, and so the same bits, in every process and under every schedule: autotuning
    # chooses by measured time and varies (openxla/xla#15229); cuBLASLt's own choice does not.
    # Triton's matrix products would run with untuned tiles, so they are off
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    # off: XLA would copy the matrices that multiply the same tokens into one, which takes 28 MiB of
    # a ring step at 512x512 (sm_89)
    "xla_gpu_dot_merger_threshold_mb": 0,
}

BEYOND = 1 << 50  # scratch bytes that fit no device


class Program:
    """A function compiled once per set of shapes for one device.

    `donate`: indices of arguments that the results may overwrite. `static`: keyword arguments of
    the function, fixed for this program. `precision`: of float32 products; a GPU's default is TF32.
    """

    def __init__(
        self,
        placement: Placement,
        function: Callable,
        *,
        donate: tuple[int, ...] = (),
        precision: str | None = None,
        **static,
    ):
        def with_token(*args):
            # the recorder awaits this token, because the result itself may be donated to the next
            # program
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
        """The executable for `args` (arrays or ShapeDtypeStructs), and its scratch bytes.

        None and BEYOND if the device ran out of memory while compiling.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # stages may compile concurrently
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
        except jax.errors.JaxRuntimeError as fault:  # a GPU's compiler loads the program too
            if not is_exhausted(fault):
                raise
            return None, BEYOND
        finally:
            self.compile_seconds += time.perf_counter() - began
        memory = executable.memory_analysis()
        return executable, 0 if memory is None else scratch_bytes(memory)

    def __call__(
        self, recorder: Recorder, *args, name: str = "", copied: tuple[str, int] | None = None
    ):
        """Run the program.

        `name`: of the run in the ledgers. `copied`: name and bytes of a copy that the program makes.
        """
        executable, scratch = self.compiled(*args)
        if executable is None:
            raise jax.errors.JaxRuntimeError(
                f"{EXHAUSTED}: the device ran out of memory while compiling {self.name}"
            )
        recorder.mark(scratch)
        kinds = [("compute", name or self.name, 0), *([("copy", *copied)] if copied else [])]
        if id(executable) in self._has_run:
            result, token = executable(*args)
            recorder.launched(token, *kinds)
            return result
        recorder.settle()
        args = self._placement.settled(args)
        with self._placement.gate.alone():
            result, token = executable(*args)
            recorder.launched(token, *kinds)
            recorder.settle()
        self._has_run.add(id(executable))
        return result


def scratch_bytes(memory) -> int:
    """Scratch bytes of an executable: temporaries, and results outside donated arguments."""
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
