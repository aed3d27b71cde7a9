"""The account of a job: device bytes, copies and seconds, by stage.

Programs are recorded at launch. The ledger awaits them in order and lets at most `ahead` be in
flight.
"""

import collections
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from ..units import tree_bytes


class Event(NamedTuple):
    lane: str  # "compute", "copy" (host to device) or "tier" (disk to host)
    name: str
    stage: str
    begin: float  # seconds since the ledger began
    end: float
    nbytes: int


class _Running(NamedTuple):
    result: object  # an array that is ready when the program or copy is done
    kinds: tuple[tuple[str, str, int], ...]  # lane, name and bytes of each event to record
    stage: str
    begin: float


@dataclass
class Ledger:
    """Device bytes by name with their peak by stage, copies to the device, and seconds by stage.

    `ahead`: programs that may be unfinished on the device when the next one is launched.
    """

    ahead: int = 0
    held: dict[str, int] = field(default_factory=dict)  # device bytes now, by name
    peak_by_stage: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    saved_bytes: int = 0  # not copied, because an NFE reused K and V
    # seconds, stage and device bytes at each mark
    levels: list[tuple[float, str, int]] = field(default_factory=list)
    _stage: str = "load"
    _began: float = field(default_factory=time.perf_counter)
    _running: collections.deque[_Running] = field(default_factory=collections.deque)
    _sent: collections.deque[_Running] = field(default_factory=collections.deque)

    @property
    def peak(self) -> int:
        return max(self.peak_by_stage.values(), default=0)

    @property
    def copied_by_stage(self) -> dict[str, int]:
        copied: collections.Counter[str] = collections.Counter()
        for event in self.events:
            if event.lane == "copy":
                copied[event.stage] += event.nbytes
        return dict(copied)

    @property
    def copied_bytes(self) -> int:
        return sum(self.copied_by_stage.values())

    def hold(self, name: str, tree) -> None:
        """Count the bytes of `tree` as on the device, in place of the last tree of that `name`."""
        self.held[name] = tree_bytes(tree)
        self.mark()

    def drop(self, name: str) -> None:
        self.held.pop(name, None)

    def mark(self, more: int = 0) -> None:
        """Record the device bytes now: those held, and `more` that a program takes."""
        now = sum(self.held.values()) + more
        self.peak_by_stage[self._stage] = max(self.peak_by_stage.get(self._stage, 0), now)
        self.levels.append((time.perf_counter() - self._began, self._stage, now))

    @contextmanager
    def event(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the time of a `with` block. Reading threads use this too."""
        stage, begin = self._stage, time.perf_counter() - self._began
        try:
            yield
        finally:
            self.events.append(
                Event(lane, name, stage, begin, time.perf_counter() - self._began, nbytes)
            )

    def launched(self, result, *kinds: tuple[str, str, int]) -> None:
        """Record a program that was just launched; it is done when `result` is ready.

        `kinds`: lane, name and bytes of each of its events.
        """
        self._running.append(
            _Running(result, kinds, self._stage, time.perf_counter() - self._began)
        )
        self.settle(self.ahead)

    def settle(self, left: int = 0) -> None:
        """Wait until at most `left` programs are in flight."""
        while len(self._running) > left:
            run = self._running.popleft()
            jax.block_until_ready(run.result)
            end = self._note(run)
            if self._running:  # programs run one after the other
                self._running[0] = self._running[0]._replace(begin=max(end, self._running[0].begin))

    def sent(self, tree, name: str, nbytes: int) -> None:
        """Record a copy of `tree` to the device that was just started; `arrived` awaits it."""
        self._sent.append(
            _Running(
                tree, (("copy", name, nbytes),), self._stage, time.perf_counter() - self._began
            )
        )

    def arrived(self) -> None:
        """Wait until every copy that was `sent` is on the device."""
        while self._sent:
            copy = self._sent.popleft()
            jax.block_until_ready(copy.result)
            self._note(copy)

    def _note(self, run: _Running) -> float:
        """Record the events of a run that ended now, and return when that is."""
        end = time.perf_counter() - self._began
        self.events += [
            Event(lane, name, run.stage, run.begin, end, nbytes) for lane, name, nbytes in run.kinds
        ]
        return end

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self._stage = self._stage, name
        began = time.perf_counter()
        try:
            yield
            self.settle()
            self.arrived()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self._stage = outer

    def trace(self) -> str:
        """The events in Chrome's trace format, which Perfetto reads too.

        It has a lane each for compute, copy and tier, and the device bytes as a counter.
        """
        lanes = {"compute": 1, "copy": 2, "tier": 3}
        rows: list[dict] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}}
            for lane, number in lanes.items()
        ]
        rows += [
            {
                "ph": "X",
                "pid": 1,
                "tid": lanes[e.lane],
                "name": e.name,
                "cat": e.stage,
                "ts": round(1e6 * e.begin),
                "dur": round(1e6 * (e.end - e.begin)),
                "args": {"bytes": e.nbytes, "stage": e.stage},
            }
            for e in self.events
        ]
        rows += [
            {
                "ph": "C",
                "pid": 1,
                "name": "device memory",
                "ts": round(1e6 * at),
                "args": {"bytes": nbytes},
            }
            for at, _, nbytes in self.levels
        ]
        return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
