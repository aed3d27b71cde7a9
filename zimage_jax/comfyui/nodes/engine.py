"""The engine's process, and how the nodes talk to it: HTTP on a loopback port, with a key of its own."""

import atexit
import http.client
import json
import logging
import os
import queue
import re
import secrets
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .home import Home

LOG = logging.getLogger("zimage_jax")
TICK = 0.05  # seconds between looks at ComfyUI's interrupt
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:([0-9]+)")
_GIB = 1 << 30
_MOST_AT_ONCE = 16  # jobs in flight: those that share a sweep of the weights

Check = Callable[[], None]  # raises what interrupts
Tell = Callable[[str], None]  # shows a line on the node
OnStep = Callable[[int, dict[str, Any], bytes], None]  # number of the job, event, preview


class EngineError(RuntimeError):
    """What a node shows, in one sentence."""


@dataclass(frozen=True)
class Files:
    """What the process opens. A stamp changes with its files."""

    model: str | None = None  # of --model; None is the tiny one
    model_stamp: str = ""
    control: str | None = None  # of --control; None where a job needs none
    control_stamp: str = ""
    loras: tuple[str, ...] = ()  # folders, of --loras

    def arguments(self) -> list[str]:
        found = ["--model", self.model] if self.model else []
        found += ["--control", self.control] if self.control else []
        return [*found, *(word for folder in self.loras for word in ("--loras", folder))]

    def why_not(self, opened: "Files") -> str | None:
        """Why these need a process that has not opened `opened`; None if that has them."""
        if self.model != opened.model:
            return " (another model)"
        if self.model_stamp != opened.model_stamp:
            return " (the model's files have changed)"
        if self.loras != opened.loras:
            return " (other folders of LoRAs)"
        if self.control is None:  # it draws as without one
            return None
        if self.control != opened.control:
            return " (another ControlNet)" if opened.control else " (a ControlNet)"
        if self.control_stamp != opened.control_stamp:
            return " (the ControlNet's file has changed)"
        return None


