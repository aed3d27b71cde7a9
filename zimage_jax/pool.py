"""A process per device behind one interface: each job is drawn whole by one of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import EngineError
from .planning.plan import Memory
from .process import PATIENCE, Remote, ZImageProcess


class ZImagePool:
    """As ZImageProcess, but with a process for each of `devices`, by the numbers that nvidia-smi
    gives them; a number may repeat. A job gives the same picture on any of them.

    A job goes to the process with the fewest that are not done. If a process cannot be started
    again, its jobs go to the others. `memory`: the options of all processes, or one for each.

    Each process reads the weights into host memory for itself, unless `Memory.host_bytes` lets all
    of them read blocks from the one page cache. Raises what ZImageProcess raises.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        devices: Sequence[int],
        dtype: str | None = None,
        memory: Memory | Sequence[Memory] | None = None,
        patience: float | int = PATIENCE,
        on_start: Callable[[dict[str, float], int], None] | None = None,
        in_flight: int | None = None,
    ):
        self._lock = threading.Lock()
        memories = (
            [memory] * len(devices) if memory is None or isinstance(memory, Memory) else memory
        )

        def start(device: int, memory: Memory | None) -> ZImageProcess:
            return ZImageProcess(
                path,
                dtype=dtype,
                memory=memory,
                patience=patience,
                on_start=on_start,
                device=device,
                heir=self._inherit,
                in_flight=in_flight,
            )

        self.processes: list[ZImageProcess] = []
        with ThreadPoolExecutor(len(devices)) as starters:
            started = [starters.submit(start, *of) for of in zip(devices, memories, strict=True)]
        try:
            self.processes = [future.result() for future in started]
        except BaseException:
            for future in started:
                if future.exception() is None:
                    future.result().close()
            raise
        first = self.processes[0]
        self.config, self.name = first.config, first.name
        self.description = f"{first.description}; {len(devices)} processes"

    def __enter__(self) -> "ZImagePool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ZImagePool: {self.processes}>"

    @property
    def alive(self) -> list[ZImageProcess]:
        """The processes that take jobs, those with the fewest first."""
        return sorted((p for p in self.processes if not p.is_closed), key=lambda p: p.unfinished)

    @property
    def is_closed(self) -> bool:
        """Whether no process takes jobs."""
        return not self.alive

    @property
    def in_flight(self) -> int:
        """The most jobs that all processes draw at once."""
        return sum(process.in_flight for process in self.processes)

    @property
    def memory(self) -> Memory:
        return self.processes[0].memory

    @property
    def starts(self) -> int:
        return sum(process.starts for process in self.processes)

    @property
    def host_bytes(self) -> int:
        return sum(process.host_bytes for process in self.processes)

    @property
    def held(self) -> dict[str, int]:
        """Device bytes by array, of all devices together."""
        found: dict[str, int] = {}
        for process in self.processes:
            for name, nbytes in process.held.items():
                found[name] = found.get(name, 0) + nbytes
        return found

    def describe(self) -> str:
        return self.description

    def submit(self, prompt: str | None = None, **options: Any) -> Remote:
        """As ZImageProcess.submit."""
        return self._first(lambda process: process.submit(prompt, **options))

    def encode(self, texts: Sequence[str], **options: Any) -> Remote:
        """As ZImageProcess.encode."""
        return self._first(lambda process: process.encode(texts, **options))

    def plan(self, prompt: str | None = None, **options: Any) -> Remote:
        """As ZImageProcess.plan, of the device whose process has the fewest jobs."""
        return self._first(lambda process: process.plan(prompt, **options))

    def restart(self, memory: Memory | None = None) -> None:
        """Start all processes again, with other options about memory; every job goes on."""
        for process in self.processes:
            process.restart(memory)

    def close(self) -> None:
        """End the processes, and all jobs that are not done."""
        for process in self.processes:
            process.close()

    def _first(self, ask: Callable[[ZImageProcess], Remote]) -> Remote:
        with self._lock:  # two jobs at once go to two processes
            for process in self.alive:
                with suppress(EngineError):  # it has closed meanwhile
                    return ask(process)
        raise EngineError("the engine is closed: none of its processes can be started again")

    def _inherit(self, remote: Remote) -> bool:
        """Give a job of a process that is closed to another. False if there is none."""
        return any(process.adopt(remote) for process in self.alive)
