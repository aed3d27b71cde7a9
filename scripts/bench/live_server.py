"""A live server in a process of its own, and plain HTTP to it."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120  # seconds


class LiveServer:
    """`data`: its folder. Arguments and `environment` are those of python -m zimage_jax.serve."""

    def __init__(self, data: Path, *arguments: object, environment: dict[str, str] | None = None):
        self.data, self._arguments = data, arguments
        inherited = {name: v for name, v in os.environ.items() if name != "ZIMAGE_API_KEY"}
        self._environment = inherited | {"PYTHONPATH": str(ROOT)} | (environment or {})
        self.key: str | None = self._environment.get("ZIMAGE_API_KEY")
        self.start()

    def start(self) -> None:
        self.log = self.data.with_suffix(".log")
        command = [sys.executable, "-m", "zimage_jax.serve", "--data", self.data, "--port", 0]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, (*command, *self._arguments))),
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
            )
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            line = lines.readline()
        match = re.search(r"listening on http://(127\.0\.0\.1):(\d+) ", line)
        assert match, line + self.log.read_text()
        self.port = int(match[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LiveServer":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> float:
        """SIGTERM. Seconds until it has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)
        return time.monotonic() - began

    def engine(self) -> int:
        """The process that draws."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            children += " " + (thread / "children").read_text()
        for pid in children.split():
            if b"zimage_jax.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError("no engine")

    # -- HTTP --------------------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the body: what its JSON says, else its bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None and not isinstance(body, bytes):
            body, given = json.dumps(body).encode(), given | {"Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**given, **(headers or {})})
            response = connection.getresponse()
            data = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        if found.get("content-type", "").startswith("application/json"):
            return response.status, found, json.loads(data)
        return response.status, found, data

    def post(self, path: str, body: Any) -> Any:
        """What a request that must succeed says."""
        status, _, found = self.ask("POST", path, body)
        assert status < 300, found
        return found

    def get(self, path: str) -> Any:
        status, _, found = self.ask("GET", path)
        assert status == 200, found
        return found

    def refused(self, path: str, body: Any, status: int = 400) -> str:
        """The message of a request that must be refused."""
        found, _, error = self.ask("POST", path, body)
        assert found == status, error
        return error["error"]["message"]

    def wait(self, job: str, *states: str) -> Any:
        """The job, once it is in one of the states: by default once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.get(f"/jobs/{job}")
            if found["state"] in (states or ("done", "failed", "cancelled")):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.02)

    @contextlib.contextmanager
    def events(self, path: str) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a stream: names and data."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            assert response.getheader("content-type", "").startswith("text/event-stream")

            def read() -> Iterator[tuple[str, Any]]:
                name = ""
                for line in response:
                    if line.startswith(b"event: "):
                        name = line[7:].strip().decode()
                    elif line.startswith(b"data: "):
                        yield name, json.loads(line[6:])

            yield read()
