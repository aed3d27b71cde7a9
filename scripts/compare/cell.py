"""One cell of a sweep, in a process of its own: a list of cells as JSON on standard input, what
came of each as a line on standard output.

scripts/compare/schedules.py starts it, with a single cell but where nothing runs (simulate), and on
a GPU with the cells of one cap of its allocator."""

import time

_SCRIPT_BEGAN = time.clock_gettime(
    time.CLOCK_BOOTTIME
)  # before anything heavy is imported: cold starts count from here

import collections  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, NamedTuple  # noqa: E402

from scripts.compare import sweep  # noqa: E402

if TYPE_CHECKING:
    from zimage_jax import Memory, Plan, Result, ZImage
    from zimage_jax.planning.planner import Work
    from zimage_jax.planning.seconds import Rates
    from zimage_jax.weights.checkpoint import Checkpoint

MIB, GIB = 2**20, 2**30
BUCKET = 64  # caption tokens of a simulated job: a sentence or two
CYCLED_BYTES = 2 * GIB  # of chunks in host memory whose copies are timed
PROMPT, SEED = "a red circle above a blue square", 7


def process_peak_bytes() -> int:
    """The most of this process that was in memory at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- a job on this machine -------------------------------------------------------------------------


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
    }
    if "kv" in cell:
        from zimage_jax.model.kv import KVPolicy

        job["kv"] = KVPolicy.parse(**cell["kv"])
    return job


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


def measure(cell: dict) -> dict:
    """A job drawn `repeats` times after a warm-up, in turn with the same job resident: what the
    schedule costs, what was predicted, and whether the picture is the same."""
    import jax

    from zimage_jax import ZImage, cli
    from zimage_jax.errors import OutOfMemoryError
    from zimage_jax.planning.planner import Memory

    cli.use_compile_cache()
    if jax.default_backend() != "cpu":
        return _measure_on_gpu(cell)
    path, job, repeats = _path(cell), job_of(cell), cell.get("repeats", 5)
    pipe = ZImage.load(path, dtype=cell.get("dtype"), memory=memory_of(cell))
    first = draw(pipe, job)
    other = ZImage.load(path, dtype=cell.get("dtype"), memory=Memory("resident"))
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
    row = (
        _peaks(runs[-1].result)
        | _seconds(first, runs)
        | {"process_peak_bytes": process_peak_bytes()}
    )
    row |= (
        _against_resident(runs, against) if against else {"psnr_db": None, "resident_seconds": None}
    )
    return row | _predicted_seconds(cell, runs[-1].result, against) | _timeline(runs[-1].result)


_loaded: dict[tuple, "ZImage"] = {}
_resident: dict[str, list[Drawn]] = {}  # by job


def _measure_on_gpu(cell: dict) -> dict:
    """The same where the model may not fit: the resident run is an earlier cell of this process, if
    it had one. The peak is the allocator's where this cell raised it, and else the ledger's, for an
    allocator's peak is never taken back."""
    from scripts.compare import gpu_times
    from zimage_jax import ZImage

    key, job, memory = (_path(cell), cell.get("dtype")), job_of(cell), memory_of(cell)
    if key not in _loaded:
        _loaded[key] = ZImage.load(key[0], dtype=key[1])
    pipe, job["memory"] = _loaded[key], memory
    before = _allocator_peak()
    first, runs = draw(pipe, job), [draw(pipe, job) for _ in range(cell.get("repeats", 5))]
    result, name = runs[-1].result, sweep.job(cell)
    row = _peaks(result) | _seconds(first, runs) | {"process_peak_bytes": process_peak_bytes()}
    if _allocator_peak() <= before:
        row |= {"peak_device_bytes": result.ledger.peak, "peak_device_bytes_from": "ledger"}
    row |= {"psnr_db": None, "resident_seconds": None}
    if result.plan.kept and result.plan.schedule == "resident":
        _resident[name] = runs
    elif name in _resident:
        row |= _against_resident(runs, _resident[name])
    row["seconds_per_nfe"] = round(
        statistics.median(s for run in runs for s in run.seconds_of_nfes), 5
    )
    if result.plan.schedule != "scan":  # which is one program, of which the profile sees no NFEs
        row |= gpu_times.of_nfes(pipe, job)
    row |= _predicted_seconds(cell, result, [])
    return row | _floor(result, row, pipe) | _timeline(result)


def _allocator_peak() -> int:
    from zimage_jax.runtime.placement import allocator_peak

    return allocator_peak() or 0


