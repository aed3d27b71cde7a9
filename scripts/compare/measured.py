"""A job measured on this machine: what its schedule costs, and what was predicted."""

import statistics
from typing import TYPE_CHECKING

from scripts.compare import predicted, sweep
from scripts.compare.jobs import (
    Drawn,
    by_stage,
    draw,
    job_of,
    memory_of,
    path_of,
    process_peak_bytes,
)

if TYPE_CHECKING:
    from zimage_jax import Result, ZImage


def measure(cell: dict) -> dict:
    """A job drawn `repeats` times after a warm-up, in turn with the same job resident: what the
    schedule costs, what was predicted, and whether the picture is the same."""
    import jax

    from zimage_jax import Memory, ZImage, cli
    from zimage_jax.errors import OutOfMemoryError

    cli.use_compile_cache()
    if jax.default_backend() != "cpu":
        return measure_on_gpu(cell)
    path, job, repeats = path_of(cell), job_of(cell), cell.get("repeats", 5)
    pipe = ZImage.load(path, dtype=cell.get("dtype"), memory=memory_of(cell))
    first = draw(pipe, job)
    other = ZImage.load(path, dtype=cell.get("dtype"), memory=Memory(schedule="resident"))
    plain = {key: value for key, value in job.items() if key != "kv"}
    runs: list[Drawn] = []
    against: list[Drawn] = []
    try:
        draw(other, plain)
        for _ in range(repeats):
            runs.append(draw(pipe, job))
            against.append(draw(other, plain))
    except OutOfMemoryError:  # the device does not hold the model: nothing to compare with
        runs = [draw(pipe, job) for _ in range(repeats)]
    # of a picture that is not the first: what stays on the device was not there from the start of
    # that one
    row = peaks(runs[-1].result) | times(first, runs) | {"process_peak_bytes": process_peak_bytes()}
    row |= (
        against_resident(runs, against) if against else {"psnr_db": None, "resident_seconds": None}
    )
    return row | predicted.seconds_of(cell, runs[-1].result, against) | _timeline(runs[-1].result)


_loaded: dict[tuple, "ZImage"] = {}
_resident: dict[str, list[Drawn]] = {}  # by job


def measure_on_gpu(cell: dict) -> dict:
    """The same where the model may not fit: the resident run is an earlier cell of this process, if
    it had one. The peak is the allocator's where this cell raised it, and else the ledger's, for an
    allocator's peak is never taken back."""
    from scripts.compare import gpu_times
    from zimage_jax import ZImage

    key, job, memory = (path_of(cell), cell.get("dtype")), job_of(cell), memory_of(cell)
    if key not in _loaded:
        _loaded[key] = ZImage.load(key[0], dtype=key[1])
    pipe, job["memory"] = _loaded[key], memory
    before = _allocator_peak()
    first, runs = draw(pipe, job), [draw(pipe, job) for _ in range(cell.get("repeats", 5))]
    result, name = runs[-1].result, sweep.job(cell)
    row = peaks(result) | times(first, runs) | {"process_peak_bytes": process_peak_bytes()}
    if _allocator_peak() <= before:
        row |= {"peak_device_bytes": result.ledger.peak, "peak_device_bytes_from": "ledger"}
    row |= {"psnr_db": None, "resident_seconds": None}
    if result.plan.kept and result.plan.schedule == "resident":
        _resident[name] = runs
    elif name in _resident:
        row |= against_resident(runs, _resident[name])
    row["seconds_per_nfe"] = round(
        statistics.median(s for run in runs for s in run.seconds_of_nfes), 5
    )
    if result.plan.schedule != "scan":  # which is one program, of which the profile sees no NFEs
        row |= gpu_times.of_nfes(pipe, job)
    row |= predicted.seconds_of(cell, result, [])
    return row | _floor(cell, result, row) | _timeline(result)


def _allocator_peak() -> int:
    from zimage_jax.runtime.placement import Placement

    return Placement.on().allocator_peak() or 0


def _floor(cell: dict, result: "Result", row: dict) -> dict:
    """The least seconds an NFE can take: its kernels', or its bytes' over the link, both as
    measured in this process."""

    if "kernel_seconds_per_nfe" not in row:
        return {}
    nbytes = result.plan.denoise.stream.copied_bytes
    link = nbytes / row["chunk_copy_bytes_per_sec"] if nbytes else 0.0
    floor = max(row["kernel_seconds_per_nfe"], link)
    return {
        "copied_bytes_per_nfe": nbytes,
        "link_seconds_per_nfe": round(link, 5),
        "floor_seconds_per_nfe": round(floor, 5),
        "over_floor": round(row["seconds_per_nfe"] / floor, 3),
    }


def peaks(result: "Result") -> dict:
    keys = (
        "schedule",
        "chunks",
        "resident_chunks",
        "device",
        "dtype",
        "predicted_peak_bytes",
        "predicted_peak_bytes_by_stage",
        "peak_device_bytes",
        "peak_device_bytes_from",
        "peak_device_bytes_by_stage",
        "copied_bytes",
        "copied_bytes_by_stage",
        "host_bytes",
        "compilations",
        "warnings",
        "versions",
        "kv_bytes",
    )
    told = {key: result.report[key] for key in keys if key in result.report}
    return told | {"compile_seconds": result.report["seconds"]["compile"]}


def times(first: Drawn, runs: list[Drawn]) -> dict:
    report = runs[-1].result.report
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 4),
        "seconds_of_repeats": [round(run.seconds, 4) for run in runs],
        "seconds_by_stage": by_stage(runs),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 4),
        "first_picture_seconds": round(first.seconds, 4),
        "first_preview_seconds": round(
            statistics.median(run.first_preview_seconds for run in runs), 4
        ),
        "copied_bytes_first": first.result.report["copied_bytes"],
        "latents_sha256": report["latents_sha256"],
    }


def against_resident(runs: list[Drawn], against: list[Drawn]) -> dict:
    import numpy as np

    ours, theirs = (
        np.stack([p.pixels for p in r[-1].result.pictures]).astype(float) for r in (runs, against)
    )
    error = np.mean((ours - theirs) ** 2)
    return {
        "psnr_db": "inf" if error == 0 else round(10 * np.log10(255**2 / error), 2),
        "identical_latents": bool(
            np.array_equal(runs[-1].result.latents, against[-1].result.latents)
        ),
        "resident_seconds": round(statistics.median(run.seconds for run in against), 4),
        "resident_seconds_of_repeats": [round(run.seconds, 4) for run in against],
        "resident_cpu_seconds": round(statistics.median(run.cpu_seconds for run in against), 4),
    }


def _timeline(result: "Result") -> dict:
    """Of the last repeat, in microseconds: [lane, stage, begin, end, bytes] of each event, [at,
    stage, bytes] of each change of what is on the device."""

    def micro(seconds: float) -> int:
        return round(1e6 * seconds)

    levels: list[list] = []
    for at, stage, nbytes, _ in result.ledger.levels:
        if not levels or levels[-1][1:] != [stage, nbytes]:
            levels.append([micro(at), stage, nbytes])
    events = [
        [e.lane, e.stage, micro(e.begin), micro(e.end), e.nbytes] for e in result.ledger.events
    ]
    return {"events": events, "levels": levels}
