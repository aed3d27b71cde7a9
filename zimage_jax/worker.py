"""The engine's process, which `process.ZImageProcess` starts:

    python -m zimage_jax.worker SOCKET [DEVICE]...

SOCKET is the inherited descriptor of a socket to the owner, DEVICE the number of a GPU that must be
drawn with; several share the blocks out. The first message has the arguments of ZImage.load, where
path and control may be a Sought; messages are answered until the socket closes.
"""

import functools
import os
import pickle
import queue
import signal
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import UsageError
from .pipeline.request import Planned
from .process import without_model

if TYPE_CHECKING:
    import jax

BEAT = 1.0  # seconds between two signs of life


class Worker:
    """Answers the owner's messages: tuples of a word, the number of a request, and arguments."""

    def __init__(self, pipe, link: Connection):
        self._pipe, self._link = pipe, link
        self._requests: dict[int, Any] = {}  # None until it is planned
        self._cancelled, self._lock = set[int](), threading.Lock()  # before they were planned
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        # plans are made here, in order, while the engine draws and the socket is read
        self._planners = ThreadPoolExecutor(1)

    def run(self) -> None:
        threading.Thread(target=self._send_all, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        while True:
            try:
                word, number, job = self._link.recv()
            except (EOFError, OSError):  # the owner has gone
                os._exit(0)
            if word == "cancel":
                self._cancel(number)
            else:
                self._requests[number] = None
                self._planners.submit(self._answer, word, number, job)

    def _cancel(self, number: int) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is not None:
                request.cancel()
            elif number in self._requests:
                self._cancelled.add(number)

    def _answer(self, word: str, number: int, job: dict[str, Any]) -> None:
        """Plan a job, and submit it unless the plan alone is asked for."""
        self._out.put(("planning", number, True))
        try:
            if number in self._cancelled:
                raise CancelledError("the request was cancelled")
            if word == "plan":
                done = "done", number, self._pipe.plan(**job)
            else:
                heard = functools.partial(self._heard, number)
                submit = self._pipe.submit if word == "submit" else self._pipe.submit_encode
                request = submit(**job, on_event=heard)
                self._heard(number, Planned(request.plan, request.budget))
                done = "planning", number, False
                with self._lock:
                    self._requests[number] = request
                    if number in self._cancelled:
                        request.cancel()
        except Exception as fault:
            done = "failed", number, fault
        with self._lock:
            self._cancelled.discard(number)
            if done[0] != "planning":
                del self._requests[number]
        self._out.put(done)

    def _heard(self, number: int, event) -> None:
        """In the engine's thread, or for warnings in that of `_answer`."""
        self._out.put(("event", number, event))

    def _send_all(self) -> None:
        while True:
            word, number, what = self._out.get()
            try:
                if word == "event" and what is None:
                    word, what = self._end(number)
                elif word == "event":
                    what = without_model(what)
                data = pickle.dumps((word, number, what))
                if word == "failed":
                    pickle.loads(data)  # a library's exception may not come back
            except Exception:
                data = pickle.dumps(("failed", number, RuntimeError(repr(what))))
            self._link.send_bytes(data)

    def _end(self, number: int) -> tuple[str, Any]:
        while self._requests[number] is None:  # it ended before `submit` returned
            time.sleep(0.001)
        with self._lock:
            request = self._requests.pop(number)
        try:
            return "done", request.result()
        except BaseException as fault:
            return "failed", fault

    def _beat(self) -> None:
        """Signs of life: what the engine has launched so far, and the device bytes by array."""
        while True:
            self._out.put(("beat", 0, (self._pipe.signs_of_life, self._pipe.held)))
            time.sleep(BEAT)


def _devices(*numbers: str) -> "tuple[jax.Device, ...]":
    """The process's devices, which the owner knows by these numbers. Raises UsageError if JAX fell
    back to the CPU."""
    from .runtime.placement import Placement

    found = Placement.first(max(1, len(numbers)))
    if numbers and os.environ["JAX_PLATFORMS"] != "cpu" and found.shares_memory:
        raise UsageError(
            f"device {numbers[0]}: JAX finds no such GPU (JAX_PLATFORMS=cpu: a process on the CPU "
            "for each number)"
        )
    return found.devices


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's, which ends this process
    with Connection(int(sys.argv[1])) as link:
        arguments, began = link.recv(), time.perf_counter()
        try:
            cli.start_jax()
            devices = _devices(*sys.argv[2:])
            from .pipeline.pipeline import ZImage
            from .weights.search import Sought

            sought = {n: of for n, of in arguments.items() if isinstance(of, Sought)}
            arguments |= {n: of.find() for n, of in sought.items()}
            pipe = ZImage.load(**arguments, device=devices)
            if "path" in sought:  # pictures have the names in their metadata
                pipe.name = sought["path"].name
            if "control" in sought:
                pipe.control_name = sought["control"].name
            pipe.measure()
            opened = time.perf_counter()
            plan = pipe.plan("a", seed=0).plan
            planned = time.perf_counter()
            nbytes = pipe.read(plan)
        except Exception as fault:
            link.send(("failed", 0, fault))
            return
        read = time.perf_counter() - planned
        seconds = {"open": opened - began, "plan": planned - opened, "read": read}
        link.send(("ready", 0, (pipe.config, pipe.name, pipe.describe(), seconds, nbytes)))
        Worker(pipe, link).run()


if __name__ == "__main__":
    main()