def _floor(result: "Result", row: dict, pipe: "ZImage") -> dict:
    """The least seconds an NFE can take: its kernels', or its bytes' over the link, both as
    measured in this process."""
    from zimage_jax.weights import components

    if "kernel_seconds_per_nfe" not in row:
        return {}
    stream = result.plan.denoise
    nbytes = stream.copied_blocks * components.nbytes(
        pipe.config, "transformer", "layers.0", "bfloat16"
    )
    link = nbytes / row["chunk_copy_bytes_per_sec"] if nbytes else 0.0
    floor = max(row["kernel_seconds_per_nfe"], link)
    return {
        "copied_bytes_per_nfe": nbytes,
        "link_seconds_per_nfe": round(link, 5),
        "floor_seconds_per_nfe": round(floor, 5),
        "over_floor": round(row["seconds_per_nfe"] / floor, 3),
    }


def _path(cell: dict) -> str | None:
    return None if cell.get("model", "tiny") == "tiny" else cell["model"]


def _peaks(result: "Result") -> dict:
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


def _seconds(first: Drawn, runs: list[Drawn]) -> dict:
    report = runs[-1].result.report
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 4),
        "seconds_of_repeats": [round(run.seconds, 4) for run in runs],
        "seconds_by_stage": _by_stage(runs),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 4),
        "first_picture_seconds": round(first.seconds, 4),
        "first_preview_seconds": round(
            statistics.median(run.first_preview_seconds for run in runs), 4
        ),
        "copied_bytes_first": first.result.report["copied_bytes"],
        "latents_sha256": report["latents_sha256"],
    }


def _by_stage(runs: list[Drawn]) -> dict[str, float]:
    stages = ("text", "context", "denoise", "decode")
    return {
        s: round(statistics.median(run.result.ledger.seconds[s] for run in runs), 5) for s in stages
    }


def _against_resident(runs: list[Drawn], against: list[Drawn]) -> dict:
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
    for at, stage, nbytes in result.ledger.levels:
        if not levels or levels[-1][1:] != [stage, nbytes]:
            levels.append([micro(at), stage, nbytes])
    events = [
        [e.lane, e.stage, micro(e.begin), micro(e.end), e.nbytes] for e in result.ledger.events
    ]
    return {"events": events, "levels": levels}


# -- what was predicted ----------------------------------------------------------------------------


class Speed(NamedTuple):
    """Of copies to the device, in bytes/s by the clock and by the CPU seconds that all threads
    spend on them, and the seconds by the clock that each takes of however few bytes."""

    wall: float
    cpu: float
    start: float = 0.0


def _predicted_seconds(cell: dict, result: "Result", against: list[Drawn]) -> dict:
    """By the planner's model of cost, with this machine's rates: compute as fast in each stage as
    the resident run in turn was, or without one as plan.measure says; chunks at the speed of the
    driver's own copies, and in the stages whose parameters are read from the checkpoint each time
    at the speed of such reading. Outside its stages a job takes as long as the resident one.

    On a CPU, where nothing overlaps and no start of a program is hidden, CPU seconds are the
    resident run's and those of the copies."""
    import jax
    import jax.numpy as jnp

    from zimage_jax import plan as planning
    from zimage_jax.pipeline.pipeline import TINY
    from zimage_jax.runtime.placement import default_dtype
    from zimage_jax.weights.checkpoint import Checkpoint

    if result.plan.text is None:  # the text encoder's seconds on the host are not predicted
        return {"predicted_seconds": None, "predicted_cpu_seconds": None}
    checkpoint = Checkpoint(_path(cell) or TINY)
    work, dtype = result.work, jnp.dtype(cell.get("dtype") or default_dtype()).name
    rates, chunks = planning.measure(dtype), _chunk_speed(checkpoint, result.plan)
    # from host memory too, where the device has its own
    pins = _pin_speed(checkpoint, "vae", ["decoder"]) if jax.default_backend() == "cpu" else chunks
    speeds = {"text": chunks, "context": pins, "denoise": chunks, "decode": pins}
    flops, outside = dict.fromkeys(speeds, rates.flops), 0.0
    if jax.default_backend() == "cpu":
        rates = rates._replace(dispatch=chunks.start)
    if against:
        resident, measured = against[-1].result.plan, _by_stage(against)
        alone = _model(resident, work, checkpoint, rates)
        starts = _model(resident, work, checkpoint, rates._replace(flops=math.inf))
        flops = {
            s: rates.flops * (alone[s] - starts[s]) / max(measured[s] - starts[s], 1e-9)
            for s in speeds
        }
        outside = statistics.median(run.seconds for run in against) - sum(measured.values())

    def by_stage(stage: str, **of_stage: float) -> float:
        return _model(result.plan, work, checkpoint, rates._replace(**of_stage))[stage]

    seconds = {s: by_stage(s, flops=flops[s], link=speed.wall) for s, speed in speeds.items()}
    if pins is not chunks and not result.plan.kept:
        seconds = {
            s: value + _reading(s, result.plan, checkpoint, chunks) for s, value in seconds.items()
        }
    row = {
        "predicted_seconds": round(sum(seconds.values()) + outside, 4),
        "predicted_seconds_by_stage": {s: round(value, 5) for s, value in seconds.items()},
        "predicted_seconds_from": "resident run in turn" if against else "matrix products",
        "chunk_copy_bytes_per_sec": round(chunks.wall),
        "pin_bytes_per_sec": round(pins.wall),
        "dispatch_seconds": round(chunks.start, 6),
        "predicted_cpu_seconds": None,
    }
    if against and jax.default_backend() == "cpu":
        copies = sum(by_stage(s, flops=math.inf, link=speed.cpu) for s, speed in speeds.items())
        row["predicted_cpu_seconds"] = round(
            statistics.median(run.cpu_seconds for run in against) + copies, 4
        )
    return row


