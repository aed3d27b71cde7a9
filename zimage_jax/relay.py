"""The part of a cluster's process that runs on its machine: imports no JAX, for its process does."""

import importlib.metadata
import os
from contextlib import suppress

import ray

from . import __version__
from .errors import UsageError
from .link import Child


def versions() -> dict[str, str]:
    """What a picture's bits follow from, beside the model and the device."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"zimage_jax": __version__, **found}


class Relay:
    """An actor: the engine's process on its machine, and the messages to and from it.

    The process ends when the actor does, for the socket between them closes then.
    """

    @ray.method(concurrency_group="write")
    def start(self, owners: dict[str, str], platforms: str) -> int:
        """Start the process with these JAX_PLATFORMS. Returns its id; raises UsageError unless the
        owner has our versions."""
        for name, found in versions().items():
            if found != owners[name]:
                raise UsageError(f"{name} {found}, but {owners[name]} here: install the same")
        devices = ray.get_gpu_ids()  # those in CUDA_VISIBLE_DEVICES, which Ray has set
        environment = os.environ | {"JAX_PLATFORMS": platforms}
        self._child = Child(devices[:1], environment)
        return self._child.pid

    @ray.method(concurrency_group="read")
    def read(self) -> list[bytes] | None:
        """Wait for messages. None when the process has ended."""
        found: list[bytes] = []
        try:
            while not found or self._child.poll(0):
                found.append(self._child.recv_bytes())
        except (EOFError, OSError):
            return found or None
        return found

    @ray.method(concurrency_group="write")
    def write(self, data: bytes) -> None:
        with suppress(OSError):  # `read` says that the process has ended
            self._child.send_bytes(data)

    def kill(self) -> None:
        self._child.kill()

    def end(self) -> str:
        return self._child.end()
