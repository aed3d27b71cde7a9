"""The engine in a process of its own, which is started again when it dies or hangs."""

import functools
import itertools
import pickle
import secrets
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from . import checks
from .errors import EngineError, UsageError
from .link import Child, Link
from .model.config import ModelConfig
from .pipeline.engine import IN_FLIGHT
from .pipeline.job import Step
from .pipeline.request import Event, Handle, Started
from .planning.plan import Memory

PATIENCE = 600.0  # seconds without a program compiled or launched; compiling takes minutes
TRIES = 5  # deaths of the process without an NFE of a job in flight, until the job is to blame
STARTS = 3  # tries to start the process

_NUMBERS = itertools.count(1)  # of jobs, unique among all processes


@dataclass(kw_only=True, eq=False)
class Remote(Handle):
    """A job in the other process. It is kept here until it has ended, and sent again after a death."""

    number: int
    draws: bool  # or it is planned alone
    message: bytes  # as it was when it was submitted
    ask: Callable[[bytes], None]  # of who has it
    is_planning: bool = False  # the process plans it
    is_started: bool = False
    restarts: int = 0  # of the process, while the job was in flight
    deaths: int = 0  # those since its last NFE
    _seen: int = -1  # NFEs

    @classmethod
    def of(
        cls,
        word: str,
        job: dict[str, Any],
        on_event: Callable[[Event | None], None] | None,
        ask: Callable[[bytes], None],
    ) -> "Remote":
        """A job to submit or to plan. Raises UsageError if it cannot go to another process."""
        number = next(_NUMBERS)
        try:
            message = pickle.dumps((word, number, job))
        except Exception as fault:
            raise UsageError(f"a job's arguments go to another process: {fault}") from None
        return cls(
            number=number,
            draws=word != "plan",
            message=message,
            ask=ask,
            listener=on_event,
            wants_steps=on_event is not None,
        )

    def __repr__(self) -> str:
        state = "done" if self.done() else "in flight" if self.is_started else "waiting"
        return f"<Remote {self.number}: {state}>"

    def cancel(self) -> None:
        super().cancel()
        self.ask(pickle.dumps(("cancel", self.number, None)))

    def tell(self, event: Event) -> None:
        if isinstance(event, Started):
            self.is_started = True
            if self.restarts:
                return
        if isinstance(event, Step):
            if event.index <= self._seen:  # drawn again, after a death
                return
            self._seen, self.deaths = event.index, 0
        super().tell(event)


def with_seed(options: dict[str, Any]) -> dict[str, Any]:
    """A job whose seeds of -1 are drawn, so that it is the same in each process."""
    seed = options.get("seed", -1)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    drawn = [secrets.randbits(32) if number == -1 else number for number in seeds]
    return options | {"seed": drawn[0] if isinstance(seed, int) else drawn}


class Sender(ABC):
    """Sends jobs to processes, one or several, which have a model open."""

    config: ModelConfig
    name: str  # of the model
    description: str  # of the model, for a person

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def describe(self) -> str:
        """As ZImage.describe."""
        return self.description

    def submit(
        self,
        prompt: str | None = None,
        *,
        on_event: Callable[[Event | None], None] | None = None,
        **options: Any,
    ) -> Remote:
        """As ZImage.submit, but what is wrong with the job is raised by `result`. A seed of -1 is
        drawn here, so that the job is the same in each process."""
        return self._sent("submit", with_seed({"prompt": prompt, **options}), on_event)

    def encode(
        self,
        texts: Sequence[str],
        *,
        on_event: Callable[[Event | None], None] | None = None,
        **options: Any,
    ) -> Remote:
        """As ZImage.submit_encode."""
        return self._sent("encode", {"texts": texts, **options}, on_event)

    def plan(self, prompt: str | None = None, **options: Any) -> Remote:
        """As ZImage.plan: its result is Planned."""
        return self._sent("plan", {"prompt": prompt, **options}, None)

    @abstractmethod
    def restart(self, memory: Memory | None = None) -> None:
        """Start the processes again, with other options about memory; every job goes on."""

    @abstractmethod
    def close(self) -> None:
        """End the processes, and all jobs that are not done."""

    @abstractmethod
    def _sent(
        self, word: str, job: dict[str, Any], on_event: Callable[[Event | None], None] | None
    ) -> Remote:
        """Send a job to submit, to encode or to plan. Raises UsageError and EngineError."""


