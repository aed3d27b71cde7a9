"""What a GPU does during a picture, by its profiler: how long kernels ran, how long copies, and how
much of these under those. For scripts/compare/measured.py."""

import collections
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_jax import ZImage

FIRST, LAST = (
    1,
    3,
)  # the NFEs after which the profile begins and ends: the first ones still fill the slots
NAMED = 8  # kernels

Interval = tuple[float, float]  # seconds


def of_nfes(pipe: "ZImage", job: dict) -> dict:
    """Per NFE, in seconds: the clock's, kernels', copies' from the host, and copies' during which
    no kernel ran; and the kernels that took longest, by name."""
    import jax

    marks: list[float] = []
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0

    with tempfile.TemporaryDirectory() as folder:

        def on_step(step) -> None:
            if step.index == FIRST:
                jax.profiler.start_trace(folder, profiler_options=options)
                marks.append(time.perf_counter())
            elif step.index == LAST:
                marks.append(time.perf_counter())
                jax.profiler.stop_trace()

        pipe.generate(**job, on_step=on_step)
        file = next(Path(folder).rglob("*.xplane.pb"))
        events = list(_events(jax.profiler.ProfileData.from_file(str(file))))
    nfes, is_copy = LAST - FIRST, [name.startswith("Memcpy") for name, _ in events]
    copies = _union(i for (name, i) in events if name.startswith("MemcpyH2D"))
    kernels = _union(i for (_, i), skipped in zip(events, is_copy, strict=True) if not skipped)
    by_name: collections.Counter[str] = collections.Counter()
    for name, (begin, end) in events:
        by_name[name] += end - begin
    return {
        "profiled_seconds_per_nfe": round((marks[1] - marks[0]) / nfes, 5),
        "kernel_seconds_per_nfe": round(_length(kernels) / nfes, 5),
        "copy_seconds_per_nfe": round(_length(copies) / nfes, 5),
        "bare_copy_seconds_per_nfe": round(
            (_length(_union([*copies, *kernels])) - _length(kernels)) / nfes, 5
        ),
        "longest_kernels_ms_per_nfe": {
            n[:60]: round(1e3 * s / nfes, 2) for n, s in by_name.most_common(NAMED)
        },
    }


def _events(profile) -> Iterator[tuple[str, Interval]]:
    """Of the streams of the first GPU."""
    for plane in profile.planes:
        if plane.name.startswith("/device:GPU:0"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        begin = event.start_ns / 1e9
                        yield event.name, (begin, begin + event.duration_ns / 1e9)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
