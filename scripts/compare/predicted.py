"""How long a job takes by the planner's model of cost, with this machine's rates."""

import collections
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from scripts.compare.jobs import Drawn, by_stage, path_of

if TYPE_CHECKING:
    from zimage_jax import Plan, Result
    from zimage_jax.planning.seconds import Rates
    from zimage_jax.planning.work import Work
    from zimage_jax.runtime.placement import Placement
    from zimage_jax.weights.checkpoint import Checkpoint

GIB = 2**30
CYCLED_BYTES = 2 * GIB  # of chunks in host memory whose copies are timed


class Speed(NamedTuple):
    """Of copies to the device, in bytes/s by the clock and by the CPU seconds that all threads
    spend on them, and the seconds by the clock that each takes of however few bytes."""

    wall: float
    cpu: float
    start: float = 0.0


def seconds_of(cell: dict, result: "Result", against: list[Drawn]) -> dict:
    """By the planner's model of cost, with this machine's rates: compute as fast in each stage as
    the resident run in turn was, or without one as runtime.rates says; chunks at the speed of the
    driver's own copies, and in the stages whose parameters are read from the checkpoint each time
    at the speed of such reading. Outside its stages a job takes as long as the resident one.

    On a CPU, where nothing overlaps and no start of a program is hidden, CPU seconds are the
    resident run's and those of the copies."""
    import jax.numpy as jnp

    from zimage_jax.runtime.placement import Placement, default_dtype
    from zimage_jax.runtime.rates import measure
    from zimage_jax.weights.checkpoint import Checkpoint
    from zimage_jax.weights.search import TINY

    if result.plan.choices["text"].stream is None:  # the host's text encoder is not predicted
        return {"predicted_seconds": None, "predicted_cpu_seconds": None}
    checkpoint, placement = Checkpoint(path_of(cell) or TINY), Placement.on()
    dtype = jnp.dtype(cell.get("dtype") or default_dtype(placement.target))
    rates = measure(placement, dtype.name)
    chunks = chunk_speed(checkpoint, result.plan, placement)
    is_cpu = placement.shares_memory
    # from host memory too, where the device has its own
    pins = _pin_speed(checkpoint, "vae", ["decoder"], placement) if is_cpu else chunks
    speeds = {"text": chunks, "context": pins, "denoise": chunks, "decode": pins}
    flops, outside = dict.fromkeys(speeds, rates.flops), 0.0
    if is_cpu:
        rates = rates._replace(dispatch=chunks.start)

    def model(plan: "Plan", rates: "Rates") -> dict[str, float]:
        return _model(plan, result.work, checkpoint, dtype.itemsize, rates)

    if against:
        resident, measured = against[-1].result.plan, by_stage(against)
        alone, starts = model(resident, rates), model(resident, rates._replace(flops=math.inf))
        flops = {
            s: rates.flops * (alone[s] - starts[s]) / max(measured[s] - starts[s], 1e-9)
            for s in speeds
        }
        outside = statistics.median(run.seconds for run in against) - sum(measured.values())

    def stage(name: str, **of_stage: float) -> float:
        return model(result.plan, rates._replace(**of_stage))[name]

    seconds = {s: stage(s, flops=flops[s], link=speed.wall) for s, speed in speeds.items()}
    if is_cpu and not result.plan.kept:
        seconds = {
            s: value + _reading(s, result.plan, checkpoint, chunks, placement)
            for s, value in seconds.items()
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
    if against and is_cpu:
        copies = sum(stage(s, flops=math.inf, link=speed.cpu) for s, speed in speeds.items())
        row["predicted_cpu_seconds"] = round(
            statistics.median(run.cpu_seconds for run in against) + copies, 4
        )
    return row


def _reading(
    stage: str, plan: "Plan", checkpoint: "Checkpoint", copied: Speed, placement: "Placement"
) -> float:
    """Seconds that a stage's blocks that stay take longer than copied ones, for they are read from
    the checkpoint."""
    stream = plan.choices[stage].stream if stage in ("text", "denoise") else None
    resident = sorted(stream.schedule.resident) if stream else []
    units = [unit for chunk in resident for unit in stream.chunks[chunk]]
    if not units:
        return 0.0
    nbytes = checkpoint.storage.nbytes(stream.component, *units)
    speed = _pin_speed(checkpoint, stream.component, units, placement)
    return nbytes * (1 / speed.wall - 1 / copied.wall)


def _model(
    plan: "Plan", work: "Work", checkpoint: "Checkpoint", compute_bytes: int, rates: "Rates"
) -> dict[str, float]:
    """Seconds by stage of a picture that is not the first: what stays between pictures is not
    copied again."""
    from zimage_jax.pipeline.stages import STAGES
    from zimage_jax.planning.plan import Sizes
    from zimage_jax.planning.seconds import seconds

    again = rates._replace(link=math.inf) if plan.kept else rates
    return seconds(STAGES, plan, work, Sizes(checkpoint.storage, compute_bytes), again)


def chunk_speed(checkpoint: "Checkpoint", plan: "Plan", placement: "Placement") -> Speed:
    """Of the driver's own copies of the plan's largest chunks into two slots, one chunk after the
    other, so that none lies in the processor's cache from the last time; and of as many arrays of
    one element."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from zimage_jax.runtime.placement import HOST
    from zimage_jax.runtime.program import Program
    from zimage_jax.runtime.reader import read_units
    from zimage_jax.runtime.recorder import Recorder
    from zimage_jax.runtime.stream import fill
    from zimage_jax.units import tree_bytes

    blocks = plan.denoise.stream
    nbytes = max(blocks.nbytes)
    largest = [c for c, of in zip(blocks.chunks, blocks.nbytes, strict=True) if of == nbytes]
    host = [
        tuple(read_units(checkpoint, "transformer", units, placement, HOST).values())
        for units in largest[: max(1, CYCLED_BYTES // nbytes)]
    ]
    copy, recorder = Program(placement, fill, donate=(0,)), Recorder()

    def copies(chunks: list) -> Callable[[], None]:
        slots = collections.deque(
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), chunks[0]) for _ in range(2)
        )
        turn = itertools.cycle(chunks)
        return lambda: slots.append(copy(recorder, slots.popleft(), next(turn)))

    small = jax.tree.map(lambda a: jax.device_put(np.zeros(1, a.dtype), a.sharding), host[0])
    start = nbytes / _speed(nbytes, copies([small])).wall
    speed = _speed(tree_bytes(host[0]), copies(host))
    return Speed(nbytes / max(nbytes / speed.wall - start, 1e-9), speed.cpu, start)


def _pin_speed(
    checkpoint: "Checkpoint", component: str, units: list[str], placement: "Placement"
) -> Speed:
    """Of reading units from the checkpoint to the device."""
    from zimage_jax.runtime.placement import DEVICE
    from zimage_jax.runtime.reader import read_units

    nbytes = checkpoint.storage.nbytes(component, *units)
    return _speed(nbytes, lambda: read_units(checkpoint, component, units, placement, DEVICE))


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
