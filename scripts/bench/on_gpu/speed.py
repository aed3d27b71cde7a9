"""What the device and its link achieve: attention alone, reading into page-locked memory, the rates
of a card."""

import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scripts.bench.on_gpu.models import folder_of
from zimage_jax.model.attention import Attend, attention
from zimage_jax.planning.cards import context_bytes
from zimage_jax.runtime.placement import HOST, Placement
from zimage_jax.runtime.rates import measure
from zimage_jax.runtime.reader import read_units
from zimage_jax.weights.checkpoint import Checkpoint

MIB = 2**20


# -- attention -------------------------------------------------------------------------------------


def attention_of(name: str, placement: Placement) -> Callable:
    """Raises UsageError in the call where this device cannot compute it so."""
    attend = Attend(name, placement.target)
    return lambda q, k, v, lengths: attention(q, k, v, lengths=lengths, attend=attend)


def queries(tokens: int, heads: int, width: int) -> list[jax.Array]:
    """q, k and v of one picture in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, tokens, heads, width), jnp.bfloat16) for key in keys]


def attention_alone(cell: dict) -> dict:
    """Milliseconds of one call, the median of five runs of calls given at once."""
    placement = Placement.on()
    arrays = queries(cell["tokens"], cell["heads"], cell["width"])
    lengths = jnp.full(1, cell["tokens"] - 7, jnp.int32)
    call = jax.jit(attention_of(cell["attention"], placement))
    out = jax.block_until_ready(call(*arrays, lengths))
    began = time.perf_counter()
    jax.block_until_ready(call(*arrays, lengths))
    at_once = max(1, min(50, int(0.1 / (time.perf_counter() - began))))
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([call(*arrays, lengths) for _ in range(at_once)])
        spent.append((time.perf_counter() - began) / at_once)
    exact = jax.jit(attention_of("chunks", placement))(*arrays, lengths)
    error = np.linalg.norm(np.asarray(out - exact, np.float32))
    return {
        "milliseconds": round(1e3 * statistics.median(spent), 4),
        "off_chunks": float(f"{error / np.linalg.norm(np.asarray(exact, np.float32)):.2g}"),
        "is_finite": bool(np.isfinite(np.asarray(out, np.float32)).all()),
    }


# -- reading ---------------------------------------------------------------------------------------


def _blocks(cell: dict) -> tuple[Checkpoint, list[str]]:
    """As many of the transformer's blocks as have `nbytes`."""
    checkpoint = Checkpoint(folder_of(cell))
    units = [unit for unit in checkpoint.units("transformer") if unit.startswith("layers.")]
    block = checkpoint.storage.nbytes("transformer", units[0])
    return checkpoint, units[: math.ceil(cell["nbytes"] / block)]


def reading(cell: dict) -> dict:
    """Files of blocks into page-locked memory by `threads`: through one buffer of each thread, used
    again, or through new memory for every file."""
    placement, (checkpoint, units) = Placement.on(), _blocks(cell)
    files = [checkpoint.path / "transformer" / f"{unit}.safetensors" for unit in units]
    largest, local = max(file.stat().st_size for file in files), {}

    def read(thread: int, file: Path) -> jax.Array:
        if not cell["reuses"]:
            buffer = np.empty(largest, np.uint8)
        else:
            buffer = local.setdefault(thread, np.empty(largest, np.uint8))
        with file.open("rb") as opened:
            length = opened.readinto(buffer)
        return placement.put(buffer[:length], HOST)

    began = time.perf_counter()
    with ThreadPoolExecutor(cell["threads"]) as pool:
        lanes = [
            pool.submit(lambda t: [read(t, f) for f in files[t :: cell["threads"]]], thread)
            for thread in range(cell["threads"])
        ]
        held = [lane.result() for lane in lanes]
    seconds = time.perf_counter() - began
    nbytes = sum(array.nbytes for array in itertools.chain.from_iterable(held))
    return {"nbytes": nbytes, "seconds": round(seconds, 3), "bytes_per_sec": nbytes / seconds}


def reading_units(cell: dict) -> dict:
    """The same as jobs read."""
    checkpoint, units = _blocks(cell)
    began = time.perf_counter()
    read_units(checkpoint, "transformer", units, Placement.on(), HOST)
    seconds, nbytes = time.perf_counter() - began, checkpoint.storage.nbytes("transformer", *units)
    return {"nbytes": nbytes, "seconds": round(seconds, 3), "bytes_per_sec": nbytes / seconds}


# -- rates -----------------------------------------------------------------------------------------


def rates(cell: dict) -> dict:
    """What planning.cards.MeasuredCard holds of a device, but for what reads files."""
    before = _used_bytes()
    placement = Placement.on()
    found = measure(placement, cell["dtype"])
    stats = placement.device.memory_stats() or {}
    capability = placement.target.capability or tuple(cell["capability"])
    taken, memory = _used_bytes(), _total_bytes()
    context = None
    if before is not None and taken is not None and "pool_bytes" in stats:
        context = taken - before - stats["pool_bytes"]
    elif cell.get("is_dry"):
        context, memory = context_bytes(capability), cell["memory_bytes"]
    add = jax.jit(lambda x: x + 1)
    x = jax.block_until_ready(add(jnp.zeros((), jnp.float32)))
    spent = []
    for _ in range(100):
        began = time.perf_counter()
        jax.block_until_ready(add(x))
        spent.append(time.perf_counter() - began)
    return {
        "device": placement.device.device_kind,
        "capability": list(capability),
        "memory_bytes": memory,
        "context_bytes": context,
        "flops": found.flops,
        "link": found.link,
        "dispatch_seconds": statistics.median(spent),
    }


def _nvidia(field: str) -> int | None:
    """MiB of the first GPU, as bytes; None where there is none."""
    words = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return int(float(told.splitlines()[0]) * MIB)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def _used_bytes() -> int | None:
    return _nvidia("memory.used")


def _total_bytes() -> int | None:
    return _nvidia("memory.total")


WAYS = {
    "attention": attention_alone,
    "reading": reading,
    "reading units": reading_units,
    "rates": rates,
}
