"""A function compiled once per set of shapes, with the scratch bytes that the compiler reports."""

import functools
import threading
import time
from collections import OrderedDict
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


class Recent:
    """The executables of a model in the order of their last use. Beyond `most` they are let go: a
    process that draws ever new sizes would grow without end."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._order: OrderedDict[tuple[Program, Any], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def use(self, program: "Program", key: Any) -> None:
        with self._lock:
            self._order[program, key] = None
            self._order.move_to_end((program, key))
            while len(self._order) > self._most:
                (oldest, of), _ = self._order.popitem(last=False)
                oldest.let_go(of)


class _Executable:
    """An executable and its scratch bytes: None and BEYOND if the device ran out of memory."""

    def __init__(self, executable: Any, scratch: int):
        self.executable, self.scratch, self.has_run = executable, scratch, False


class Program:
    """A function compiled once per set of shapes for one device.

    `donate`: indices of arguments that the results may overwrite. `static`: keyword arguments of
    the function, fixed for this program. `precision`: of float32 products; a GPU's default is TF32.
    `recent`: takes note of each use.
    """

    def __init__(
        self,
        placement: Placement,
        function: Callable,
        *,
        donate: tuple[int, ...] = (),
        precision: str | None = None,
        recent: Recent | None = None,
        **static,
    ):
        def with_token(*args):
            # the recorder awaits this token, because the result itself may be donated to the next
            # program
            return function(*args, **static), jnp.zeros((), jnp.int8)

        self.name = function.__name__.strip("_")
        self._placement, self._precision, self._recent = placement, precision, recent
        self._function, self._donate = with_token, donate
        self._compiled: dict[Any, _Executable] = {}
        self._lock, self._locks = threading.Lock(), dict[Any, threading.Lock]()
        self.compilations, self.compile_seconds = 0, 0.0

    def compiled(self, *args) -> tuple[Any, int]:
        """The executable for `args` (arrays or ShapeDtypeStructs), and its scratch bytes.

        None and BEYOND if the device ran out of memory while compiling.
        """
        found = self._of(args)
        return found.executable, found.scratch

    def let_go(self, key: Any) -> None:
        """Forget the executable for these shapes."""
        with self._lock:
            self._compiled.pop(key, None)
            self._locks.pop(key, None)

    def _of(self, args: tuple) -> _Executable:
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # stages may compile concurrently
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._compile(args)
        if self._recent is not None:
            self._recent.use(self, key)
        return found

    def _compile(self, args: tuple) -> _Executable:
        began = time.perf_counter()
        self.compilations += 1
        # of its own: JAX keeps what it traced as long as the jitted function lives
        function = functools.wraps(self._function)(lambda *args: self._function(*args))
        jitted = jax.jit(
            function,
            donate_argnums=self._donate,
            keep_unused=True,
            compiler_options=None if self._placement.shares_memory else OPTIONS,
        )
        try:
            with (
                jax.default_device(self._placement.device),
                jax.default_matmul_precision(self._precision),
            ):
                executable = jitted.lower(*args).compile()
        except jax.errors.JaxRuntimeError as fault:  # a GPU's compiler loads the program too
            if not is_exhausted(fault):
                raise
            return _Executable(None, BEYOND)
        finally:
            self.compile_seconds += time.perf_counter() - began
        memory = executable.memory_analysis()
        return _Executable(executable, 0 if memory is None else scratch_bytes(memory))

    def __call__(
        self, recorder: Recorder, *args, name: str = "", copied: tuple[str, int] | None = None
    ):
        """Run the program.

        `name`: of the run in the ledgers. `copied`: name and bytes of a copy that the program makes.
        """
        own = self._of(args)
        executable = own.executable
        if executable is None:
            raise jax.errors.JaxRuntimeError(
                f"{EXHAUSTED}: the device ran out of memory while compiling {self.name}"
            )
        recorder.mark(own.scratch)
        kinds = [("compute", name or self.name, 0), *([("copy", *copied)] if copied else [])]
        if own.has_run:
            result, token = executable(*args)
            recorder.launched(token, *kinds)
            return result
        recorder.settle()
        args = self._placement.settled(args)
        with self._placement.gate.alone():
            result, token = executable(*args)
            recorder.launched(token, *kinds)
            recorder.settle()
        own.has_run = True
        return result


def scratch_bytes(memory) -> int:
    """Scratch bytes of an executable: temporaries, and results outside donated arguments."""
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
