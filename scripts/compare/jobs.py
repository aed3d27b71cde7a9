"""One run of a job on this machine. For the modules beside this one."""

import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.compare import sweep

if TYPE_CHECKING:
    from zimage_jax import Memory, Result, ZImage

MIB = 2**20
STAGES = ("text", "context", "encode", "denoise", "decode")
PROMPT, SEED = "a red circle above a blue square", 7


def path_of(cell: dict) -> str | None:
    """Of the checkpoint; None: the tiny model inside the package."""
    return None if cell.get("model", "tiny") == "tiny" else cell["model"]


def process_peak_bytes() -> int:
    """The most of this process that was in memory at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@dataclass(frozen=True)
class Drawn:
    """One run of a job. CPU seconds are those of all threads: what a busy machine changes least."""

    seconds: float
    cpu_seconds: float
    first_preview_seconds: float
    seconds_of_nfes: list[float]  # but the first
    result: "Result"


def memory_of(cell: dict) -> "Memory":
    from zimage_jax import Memory

    def in_bytes(key: str) -> int | None:
        return int(cell[key] * MIB) if key in cell else None

    return Memory(
        schedule=cell.get("schedule", "auto"),
        chunks=cell.get("chunks"),
        resident_chunks=cell.get("resident_chunks"),
        max_vram_bytes=in_bytes("max_vram_mib"),
        text_encoder=cell.get("text_encoder", "auto"),
        host_bytes=in_bytes("host_memory_mib"),
        vae_tile=cell.get("vae_tile"),
    )


def job_of(cell: dict) -> dict:
    width, height = sweep.pixels(cell["size"])
    first = cell.get("seed", SEED)
    job = {
        "prompt": cell.get("prompt", PROMPT),
        "seed": [first + k for k in range(cell.get("batch", 1))],
        "width": width,
        "height": height,
        "steps": cell.get("steps", 8),
        "guidance": cell.get("guidance", 0.0),
        "sampler": cell.get("sampler", "euler"),
    }
    if "strength" in cell:
        job |= {"image": waves(width, height), "strength": cell["strength"]}
        job |= {"region": cell.get("region")}
    if "kv" in cell:
        from zimage_jax.model.kv import KVPolicy

        job["kv"] = KVPolicy.parse(**cell["kv"])
    return job


def waves(width: int, height: int) -> np.ndarray:
    """A picture to begin from: smooth, and other in every part."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    colours = [np.sin(6 * (a * x + b * y)) for a, b in ((1, 2), (3, 1), (2, 3))]
    return np.round(127.5 * (np.stack(colours, -1) + 1)).astype(np.uint8)


def draw(pipe: "ZImage", job: dict) -> Drawn:
    at: list[float] = []

    def on_step(step) -> None:
        if not step.index:
            step.previews()
        at.append(time.perf_counter())

    cpu, began = time.process_time(), time.perf_counter()
    result = pipe.generate(**job, on_step=on_step)
    ended, busy = time.perf_counter(), time.process_time() - cpu
    return Drawn(
        ended - began, busy, at[0] - began, [b - a for a, b in itertools.pairwise(at)], result
    )


def by_stage(runs: list[Drawn]) -> dict[str, float]:
    return {
        s: round(statistics.median(run.result.ledger.seconds[s] for run in runs), 5)
        for s in STAGES
        if s in runs[0].result.ledger.seconds
    }