class Engine:
    """At most one process: started by who needs it, started again for another model or ControlNet,
    for a smaller cap, after `stop`, and after it died."""

    def __init__(self, find_home: Callable[[], Home]):
        self._find_home = find_home
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._port, self._key = 0, ""
        self._files = Files()
        self.cap: int | None = None  # device bytes that it may have taken
        self._words: deque[str] = deque(maxlen=20)  # its last lines
        self._why = ""  # it is started again, for the node
        self.seconds = 0.0  # of the last start
        self.starts = 0
        atexit.register(self.stop)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ready(self, files: Files, cap: int | None, tell: Tell, check: Check) -> None:
        """Start the process if there is none, or none that serves. Raises EngineError.

        `cap`: device bytes; None is all that is free.
        """
        with self._lock:
            why = self._reason(files, cap)
            if why is None:
                self.cap = cap  # a larger one needs no new process
                return
            self._end()
            tell(f"engine: starting{why}")
            self._start(files, cap, check)
            tell(f"engine: started in {self.seconds:.1f} s{why}")

    def stop(self, why: str = "") -> None:
        """End the process; the next job starts it again. `why`: shown then."""
        with self._lock:
            if self._process is not None:
                self._end()
                self._why = f" ({why})" if why else ""

    def _reason(self, files: Files, cap: int | None) -> str | None:
        """Why to start, for the node; None if the process serves."""
        if self._process is None:
            why, self._why = self._why, ""
            return why
        if self._process.poll() is not None:
            return " (it had ended)"
        if (other := files.why_not(self._files)) is not None:
            return other
        if cap is not None and (
            self.cap is None or cap < self.cap
        ):  # memory taken is not given back
            return f" (a smaller cap: {cap / _GIB:.2f} GiB)"
        return None

    def _start(self, files: Files, cap: int | None, check: Check) -> None:
        began, home = time.monotonic(), self._find_home()
        self._key, self._folder = secrets.token_urlsafe(32), tempfile.TemporaryDirectory()
        arguments = ["--no-page", "--tensors", "--port", "0", "--data", self._folder.name]
        arguments += ["--parent", str(os.getpid()), *files.arguments()]
        arguments += ["--max-vram", str(cap / _GIB)] if cap else []
        environment = home.environment() | {"ZIMAGE_API_KEY": self._key}
        # JAX would take three quarters of the device at once, beside torch
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self._words.clear()
        self._process = subprocess.Popen(
            home.command("zimage_jax.serve", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=self._folder.name,  # python -m looks there first
            start_new_session=True,  # Ctrl-C in ComfyUI's terminal is ComfyUI's: it ends us
        )
        listening: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        threading.Thread(target=self._hear, args=[self._process, listening], daemon=True).start()
        try:
            port = _await(listening, check)
        except BaseException:
            self._end()
            raise
        if port is None:
            raise self._fault("the engine did not start")
        self._port, self._files, self.cap = port, files, cap
        self.seconds, self.starts = time.monotonic() - began, self.starts + 1

    def _hear(self, process: subprocess.Popen, listening: queue.SimpleQueue) -> None:
        """In a thread: its lines, and the port in one of them; None when it has ended."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._words.append(line.strip())
                LOG.info("engine: %s", line.strip())
                if match := _LISTENING.search(line):
                    listening.put(int(match[1]))
        process.wait()
        listening.put(None)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                _signal(process)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            with suppress(OSError):
                self._folder.cleanup()
            self._folder = None

    def _fault(self, what: str) -> EngineError:
        """An error with how the process ended and its last words."""
        process, self._process = self._process, None
        how = ""
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            code = process.poll()
            if code is None:  # it lives, but does not answer
                self._process = process
            elif code < 0:
                how = f" ({signal.Signals(-code).name})"
            else:
                how = f" (exit code {code})"
        said = next((word for word in reversed(self._words) if word.startswith("error:")), "")
        said = said.removeprefix("error:").strip()
        return EngineError(f"{what}{how}" + (f": {said}" if said else ""))

    # -- requests ----------------------------------------------------------------------------------

    def post(self, path: str, body: dict[str, Any], check: Check) -> bytes:
        """A JSON body's answer. Raises EngineError."""
        found = self._stream([(path, json.dumps(body).encode(), "application/json")], None, check)
        return found[0][1]

    def draw(
        self, bodies: Sequence[bytes], on_step: OnStep, check: Check, *, at_once: bool
    ) -> list[tuple[dict[str, Any], bytes]]:
        """Draw jobs (safetensors), `at_once` in one sweep of the weights: a report and tensors of each.

        Raises EngineError, and what `check` raises; the other jobs are cancelled then.
        """
        most = _MOST_AT_ONCE if at_once else 1
        found: list[tuple[dict[str, Any], bytes]] = []
        for start in range(0, len(bodies), most):
            part = [
                ("/tensors/draw", body, "application/x-safetensors")
                for body in bodies[start : start + most]
            ]

            def tell(number: int, event: dict[str, Any], data: bytes, first: int = start) -> None:
                on_step(first + number, event, data)

            found += self._stream(part, tell, check)
        return found

    def _stream(
        self, requests: list[tuple[str, bytes, str]], on_step: OnStep | None, check: Check
    ) -> list[tuple[dict[str, Any], bytes]]:
        """Send requests at once and follow them all. Leaving early closes, and so cancels, them."""
        events: queue.SimpleQueue[tuple[int, dict[str, Any] | None, bytes]] = queue.SimpleQueue()
        found: dict[int, tuple[dict[str, Any], bytes]] = {}
        with self._connections(len(requests)) as connections:
            for number, (connection, request) in enumerate(zip(connections, requests, strict=True)):
                arguments = (number, connection, request, self._key, events)
                threading.Thread(target=_follow, args=arguments, daemon=True).start()
            while len(found) < len(requests):
                number, event, data = _await(events, check)
                if event is None:
                    raise self._fault(
                        "the engine ended in the middle of a job; run the prompt again, which starts it"
                    )
                if event["event"] == "error":
                    raise EngineError(event["error"])
                if event["event"] == "done":
                    (report,) = event.get("reports", [{}])
                    found[number] = report, data
                elif on_step is not None:
                    on_step(number, event, data)
        return [found[number] for number in range(len(requests))]

    @contextmanager
    def _connections(self, count: int) -> Iterator[list[http.client.HTTPConnection]]:
        made = [http.client.HTTPConnection("127.0.0.1", self._port) for _ in range(count)]
        try:
            yield made
        finally:
            for connection in made:
                if connection.sock is not None:
                    with suppress(
                        OSError
                    ):  # a thread may be reading: close alone would not wake it
                        connection.sock.shutdown(socket.SHUT_RDWR)
                connection.close()


def _signal(process: subprocess.Popen) -> None:
    """Ask it to end. Twice: the first would wait for jobs that nobody awaits any more."""
    process.terminate()
    time.sleep(TICK)
    process.terminate()


def _await(events: queue.SimpleQueue, check: Check) -> Any:
    """The next of a queue; `check` may raise meanwhile."""
    while True:
        check()
        with suppress(queue.Empty):
            return events.get(timeout=TICK)


def _follow(
    number: int,
    connection: http.client.HTTPConnection,
    request: tuple[str, bytes, str],
    key: str,
    events: queue.SimpleQueue,
) -> None:
    """In a thread: send a request, and put its events with their bytes into `events`; None if the
    connection broke before the last."""
    path, body, kind = request
    headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            events.put((number, {"event": "error", "error": _refusal(answer)}, b""))
        elif answer.getheader("Content-Type", "").startswith("application/octet-stream"):
            for event, data in frames(answer.read):
                events.put((number, event, data))
                if event["event"] in ("done", "error"):
                    return
            events.put((number, None, b""))
        else:
            events.put((number, {"event": "done"}, answer.read()))
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        # the process died, or an interrupt closed the socket (AttributeError: http.client's own then)
        events.put((number, None, b""))


def frames(read: Callable[[int], bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Events of a draw: a length of four bytes, JSON, and as many bytes as its key `bytes` says.

    Raises ConnectionError if it ends within one.
    """

    def whole(count: int) -> bytes:
        data = read(count) if count else b""  # http.client would wait for the next chunk
        if len(data) < count:
            raise ConnectionError("the stream ended within an event")
        return data

    while head := read(4):
        if len(head) < 4:
            raise ConnectionError("the stream ended within an event")
        event = json.loads(whole(struct.unpack(">I", head)[0]))
        yield event, whole(event.get("bytes", 0))


def _refusal(answer: http.client.HTTPResponse) -> str:
    """The sentence of an answer that is no success."""
    data = answer.read()
    try:
        found = json.loads(data)
        error = found.get("error", found.get("detail", found))
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        return f"the engine answered {answer.status} {answer.reason}"
