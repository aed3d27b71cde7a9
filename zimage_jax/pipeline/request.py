"""A job on its way through the engine, as its owner and the engine see it."""

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from ..errors import UsageError
from ..model.prompt import Encoded
from ..planning.plan import Budget, Memory, Plan, Stage, each
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..runtime.stream import Call, Sweeps
from .attempt import Attempt
from .job import Job, Step
from .loras import Fitted

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Planned:
    """An event: the plan under which the job goes on, and the budget in bytes, or those of several
    devices."""

    plan: Plan
    budget: Budget

    @property
    def of_fullest(self) -> int:
        """The budget of the device with the highest peak."""
        peaks, budgets = self.plan.peaks_by_device, each(self.budget)
        return budgets[peaks.index(max(peaks))] if len(budgets) > 1 else budgets[0]


@dataclass(frozen=True)
class Started:
    """An event: the job has come in flight."""


Event = Started | Planned | Step | str  # a string is a warning


@dataclass(kw_only=True, eq=False)
class Handle:
    """A submitted job, as its owner sees it: read `events` and `result`, and `cancel` it."""

    wants_steps: bool = False
    # called by the engine instead of filling `events`; None when the job has ended
    listener: Callable[[Event | None], None] | None = None
    is_cancelled: bool = False
    warned: list[str] = field(default_factory=list)
    _future: Future = field(default_factory=Future)
    _events: SimpleQueue = field(default_factory=SimpleQueue)
    _listener_fault: Exception | None = None

    def cancel(self) -> None:
        """End the job within a chunk; `result` raises CancelledError then. Under `scan` it ends
        when the program does."""
        self.is_cancelled = True

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | int | None = None) -> Any:
        """Wait for the result. Raises what ended the job, CancelledError after `cancel`, and
        TimeoutError after `timeout` seconds."""
        return self._future.result(timeout)

    def wait(self) -> None:
        """Wait until the job has ended, however it did."""
        with suppress(CancelledError):
            self._future.exception()

    def events(self) -> Iterator[Event]:
        """Its events until it has ended: warnings, other plans, and steps if it `wants_steps`.

        Each is given once. Raises UsageError if a listener gets them.
        """
        if self.listener is not None:
            raise UsageError("the events go to on_event")
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for who asks again

    # -- the engine's ------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        if isinstance(event, str):
            self.warned.append(event)
        if self.wants_steps or not isinstance(event, Step):
            self.pass_on(event)

    def end(self, result: Any = None, fault: BaseException | None = None) -> None:
        if fault is not None:
            self._future.set_exception(fault)
        else:
            self._future.set_result(result)
        self.pass_on(None)

    def cancelled(self) -> CancelledError:
        """What `result` raises after `cancel`, or after a listener that raised."""
        fault = CancelledError("the request was cancelled")
        fault.__cause__ = self._listener_fault
        return fault

    def pass_on(self, event: Event | None) -> None:
        """Give an event to the owner. A listener that raises cancels the job."""
        try:
            (self.listener or self._events.put)(event)
        except Exception as fault:  # the engine serves others too
            self._listener_fault = fault
            self.cancel()


@dataclass(kw_only=True, eq=False)
class Request(Handle):
    """A job in this process's engine.

    `stages`: those that it runs. `finish(request)`: makes the result when they are done.
    """

    job: Job
    encoded: dict[str, Encoded]
    work: Work
    memory: Memory
    fitted: Fitted  # the model, with its LoRAs
    stages: tuple[Stage, ...]
    plan: Plan  # of the job alone
    budget: Budget
    finish: Callable[["Request"], Any]
    ledger: Ledger
    began: float = field(default_factory=time.perf_counter)
    number: int = field(default_factory=lambda: next(_numbers))
    # what its stage's generator asked for last
    running: Generator[Sweeps | Call, list, Any] | None = None
    asked: Sweeps | Call | None = None
    _attempt: Attempt | None = None

    def __repr__(self) -> str:
        state = "done" if self.done() else "in flight" if self.has_begun else "waiting"
        job = f"{self.work.batch} of {self.job.width}x{self.job.height}"
        return f"<Request {self.number}: {job}, {state}>"

    @property
    def key(self) -> tuple:
        """Requests in flight together have the same: options about memory, stages, LoRAs with their
        weights, and whether a ControlNet's blocks are between the model's. One program for all NFEs
        shares no sweep."""
        denoise, stages = self.plan.denoise, tuple(stage.name for stage in self.stages)
        alone = self.number if denoise is not None and denoise.is_one_program else None
        return self.memory, stages, self.fitted.key, bool(self.work.control_layers), alone

    @property
    def has_begun(self) -> bool:
        """Whether it is in flight, or was and waits to go on."""
        return self._attempt is not None

    @property
    def attempt(self) -> Attempt:
        """Its state in flight."""
        assert self._attempt is not None
        return self._attempt

    def begin(self, attempt: Attempt) -> None:
        self._attempt = attempt

    @property
    def stage(self) -> Stage | None:
        """The stage that it is at; None after the last."""
        attempt = self.attempt
        return next(
            (
                s
                for s in self.stages
                if s.name in attempt.plan.choices and s.name not in attempt.results
            ),
            None,
        )

    @property
    def may_stop(self) -> bool:
        """Whether it is between two sweeps, and can go on from the host."""
        return isinstance(self.asked, Sweeps) and self.asked.may_stop(0)

    def advance(self, found: list | None) -> None:
        """Give the stage's generator what it asked for; it asks for more, or its stage is done."""
        assert self.running is not None
        assert self.stage is not None
        try:
            self.asked = self.running.send(found)  # type: ignore[arg-type]
        except StopIteration as end:
            self.attempt.results[self.stage.name] = end.value
            self.running = self.asked = None

    def leave_device(self) -> None:
        """Drop the stage's arrays; it begins anew, or goes on from its last whole NFE."""
        try:
            if self.running is not None:
                self.running.close()
        finally:
            self.running = self.asked = None
            if self.has_begun:
                self.attempt.drop()

    def end(self, result: Any = None, fault: BaseException | None = None) -> None:
        self._attempt = None
        super().end(result, fault)

    def end_cancelled(self) -> None:
        """End it after `cancel`."""
        self.leave_device()
        self.end(fault=self.cancelled())