class ZImageProcess(Sender):
    """A model in a process of its own: a crash, a hang or another budget starts it again, and every
    job goes on. A job gives the same picture in any process.

    `path`, `control`, `dtype`, `memory`, `in_flight`: as of ZImage.load. `patience`: seconds without progress after which
    the process counts as hung. `on_start(seconds, nbytes)` is called after each start: the seconds to
    start the process, to open the model, to plan a picture and to read what it streams, and the
    bytes read into host memory. `device`: the GPU that the process sees, by number, or several that
    share the blocks out; JAX_PLATFORMS=cpu makes each number a device of the CPU. `heir(job)`: called
    for each job that is left when the process cannot be started again; True if it took the job.
    `on_room`: called when a job has ended, or all of them.
    `launch`: starts the process elsewhere. `tries`: to start it again when it has died.

    Raises what ZImage.load raises, and EngineError if the process cannot be started.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        control: str | Path | None = None,
        dtype: str | None = None,
        memory: Memory | None = None,
        patience: float | int = PATIENCE,
        on_start: Callable[[dict[str, float], int], None] | None = None,
        device: int | tuple[int, ...] | str | None = None,
        heir: Callable[["Remote"], bool] | None = None,
        on_room: Callable[[], None] | None = None,
        in_flight: int | None = None,
        launch: Callable[[], Link] | None = None,
        tries: int = STARTS,
    ):
        if sys.platform == "win32":
            raise UsageError("an engine in its own process needs Linux or macOS: use ZImage")
        self._arguments: dict[str, Any] = {
            **{"path": path, "control": control, "dtype": dtype},
            **{"memory": memory, "in_flight": in_flight},
        }
        self._patience, self._on_start = patience, on_start
        self.device, self._heir, self._on_room = device, heir, on_room
        if launch is None:
            assert not isinstance(device, str), "a device's name is for messages"
            numbers = device if isinstance(device, tuple) else () if device is None else (device,)
            launch = functools.partial(Child.on, *numbers)
        self._launch = launch
        self._tries = tries
        self._lock, self._requests = threading.RLock(), dict[int, Remote]()
        self.starts, self.held = 0, dict[str, int]()  # device bytes by array, a second old
        self.seconds: dict[str, float] = {}  # of the last start: start, open, plan and read
        self.host_bytes = 0  # read into host memory by the last start
        self._is_closed = self._is_wanted = False  # the process is to end; and to start again
        self.fault: Exception | None = None  # why there is no process, unless it was closed
        self._outbox: SimpleQueue[bytes | None] | None = None  # None while there is no process
        self._watcher = threading.Thread(
            target=self._watch, args=[self._start()], name="zimage process", daemon=True
        )
        self._watcher.start()

    def __repr__(self) -> str:
        return f"<ZImageProcess {self.pid}: {len(self._requests)} jobs, {self.starts} starts>"

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs: it was closed, or cannot be started again."""
        return self._is_closed

    @property
    def processes(self) -> list["ZImageProcess"]:
        return [self]

    @property
    def unfinished(self) -> int:
        """Jobs that are not done."""
        return len(self._requests)

    @property
    def in_flight(self) -> int:
        """The most jobs that share the weights on their way over the device."""
        return self._arguments["in_flight"] or IN_FLIGHT

    @property
    def memory(self) -> Memory:
        """The options about memory of jobs that set none."""
        return self._arguments["memory"] or Memory()

    @property
    def pid(self) -> int:
        return self._link.pid

    @property
    def is_here(self) -> bool:
        """Whether the process runs on this machine."""
        return self._link.is_here

    def restart(self, memory: Memory | None = None) -> None:
        if memory is not None:
            self._arguments["memory"] = checks.instance("memory", memory, Memory)
        self._is_wanted = True
        self._link.kill()

    def close(self) -> None:
        self._is_closed = True
        self._link.kill()
        self._watcher.join()
        self._end_all(CancelledError("the engine was closed"))

    def wait(self) -> None:
        """Wait until it takes no more jobs, because it was closed or cannot be started again."""
        self._watcher.join()

    # -- the process -------------------------------------------------------------------------------

    def _start(self) -> Link:
        """Start the process and wait until the model is open. Raises what it cannot open."""
        began = time.perf_counter()
        self._link = link = self._launch()
        try:
            if self._is_closed:  # meanwhile
                link.kill()
            link.send_bytes(pickle.dumps(self._arguments))
            word, _, what = link.recv()
        except (EOFError, OSError):
            raise EngineError(f"the engine's process ended at its start ({link.end()})") from None
        except BaseException:
            link.end()
            raise
        if word == "failed":
            link.end()
            raise what
        self.config, self.name, self.description, self.seconds, self.host_bytes = what
        self.seconds["start"] = time.perf_counter() - began - sum(self.seconds.values())
        self.starts += 1
        self._signs, self._progressed = -1, time.monotonic()
        try:
            if self._on_start is not None:
                self._on_start(self.seconds, self.host_bytes)
        except BaseException:
            link.end()
            raise
        return link

    def _watch(self, link: Link) -> None:
        """In a thread: hear the process, and start it again if it dies or hangs."""
        self._send_all(link)
        while True:
            try:
                if link.poll(1.0):
                    self._hear(*link.recv())
                if self._is_hung():
                    link.kill()
                continue
            except Exception:  # it has died, or sent what cannot be read
                ending = link.end()
            with self._lock:
                assert self._outbox is not None
                self._outbox.put(None)
                self._outbox = None
            if not self._is_closed:
                self._blame(ending)
            again = None if self._is_closed else self._start_again(ending)
            if again is None:
                self._end_all(self.fault or CancelledError("the engine was closed"))
                return
            link = again
            self._send_all(link)
            self._tell_room()  # if it was asked to draw what it died of

    def _start_again(self, ending: str) -> Link | None:
        self.fault = EngineError(f"the engine's process ended ({ending})")
        for _ in range(self._tries):
            try:
                link = self._start()
            except Exception as fault:
                if self._is_closed:
                    return None
                self.fault = EngineError(f"the engine cannot be started again: {fault}")
            else:
                self.fault = None
                return link
        return None

    def _blame(self, ending: str) -> None:
        """Count a death of the process for the jobs that it planned or drew, and end those to
        blame."""
        with self._lock:
            left, wanted, self._is_wanted = list(self._requests.values()), self._is_wanted, False
        for remote in left:
            remote.restarts += remote.is_started
            remote.deaths += (remote.is_planning or remote.is_started) and not wanted
            remote.is_planning = remote.is_started = False
            if remote.is_cancelled:
                fault: BaseException = remote.cancelled()
            elif remote.deaths >= TRIES:
                fault = EngineError(
                    f"the engine's process ended {TRIES} times before an NFE of this job ({ending})"
                )
            else:
                continue
            with self._lock:
                self._requests.pop(remote.number, None)
            remote.end(fault=fault)

    def _send_all(self, link: Link) -> None:
        """Send all jobs that are not done; those that are submitted from now on are sent at once.

        A thread sends, for a process that hangs reads nothing.
        """
        outbox: SimpleQueue[bytes | None] = SimpleQueue()

        def send() -> None:
            with suppress(OSError):  # its jobs are sent to the next process
                while (message := outbox.get()) is not None:
                    link.send_bytes(message)

        with self._lock:
            self._outbox = outbox
            for remote in self._requests.values():
                outbox.put(remote.message)
                if remote.is_cancelled:
                    remote.cancel()
        threading.Thread(target=send, name="zimage sender", daemon=True).start()

    def _hear(self, word: str, number: int, what: Any) -> None:
        if word == "beat":
            signs, self.held = what
            if signs != self._signs:
                self._signs, self._progressed = signs, time.monotonic()
            return
        with self._lock:
            remote = self._requests.get(number)
            if word in ("done", "failed"):
                self._requests.pop(number, None)
        if remote is None:
            return
        if word == "planning":
            remote.is_planning = what
        elif word == "event":
            remote.tell(what)
        else:
            self._progressed = time.monotonic()
            remote.end(**{"result" if word == "done" else "fault": what})
            self._tell_room()

    def _tell_room(self) -> None:
        if self._on_room is not None:
            self._on_room()

    def _is_hung(self) -> bool:
        with self._lock:
            if not any(r.is_started or r.is_planning for r in self._requests.values()):
                self._progressed = time.monotonic()
        return time.monotonic() - self._progressed > self._patience

    def _end_all(self, fault: BaseException) -> None:
        with self._lock:
            left, self._requests = list(self._requests.values()), {}
            is_broken, self._is_closed = not self._is_closed, True
        for remote in left:
            if not (is_broken and self._heir is not None and self._heir(remote)):
                remote.end(fault=fault)
        if is_broken:
            self._tell_room()

    def adopt(self, remote: Remote) -> bool:
        """Take a job that no other process draws, or draws any more. False if this one is closed."""
        remote.restarts += remote.is_started
        remote.is_planning = remote.is_started = False
        with self._lock:
            if self._is_closed:
                return False
            remote.ask = self._ask
            self._requests[remote.number] = remote
            self._ask(remote.message)
            if remote.is_cancelled:
                remote.cancel()
        return True

    def _sent(
        self, word: str, job: dict[str, Any], on_event: Callable[[Event | None], None] | None
    ) -> Remote:
        remote = Remote.of(word, job, on_event, self._ask)
        if not self.adopt(remote):
            raise EngineError(f"the engine is closed{f' ({self.fault})' if self.fault else ''}")
        return remote

    def _ask(self, message: bytes) -> None:
        """Send a message. Jobs that a dead process did not get are sent to the next."""
        with self._lock:
            if self._outbox is not None:
                self._outbox.put(message)


def without_model(event: Event) -> Event:
    """An event without what it holds of the model: its previews are made."""
    if not isinstance(event, Step):
        return event
    return Step(event.index, event.steps, event.t, event.latents, _Made(event.previews()))


class _Made:
    """Previews, in place of the function that makes them."""

    def __init__(self, pixels):
        self._pixels = pixels

    def __call__(self, latents):
        return self._pixels
