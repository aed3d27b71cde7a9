"""The device and the host as they are: what they hold, and what threads may do with the device at
once."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Gate:
    """Many threads may be inside together, or one alone; whoever wants to be alone comes before
    those who wait."""

    def __init__(self) -> None:
        self._changed, self._inside, self._wanted = threading.Condition(), 0, 0

    @property
    def is_wanted(self) -> bool:
        """Whether someone waits to be alone, or is."""
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


# XLA's allocator gives a free piece whole when less than this, and less than what was asked for,
# would be left of it (bfc_allocator.cc). Under a cap of 1.5 GiB on an H100 its peak was 112 MiB
# over the ledger's
UNSPLIT_BYTES = 128 * 2**20

# A program is compiled and first run alone, and arrays are placed together. On an H100 (jax 0.11.2)
# cuDNN failed to unpack an attention, "capturing stream has unjoined work", and the process with
# it, while four threads placed arrays; that it was these which spoilt the capture is inferred
GATE = Gate()


FIRST_BFLOAT16 = 8  # compute capability of Ampere: the first NVIDIA cards with bfloat16 products


def dtype_of(platform: str, capability: str | None) -> str:
    """The dtype to compute in on a platform as JAX names it ("cpu", "gpu"), whose device has a
    compute capability such as "7.5"; None, or other words such as "gfx90a", where it is no NVIDIA
    card's."""
    if platform == "cpu":
        return "float32"
    major = (capability or "").partition(".")[0]
    return "float16" if major.isdigit() and int(major) < FIRST_BFLOAT16 else "bfloat16"


def default_dtype() -> str:
    """The dtype to compute in on this machine's device."""
    device = jax.local_devices()[0]
    return dtype_of(device.platform, getattr(device, "compute_capability", None))


def shares_memory() -> bool:
    """Whether device memory is the host's."""
    return jax.default_backend() == "cpu"


def runs_ahead() -> int:
    """Programs to give to the device before the last is done: one on a GPU, which would else wait
    for the host between any two. A CPU's programs run on the cores that would prepare the next."""
    return 0 if shares_memory() else 1


def allocator_peak() -> int | None:
    """The peak the device's own allocator saw in this process; None on a CPU, which keeps no such
    count."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def free_device_bytes() -> int:
    """Bytes the device can still give; a CPU's device memory is the host's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return free_host_bytes()
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"] - UNSPLIT_BYTES)


def free_host_bytes() -> int:
    """Host memory that is available without swapping."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
