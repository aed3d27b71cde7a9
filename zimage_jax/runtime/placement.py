"""The devices of a model: their kinds of memory, their free bytes, and their locks for threads."""

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from ..errors import OutOfMemoryError, UsageError
from ..model.attention import Target
from ..planning.seconds import SPREAD
from ..units import size, tree_bytes

# XLA's allocator does not split a free piece if the rest would be under 128 MiB and under the
# requested size (bfc_allocator.cc). Under a cap of 1.5 GiB on an H100, its peak was 112 MiB over
# the ledger's
UNSPLIT_BYTES = 128 * 2**20

DEVICE, HOST = "device", "pinned_host"


class Gate:
    """A lock: many threads hold it together, or one alone. Those that wait for `alone` go first."""

    def __init__(self) -> None:
        self._changed, self._inside, self._wanted = threading.Condition(), 0, 0
        self.in_flight: list[jax.Array] = []  # arrays that `Placement.send` has not yet placed

    def forget_placed(self) -> None:
        """Keep no array alive that is placed."""
        self.in_flight[:] = [
            array
            for array in self.in_flight
            if not (array.is_deleted() or array.is_ready())  # type: ignore[attr-defined]
        ]

    @property
    def is_wanted(self) -> bool:
        """Whether a thread is inside alone, or waits to be."""
        return self._wanted > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self.is_wanted)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._wanted += 1
            try:
                self._changed.wait_for(lambda: not self._inside)
                yield
            finally:
                self._wanted -= 1
                self._changed.notify_all()


_GATES: dict[jax.Device, Gate] = {}


EXHAUSTED = "RESOURCE_EXHAUSTED"  # XLA's status when memory runs out


def is_exhausted(fault: jax.errors.JaxRuntimeError) -> bool:
    """Whether `fault` says that memory ran out."""
    return EXHAUSTED in str(fault)


@dataclass(frozen=True)
class Placement:
    """A device and the host memory beside it, and the `others` with which it shares a model's
    chunks. What is not in chunks is on this one.

    `gate`: a program's first run enters it alone, and threads that place arrays enter it together,
    for all models on the device. cuDNN's warm-up at a program's first run captures the compute
    stream, and placing an array records events on that stream. An H100 (jax 0.11.2) failed with
    "capturing stream has unjoined work". That other threads' arrays were the cause is inferred from
    XLA's sources (cudnn_thunk.cc, local_device_state.cc), not proven on a GPU.
    """

    device: jax.Device
    gate: Gate = field(compare=False)
    others: tuple["Placement", ...] = ()

    @classmethod
    def on(cls, *devices: jax.Device) -> "Placement":
        """The placement of `devices`, by default the process's first device."""
        first, *others = devices or jax.local_devices()[:1]
        gate = _GATES.setdefault(first, Gate())
        return cls(first, gate, tuple(map(cls.on, others)))

    @classmethod
    def first(cls, count: int) -> "Placement":
        """The placement of the process's first devices. Raises UsageError if it has fewer."""
        found = jax.local_devices()
        if len(found) < count:
            raise UsageError(
                f"--devices: expected {count}, JAX finds {len(found)} of platform "
                f"{found[0].platform}"
            )
        return cls.on(*found[:count])

    def __str__(self) -> str:
        counts = Counter(placement.device.device_kind for placement in self.each)
        return ", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in counts.items())

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        return tuple(placement.device for placement in self.each)

    @property
    def each(self) -> tuple["Placement", ...]:
        """The placement of each device alone."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @classmethod
    def on_host(cls) -> "Placement":
        """The placement of the CPU, for work that must not use the device's memory."""
        return cls.on(jax.local_devices(backend="cpu")[0])

    @property
    def target(self) -> Target:
        """The platform and compute capability that programs are compiled for: those of the least
        capable of several devices, so that all compute alike."""
        if self.others:
            return min((of.target for of in self.each), key=lambda of: of.capability or ())
        word = getattr(self.device, "compute_capability", "")  # "8.9"; AMD's is "gfx90a"
        capability = re.fullmatch(r"([0-9]+)\.([0-9]+)", word)
        return Target(
            self.platform, (int(capability[1]), int(capability[2])) if capability else None
        )

    @property
    def platform(self) -> str:
        return self.device.platform

    @property
    def shares_memory(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.platform == "cpu"

    @property
    def runs_ahead(self) -> int:
        """Programs launched before the last one is done.

        One on a GPU, which otherwise idles between programs; with others, the copy of its next chunk
        is a program too. None on a CPU, whose cores would both run a program and prepare the next.
        """
        return 0 if self.shares_memory else 1 + bool(self.others)

    @property
    def spread(self) -> int:
        """Over how many programs of a visit the copy of the next chunk is spread."""
        return 1 if self.shares_memory else SPREAD

    def sharding(self, kind: str = DEVICE) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.device, memory_kind=kind)

    def put(self, tree, kind: str = DEVICE):
        """Place arrays in DEVICE or HOST memory and wait: none may be copied during a first run.

        Raises OutOfMemoryError if the host cannot page-lock that much memory.
        """
        # a CPU needs no gate, and a preview is made there while the scan's program runs
        try:
            with nullcontext() if self.shares_memory else self.gate.together():
                return jax.block_until_ready(jax.device_put(tree, self.sharding(kind)))
        except jax.errors.JaxRuntimeError as fault:
            if kind == HOST and is_exhausted(fault):
                raise out_of_pinned_memory(tree_bytes(tree)) from None
            raise

    def send(self, tree, kind: str = DEVICE):
        """Like `put`, but returns at once: the arrays are copied while programs run.

        `settled` awaits them before a program's first run.
        """
        sent = jax.device_put(tree, self.sharding(kind))
        self.gate.forget_placed()
        self.gate.in_flight += jax.tree.leaves(sent)
        return sent

    def brought(self, tree):
        """`tree` with all its arrays on this device: those of other devices are sent."""

        def bring(array):
            if not isinstance(array, jax.Array) or array.devices() == {self.device}:
                return array
            (source,), sent = array.devices(), self.send(array)
            # neither device may run a program for the first time meanwhile
            Placement.on(source).gate.in_flight.append(sent)
            return sent

        return jax.tree.map(bring, tree)

    def settled(self, args):
        """A first run's arguments: numpy arrays are placed, and all sent arrays are awaited."""
        jax.block_until_ready([array for array in self.gate.in_flight if not array.is_deleted()])
        self.gate.in_flight.clear()

        def place(array):
            return array if isinstance(array, jax.Array) else self.put(array)

        return jax.block_until_ready(jax.tree.map(place, args))

    def allocator_peak(self) -> int | None:
        """The allocator's peak bytes in this process; None on a CPU, which does not count them."""
        stats = self.device.memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on the device; on a CPU, the host's free bytes."""
        stats = self.device.memory_stats()
        if stats is None:
            return free_host_bytes()
        return max(0, stats["bytes_limit"] - stats["bytes_in_use"] - UNSPLIT_BYTES)


