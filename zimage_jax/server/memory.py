"""What is in memory: on the device, in the host, and by what plan."""

import functools
import os
from pathlib import Path
from typing import Any

from ..errors import OutOfMemoryError
from ..pipeline.request import Planned
from ..pipeline.size import WHOLE
from ..planning.plan import Plan
from .jobs import Jobs
from .order import Order


def plan_to_json(planned: Planned) -> dict[str, Any]:
    """A plan, with the chunks of each stage that stay on the device or are copied to it."""
    plan = planned.plan
    return {
        "budget_bytes": planned.of_fullest,
        "peak_bytes": plan.peak_bytes,
        "peak_bytes_by_stage": plan.peak_bytes_by_stage,
        "arrays_by_stage": {stage: dict(of) for stage, of in plan.arrays_by_stage.items()},
        "seconds": plan.seconds,
        "seconds_by_stage": plan.seconds_by_stage,
        "nfes": plan.nfes,
        "schedule": plan.schedule,
        "streams": _streams(plan),
    }


def _streams(plan: Plan) -> dict[str, dict[str, int]]:
    found = {}
    for stage, choice in plan.choices.items():
        stream = choice.stream
        if stream is not None:
            streamed = stream.streamed
            nbytes = sum(stream.nbytes[chunk] for chunk in streamed)
            found[stage] = {
                "resident_chunks": len(stream.chunks) - len(streamed),
                "resident_bytes": sum(stream.nbytes) - nbytes,
                "streamed_chunks": len(streamed),
                "streamed_bytes": nbytes,
            }
    return found


async def estimate(jobs: Jobs, order: Order) -> dict[str, Any]:
    """What a job would take, and the largest square that fits now."""
    found: dict[str, Any]
    try:
        planned = await jobs.plan(order)
    except OutOfMemoryError as fault:
        found = {"fits": False, "message": str(fault), "needed_bytes": fault.needed}
        side = fault.side
    else:
        found = {"fits": True, **plan_to_json(planned)}
        side = await _largest(jobs, order)
    return found | {"largest": {"width": side, "height": side} if side else None}


async def _largest(jobs: Jobs, order: Order) -> int:
    """The side of the largest square that fits, up to the largest that the model draws whole."""
    config = jobs.engine.config
    widest = min(config.transformer.axes_lens[1:]) * config.pixel_multiple
    side = min(WHOLE * config.vae.sample_size, widest)
    if order.canvas is not None:
        return 0  # its size is the picture's
    try:
        await jobs.plan(order.with_size(side, side))
    except OutOfMemoryError as fault:
        return fault.side
    return side


def report(jobs: Jobs) -> dict[str, Any]:
    engine = jobs.engine
    held = dict(engine.held)
    return {
        "device": {
            "now_bytes": sum(held.values()),
            "arrays": held,
            "peak_bytes_by_stage": jobs.peaks,
        },
        "devices": [
            {"device": of.device, "now_bytes": sum(dict(of.held).values()), "jobs": of.unfinished}
            for of in engine.processes
        ],
        "plan": None if jobs.planned is None else plan_to_json(jobs.planned),
        "host": {
            "parameters_bytes": engine.host_bytes,
            "engine_bytes": sum(_resident(of.pid) or 0 for of in engine.processes if of.is_here)
            or None,
            "server_bytes": _resident(os.getpid()),
            "available_bytes": _available(),
        },
        "nvidia": _nvidia(),
    }


def _resident(pid: int) -> int | None:
    """Bytes of host memory of a process; None where /proc does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _nvidia() -> list[dict[str, Any]]:
    """The driver's view of each GPU, as nvidia-smi's; empty without one, or without nvidia-ml-py."""
    nvml = _nvml()
    if nvml is None:
        return []
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            row = {
                "index": index,
                "name": nvml.nvmlDeviceGetName(device),
                "used_bytes": memory.used,
                "total_bytes": memory.total,
            }
            found.append(row)
    except nvml.NVMLError:
        return found
    return found


@functools.cache
def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
