"""The engine's process, which `process.ZImageProcess` starts: python -m zimage_jax.worker SOCKET.

SOCKET is the inherited descriptor of a socket to the owner. The first message has the arguments of
ZImage.load; messages are answered until the socket closes.
"""

import os
import pickle
import queue
import signal
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from . import cli
from .process import without_model

BEAT = 1.0  # seconds between two signs of life


class Worker:
    """Answers the owner's messages: tuples of a word, the number of a request, and arguments."""

    def __init__(self, pipe, link: Connection):
        self._pipe, self._link = pipe, link
        self._requests: dict[int, Any] = {}
        self._cancelled: set[int] = set()  # some of them before their turn to be planned
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        # plans are made here, in order, while the engine draws and the socket is read
        self._planners = ThreadPoolExecutor(1)

    def run(self) -> None:
        threading.Thread(target=self._send_all, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        while True:
            try:
                word, number, *rest = self._link.recv()
            except (EOFError, OSError):  # the owner has gone
                os._exit(0)
            if word == "cancel":
                self._cancelled.add(number)
                self._cancel(number)
            else:
                self._planners.submit(getattr(self, f"_{word}"), number, *rest)

    def _cancel(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None and number in self._cancelled:
            request.cancel()

    def _submit(self, number: int, job: dict[str, Any]) -> None:
        try:
            if number in self._cancelled:
                raise CancelledError("the request was cancelled")
            self._requests[number] = self._pipe.submit(
                **job, on_event=lambda event: self._heard(number, event)
            )
            self._cancel(number)  # meanwhile
        except Exception as fault:
            self._out.put(("failed", number, fault))

    def _plan(self, number: int, job: dict[str, Any]) -> None:
        try:
            self._out.put(("done", number, self._pipe.plan(**job)))
        except Exception as fault:
            self._out.put(("failed", number, fault))

    def _heard(self, number: int, event) -> None:
        """In the engine's thread."""
        self._out.put(("event", number, event))

    def _send_all(self) -> None:
        while True:
            word, number, what = self._out.get()
            if word == "event" and what is None:
                word, what = self._end(number)
            elif word == "event":
                what = without_model(what)
            self._send(word, number, what)

    def _end(self, number: int) -> tuple[str, Any]:
        while number not in self._requests:  # it ended before `submit` returned
            time.sleep(0.001)
        try:
            return "done", self._requests.pop(number).result()
        except BaseException as fault:
            return "failed", fault

    def _send(self, word: str, number: int, what: Any) -> None:
        try:
            data = pickle.dumps((word, number, what))
        except Exception as fault:  # an exception of a library, say
            data = pickle.dumps(("failed", number, RuntimeError(f"{what!r} ({fault})")))
        self._link.send_bytes(data)
        if word != "event":
            self._cancelled.discard(number)

    def _beat(self) -> None:
        """Signs of life: what the engine has launched so far, and the device bytes by array."""
        while True:
            recorder = self._pipe._engine.recorder
            self._out.put(("beat", 0, (recorder.launches, dict(recorder.held))))
            time.sleep(BEAT)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's, which ends this process
    with Connection(int(sys.argv[1])) as link:
        arguments, began = link.recv(), time.perf_counter()
        try:
            cli.start_jax()
            from .pipeline.pipeline import ZImage

            pipe = ZImage.load(**arguments)
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
