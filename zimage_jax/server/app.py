"""The server: the APIs on one app, behind one guard, and how it starts and stops."""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import uvicorn
from fastapi import FastAPI, Form
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..errors import EngineError, UsageError, ZImageError
from ..pool import ZImagePool
from ..process import ZImageProcess
from . import a1111, native, openai, tensors
from .errors import RefusedError, invalid, refusal_of
from .guard import COOKIE, Guard, same, session_of
from .jobs import Jobs
from .loras import LoraFolders
from .order import LARGEST_BODY
from .store import Store

CONNECTIONS = 1000  # beyond, clients are asked to come again
_CLOSING = 2  # seconds that open connections have at a stop, after the jobs'


def make_app(
    jobs: Jobs, key: str | None = None, *, has_page: bool, has_tensors: bool = False
) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        yield

    app = FastAPI(
        title="zimage_jax",
        description="Pictures by Z-Image-Turbo: README.md of zimage_jax/server has the details.",
        lifespan=lifespan,
        max_body_size=LARGEST_BODY,
    )
    for module in (openai, a1111, native, *([tensors] if has_tensors else [])):
        app.include_router(module.router(jobs))
    for kind in (RefusedError, ZImageError, Exception):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    if key is not None:
        _add_sign_in(app, key)
    if has_page:
        page().mount(app, jobs)
    return app


def page() -> ModuleType:
    """The module of the page: Gradio takes 5 seconds to import."""
    return importlib.import_module(".page.page", __package__)


def _add_sign_in(app: FastAPI, key: str) -> None:
    @app.post("/sign-in", status_code=204, tags=["native"])
    async def sign_in(given: str = Form(alias="key", max_length=1000)):
        """Give a browser that knows the key a cookie instead of it."""
        if not same(given, key):
            raise RefusedError(401, "this is not the API key", "invalid_api_key")
        response = Response(status_code=204)
        response.set_cookie(COOKIE, session_of(key), httponly=True, samesite="strict")
        return response


async def _refuse(request: Request, fault: Exception) -> Response:
    return refusal_of(fault).response(request.url.path)


async def _invalid(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, RequestValidationError)
    return invalid(list(fault.errors())).response(request.url.path)


async def _plain(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return RefusedError(fault.status_code, str(fault.detail), "http").response(request.url.path)


class Server(uvicorn.Server):
    """Stops its jobs before its connections. A second signal ends the process at once."""

    def __init__(self, app: Guard, jobs: Jobs, line: str):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=_CLOSING,
                server_header=False,
            )
        )
        self._jobs, self._line = jobs, line
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._line, flush=True)
            self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        await self._jobs.stop_wanted.wait()
        await self._jobs.stop()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in signals}

        def stop(number: int) -> None:
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = number
            self._jobs.stop_wanted.set()

        for number in signals:
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; clients are refused until the server has started. Raises UsageError
    if the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        return listener
    except (OSError, OverflowError) as fault:
        listener.close()
        reason = getattr(fault, "strerror", None) or fault
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({reason})") from None


def serve(
    engine: ZImageProcess | ZImagePool,
    store: Store,
    listener: socket.socket,
    *,
    most: int,
    key: str | None = None,
    hosts: Collection[str] = (),
    has_page: bool = True,
    loras: Sequence[Path] = (),
    has_tensors: bool = False,
) -> None:
    """Serve until a signal. `loras`: folders of LoRAs that clients may choose.

    Raises EngineError if the engine cannot be started again, UsageError if a folder cannot be
    read, and KeyboardInterrupt after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    jobs = Jobs(engine, store, LoraFolders(loras, engine.config), most=most)
    host, port = listener.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    what = "a page for people, " if has_page else ""
    line = f"listening on http://{place}:{port} ({what}/docs for programs); model {engine.name}, data in {store.folder}"
    app = make_app(jobs, key, has_page=has_page, has_tensors=has_tensors)
    server = Server(Guard(app, key, hosts), jobs, line)
    server.run(sockets=[listener])
    if jobs.fault is not None:
        raise EngineError(f"{jobs.fault}; the jobs are stored, and drawn after the next start")
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt
