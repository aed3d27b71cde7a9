"""A process for each GPU of a Ray cluster, behind the interface of ZImagePool.

Ray starts the processes, carries their messages and says which machines there are. Which job goes
where is ZImagePool's matter, as on one machine.
"""

import logging
import os
import pickle
import queue
import re
import signal
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Ray prints errors of machines to standard output, which is the command's; we say them ourselves
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"[\s\S]*")

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .errors import EngineError, UsageError
from .files import printable
from .pipeline.engine import IN_FLIGHT
from .pipeline.opened import File
from .planning.plan import Memory
from .pool import ZImagePool
from .process import PATIENCE, Remote, ZImageProcess
from .relay import Relay, versions
from .weights.checkpoint import CONTROL
from .weights.search import Sought

PERIOD = 1.0  # seconds between two looks at the machines
ANSWERS = 10.0  # seconds for the head to take a connection
LONGEST_PAUSE = 60.0  # seconds before a machine that failed is tried again; first PERIOD
_FILES = ("image", "mask", "control_image")  # arguments of jobs
_Key = tuple[str, int]  # a machine's id, and which of its devices


class Actor:
    """A Link to the process of a Relay on the machine `node`, which may have to wait for it."""

    is_here = False
    pid = 0  # on its machine, once it is started

    def __init__(self, node: str, resources: dict[str, int], platforms: str):
        remote: Any = ray.remote  # its annotations lack concurrency_groups
        self._relay = (
            remote(concurrency_groups={"read": 1, "write": 1})(Relay)
            .options(
                **resources,
                max_restarts=0,  # another process draws what it drew
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote()
        )
        self._started = self._relay.start.remote(versions(), platforms)
        self._reading: Any = None
        self._heard = deque[bytes]()
        self._is_killed = False

    def send_bytes(self, data: bytes) -> None:
        self._relay.write.remote(data)

    def recv(self) -> Any:
        while not self.poll(1.0):
            pass
        return pickle.loads(self._heard.popleft())

    def poll(self, seconds: float) -> bool:
        if self._heard:
            return True
        if self._is_killed:
            raise EOFError
        asked = self._started if self._reading is None else self._reading
        if not ray.wait([asked], timeout=seconds)[0]:
            return False
        try:
            found = ray.get(asked)
        except RayTaskError as fault:
            raise fault.cause from None
        except RayError as fault:
            if "No module named" in str(fault):
                raise EngineError("zimage_jax is not installed there") from None
            raise EOFError from None
        if self._reading is None:
            self.pid, found = found, []
        elif found is None:
            raise EOFError
        self._reading = self._relay.read.remote()
        self._heard.extend(found)
        return bool(found)

    def kill(self) -> None:
        self._is_killed = True
        self._relay.kill.remote()

    def end(self) -> str:
        try:
            return ray.get(self._relay.end.remote(), timeout=5)
        except RayError:
            return "its machine, or Ray's process there, is lost"
        finally:
            ray.kill(self._relay)


class ZImageCluster(ZImagePool):
    """As ZImagePool, on the machines of a Ray cluster: a process for each GPU, or with
    JAX_PLATFORMS=cpu one for each machine. Machines may join and leave at any time: the jobs of one
    that is lost go to others, and wait if there is none.

    `address`: of the cluster's head, as in 10.0.0.2:6379; "local" is this machine alone. `path`,
    `control`: each machine looks for the native checkpoints of their checksums (`weights.search`). `dtype`: the same
    everywhere, by default bfloat16 on GPUs and float32 on CPUs. `say(line)`: called for machines that
    cannot draw or are lost.

    Raises UsageError if there is no such cluster or no device in it, and if none of its machines can
    draw, what one of them raised. Needs the extra `ray`. A program can have one at a time.
    """

    def __init__(
        self,
        address: str,
        path: str | Path | None = None,
        *,
        control: str | Path | None = None,
        dtype: str | None = None,
        memory: Memory | None = None,
        patience: float | int = PATIENCE,
        in_flight: int | None = None,
        say: Callable[[str], object] = warnings.warn,
    ):
        self._open()
        self._on_cpus = os.environ.get("JAX_PLATFORMS") == "cpu"
        self._arguments: dict[str, Any] = {
            "path": Sought.of(path),
            "control": None if control is None else Sought.of(control, CONTROL),
            "dtype": dtype or ("float32" if self._on_cpus else "bfloat16"),
            "in_flight": in_flight,
            "patience": patience,
        }
        self._memory, self._say, self._starts = memory or Memory(), say, 0
        self._present: dict[str, dict] = {}  # the machines that are there, by id
        self._keepers: dict[_Key, threading.Thread] = {}
        self._links: dict[_Key, Actor] = {}
        self._news: queue.SimpleQueue[tuple[_Key, ZImageProcess | Exception]] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="zimage cluster", daemon=True)
        _connect(address)
        try:
            self._look()
            if not self._keepers:
                what = "CPU" if self._on_cpus else "GPU (JAX_PLATFORMS=cpu: draw on CPUs)"
                raise UsageError(f"--cluster {printable(address)}: no machine has a {what}")
            first = self._first_process()
        except BaseException:
            self.close()
            raise
        self.config, self.name = first.config, first.name
        self.description = f"{first.description}; {len(self._keepers)} processes of a cluster"
        self._watcher.start()

    def _first_process(self) -> ZImageProcess:
        """Wait until a process can draw. Raises what went wrong if none can."""
        faults: dict[_Key, Exception] = {}
        while True:
            key, found = self._news.get()
            if isinstance(found, ZImageProcess):
                break
            faults[key] = found
            if len(faults) == len(self._keepers):
                raise found
        for fault in faults.values():
            self._say(str(fault))
        return found

    # -- the machines ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """In a thread: look at the machines, and say what went wrong there, until the end."""
        while not self._is_stopping.wait(PERIOD):
            with suppress(RayError):
                self._look()
            self._tell()
        self._tell()

    def _tell(self) -> None:
        while not self._news.empty():
            _, found = self._news.get()
            if isinstance(found, Exception):
                self._say(str(found))

    def _look(self) -> None:
        """Keep a process for each device of each machine that is there."""
        self._present = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for node, facts in self._present.items():
            for number in range(self._devices(facts["Resources"])):
                keeper = self._keepers.get((node, number))
                if keeper is None or not keeper.is_alive():
                    keeper = threading.Thread(target=self._keep, args=[(node, number)], daemon=True)
                    self._keepers[node, number] = keeper
                    keeper.start()

    def _devices(self, resources: dict[str, float]) -> int:
        """How many processes a machine has room for."""
        if self._on_cpus:
            return int(resources.get("CPU", 0) >= 1)
        return int(resources.get("GPU", 0))

    def _keep(self, key: _Key) -> None:
        """In a thread for each device: there is a process as long as its machine is there."""
        node, number = key
        name = f"{self._present[node]['NodeManagerAddress']}#{number}"
        said, pause = "", PERIOD
        while node in self._present and not self._is_stopping.is_set():
            try:
                process = self._start(key, name)
            except Exception as fault:
                fault.args = (f"{name}: {printable(fault, 500)}",)
                if str(fault) != said:
                    self._news.put((key, fault))
                said, pause = str(fault), min(2 * pause, LONGEST_PAUSE)
                self._is_stopping.wait(pause)
                continue
            said, pause = "", PERIOD
            with self._lock:
                self.processes = [*self.processes, process]
                self._starts += 1
            self._news.put((key, process))
            self._feed()
            process.wait()
            with self._lock:
                self.processes = [other for other in self.processes if other is not process]
            if process.fault is not None:
                self._news.put((key, EngineError(f"{name}: {process.fault}; others draw its jobs")))

    def _start(self, key: _Key, name: str) -> ZImageProcess:
        resources = {"num_cpus": 1} if self._on_cpus else {"num_cpus": 0, "num_gpus": 1}
        self._links[key] = link = Actor(key[0], resources, "cpu" if self._on_cpus else "cuda,cpu")
        if self._is_stopping.is_set():  # since it was asked last, so that `close` kills it or we do
            link.kill()
        return ZImageProcess(
            **self._arguments,
            memory=self._memory,
            device=name,
            heir=self._inherit,
            on_room=self._feed,
            launch=lambda: link,
            tries=0,
        )

    # -- as ZImagePool -----------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return self._is_stopping.is_set()

    @property
    def in_flight(self) -> int:
        each = self._arguments["in_flight"] or IN_FLIGHT
        return each * max(1, len(self.processes))

    @property
    def memory(self) -> Memory:
        return self._memory

    @property
    def starts(self) -> int:
        return self._starts

    def restart(self, memory: Memory | None = None) -> None:
        self._memory = memory or self._memory
        super().restart(memory)

    def close(self) -> None:
        self._is_stopping.set()
        self._end_waiting(CancelledError("the engine was closed"))
        if self._watcher.is_alive():
            self._watcher.join()
        super().close()
        for link in self._links.values():  # of those that are starting too
            link.kill()
        for keeper in self._keepers.values():
            keeper.join()
        ray.shutdown()

    def _sent(self, word: str, job: dict[str, Any], on_event: Any) -> Remote:
        """Send the files that a job names as well: its machine may not have them."""
        given = {name: job[name] for name in _FILES if isinstance(job.get(name), str | os.PathLike)}
        try:
            files = {name: File.read(path, name) for name, path in given.items()}
        except UsageError as fault:  # raised by `result`, as what a process finds wrong
            remote = Remote.of(word, {}, on_event, lambda _: None)
            remote.end(fault=fault)
            return remote
        return super()._sent(word, job | files, on_event)


@contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init puts its own handler of SIGTERM in place of the command's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, held)


def _connect(address: str) -> None:
    """Raises UsageError if there is no such cluster."""
    if not re.fullmatch(r"local|[^\s/]+:[0-9]{1,5}", address):
        raise UsageError(f"--cluster {printable(address)}: expected HOST:PORT or local")
    if address != "local":
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: Any = {"include_dashboard": False} if address == "local" else {}
    try:
        with _own_signals():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as fault:
        reason = printable(str(fault).splitlines()[0] if str(fault) else repr(fault), 300)
        raise UsageError(f"--cluster {printable(address)}: {reason}") from None


def _check_answers(address: str) -> None:
    """Raises UsageError if nothing listens at HOST:PORT, for which Ray would wait for minutes."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS).close()
    except (OSError, OverflowError, UnicodeError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UsageError(
            f"--cluster {printable(address)}: nothing answers there ({reason}); "
            "start Ray on that machine: ray start --head"
        ) from None
