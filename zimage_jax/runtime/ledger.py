"""The account of a job: device bytes, copies and seconds, by stage."""

import collections
import json
import time
from dataclasses import dataclass, field
from typing import NamedTuple


class Event(NamedTuple):
    lane: str  # "compute", "copy" (host to device) or "tier" (disk to host)
    name: str
    stage: str
    begin: float  # seconds since the ledger began
    end: float
    nbytes: int
    jobs: int = 1  # that share it


@dataclass
class Ledger:
    """Peak device bytes by stage, copies to the device, and seconds by stage.

    Bytes on the device are everyone's. A copy that several jobs share counts for each with its
    share.
    """

    peak_by_stage: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    saved_bytes: int = 0  # not copied, because an NFE reused K and V
    # seconds, stage and device bytes at each mark
    levels: list[tuple[float, str, int]] = field(default_factory=list)
    most_jobs: int = 1  # that were in flight together, this one among them
    _began: float = field(default_factory=time.perf_counter)

    @property
    def peak(self) -> int:
        return max(self.peak_by_stage.values(), default=0)

    @property
    def copied_by_stage(self) -> dict[str, int]:
        copied: collections.Counter[str] = collections.Counter()
        for event in self.events:
            if event.lane == "copy":
                copied[event.stage] += event.nbytes // event.jobs
        return dict(copied)

    @property
    def copied_bytes(self) -> int:
        return sum(self.copied_by_stage.values())

    def add(self, event: Event) -> None:
        """Record an event whose seconds are those of time.perf_counter."""
        begin, end = event.begin - self._began, event.end - self._began
        self.events.append(event._replace(begin=begin, end=end))

    def mark(self, stage: str, nbytes: int) -> None:
        """Record the device bytes now."""
        self.peak_by_stage[stage] = max(self.peak_by_stage.get(stage, 0), nbytes)
        self.levels.append((time.perf_counter() - self._began, stage, nbytes))

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
                "args": {"bytes": e.nbytes, "stage": e.stage, "jobs": e.jobs},
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
