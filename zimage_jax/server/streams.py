"""Event streams (SSE), and waiting for a job as long as its client does."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from .errors import RefusedError
from .jobs import STORED, Jobs, Live
from .store import CANCELLED, FAILED

PING = 15.0  # seconds without an event, after which proxies close a connection
Events = AsyncIterator[tuple[str, Mapping[str, Any]] | None]


def stream(events: Events) -> StreamingResponse:
    """Events as name and data; None is a sign of life."""

    async def lines() -> AsyncIterator[str]:
        async for event in events:
            if event is None:
                yield ": alive\n\n"
            else:
                name, data = event
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def ended(request: Request, jobs: Jobs, live: Live) -> None:
    """Wait until a job is done. If its client goes away, the job is cancelled: nobody else knows of
    it. Raises RefusedError if it ends otherwise."""
    await until(request, live.ended)
    if not live.ended.is_set():
        await jobs.cancel(live)
    check_done(live)


async def until(request: Request, ended: asyncio.Event) -> None:
    """Wait for an event, as long as the client does."""
    end = asyncio.create_task(ended.wait())
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        end.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_done(live: Live) -> None:
    """Raises RefusedError if a job that has ended is not done."""
    if live.state == FAILED:
        code = live.record.code or "failed"
        status = 500 if code == "failed" else 400
        raise RefusedError(status, live.record.error or "the job failed", code)
    if live.state == CANCELLED:
        raise RefusedError(409, "the job was cancelled", "cancelled")
    if live.state == STORED:
        message = f"the server is stopping; job {live.id} is stored and drawn after its next start"
        raise RefusedError(503, message, "stopping", retry_after=10)


@contextmanager
def cancelled_with(jobs: Jobs, live: Live) -> Iterator[None]:
    """Around a stream that is a job's only reader: the job is cancelled if the stream ends before."""
    try:
        yield
    finally:
        if not live.ended.is_set():
            jobs.spawn(jobs.cancel(live))