# compute capability of Ampere, the first NVIDIA cards with bfloat16 products
FIRST_BFLOAT16 = (8, 0)
# cuDNN 9.10.2: the two releases before it compute some attentions wrongly, and JAX refuses them
CUDNN_FROM = 91002


def default_dtype(target: Target) -> str:
    """The compute dtype on `target` if the user names none."""
    if target.platform == "cpu":
        return "float32"
    return "float16" if target.capability and target.capability < FIRST_BFLOAT16 else "bfloat16"


def require_cudnn() -> None:
    """Raises UsageError if JAX finds no cuDNN, or one that is too old."""
    from jax._src.lib import cuda_versions

    try:
        version = cuda_versions.cudnn_get_version() if cuda_versions else 0
    except RuntimeError:  # the library cannot be loaded
        version = 0
    if version < CUDNN_FROM:
        found = f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "none"
        raise UsageError(
            f"attention 'cudnn' needs cuDNN 9.10.2 or newer, found {found}; use auto or chunks"
        )


_KERNEL = Path("/proc/version")


def pinned_limit_hint() -> str:
    """The end of an error's line: what to do under WSL2. Empty on other systems."""
    try:
        kernel = _KERNEL.read_text("utf-8", "replace")
    except OSError:  # not Linux
        return ""
    if "microsoft" not in kernel.lower():
        return ""
    return (
        "; WSL2 page-locks at most about half of its memory: read the model through a window with "
        "--host-memory GIB, or give WSL2 more (memory= under [wsl2] in .wslconfig)"
    )


def out_of_pinned_memory(nbytes: int) -> OutOfMemoryError:
    """The error for `nbytes` of page-locked host memory that could not be allocated."""
    return OutOfMemoryError(
        f"the host could not page-lock {size(nbytes)} for parameters{pinned_limit_hint()}",
        nbytes,
    )


def free_host_bytes() -> int:
    """Bytes of host memory that are available without swapping."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
