"""The engine's process as its owner holds it: messages to it and from it, and its end."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

from .errors import UsageError


@runtime_checkable
class Link(Protocol):
    """A process of `zimage_jax.worker` that was started. When it has ended, `poll` and `recv` raise
    EOFError or OSError."""

    is_here: bool  # it runs on this machine

    @property
    def pid(self) -> int: ...

    def send_bytes(self, data: bytes) -> None:
        """Send a pickled message."""

    def recv(self) -> Any:
        """Wait for a message, and return it."""

    def poll(self, seconds: float) -> bool:
        """Whether a message is there, within so many seconds."""
        ...

    def kill(self) -> None:
        """End the process, from any thread, even if it hangs."""

    def end(self) -> str:
        """End the process, if it has not ended, and the link. Returns how it ended."""
        ...


class Child:
    """The process on this machine, and a socket to it.

    `devices`: the GPUs that it must draw with, by number. `environment`: of the process.
    """

    is_here = True

    def __init__(self, devices: Sequence[int | str], environment: dict[str, str] | None = None):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "zimage_jax.worker", str(theirs.fileno())),
                    *map(str, devices),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self._connection = Connection(ours.detach())

    @classmethod
    def on(cls, *devices: int) -> "Child":
        """A process that sees these GPUs, by number among those that this process sees; none: all."""
        return cls(devices, _environment(devices) if devices else None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_bytes(self, data: bytes) -> None:
        self._connection.send_bytes(data)

    def recv(self) -> Any:
        return pickle.loads(self.recv_bytes())

    def recv_bytes(self) -> bytes:
        return self._connection.recv_bytes()

    def poll(self, seconds: float) -> bool:
        return self._connection.poll(seconds)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        self._process.kill()
        self._connection.close()
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _environment(devices: tuple[int, ...]) -> dict[str, str]:
    """Of a process that sees these GPUs."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": visible(devices),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cuda,cpu",
    }


def visible(devices: tuple[int, ...]) -> str:
    """CUDA_VISIBLE_DEVICES of a process that sees these GPUs alone. Raises UsageError."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else []
    for device in devices:
        if names and device >= len(names):
            raise UsageError(f"device {device}: CUDA_VISIBLE_DEVICES names {len(names)} devices")
    return ",".join(names[device] if names else str(device) for device in devices)
