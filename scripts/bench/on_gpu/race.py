"""First runs of attention beside threads that place arrays.

A program with cuDNN's attention captures the compute stream when it is first run, and a placement
records its events on that stream (Placement's docstring): what comes of both at once, and whether
the gate prevents it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scripts.bench.on_gpu.speed import attention_of, queries
from zimage_jax.runtime.placement import Placement

CHECKED = 8  # one of so many placed arrays is read back and compared


def race(cell: dict) -> dict:
    """`first_runs` programs, each of another number of tokens, beside `threads` that place arrays of
    `nbytes`; under the gate where `gated`. A program's first result is compared with its second."""
    placement, began = Placement.on(), time.perf_counter()
    stop, copies = threading.Event(), Copies(cell["nbytes"])
    place = placement.put if cell["gated"] else _ungated(placement)
    with ThreadPoolExecutor(cell["threads"]) as pool:
        placing = [pool.submit(copies.run, place, stop) for _ in range(cell["threads"])]
        try:
            wrong = [_first_run(cell, 32 * (4 + k), placement) for k in range(cell["first_runs"])]
        finally:
            stop.set()
        for thread in placing:
            thread.result()
    return {
        "first_runs": len(wrong),
        "wrong_first_runs": sum(wrong),
        "copies": copies.made,
        "wrong_copies": copies.wrong,
        "captures": _captures(cell.get("log")),
        "seconds": round(time.perf_counter() - began, 2),
    }


class Copies:
    def __init__(self, nbytes: int):
        self._host = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        self._lock, self.made, self.wrong = threading.Lock(), 0, 0

    def run(self, place: Callable, stop: threading.Event) -> None:
        own = self._host.copy()
        while not stop.is_set():
            placed = place(own)
            with self._lock:
                self.made += 1
                checked = self.made % CHECKED == 0
            if checked and not np.array_equal(np.asarray(placed), self._host):
                with self._lock:
                    self.wrong += 1


def _ungated(placement: Placement) -> Callable:
    return lambda array: jax.block_until_ready(jax.device_put(array, placement.sharding()))


def _first_run(cell: dict, tokens: int, placement: Placement) -> bool:
    """Whether the first result differs from the second."""
    arrays = jax.block_until_ready(queries(tokens, cell["heads"], cell["width"]))
    lengths = jax.block_until_ready(jnp.full(1, tokens - 7, jnp.int32))
    compiled = jax.jit(attention_of(cell["attention"], placement)).lower(*arrays, lengths).compile()
    with placement.gate.alone() if cell["gated"] else nullcontext():
        first = jax.block_until_ready(compiled(*arrays, lengths))
    return not np.array_equal(np.asarray(first), np.asarray(compiled(*arrays, lengths)))


def _captures(log: str | None) -> int | None:
    """How often cuDNN's frontend says that it captured a stream; None where it wrote no log."""
    file = Path(log) if log else None
    if file is None or not file.exists():
        return None
    return file.read_text("utf-8", "replace").count("BEGIN FAKE GRAPH CAPTURE")


WAYS = {"race": race}