def _reading(stage: str, plan: "Plan", checkpoint: "Checkpoint", copied: Speed) -> float:
    """Seconds that a stage's blocks that stay take longer than copied ones, for they are read from
    the checkpoint."""
    streams = {"text": ("text_encoder", plan.text), "denoise": ("transformer", plan.denoise)}
    component, stream = streams.get(stage, ("", None))
    units = (
        [unit for chunk in sorted(stream.schedule.pinned) for unit in stream.chunks[chunk]]
        if stream
        else []
    )
    if not units:
        return 0.0
    nbytes = sum(checkpoint.nbytes(component, unit) for unit in units)
    return nbytes * (1 / _pin_speed(checkpoint, component, units).wall - 1 / copied.wall)


def _model(
    plan: "Plan", work: "Work", checkpoint: "Checkpoint", rates: "Rates"
) -> dict[str, float]:
    """Seconds by stage of a picture that is not the first: what stays between pictures is not
    copied again."""
    from zimage_jax.planning.seconds import seconds

    again = rates._replace(link=math.inf) if plan.kept else rates
    return seconds(plan, work, checkpoint.config, checkpoint.dtype, again)


def _chunk_speed(checkpoint: "Checkpoint", plan: "Plan") -> Speed:
    """Of the driver's own copies of the plan's largest chunks into two slots, one chunk after the
    other, so that none lies in the processor's cache from the last time; and of as many arrays of
    one element."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from zimage_jax.runtime.ledger import Ledger
    from zimage_jax.runtime.staging import Program, fill, read_blocks, tree_bytes

    size = max(plan.denoise.sizes)
    largest = [chunk for chunk in plan.denoise.chunks if len(chunk) == size]
    nbytes = sum(checkpoint.nbytes("transformer", unit) for unit in largest[0])
    host = [
        tuple(read_blocks(checkpoint, "transformer", units, "pinned_host").values())
        for units in largest[: max(1, CYCLED_BYTES // nbytes)]
    ]
    copy, ledger = Program(fill, donate=(0,)), Ledger()

    def copies(chunks: list) -> Callable[[], None]:
        slots = collections.deque(
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), chunks[0]) for _ in range(2)
        )
        turn = itertools.cycle(chunks)
        return lambda: slots.append(copy(ledger, slots.popleft(), next(turn)))

    small = jax.tree.map(lambda a: jax.device_put(np.zeros(1, a.dtype), a.sharding), host[0])
    start = nbytes / _speed(nbytes, copies([small])).wall
    speed = _speed(tree_bytes(host[0]), copies(host))
    return Speed(nbytes / max(nbytes / speed.wall - start, 1e-9), speed.cpu, start)


def _pin_speed(checkpoint: "Checkpoint", component: str, units: list[str]) -> Speed:
    """Of reading units from the checkpoint to the device."""
    import jax

    from zimage_jax.runtime.staging import read_blocks

    read = lambda: jax.block_until_ready(read_blocks(checkpoint, component, units, "device"))  # noqa: E731
    return _speed(sum(checkpoint.nbytes(component, unit) for unit in units), read)


def _speed(nbytes: int, call: Callable[[], object], repeats: int = 9) -> Speed:
    """Median by the clock, mean by CPU seconds, after a call that warms up."""
    call()
    spent, busy = [], time.process_time()
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return Speed(
        nbytes / statistics.median(spent), nbytes * repeats / max(time.process_time() - busy, 1e-9)
    )


def simulate(cell: dict) -> dict:
    """A job on a card that is not there, by the planner alone."""
    from zimage_jax.model.config import PRESETS
    from zimage_jax.model.kv import KVPolicy
    from zimage_jax.planning import cards
    from zimage_jax.planning.planner import Planner, Work
    from zimage_jax.planning.seconds import bound_by, seconds
    from zimage_jax.planning.stored import StoredCosts

    name = cell.get("model", "turbo")
    if name not in PRESETS:
        raise sweep.UsageError(
            f"model {name!r}: a card is simulated with one of {', '.join(PRESETS)}"
        )
    config, dtype, card = PRESETS[name], "bfloat16", cards.find(cell["card"])
    width, height = sweep.pixels(cell["size"])
    policy, steps = KVPolicy.parse(**cell.get("kv", {})), cell.get("steps", 8)
    work = Work.of(
        config, width, height, steps, policy, dtype, bucket=BUCKET, batch=cell.get("batch", 1)
    )
    costs = StoredCosts(config, card)
    budget = (
        min(card.usable, int(cell["max_vram_gib"] * GIB)) if "max_vram_gib" in cell else card.usable
    )
    plan = Planner(config, dtype, 2, costs).plan(work, memory_of(cell), budget)
    by_stage = seconds(plan, work, config, dtype, card.rates)
    alone = seconds(plan, work, config, dtype, card.rates._replace(link=math.inf, disk=math.inf))
    return {
        "schedule": plan.schedule,
        "chunks": len(plan.main_sizes),
        "resident_chunks": plan.resident_chunks,
        "vae_rows": plan.vae_rows,
        "budget_bytes": budget,
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
        "predicted_seconds": round(sum(by_stage.values()), 4),
        "predicted_seconds_by_stage": {stage: round(value, 4) for stage, value in by_stage.items()},
        "predicted_compute_seconds_by_stage": {
            stage: round(value, 4) for stage, value in alone.items()
        },
        "bound_by": bound_by(plan, work, config, dtype, card.rates),
        "temporaries": costs.source,
        "rates": card.source,
    }


# -- starting --------------------------------------------------------------------------------------


def cold(cell: dict) -> dict:
    """This very process, from its start to a picture on disk, by part."""
    parts, cpu = {}, {}

    def part(name: str) -> None:
        parts[name] = (
            time.clock_gettime(time.CLOCK_BOOTTIME) - _process_began() - sum(parts.values())
        )
        cpu[name] = time.process_time() - sum(cpu.values())

    part("python")
    import jax  # noqa: F401

    part("import jax")
    from zimage_jax import ZImage, cli

    cli.use_compile_cache()
    ZImage.load  # noqa: B018  the name alone imports the package's modules and flax
    part("import zimage_jax and flax")
    pipe = ZImage.load(_path(cell))
    part("load")
    result = pipe.generate(cell.get("prompt", PROMPT), seed=SEED)
    part("compile and run")
    with tempfile.TemporaryDirectory() as folder:
        result.pictures[0].save(Path(folder) / "picture.png")
    part("write")
    total = sum(parts.values())
    parts["compile"] = result.report["seconds"]["compile"]
    parts["run"] = parts.pop("compile and run") - parts["compile"]
    return {
        "seconds": round(total, 3),
        "seconds_by_part": {name: round(value, 3) for name, value in parts.items()},
        "cpu_seconds_by_part": {name: round(value, 3) for name, value in cpu.items()},
        "compilations": result.report["compilations"],
        "versions": result.report["versions"],
    }


def _process_began() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def answer(cell: dict) -> dict:
    from zimage_jax.errors import ZImageError  # alone: a cold start counts the rest

    try:
        return {"measure": measure, "simulate": simulate, "cold": cold}[cell["kind"]](cell)
    except ZImageError as fault:
        return {"error": str(fault)}


def main() -> None:
    warnings.simplefilter("ignore")
    for cell in json.load(sys.stdin):
        print(json.dumps(answer(cell)), flush=True)


if __name__ == "__main__":
    main()
