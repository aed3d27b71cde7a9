"""A real ComfyUI, headless on the CPU: its process, its HTTP API and its websocket."""

import base64
import json
import os
import secrets
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue

START = 300  # seconds that it may take to start


class ComfyUI:
    """`base` has its custom_nodes, models, input and output; the sources stay as they are."""

    def __init__(self, sources: Path, python: str, base: Path):
        self.base = base
        for name in ("custom_nodes", "models", "input", "output"):
            (base / name).mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = base / "log"
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--base-directory", str(base), "--disable-auto-launch"]
        arguments += ["--database-url", "sqlite:///:memory:"]
        environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "XLA_FLAGS")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "main.py", *arguments],
                cwd=sources,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait(self) -> None:
        for _ in range(START * 5):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-4000:])

    def close(self) -> None:
        """End it so that it cannot end its engine: that sees it by itself."""
        self.process.kill()
        self.process.wait()

    # -- its API -----------------------------------------------------------------------------------

    def request(self, path: str, body: object = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as fault:
            with fault:
                return fault.code, fault.read()

    def get(self, path: str):
        status, data = self.request(path)
        assert status == 200, (path, status, data[:500])
        return json.loads(data)

    def queue(self, prompt: dict, client: str = "nobody") -> str:
        status, data = self.request("/prompt", {"prompt": prompt, "client_id": client})
        assert status == 200, data.decode()
        return json.loads(data)["prompt_id"]

    def ended(self, number: str, timeout: float = 300) -> dict:
        """The history of a prompt, when it has ended."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if found := self.get(f"/history/{number}"):
                return found[number]
            time.sleep(0.1)
        raise TimeoutError(number)

    def run(self, prompt: dict) -> dict:
        """The outputs of a prompt that must succeed."""
        history = self.ended(self.queue(prompt))
        assert history["status"]["status_str"] == "success", history["status"]["messages"]
        return history["outputs"]

    def file(self, of: dict) -> Path:
        return self.base / of["type"] / of["subfolder"] / of["filename"]

    def engine_pids(self) -> list[int]:
        """Processes of the engine: the children of ComfyUI that serve."""
        return [
            pid for pid in children(self.process.pid) if b"zimage_jax.serve" in command_line(pid)
        ]


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def resident(pid: int) -> int:
    """Bytes of host memory of a process and its children."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children(pid)))


class Listener:
    """What a client's websocket gets: texts as JSON, binary messages as (type, bytes)."""

    def __init__(self, comfy: ComfyUI, client: str):
        self.messages: SimpleQueue[dict | tuple[int, bytes]] = SimpleQueue()
        self._socket = socket.create_connection(("127.0.0.1", comfy.port))
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        head = (
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{comfy.port}\r\n"
            f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        assert b" 101 " in self._file.readline()
        while self._file.readline() != b"\r\n":
            pass
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        parts = b""
        while len(head := self._file.read(2)) == 2:
            size = head[1] & 127
            if size == 126:
                (size,) = struct.unpack(">H", self._file.read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._file.read(8))
            kind, parts = (head[0] & 15) or kind, parts + self._file.read(size)
            if head[0] & 128:
                if kind == 1:
                    self.messages.put(json.loads(parts))
                elif kind == 2:
                    self.messages.put((struct.unpack(">I", parts[:4])[0], parts[4:]))
                parts = b""

    def until(self, kind: str, timeout: float = 300) -> list:
        """All messages up to the first text of a type, that included."""
        found: list = []
        until = time.monotonic() + timeout
        while not (found and isinstance(found[-1], dict) and found[-1]["type"] == kind):
            try:
                found.append(self.messages.get(timeout=max(0.0, until - time.monotonic())))
            except Empty:
                raise TimeoutError(f"no {kind} after {found[-5:]}") from None
        return found

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
