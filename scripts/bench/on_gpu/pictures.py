"""Pictures under memory schedules: bits, seconds and bytes."""

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from scripts.bench.on_gpu.models import folder_of, write
from scripts.compare import gpu_times
from scripts.compare.jobs import Drawn, draw, job_of, memory_of
from scripts.compare.measured import peaks, times
from scripts.compare.predicted import chunk_speed
from zimage_jax import Memory, ZImage
from zimage_jax.errors import OutOfMemoryError
from zimage_jax.runtime import program
from zimage_jax.runtime.placement import Placement
from zimage_jax.weights.checkpoint import Checkpoint

_pipes: dict[str, ZImage] = {}


@contextmanager
def _options(cell: dict) -> Iterator[None]:
    """Compile options of a cell: those of `without` left out, those of `options` added."""
    before = dict(program.OPTIONS)
    for name in cell.get("without", ()):
        program.OPTIONS.pop(name)
    program.OPTIONS.update(cell.get("options", {}))
    try:
        yield
    finally:
        program.OPTIONS.clear()
        program.OPTIONS.update(before)


def _pipe(cell: dict) -> ZImage:
    """A model, loaded once per process, dtype and compile options."""
    folder, dtype = folder_of(cell), cell.get("dtype")
    key = json.dumps([str(folder), dtype, cell.get("without"), cell.get("options")])
    if key not in _pipes:
        _pipes[key] = ZImage.load(folder, dtype=dtype)
    return _pipes[key]


def _draws(cell: dict, memory: Memory) -> list[Drawn]:
    """The first picture, and `repeats` more."""
    pipe, job = _pipe(cell), job_of(cell) | {"memory": memory}
    return [draw(pipe, job) for _ in range(1 + cell.get("repeats", 1))]


def seconds_per_nfe(runs: list[Drawn]) -> float:
    """The median, without the NFEs in which slots are filled."""
    return statistics.median(s for run in runs for s in run.seconds_of_nfes)


def picture(cell: dict) -> dict:
    """A job drawn `repeats` times after a first time. An allocator's peak is never taken back: it is
    of this cell only where `allocator_peak_is_own`."""
    before = Placement.on().allocator_peak() or 0
    with _options(cell):
        first, *runs = _draws(cell, memory_of(cell))
    result, after = runs[-1].result, Placement.on().allocator_peak() or 0
    report = result.report
    return (
        peaks(result)
        | times(first, runs)
        | {
            "seconds_per_nfe": round(seconds_per_nfe(runs), 5),
            "attention": report["attention"],
            "ledger_peak_bytes": report["ledger_peak_bytes"],
            "allocator_peak_bytes": report["allocator_peak_bytes"],
            "allocator_peak_is_own": after > before,
        }
    )


def floor(cell: dict) -> dict:
    """Seconds per NFE over the least that they can be: of its computing, or of its bytes over the
    link. Computing is the same job's resident; a card that does not hold the model has no such."""
    _, *runs = _draws(cell, memory_of(cell))
    plan, checkpoint = runs[-1].result.plan, Checkpoint(folder_of(cell))
    nbytes = plan.denoise.stream.copied_bytes
    speed = chunk_speed(checkpoint, plan, Placement.on()).wall
    try:
        _, *resident = _draws(cell, Memory(schedule="resident"))
        computing = seconds_per_nfe(resident)
    except OutOfMemoryError:
        computing = None
    seconds, link = seconds_per_nfe(runs), nbytes / speed
    least = max(computing or 0.0, link)
    return {
        "seconds_per_nfe": round(seconds, 5),
        "computing_seconds_per_nfe": computing and round(computing, 5),
        "link_seconds_per_nfe": round(link, 5),
        "link_bytes_per_sec": round(speed),
        "copied_bytes_per_nfe": nbytes,
        "over_floor": round(seconds / least, 3),
        "bound_by": "link" if link == least else "compute",
    }


def hidden(cell: dict) -> dict:
    """The share of the copies' seconds in which a kernel ran, by the profiler."""
    _draws(cell | {"repeats": 0}, memory_of(cell))
    found = gpu_times.of_nfes(_pipe(cell), job_of(cell) | {"memory": memory_of(cell)})
    if not found["copy_seconds_per_nfe"]:
        return found | {"not_measured": "the profile has no copies to a GPU"}
    bare = found["bare_copy_seconds_per_nfe"] / found["copy_seconds_per_nfe"]
    return found | {"hidden_share": round(1 - bare, 4)}


WAYS = {"write": write, "picture": picture, "floor": floor, "hidden": hidden}
