"""A hub on this machine: Hugging Face's and ModelScope's answers for one repository in memory, and
the faults that a test asks for."""

import contextlib
import gc
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from tqdm import tqdm

from checkpoints_convert import hub as hubs
from checkpoints_convert.downloads import Downloads
from checkpoints_convert.hub import Limits

REPO = "someone/z-image"
NAME = "vae/diffusion_pytorch_model.safetensors"
DATA = np.random.default_rng(0).bytes(300_123)
# a timeout that no busy machine reaches: a part asked for twice would be counted twice
LIMITS = Limits(connections=3, timeout=20, retries=5, backoff=0.01, block=4096, segment=32768)
Fault = Callable[["Handler", str], bool]  # True if it answered


_COUNTING = threading.Lock()


class LocalHub:
    """`faults`: each is tried in turn for every request of a file. `log`: (method and path, headers)
    of every request; `sent`: file -> bytes of its body that were sent."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults = dict(files), list[Fault]()
        self.log: list[tuple[str, dict[str, str]]] = []
        self.sent: dict[str, int] = {}
        self.connections = 0
        self.ranges = True
        self.etag: Callable[[str], str] = lambda name: f'"{sha(self.files[name])}"'
        self.listed: Callable[[dict], None] = lambda answer: None  # changes the list of files
        self.redirects_to: LocalHub | None = None
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """Begin the counts anew, once those who hung up have been served to the end."""
        deadline = time.monotonic() + 5
        while self.connections and time.monotonic() < deadline:
            gc.collect()  # an exception and its frames hold a connection, and each other
            time.sleep(0.005)
        self.log.clear()
        self.sent.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    hub: LocalHub

    def process_request(self, request, client_address) -> None:
        with _COUNTING:
            self.hub.connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with _COUNTING:
                self.hub.connections -= 1

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up, or is killed, is what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart: 40 ms otherwise
    server: _Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        hub.log.append((path, dict(self.headers)))
        if path.startswith(f"/api/models/{REPO}/revision/") and query.get("blobs") == ["true"]:
            files = [_sibling(name, data) for name, data in hub.files.items()]
            answer = {"sha": "c0ffee", "siblings": files}
            return self._json(answer)
        if path == f"/api/v1/models/{REPO}/repo/files":
            files = [
                {"Path": n, "Type": "blob", "Size": len(d), "Sha256": sha(d)}
                for n, d in hub.files.items()
            ]
            return self._json({"Code": 200, "Data": {"Files": files}})
        if path == f"/api/v1/models/{REPO}/repo":
            return self._file(query["FilePath"][0])
        for prefix in (f"/{REPO}/resolve/c0ffee/", "/storage/"):
            if path.startswith(prefix) and path.removeprefix(prefix) in hub.files:
                return self._file(path.removeprefix(prefix))
        return self.refuse(404)

    def _json(self, answer: dict) -> None:
        self.server.hub.listed(answer)
        self.respond(200, json.dumps(answer).encode())

    def _file(self, name: str) -> None:
        hub = self.server.hub
        if any(fault(self, name) for fault in list(hub.faults)):
            return
        if hub.redirects_to is not None:
            self.refuse(302, Location=f"{hub.redirects_to.url}/storage/{name}?signature=secret")
            return
        self.send_file(name)

    def send_file(self, name: str, cut: int | None = None, **headers: str) -> None:
        """The file, or the part asked for; after `cut` bytes of it the connection ends."""
        hub = self.server.hub
        data, etag = hub.files[name], hub.etag(name)
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if wanted and hub.ranges and condition in (None, etag):
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                self.refuse(416)
                return
            headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} | headers
            self.respond(206, data[first : last + 1], cut, name, ETag=etag, **headers)
        else:
            self.respond(200, data, cut, name, ETag=etag, **headers)

    def respond(
        self, status: int, body: bytes, cut: int | None = None, name: str = "", **headers: str
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        sent = body if cut is None else body[:cut]
        self.server.hub.sent[name] = self.server.hub.sent.get(name, 0) + len(sent)
        self.wfile.write(sent)
        if cut is not None:
            self.hang_up()

    def refuse(self, status: int, **headers: str) -> None:
        self.respond(status, b"", **{k.replace("_", "-"): v for k, v in headers.items()})

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def stall(self, seconds: float) -> None:
        time.sleep(seconds)
        self.hang_up()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sibling(name: str, data: bytes) -> dict:
    entry = {"rfilename": name, "size": len(data), "blobId": git_sha(data)}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"sha256": sha(data), "size": len(data), "pointerSize": 134}
    return entry


# -- what tests do with it -------------------------------------------------------------------------


def download(path: Path, name=NAME, limits=LIMITS, where="huggingface", said=None) -> int:
    """Fetch one file to `path`; returns the bytes that came."""
    said = [] if said is None else said
    repository = hubs.open_repository(where, REPO, None, limits, said.append)
    bar = tqdm(total=0, disable=True)
    with Downloads(repository.web, limits, said.append, bar) as all_:
        all_.wait(all_.add(repository.file(name), path))
    return all_.nbytes


def some(count: int, answer):
    """A fault of the first `count` requests of a file."""
    left, lock = [count], threading.Lock()

    def fault(handler: Handler, name: str) -> bool:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                return False
        answer(handler, name)
        return True

    return fault
