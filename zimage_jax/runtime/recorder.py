"""Awaits the programs and copies of each device in order, and records them in the ledgers of the
jobs that they serve."""

import collections
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax

from ..units import tree_bytes
from .ledger import Event, Ledger


class _Running(NamedTuple):
    result: object  # an array that is ready when the program or copy is done
    kinds: tuple[tuple[str, str, int], ...]  # lane, name and bytes of each event to record
    stage: str
    ledgers: tuple[Ledger, ...]
    begin: float


class Recorder:
    """Knows which arrays are on the device, and lets at most `ahead` programs be in flight.

    It records in the ledgers of the stage that runs; outside of a stage, in those given here. Of
    several `devices` it is the first one's, and `each` has those of all.
    """

    def __init__(self, *ledgers: Ledger, ahead: int = 0, devices: int = 1):
        self.ahead, self.device = ahead, 0
        self.each: tuple[Recorder, ...] = (self, *(Recorder(*ledgers) for _ in range(devices - 1)))
        for device, recorder in enumerate(self.each):
            recorder.ahead, recorder.device = ahead, device
        self.held: dict[str, int] = {}  # device bytes now, by name
        self.launches = 0  # programs so far: a sign of life
        self._ledgers, self._stage = ledgers, "load"
        self._running, self._sent = collections.deque[_Running](), collections.deque[_Running]()

    @contextmanager
    def stage(self, name: str, ledgers: Sequence[Ledger]) -> Iterator[None]:
        """A stage of the jobs with these `ledgers`. Its programs and copies are done at its end."""
        outer = self._stage, self._ledgers
        for recorder in self.each:
            recorder._stage, recorder._ledgers = name, tuple(ledgers)
        began = time.perf_counter()
        for ledger in ledgers:
            ledger.most_jobs = max(ledger.most_jobs, len(ledgers))
        try:
            yield
            for recorder in self.each:
                recorder.settle()
                recorder.arrived()
        finally:
            for ledger in ledgers:
                so_far = ledger.seconds.get(name, 0.0)
                ledger.seconds[name] = so_far + time.perf_counter() - began
            for recorder in self.each:
                recorder._stage, recorder._ledgers = outer

    # -- device bytes ------------------------------------------------------------------------------

    def hold(self, name: str, tree) -> None:
        """Count the bytes of `tree` as on the device, in place of the last tree of that `name`."""
        self.held[name] = tree_bytes(tree)
        self.mark()

    def drop(self, name: str) -> None:
        self.held.pop(name, None)

    def mark(self, more: int = 0) -> None:
        """Record the device bytes now: those held, and `more` that a program takes."""
        now = sum(self.held.values()) + more
        for ledger in self._ledgers:
            ledger.mark(self._stage, now, self.device)

    def saved(self, nbytes: int) -> None:
        """Record bytes that were not copied, because an NFE reuses K and V."""
        for ledger in self._ledgers:
            ledger.saved_bytes += nbytes // len(self._ledgers)

    # -- programs and copies -----------------------------------------------------------------------

    @contextmanager
    def event(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the time of a `with` block. Reading threads use this too."""
        stage, ledgers, begin = self._stage, self._ledgers, time.perf_counter()
        try:
            yield
        finally:
            self._note(((lane, name, nbytes),), stage, ledgers, begin, time.perf_counter())

    def launched(self, result, *kinds: tuple[str, str, int]) -> None:
        """Record a program that was just launched; it is done when `result` is ready.

        `kinds`: lane, name and bytes of each of its events.
        """
        self.launches += 1
        self._running.append(self._begun(result, kinds))
        self.settle(self.ahead)

    def settle(self, left: int = 0) -> None:
        """Wait until at most `left` programs are in flight."""
        while len(self._running) > left:
            run = self._running.popleft()
            jax.block_until_ready(run.result)
            end = time.perf_counter()
            self._note(run.kinds, run.stage, run.ledgers, run.begin, end)
            if self._running:  # programs run one after the other
                self._running[0] = self._running[0]._replace(begin=max(end, self._running[0].begin))

    def sent(self, tree, name: str, nbytes: int) -> None:
        """Record a copy of `tree` to the device that was just started; `arrived` awaits it."""
        self._sent.append(self._begun(tree, (("copy", name, nbytes),)))

    def arrived(self) -> None:
        """Wait until every copy that was `sent` is on the device."""
        while self._sent:
            copy = self._sent.popleft()
            jax.block_until_ready(copy.result)
            self._note(copy.kinds, copy.stage, copy.ledgers, copy.begin, time.perf_counter())

    def abandon(self) -> None:
        """Forget the programs and copies in flight, after an error."""
        for recorder in self.each:
            recorder._running.clear()
            recorder._sent.clear()

    def leave(self, ledger: Ledger) -> None:
        """Record no more in the ledger of a job that has left: the others share what is to come."""
        for recorder in self.each:
            recorder._ledgers = tuple(other for other in self._ledgers if other is not ledger)

    def _begun(self, result, kinds: tuple[tuple[str, str, int], ...]) -> _Running:
        return _Running(result, kinds, self._stage, self._ledgers, time.perf_counter())

    def _note(
        self,
        kinds: tuple[tuple[str, str, int], ...],
        stage: str,
        ledgers: Sequence[Ledger],
        begin: float,
        end: float,
    ) -> None:
        """Record events that began and ended at these times, in all `ledgers`."""
        for lane, name, nbytes in kinds:
            event = Event(lane, name, stage, begin, end, nbytes, len(ledgers), self.device)
            for ledger in ledgers:
                ledger.add(event)
