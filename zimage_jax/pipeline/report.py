"""The report of a job and the metadata of its pictures, as JSON."""

import importlib.metadata
import platform
from typing import Any, cast

from ..weights import formats
from .attempt import Attempt
from .job import Report


def metadata(attempt: Attempt, model: str, control: str | None) -> dict[str, Any]:
    """The settings that all pictures of a job share. `model` and `control`: the checkpoints'
    names."""
    job = attempt.job
    common = {
        "width": job.width,
        "height": job.height,
        "steps": job.steps,
        "guidance": job.guidance,
        "negative_prompt": job.negative_prompt,
        "noise": job.noise,
        "sampler": job.sampler,
        "sigmas": job.sigmas,
        "shift": job.shift,
        "prompt_weights": job.prompt_weights,
        "text_weight": job.text_weight,
        "variance": job.variance,
        "kv": job.kv.to_json(),
        "dtype": str(attempt.programs.dtype),
        "model": model,
        "versions": versions(),
    }
    optional = {
        "attention": None if job.attention == "auto" else job.attention,
        "cfg_normalization": job.cfg_normalization or None,
        "cfg_truncation": None if job.cfg_truncation == 1 else job.cfg_truncation,
        "region": job.region,
        "lora": None if attempt.adapters is None else attempt.adapters.to_json(),
        "image": None if job.canvas is None else _image(attempt),
        "control": job.control
        and {
            "model": control,
            "image": job.control.settings["image"],
            "fit": job.control.settings["fit"],
            "sha256": job.control.sha256,
            "scale": job.control_scale,
        },
    }
    return common | {key: value for key, value in optional.items() if value is not None}


def _image(attempt: Attempt) -> dict[str, Any]:
    """What a job began from, and how much of it was redrawn."""
    job = attempt.job
    assert job.canvas is not None
    return {
        **job.canvas.to_json(),
        "strength": job.strength,
        "strength_rule": job.strength_rule,
        "noise_level": round(attempt.trajectory.start, 6),
        "differential": job.differential,
    }


def report(
    attempt: Attempt,
    common: dict[str, Any],
    each: list[dict[str, Any]],
    warnings: list[str],
    host_bytes: int,
) -> Report:
    """The report: `common` from `metadata`, and `each` picture's own prompt, seed and checksum."""
    plan, ledger, work, programs = attempt.plan, attempt.ledger, attempt.work, attempt.programs
    config, placement = attempt.config.transformer, attempt.placement
    # summed over reading threads, which run while the device computes: overlaps the stages
    load = sum(event.end - event.begin for event in ledger.events if event.lane == "tier")
    seconds = {**ledger.seconds, "load": load, "compile": programs.compile_seconds}
    measured = [of.allocator_peak() for of in placement.each]
    peaks = [of for of in measured if of is not None]
    peak = max(peaks) if len(peaks) == len(measured) else None
    own = each[0] if len(each) == 1 else {key: [of[key] for of in each] for key in each[0]}
    found = {
        **own,
        **common,
        "formats": formats.names(programs.storage),
        "schedule": plan.schedule,
        "nfes": work.steps,
        "chunks": 0 if plan.denoise is None else len(plan.denoise.main_chunks),
        "resident_chunks": 0 if plan.denoise is None else plan.denoise.resident_chunks,
        "attention": programs.attention_names(work),
        "device": placement.device.device_kind,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "first_preview_seconds": attempt.first_preview_seconds,
        "compilations": programs.compilations,
        "warnings": warnings,
        "predicted_seconds": None if plan.seconds is None else round(plan.seconds, 3),
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
        "predicted_arrays_by_stage": {s: dict(of) for s, of in plan.arrays_by_stage.items()},
        "peak_device_bytes": ledger.peak if peak is None else peak,
        "peak_device_bytes_from": "ledger" if peak is None else "allocator",
        "ledger_peak_bytes": ledger.peak,
        "allocator_peak_bytes": peak,
        "peak_device_bytes_by_stage": ledger.peak_by_stage,
        "copied_bytes": ledger.copied_bytes,
        "copied_bytes_by_stage": ledger.copied_by_stage,
        "copied_bytes_saved_by_reuse": ledger.saved_bytes,
        "most_jobs_in_flight": ledger.most_jobs,
        "kv_bytes": work.kv_bytes(config),
        "kv_bytes_without_policy": work.without_policy(programs.dtype).kv_bytes(config),
        "kv_bytes_of_a_block_by_nfe": work.kv_bytes_by_nfe(config),
        "host_bytes": host_bytes,
        "devices": [_device(attempt, device, of) for device, of in enumerate(measured)],
    }
    return cast(Report, found)


def _device(attempt: Attempt, device: int, measured: int | None) -> dict[str, Any]:
    """What the report says of one device. `measured`: its allocator's peak."""
    plan, ledger = attempt.plan, attempt.ledger
    chunks = {"chunks": 0, "resident_chunks": 0}
    if plan.denoise is not None:
        lane = plan.denoise.blocks.lanes[device]
        chunks = {
            "chunks": sum(map(lane.is_main, range(len(lane.chunks)))),
            "resident_chunks": sum(map(lane.is_main, lane.schedule.resident)),
        }
    by_stage = ledger.peaks.get(device, {})
    own = max(by_stage.values(), default=0)
    return {
        "device": attempt.placement.each[device].device.device_kind,
        **chunks,
        "predicted_peak_bytes": plan.peaks_by_device[device],
        "predicted_peak_bytes_by_stage": plan.peaks_on(device),
        "peak_device_bytes": own if measured is None else measured,
        "ledger_peak_bytes": own,
        "peak_device_bytes_by_stage": by_stage,
        "copied_bytes": ledger.copied_by_device.get(device, 0),
    }


def versions() -> dict[str, str]:
    """Versions of this package, of JAX and Flax, and of Python."""

    def of(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            return "not installed"

    return {name: of(name) for name in ("zimage_jax", "jax", "jaxlib", "flax")} | {
        "python": platform.python_version()
    }
