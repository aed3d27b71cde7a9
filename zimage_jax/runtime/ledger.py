"""The account of a job: device bytes, copies and seconds, by stage."""

import collections
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Event(NamedTuple):
    lane: str  # "compute", "copy" (host to device) or "tier" (disk to host)
    name: str
    stage: str
    begin: float  # seconds since the ledger began
    end: float
    nbytes: int
    jobs: int = 1  # that share it
    device: int = 0  # of several


@dataclass
class Ledger:
    """Peak device bytes by stage, copies to the device, and seconds by stage.

    Bytes on the device are everyone's. A copy that several jobs share counts for each with its
    share. Of several devices a peak is the one of the fullest.
    """

    # device -> stage -> peak bytes
    peaks: dict[int, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    saved_bytes: int = 0  # not copied, because an NFE reused K and V
    # seconds, stage, device bytes and device at each mark
    levels: list[tuple[float, str, int, int]] = field(default_factory=list)
    most_jobs: int = 1  # that were in flight together, this one among them
    _began: float = field(default_factory=time.perf_counter)

    @property
    def peak(self) -> int:
        return max(self.peak_by_stage.values(), default=0)

    @property
    def peak_by_stage(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for of_device in self.peaks.values():
            for stage, nbytes in of_device.items():
                found[stage] = max(found.get(stage, 0), nbytes)
        return found

    @property
    def copied_by_stage(self) -> dict[str, int]:
        return self._copied(lambda event: event.stage)

    @property
    def copied_by_device(self) -> dict[int, int]:
        return self._copied(lambda event: event.device)

    def _copied(self, key: Callable[[Event], Any]) -> dict[Any, int]:
        copied: collections.Counter[Any] = collections.Counter()
        for event in self.events:
            if event.lane == "copy":
                copied[key(event)] += event.nbytes // event.jobs
        return dict(copied)

    @property
    def copied_bytes(self) -> int:
        return sum(self.copied_by_stage.values())

    def add(self, event: Event) -> None:
        """Record an event whose seconds are those of time.perf_counter."""
        begin, end = event.begin - self._began, event.end - self._began
        self.events.append(event._replace(begin=begin, end=end))

    def mark(self, stage: str, nbytes: int, device: int = 0) -> None:
        """Record the bytes on a device now."""
        peaks = self.peaks.setdefault(device, {})
        peaks[stage] = max(peaks.get(stage, 0), nbytes)
        self.levels.append((time.perf_counter() - self._began, stage, nbytes, device))

    def trace(self) -> str:
        """The events in Chrome's trace format, which Perfetto reads too.

        Each device has a lane each for compute, copy and tier, and its bytes as a counter.
        """
        lanes = {"compute": 1, "copy": 2, "tier": 3}
        devices = sorted({e.device for e in self.events} | {level[3] for level in self.levels})
        rows: list[dict] = [
            {
                "ph": "M",
                "pid": 1 + device,
                "tid": number,
                "name": "thread_name",
                "args": {"name": lane},
            }
            for device in devices
            for lane, number in lanes.items()
        ]
        rows += [
            {
                "ph": "M",
                "pid": 1 + device,
                "name": "process_name",
                "args": {"name": f"device {device}"},
            }
            for device in devices
        ]
        rows += [
            {
                "ph": "X",
                "pid": 1 + e.device,
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
                "pid": 1 + device,
                "name": "device memory",
                "ts": round(1e6 * at),
                "args": {"bytes": nbytes},
            }
            for at, _, nbytes, device in self.levels
        ]
        return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
