"""Our own API: jobs, their events and pictures, plans, memory, health."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse

from .errors import RefusedError
from .jobs import RUNNING, Jobs, Live
from .memory import estimate, report
from .order import Drawing, Order, from_base64, given, order, seed_to_json
from .pictures import FORMATS, encoded, to_base64
from .store import ACCEPTED, STATES, Record
from .streams import PING, Events, stream

_PICTURE = re.compile(rf"([0-9a-f]{{24}})-([0-9]{{1,3}})\.({'|'.join(FORMATS)})")


def view(jobs: Jobs, job: Live | Record) -> dict[str, Any]:
    """A job as clients see it."""
    live = job if isinstance(job, Live) else None
    record = job if isinstance(job, Record) else job.record
    found: dict[str, Any] = {
        "id": record.id,
        "number": record.number,
        "state": live.state if live else record.state,
        "origin": record.origin,
        "created": record.created,
        "arguments": record.arguments,
        "count": len(record.seeds),
        "seeds": [seed_to_json(seed) for seed in record.seeds],
        "from": list(record.inputs),
        "warnings": list(live.warnings if live else record.warnings),
        "pictures": [
            {
                "number": n,
                "url": f"/pictures/{record.id}-{n}.png",
                "seed": seed_to_json(record.seeds[n]),
                **facts,
            }
            for n, facts in sorted((live or record).pictures.items())
        ],
    }
    if record.ended is not None:
        found["ended"] = record.ended
    if record.error is not None:
        found["error"] = {"message": record.error, "code": record.code}
    if live and not live.ended.is_set():
        found["progress"] = round(live.progress, 4)
        if live.state != RUNNING:
            found["position"] = jobs.position(live)
    return found


def live_or_record(jobs: Jobs, job: str) -> Live | Record:
    """Raises RefusedError if there is no such job."""
    found = jobs.live.get(job) or jobs.store.find(job)
    if found is None:
        raise RefusedError(404, "no such job", "not_found", param="id")
    return found


def make_order(
    jobs: Jobs, body: Any, origin: str = "native", files: Mapping[str, bytes] | None = None
) -> Order:
    """The order of a Drawing: call it in a thread. `files`: pictures, if they are not in the
    body. Raises UsageError."""
    said = given(body)
    inputs = dict(files or {}) | {
        name: from_base64(name, data)
        for name in ("image", "mask", "control_image")
        if (data := said.pop(name, None)) is not None
    }
    own = {name: said.pop(name) for name in ("seed", "count", "enlarge") if name in said}
    return order(jobs.engine.config, jobs.loras, origin, said, inputs=inputs, **own)


def router(jobs: Jobs) -> APIRouter:
    routes = APIRouter(tags=["native"])
    _jobs(routes, jobs)
    _machine(routes, jobs)
    return routes


def _jobs(routes: APIRouter, jobs: Jobs) -> None:
    @routes.post("/jobs", status_code=202)
    async def accept(body: Drawing, response: Response):  # type: ignore[valid-type]
        """Store a job; it is drawn, whatever happens to the server. The keys are the arguments of
        ZImage.generate."""
        jobs.check_intake()
        live = await jobs.accept(await jobs.aside(make_order, jobs, body))
        response.headers["Location"] = f"/jobs/{live.id}"
        return view(jobs, live)

    @routes.get("/jobs")
    async def latest(
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[int | None, Query(description="a job's number")] = None,
        state: Annotated[str | None, Query(pattern="|".join(STATES))] = None,
    ):
        """The newest jobs first. State accepted are those that have not ended."""
        records = jobs.store.latest(limit, before, state)
        return {"jobs": [view(jobs, jobs.live.get(record.id, record)) for record in records]}

    @routes.get("/jobs/{job}")
    async def one(job: str):
        return view(jobs, live_or_record(jobs, job))

    @routes.delete("/jobs/{job}")
    async def delete(job: str):
        """Cancel a job that has not ended. One that has is removed, with its pictures."""
        found = live_or_record(jobs, job)
        if isinstance(found, Live):
            await jobs.cancel(found)
            return view(jobs, found)
        if found.state == ACCEPTED:  # on its way between the disk and the queue, or the reverse
            raise RefusedError(409, "the job is just beginning or ending: try again", "busy")
        await asyncio.wrap_future(jobs.store.remove(job))
        return {"id": job, "state": "removed"}

    @routes.get("/jobs/{job}/events")
    async def events(job: str):
        """Server-sent events: queued with its position, step with a small preview, picture, and at
        last done, failed, cancelled or stored (the server is stopping)."""
        return stream(_events(jobs, live_or_record(jobs, job)))

    @routes.get("/pictures/{name}", response_class=Response)
    async def picture(name: str, compression: Annotated[int, Query(ge=0, le=100)] = 100):
        """A picture as it was written (.png), or as .jpeg or .webp."""
        match = _PICTURE.fullmatch(name)
        found = match and (jobs.live.get(match[1]) or jobs.store.find(match[1]))
        if not match or not found or int(match[2]) not in found.pictures:
            raise RefusedError(404, "no such picture", "not_found")
        path = jobs.store.picture(match[1], int(match[2]))
        data = await jobs.aside(encoded, path, match[3], compression)
        headers = {
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, max-age=31536000",
        }
        return Response(data, media_type=f"image/{match[3]}", headers=headers)


async def _events(jobs: Jobs, job: Live | Record) -> Events:
    if isinstance(job, Record):
        yield job.state, view(jobs, job)
        return
    position: int | None = None
    seen: dict[int, int] = {}
    shown: set[int] = set()
    async for is_change in job.changes(PING):
        if not is_change:
            yield None
            continue
        if job.state not in (RUNNING, *STATES) and position != jobs.position(job):
            position = jobs.position(job)
            yield "queued", {"id": job.id, "position": position}
        for picture, step in list(job.steps.items()):
            if seen.get(picture) != step.index and picture not in job.pictures:
                seen[picture] = step.index
                yield (
                    "step",
                    {
                        "picture": picture,
                        "step": step.index + 1,
                        "steps": step.steps,
                        "progress": round(job.progress, 4),
                        "preview": to_base64(job.preview(picture)),
                    },
                )
        for picture in job.pictures.keys() - shown:
            shown.add(picture)
            yield "picture", next(p for p in view(jobs, job)["pictures"] if p["number"] == picture)
    yield job.state, view(jobs, job)


def _machine(routes: APIRouter, jobs: Jobs) -> None:
    @routes.get("/loras")
    async def loras():
        """The LoRAs that a job may name, or why a file is none of this model."""
        return {"loras": await jobs.aside(jobs.loras.describe)}

    @routes.post("/plan")
    async def plan(body: Drawing):  # type: ignore[valid-type]
        """What a job would take, and the largest square that fits now. Nothing is drawn."""
        return await estimate(jobs, await jobs.aside(make_order, jobs, body))

    @routes.get("/memory")
    async def memory():
        """Device and host bytes now, the peaks of the last picture by stage, and what its plan keeps
        on the device and what it streams."""
        return report(jobs)

    @routes.get("/memory/events")
    async def memory_events(seconds: Annotated[float, Query(ge=0.2, le=60)] = 1.0):
        async def now() -> AsyncIterator[tuple[str, dict[str, Any]]]:
            while not jobs.is_stopping:
                yield "memory", report(jobs)
                await asyncio.sleep(seconds)

        return stream(now())

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        """Figures for Prometheus."""
        return Response(jobs.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/health")
    async def health(response: Response):
        """200 while jobs are taken and drawn, else 503."""
        is_well = not (jobs.is_stopping or jobs.fault)
        response.status_code = 200 if is_well else 503
        return {
            "status": "ok" if is_well else jobs.fault or "stopping",
            "queued": jobs.queued,
            "running": len(jobs.live) - jobs.queued,
            "engine_starts": jobs.engine.starts,
        }
