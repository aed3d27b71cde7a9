"""A process per device behind one interface: each job is drawn whole by one of them."""

import bisect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import EngineError
from .pipeline.request import Event
from .planning.plan import Memory
from .process import PATIENCE, Remote, Sender, ZImageProcess

READY = 2  # jobs that a process has beyond those in flight, planned while those are drawn


class ZImagePool(Sender):
    """As ZImageProcess, but with a process for each of `devices`, by the numbers that nvidia-smi
    gives them; a number may repeat. A job gives the same picture on any of them.

    Jobs wait here until a process has room for them, so that a faster device draws more of them. If
    a process cannot be started again, its jobs go to the others. `memory`: the options of all
    processes, or one for each. `plan`: of the device whose process has the fewest jobs.

    Each process reads the weights into host memory for itself, unless `Memory.host_bytes` lets all
    of them read blocks from the one page cache. Raises what ZImageProcess raises.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        devices: Sequence[int],
        control: str | Path | None = None,
        dtype: str | None = None,
        memory: Memory | Sequence[Memory] | None = None,
        patience: float | int = PATIENCE,
        on_start: Callable[[dict[str, float], int], None] | None = None,
        in_flight: int | None = None,
    ):
        self._open()
        memories = (
            [memory] * len(devices) if memory is None or isinstance(memory, Memory) else memory
        )

        def start(device: int, memory: Memory | None) -> ZImageProcess:
            return ZImageProcess(
                path,
                control=control,
                dtype=dtype,
                memory=memory,
                patience=patience,
                on_start=on_start,
                device=device,
                heir=self._inherit,
                on_room=self._feed,
                in_flight=in_flight,
            )

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

    processes: list[ZImageProcess]

    def _open(self) -> None:
        self.processes = []
        self._lock, self._waiting = threading.RLock(), deque[Remote]()

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

    def restart(self, memory: Memory | None = None) -> None:
        for process in self.processes:
            process.restart(memory)

    def close(self) -> None:
        for process in self.processes:
            process.close()
        self._end_waiting(CancelledError("the engine was closed"))

    # -- the jobs that wait ------------------------------------------------------------------------

    @property
    def _is_hopeless(self) -> bool:
        """Whether jobs that wait would wait for ever."""
        return self.is_closed

    def _sent(
        self, word: str, job: dict[str, Any], on_event: Callable[[Event | None], None] | None
    ) -> Remote:
        remote = Remote.of(word, job, on_event, lambda _: self._drop(remote))
        with self._lock:
            if self._is_hopeless:
                raise EngineError(
                    "the engine is closed: none of its processes can be started again"
                )
            if remote.draws:
                self._waiting.append(remote)
            else:  # a plan takes no room
                self._waiting.appendleft(remote)
        self._feed()
        return remote

    def _feed(self) -> None:
        """Give the processes that have room the jobs that wait; end them if no process is left."""
        with self._lock:
            while self._waiting:
                # one that was adopted counts at once, so that two jobs go to two processes
                first = next(iter(self.alive), None)
                if first is None:
                    break
                if self._waiting[0].draws and first.unfinished >= first.in_flight + READY:
                    break
                if first.adopt(self._waiting[0]):
                    self._waiting.popleft()
            is_hopeless = self._is_hopeless
        if is_hopeless:
            self._end_waiting(EngineError("none of the engine's processes is left"))

    def _drop(self, remote: Remote) -> None:
        """End a job that is cancelled while it waits."""
        with self._lock:
            if remote not in self._waiting:  # a process has it
                return
            self._waiting.remove(remote)
        remote.end(fault=remote.cancelled())

    def _inherit(self, remote: Remote) -> bool:
        """Take a job of a process that is closed. False if nobody will draw it."""
        with self._lock:
            if self._is_hopeless:
                return False
            remote.ask = lambda _: self._drop(remote)
            bisect.insort(self._waiting, remote, key=lambda waiting: waiting.number)
        if remote.is_cancelled:
            self._drop(remote)
        self._feed()
        return True

    def _end_waiting(self, fault: BaseException) -> None:
        with self._lock:
            left, self._waiting = list(self._waiting), deque()
        for remote in left:
            remote.end(fault=fault)
