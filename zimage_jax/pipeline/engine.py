"""One thread that drives the device for all requests: each sweep over the weights brings every
chunk once, and applies it to every request in flight.

Requests are never merged into one program, so that the bits of a picture do not depend on its
company. Requests that differ in step, prompt, size, guidance or kind fly together if they have the
same memory options and the same LoRAs. They join and leave between two sweeps; there the stages other than denoise run
too, for all requests that have reached them, and whoever goes on leaves the device meanwhile.

Nobody starves: requests join in the order in which they came, and one that does not fit beside the
others holds back those behind it until it does. Between two sweeps they join once, so that whoever
is in flight gets the next one.
"""

import inspect
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import jax
import numpy as np

from ..errors import NonFiniteError, OutOfMemoryError, UsageError
from ..planning.plan import Budget, Memory, Plan, Stage, each
from ..runtime.placement import Placement, is_exhausted
from ..runtime.programs import Programs
from ..runtime.recorder import Recorder
from ..runtime.store import Loan, ParameterStore
from ..runtime.stream import Call, CallError, Sweeps
from ..units import size
from .attempt import Attempt
from .job import Step
from .plans import Plans
from .preview import Preview
from .request import Planned, Request, Started

IN_FLIGHT = 16  # requests at most: from there on a copy costs each of them little
SHARED = "denoise"  # the stage whose sweeps requests join and leave


class Engine:
    """Runs requests. Its thread lives while there are any."""

    def __init__(
        self,
        programs: Programs,
        plans: Plans,
        store: ParameterStore,
        placement: Placement,
        preview: Preview,
        most: int,
    ):
        self.programs, self.plans, self.store = programs, plans, store
        self.placement, self.preview, self.most = placement, preview, most
        self.recorder = Recorder(ahead=placement.runs_ahead, devices=len(placement.each))
        self._waiting, self._lock = deque[Request](), threading.Lock()
        self._is_running = False
        self._free: tuple[int, ...] | None = None  # device bytes, before anything is in flight
        self._here = threading.local()

    def submit(self, *requests: Request) -> None:
        """Let requests wait their turn. Those that come together may join together."""
        for request in requests:
            for text in request.warned:
                request.pass_on(text)
        with self._lock:
            self._waiting.extend(requests)
            if self._is_running:
                return
            self._is_running = True
        threading.Thread(target=self._run, name="zimage engine").start()

    def budget(self, memory: Memory) -> Budget:
        """Device bytes that requests with these options may use together: of the device, or of each
        of several. Raises UsageError for options about another number of devices."""
        count, free, most = len(self.placement.each), self._free, memory.max_vram_bytes
        if most is None:
            found = self.store.free_device_bytes() if free is None else free
        else:
            found = each(most) * (1 if isinstance(most, tuple) else count)
        if len(found) != count:
            raise UsageError(f"--max-vram: {len(found)} sizes for {count} devices")
        return found if count > 1 else found[0]

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Around a callback of a request, in its owner's thread."""
        self._here.is_inside = True
        try:
            yield
        finally:
            self._here.is_inside = False

    def check_caller(self) -> None:
        """Raises UsageError inside a callback."""
        if getattr(self._here, "is_inside", False):
            raise UsageError(
                "a callback asked its own model for another picture: "
                "call generate after the first one has returned"
            )

    # -- the engine's thread -----------------------------------------------------------------------

    def next(self) -> Request | None:
        """The request that has waited longest. Those that were cancelled meanwhile end."""
        with self._lock:
            cancelled = [request for request in self._waiting if request.is_cancelled]
            for request in cancelled:
                self._waiting.remove(request)
            first = self._waiting[0] if self._waiting else None
        for request in cancelled:  # outside of the lock: a listener may do anything
            request.end_cancelled()
        return first

    def take(self) -> Request:
        with self._lock:
            return self._waiting.popleft()

    def put_back(self, request: Request) -> None:
        """First in the line again, with all that it has done."""
        with self._lock:
            self._waiting.appendleft(request)

    def _run(self) -> None:
        self._here.is_inside = True  # listeners are called in this thread
        try:
            with jax.default_device(self.placement.device):
                self._serve()
        except BaseException as fault:
            with self._lock:
                left, self._waiting, self._is_running = self._waiting, deque(), False
            for request in left:
                request.end(fault=fault)

    def _serve(self) -> None:
        while True:
            first = self.next()
            with self._lock:
                if first is None and not self._waiting:
                    self._is_running = False
                    return
            if first is not None:
                self._free = self.store.free_device_bytes()
                try:
                    Flight(self, first).run()
                finally:
                    self._free = None


