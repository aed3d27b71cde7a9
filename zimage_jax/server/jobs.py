"""The queue of jobs between the APIs and the engine's process. All of it runs on the event loop.

A job is stored before it is accepted, and its pictures before it is done, so that whatever ends
this process, the next one draws what is missing. Each picture of a job is a request of its own to
the engine: it is the same as alone, and shares the weights on their way with the others.
"""

import asyncio
import contextlib
import math
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import EngineError, OutOfMemoryError, OutputError, UsageError, ZImageError
from ..pipeline.job import Result, Step
from ..pipeline.picture import encode_png
from ..pipeline.request import Event, Planned, Started
from ..pool import ZImagePool
from ..process import Remote, ZImageProcess
from .errors import RefusedError
from .loras import LoraFolders
from .metrics import Metrics
from .order import Order, as_arguments
from .store import CANCELLED, DONE, FAILED, Record, Store

QUEUED, RUNNING, STORED = "queued", "running", "stored"  # states before the end, and at a stop
AHEAD = 2  # times what the engine has in flight are given to it, so that others can join
GRACE = 5.0  # seconds that a stop leaves to what is in flight
PATIENCE = 600.0  # seconds for a plan: a GPU's compiler takes minutes
_GUESS = 10.0  # seconds of a picture, before any was drawn


@dataclass(eq=False)
class Live:
    """A job that has not ended, and its end for those who wait for it."""

    record: Record
    state: str = QUEUED
    remotes: dict[int, Remote] = field(default_factory=dict)  # by picture
    steps: dict[int, Step] = field(default_factory=dict)  # the last of each picture
    pictures: dict[int, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    began: float | None = None  # by time.monotonic
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    saved: int = 0  # pictures on the disk
    _version: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _previews: dict[int, tuple[Step, bytes]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def progress(self) -> float:
        """The share of its steps that are done."""
        done = sum(
            (step.index + 1) / step.steps
            for n, step in self.steps.items()
            if n not in self.pictures
        )
        return (done + len(self.pictures)) / len(self.record.seeds)

    def preview(self, picture: int) -> bytes:
        """A small PNG of a picture's last step."""
        step = self.steps[picture]
        if self._previews.get(picture, (None,))[0] is not step:
            self._previews[picture] = step, encode_png(step.previews()[0])
        return self._previews[picture][1]

    def change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, patience: float) -> AsyncIterator[bool]:
        """True now and after changes, until the job has ended; False after `patience` seconds
        without any. Who is slow misses changes, and takes no memory."""
        seen = -1
        while True:
            if seen != self._version:
                seen = self._version
                yield True
            elif self.ended.is_set():
                return
            else:
                try:
                    await asyncio.wait_for(self._changed.wait(), patience)
                except TimeoutError:
                    yield False


class Jobs:
    """`most`: jobs that may wait; beyond, clients are asked to come again."""

    def __init__(
        self, engine: ZImageProcess | ZImagePool, store: Store, loras: LoraFolders, *, most: int
    ):
        self.engine, self.store, self.loras, self.most = engine, store, loras, most
        self.live: dict[str, Live] = {}  # in the order in which they came
        self.metrics = Metrics(
            {
                "zimage_jobs_queued": ("Jobs that wait", lambda: self.queued),
                "zimage_jobs_running": ("Jobs in flight", lambda: len(self.live) - self.queued),
                "zimage_device_bytes": ("Device bytes now", lambda: sum(engine.held.values())),
                "zimage_engine_starts": ("Starts of the engine", lambda: engine.starts),
            }
        )
        self.planned: Planned | None = None  # the last plan that is known
        self.peaks: dict[str, int] = {}  # device bytes by stage, of the last picture
        self.fault: str | None = None  # why nothing can be drawn any more
        self.is_stopping = False
        self.stop_wanted = asyncio.Event()
        self._waiting: deque[Live] = deque()
        self._accepting = 0  # jobs on their way to the disk
        self._handed = 0  # pictures that the engine has
        self._seconds = _GUESS  # of a picture, lately
        self._tasks: set[asyncio.Task] = set()
        # pictures are decoded and encoded beside the loop, two at a time: that bounds the memory
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="zimage pictures")
        self._planners = ThreadPoolExecutor(1, thread_name_prefix="zimage plans")

    async def start(self) -> None:
        """Go on with what the last process did not end."""
        self._loop = asyncio.get_running_loop()
        for record in self.store.accepted():
            pictures = dict(record.pictures)
            self._enter(Live(record, pictures=pictures, saved=len(pictures)))
        self._feed()
        self.spawn(self._plan_first())

    async def _plan_first(self) -> None:
        """What the device has in memory for a picture of the model's own size."""
        with contextlib.suppress(ZImageError, CancelledError):
            planned = await self._loop.run_in_executor(
                self._planners, lambda: self.engine.plan("a", seed=0).result(PATIENCE)
            )
            self.planned = self.planned or planned

    async def stop(self) -> None:
        """Let what is in flight end for a few seconds. What is not done then is drawn by the next
        process."""
        self.is_stopping = True
        deadline = time.monotonic() + GRACE
        while self._handed and self.fault is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self.aside(self.engine.close)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for live in list(self.live.values()):
            self._leave(live, STORED)
        self._helpers.shutdown(cancel_futures=True)
        self._planners.shutdown(cancel_futures=True)

    # -- what clients ask for ----------------------------------------------------------------------

    @property
    def queued(self) -> int:
        return sum(live.state == QUEUED for live in self.live.values())

    def position(self, live: Live) -> int:
        """How many jobs start before it."""
        count = 0
        for other in self.live.values():
            if other is live:
                break
            count += other.state == QUEUED
        return count

    def check_intake(self) -> None:
        """Raises RefusedError if no job is taken now."""
        if self.is_stopping or self.fault:
            raise RefusedError(
                503, self.fault or "the server is stopping", "stopping", retry_after=10
            )
        if self.queued + self._accepting >= self.most:
            seconds = self._seconds * self.queued
            raise RefusedError(
                *(429, f"{self.queued} jobs are waiting: come again later", "queue_full"),
                retry_after=min(600, math.ceil(seconds)),
            )

    async def aside(self, function, *arguments, **keywords) -> Any:
        """Call a function in one of the threads for work that would hold up the loop."""
        return await self._loop.run_in_executor(
            self._helpers, lambda: function(*arguments, **keywords)
        )

    async def accept(self, order: Order) -> Live:
        """Store a job; it is drawn then, whatever happens. Raises RefusedError."""
        self.check_intake()
        self._accepting += 1
        # a client that goes away meanwhile must not leave half of it
        return await asyncio.shield(asyncio.create_task(self._accept(order)))

    async def _accept(self, order: Order) -> Live:
        record = Record(
            id=secrets.token_hex(12),
            origin=order.origin,
            arguments=order.arguments,
            seeds=order.seeds,
            inputs=tuple(order.inputs),
            created=time.time(),
        )
        try:
            for name, data in order.inputs.items():
                await self.aside(self.store.save, self.store.input(record.id, name), data)
            number = await asyncio.wrap_future(self.store.add(record))
        finally:
            self._accepting -= 1
        live = Live(replace(record, number=number))
        self._enter(live)
        self._feed()
        return live

    async def cancel(self, live: Live) -> None:
        """End a job that has not ended; its pictures so far stay."""
        await self._end(live, CANCELLED)

    async def plan(self, order: Order) -> Planned:
        """The plan of a job that is not drawn. Raises OutOfMemoryError."""

        def ask() -> Planned:
            return self.engine.plan(**order.to_plan(self.loras)).result(PATIENCE)

        return await self._loop.run_in_executor(self._planners, ask)

    def spawn(self, work: Coroutine) -> None:
        """Begin work that nobody awaits; a stop does."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the queue ---------------------------------------------------------------------------------

    def _enter(self, live: Live) -> None:
        self.live[live.id] = live
        self._waiting.append(live)

    def _leave(self, live: Live, state: str) -> None:
        was_queued, live.state = live.state == QUEUED, state
        self.live.pop(live.id, None)
        live.ended.set()
        live.change()
        if was_queued:
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        for other in self.live.values():
            if other.state == QUEUED:
                other.change()

    def _feed(self) -> None:
        """Give the engine as many pictures as it can use."""
        while (
            self._waiting and self._handed < AHEAD * self.engine.in_flight and not self.is_stopping
        ):
            live = self._waiting.popleft()
            if live.state != QUEUED:
                continue
            record = live.record
            inputs = {name: str(self.store.input(record.id, name)) for name in record.inputs}
            try:
                arguments = as_arguments(record.arguments, self.loras) | inputs
            except UsageError as fault:  # a LoRA has gone since the job was accepted
                self.spawn(self._end(live, FAILED, str(fault), _code(fault)))
                continue
            for picture, seed in enumerate(record.seeds):
                if picture in live.pictures:
                    continue
                try:
                    live.remotes[picture] = self.engine.submit(
                        **arguments, seed=seed, on_event=_Listener(self, live, picture)
                    )
                except EngineError as fault:
                    self.break_off(fault)
                    return
                self._handed += 1

    def hear(self, live: Live, picture: int, event: Event | None) -> None:
        if event is None:
            self._handed -= 1
            self._feed()
            self.spawn(self._finish(live, picture))
            return
        if isinstance(event, Started) and live.state == QUEUED:
            live.state, live.began = RUNNING, time.monotonic()
            self._tell_waiting()
        elif isinstance(event, Step):
            live.steps[picture] = event
        elif isinstance(event, Planned):
            self.planned = event
        elif isinstance(event, str) and event not in live.warnings:
            live.warnings.append(event)
        live.change()

    async def _finish(self, live: Live, picture: int) -> None:
        """Keep a picture that is drawn, or end its job."""
        try:
            result = live.remotes[picture].result(0)
            if live.ended.is_set():
                return
            facts = await self.aside(self._save, live.id, picture, result)
            live.saved += 1
            is_last = live.saved == len(live.record.seeds)
            kept = await asyncio.wrap_future(
                self.store.keep(live.id, picture, facts, warnings=live.warnings, is_last=is_last)
            )
            if not kept:
                self.store.picture(live.id, picture).unlink(missing_ok=True)
                return
            live.pictures[picture] = facts
            self.note(result)
            if is_last:
                self.metrics.ended(DONE)
                self._leave(live, DONE)
            else:
                live.change()
        except CancelledError:  # by `_end`, or by a stop
            return
        except (OutputError, sqlite3.Error) as fault:  # a full disk, say: it is drawn another time
            self.break_off(fault)
        except ZImageError as fault:
            if self.engine.is_closed:
                self.break_off(fault)
            else:
                # messages name files of ours
                message = self.loras.without_folder(fault).replace(f"{self.store.folder}/", "")
                await self._end(live, FAILED, message, _code(fault))
        except Exception as fault:
            await self._end(live, FAILED, f"{type(fault).__name__}: {fault}", "failed")

    def _save(self, job: str, picture: int, result: Result) -> dict[str, Any]:
        drawn = result.pictures[0]
        self.store.save(self.store.picture(job, picture), encode_png(drawn.pixels, drawn.metadata))
        report = result.report
        height, width = drawn.pixels.shape[:2]
        names = ("steps", "guidance", "latents_sha256", "peak_device_bytes", "schedule", "model")
        return {
            "width": width,
            "height": height,
            "seconds": report["seconds"]["total"],
            **{name: report[name] for name in names},  # type: ignore[literal-required]
        }

    def note(self, result: Result) -> None:
        """Remember what a picture took."""
        seconds = result.report["seconds"]["total"]
        self._seconds += (seconds - self._seconds) / 4
        self.metrics.drawn(seconds)
        self.peaks = result.report["peak_device_bytes_by_stage"]
        self.planned = Planned(result.plan, self.planned.budget if self.planned else 0)

    async def _end(
        self, live: Live, state: str, error: str | None = None, code: str | None = None
    ) -> None:
        if live.ended.is_set() or self.is_stopping:
            return
        has_ended = await asyncio.wrap_future(
            self.store.end(live.id, state, error, code, live.warnings)
        )
        if not has_ended:
            return
        live.record = replace(live.record, error=error, code=code)
        for remote in live.remotes.values():
            remote.cancel()
        self.metrics.ended(state)
        self._leave(live, state)

    def break_off(self, fault: Exception) -> None:
        """Nothing can be drawn or kept any more: the jobs stay stored, and the server ends."""
        if not self.is_stopping and self.fault is None:
            self.fault = str(fault)
            self.stop_wanted.set()


class _Listener:
    """Called in the thread that hears the engine's process."""

    def __init__(self, jobs: Jobs, live: Live, picture: int):
        self._of = jobs, live, picture

    def __call__(self, event: Event | None) -> None:
        jobs, live, picture = self._of
        with contextlib.suppress(RuntimeError):  # the loop has ended
            jobs._loop.call_soon_threadsafe(jobs.hear, live, picture, event)


def _code(fault: ZImageError) -> str:
    if isinstance(fault, OutOfMemoryError):
        return "out_of_memory"
    return "invalid_request" if isinstance(fault, UsageError) else "failed"