class _OwnError(Exception):
    """A request's own `fault`, by which others lost what was on the device."""

    def __init__(self, request: Request, fault: BaseException):
        super().__init__(request, fault)
        self.request, self.fault = request, fault


class Flight:
    """The requests in flight, from the first until all are done. They have the same `key`."""

    def __init__(self, engine: Engine, first: Request):
        self._engine, self._recorder = engine, engine.recorder
        self._key, self._memory, self._budget = first.key, first.memory, first.budget
        self._requests: list[Request] = []
        self._most = engine.most
        self._loan: Loan | None = None
        self._refused: tuple | None = None  # who did not fit, and beside whom
        self._run_ahead(engine.placement.runs_ahead)

    def _run_ahead(self, programs: int) -> None:
        for recorder in self._recorder.each:
            recorder.ahead = programs

    def run(self) -> None:
        """Fly until all are done. A fault of the engine itself ends all who are in flight."""
        try:
            self._fly()
        except Exception as fault:
            if self._loan is not None:
                self._loan.release()
            for request in self._requests:
                request.end(fault=fault)

    def _fly(self) -> None:
        """Requests join at the beginning and after each sweep alone, so that whoever is in flight
        gets one in between."""
        self._admit()
        while self._requests:
            stage = self._next_stage()
            here = [request for request in self._requests if request.stage is stage]
            try:
                self._run_stage(stage, here)
                self._finish()
            except _OwnError as own:
                self._recover(own.fault, [own.request])
            except Exception as fault:
                self._recover(fault, here)
            if self._requests and stage.name == SHARED:
                self._admit()

    # -- who is in flight --------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let requests join in their order, as long as they fit."""
        while (plans := self._with_next()) is not None:
            request = self._engine.take()
            is_new = not request.has_begun
            self._requests.append(request)
            self._go_by(plans)
            if is_new:
                request.tell(Started())

    def _with_next(self) -> Sequence[Plan] | None:
        """The plans of those in flight and of the next that waits; None if it may not join."""
        request = self._engine.next()
        if request is None or len(self._requests) >= self._most or request.key != self._key:
            return None
        if not self._requests:
            return self._together([request])
        asked = request, *self._requests
        if asked == self._refused:
            return None
        try:
            plans = self._together([*self._requests, request])
        except OutOfMemoryError:
            self._refused = asked
            return None
        # what is on the device for good stays: where nothing is streamed there is nothing to share
        fits = plans[0].kept == self._requests[0].attempt.plan.kept
        self._refused = None if fits else asked
        return plans if fits else None

    def _together(self, requests: Sequence[Request]) -> Sequence[Plan]:
        if len(requests) == 1:
            (only,) = requests
            if only.budget == self._budget:
                return [only.plan]
            return [only.fitted.plans.plan(only.work, only.memory, self._budget, only.stages)]
        return requests[0].fitted.plans.together(
            [request.work for request in requests],
            [request.plan for request in requests],
            self._memory,
            self._budget,
            requests[0].stages,
        )

    def _go_by(self, plans: Sequence[Plan]) -> None:
        """Give all requests the plans that they have together."""
        self._loan = self._engine.store.lend(
            self._recorder,
            kept=plans[0].kept,
            host_bytes=self._memory.host_bytes,
            loras=self._requests[0].fitted.loras,
        )
        for request, plan in zip(self._requests, plans, strict=True):
            if not request.has_begun:
                request.begin(self._attempt(request, plan))
            request.attempt.plan, request.attempt.loan = plan, self._loan

    def _attempt(self, request: Request, plan: Plan) -> Attempt:
        engine, path, seen = self._engine, request.job.trajectory, set[int]()

        def observe(index: int, latents: np.ndarray) -> None:
            if index in seen:  # done again, after the device had lost it
                return
            seen.add(index)
            if attempt.first_preview_seconds is None:
                attempt.first_preview_seconds = round(time.perf_counter() - request.began, 4)
            if not np.isfinite(latents).all():
                raise NonFiniteError(
                    f"the latents are not finite after NFE {index + 1} of {path.nfes} in "
                    f"{engine.programs.dtype}; the weights are damaged or the dtype is too narrow "
                    "(--dtype float32)"
                )
            t = float(path.scheduler_times[index])
            request.tell(Step(index, path.nfes, t, latents, engine.preview.pixels))

        assert self._loan is not None
        attempt = Attempt(
            number=request.number,
            job=request.job,
            trajectory=path,
            encoded=request.encoded,
            work=request.work,
            plan=plan,
            programs=request.fitted.programs,
            adapters=request.fitted.adapters,
            loan=self._loan,
            placement=engine.placement,
            recorder=self._recorder,
            ledger=request.ledger,
            observe=observe,
            began=time.perf_counter(),
        )
        return attempt

    def _remove(self, request: Request) -> None:
        """The request is no longer in flight, and neither are its arrays on the device."""
        request.leave_device()
        self._recorder.leave(request.ledger)
        self._requests.remove(request)
        if not self._requests and self._loan is not None:
            self._loan.release()

    def _finish(self) -> None:
        """Let requests leave whose stages are all done."""
        for request in [request for request in self._requests if request.stage is None]:
            self._remove(request)
            request.ledger.seconds["total"] = time.perf_counter() - request.attempt.began
            try:
                result = request.finish(request)
            except Exception as fault:
                request.end(fault=fault)
            else:
                request.end(result)

    # -- one stage ---------------------------------------------------------------------------------

    def _next_stage(self) -> Stage:
        """The last stage that someone is at, but denoise comes after all others."""
        at = [request.stage for request in self._requests]
        order = [stage for stage in self._requests[0].stages if stage in at]
        assert order
        return max(order, key=lambda stage: (stage.name != SHARED, order.index(stage)))

    def _run_stage(self, stage: Stage, requests: list[Request]) -> None:
        """Run a stage for requests, then drop their arrays from the device.

        The denoise stage may end before they are done, if others may join or are done.
        """
        self._make_room(stage)
        with self._recorder.stage(stage.name, [request.ledger for request in requests]):
            for request in requests:
                self._begin(stage, request)
            going = [r for r in self._going(requests) if r.running is not None]
            if going:
                self._sweep(stage, going)
            for request in requests:
                request.leave_device()

    def _make_room(self, stage: Stage) -> None:
        """Drop parameters of other stages from the device. If others are in flight, parameters for
        the next sweep stay as long as the stage's peak beside them is within the plan's."""
        assert self._loan is not None
        plan = self._requests[0].attempt.plan
        waits = [r for r in self._requests if SHARED in r.attempt.plan.choices]
        is_alone = stage.name != SHARED and len(self._requests) == 1
        if is_alone or all(SHARED in r.attempt.results for r in waits):
            self._loan.release()
            return
        stream = waits[0].attempt.plan.choices[SHARED].stream
        wanted = {(stream.component, "stem", 0)} | {
            (stream.component, unit, stream.owner(chunk))
            for chunk in stream.schedule.resident
            for unit in stream.chunks[chunk]
        }
        self._loan.release(
            wanted=wanted,
            room=[
                most - (0 if stage.name == SHARED else plan.peaks_on(device)[stage.name])
                for device, most in enumerate(plan.peaks_by_device)
            ],
        )

    def _going(self, requests: Sequence[Request]) -> list[Request]:
        """Those still in flight. Whoever was cancelled ends, once the last program is done."""
        for request in [r for r in requests if r.is_cancelled and r in self._requests]:
            for recorder in self._recorder.each:
                recorder.settle()
            self._remove(request)
            request.end_cancelled()
        return [request for request in requests if request in self._requests]

    def _begin(self, stage: Stage, request: Request) -> None:
        """Start a stage: it is done, or asks for sweeps."""
        if request.is_cancelled:
            return
        with self._ends_alone(request):
            found = stage.run(request.attempt)
            if inspect.isgenerator(found):
                request.running = cast("Generator[Sweeps | Call, list, Any]", found)
                request.advance(None)
            else:
                request.attempt.results[stage.name] = found
            request.attempt.drop()

    @contextmanager
    def _ends_alone(self, request: Request) -> Iterator[None]:
        """A fault inside ends this request alone; the device's lack of memory is everyone's."""
        try:
            yield
        except Exception as fault:
            if isinstance(fault, jax.errors.JaxRuntimeError) and is_exhausted(fault):
                raise
            self._remove(request)
            request.end(fault=fault)

    def _sweep(self, stage: Stage, requests: list[Request]) -> None:
        """Sweeps over the stage's chunks for all `requests`, until one is done or another joins."""
        assert self._loan is not None
        plan = requests[0].attempt.plan.choices[stage.name].stream
        coming = [cast(Sweeps, request.asked) for request in requests]

        def without_kv(chunk: int, sweep: int) -> bool:
            wanted = [of.nfes[sweep] for of in coming if sweep < len(of.nfes)]
            return all(plan.without_kv(chunk, nfe) for nfe in wanted)

        count = _sweeps_until_one_is_done(coming)
        with self._loan.stream(plan, count, without_kv=without_kv) as stream:
            for sweep in range(count):
                self._advance(requests, [None] * len(requests))
                for _ in plan.chunks:
                    requests = self._going(requests)
                    if not requests:
                        return
                    try:
                        found = stream.visit([cast(Call, r.asked) for r in requests])
                    except CallError as error:
                        raise _OwnError(requests[error.index], error.fault) from error
                    self._advance(requests, found)
                requests = [r for r in self._going(requests) if r.running is not None]
                may_stop = sweep + 1 < count and all(request.may_stop for request in requests)
                if not requests or (may_stop and self._with_next()):
                    return

    def _advance(self, requests: Sequence[Request], found: Sequence[list | None]) -> None:
        for request, xs in zip(requests, found, strict=True):
            if request in self._requests and request.running is not None:
                with self._ends_alone(request):
                    request.advance(xs)

    # -- after a fault -----------------------------------------------------------------------------

    def _recover(self, fault: BaseException, of: Sequence[Request]) -> None:
        """End the requests `of` a fault, or try a smaller plan if the device is out of memory.

        All others go on from their last whole NFE.
        """
        self._recorder.abandon()
        for request in self._requests:
            with suppress(jax.errors.JaxRuntimeError):  # its arrays are lost as well
                request.leave_device()
        if isinstance(fault, jax.errors.JaxRuntimeError) and is_exhausted(fault):
            self._engine.store.clear(self._recorder)
            for recorder in self._recorder.each:
                recorder.held.clear()
            if self._requests:
                self._shrink()
            return
        for request in [r for r in of if r in self._requests]:
            self._remove(request)
            request.end(fault=fault)

    def _shrink(self) -> None:
        """Try with a program at a time, then with a smaller plan, then with fewer requests."""
        before = self._requests[0].attempt.plan
        peak = before.peak_bytes
        if self._recorder.ahead:  # two programs in flight may take the scratch of both
            self._run_ahead(0)
            then = "trying a program at a time"
        else:
            peaks, then = before.peaks_by_device, "trying a smaller one"
            self._budget = tuple(p - 1 for p in peaks) if len(peaks) > 1 else peak - 1
        while True:
            try:
                self._go_by(self._together(self._requests))
                break
            except OutOfMemoryError as fault:
                last = self._requests[-1]
                self._remove(last)
                if not self._requests:
                    last.end(fault=fault)
                    return
                then, self._most = "trying with fewer requests in flight", len(self._requests)
                self._engine.put_back(last)
        for request in self._requests:
            request.tell(f"out of device memory with a plan of {size(peak)}; {then}")
            request.tell(Planned(request.attempt.plan, self._budget))


def _sweeps_until_one_is_done(coming: Sequence[Sweeps]) -> int:
    """How many sweeps until one is done and all others can go on from the host."""
    lengths = [len(sweeps.nfes) for sweeps in coming]
    counts = range(min(lengths), max(lengths) + 1)
    return next(n for n in counts if all(sweeps.may_stop(n) for sweeps in coming))
