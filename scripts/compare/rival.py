"""One rival's cell of a sweep, in a process of its own, as scripts/compare/cell.py is for ours.
Needs the reference extra.

The small random model of scripts/bench/pytorch.py, float32, in diffusers' pipeline or in ours.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.bench import pytorch as bench_pytorch
from scripts.compare import sweep
from scripts.compare.jobs import PROMPT, SEED, process_peak_bytes

GROUP = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
# how diffusers is told; each but resident moves parameters to a GPU
MODES: dict[str, Callable[[Any], Any]] = {
    "resident": lambda pipe: pipe.to("cuda") if torch.cuda.is_available() else pipe,
    "compiled": lambda pipe: _compiled(pipe),
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group block": lambda pipe: pipe.enable_group_offload(
        offload_type="block_level", num_blocks_per_group=1, **GROUP
    ),
    "group block, stream": lambda pipe: pipe.enable_group_offload(
        offload_type="block_level", num_blocks_per_group=1, use_stream=True, **GROUP
    ),
    "group leaf": lambda pipe: pipe.enable_group_offload(offload_type="leaf_level", **GROUP),
    "group leaf, stream": lambda pipe: pipe.enable_group_offload(
        offload_type="leaf_level", use_stream=True, **GROUP
    ),
}
SYSTEMS = ("diffusers", "zimage_jax", "in turn")


def _compiled(pipe: Any) -> None:
    """Resident, with one compiled program for all blocks of the transformer, as diffusers advises."""
    MODES["resident"](pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


class Parts:
    """Seconds spent inside methods of a pipeline's models."""

    def __init__(self, **methods: tuple[Any, str]):
        self.seconds = dict.fromkeys(methods, 0.0)
        for name, (owner, method) in methods.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, call: Callable) -> Callable:
        def timed(*args, **words):
            began = time.perf_counter()
            try:
                return call(*args, **words)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed


def rival(cell: dict) -> dict:
    """Medians of `repeats` pictures after a warm-up. In turn: both in one process, so that whatever
    else the machine does falls on both, and where the time of each goes."""
    system, mode, steps = cell["system"], cell.get("mode", "resident"), cell.get("steps", 8)
    if system not in SYSTEMS or mode not in MODES:
        raise sweep.UsageError(
            f"{system}, {mode}: expected {', '.join(SYSTEMS)}, and for diffusers {', '.join(MODES)}"
        )
    width, height = sweep.pixels(cell["size"])
    words = {"width": width, "height": height}
    with tempfile.TemporaryDirectory() as folder:
        calls, stages = {}, {}
        if system != "zimage_jax":
            theirs = bench_pytorch.diffusers_pipeline()
            parts = Parts(
                text=(theirs.text_encoder, "forward"),
                denoise=(theirs.transformer, "forward"),
                decode=(theirs.vae, "decode"),
            )
            MODES[mode](theirs)

            def diffusers() -> None:
                noise = torch.Generator().manual_seed(SEED)
                theirs(
                    PROMPT, num_inference_steps=steps, guidance_scale=0.0, generator=noise, **words
                )

            calls["diffusers"], stages["diffusers"] = diffusers, lambda: dict(parts.seconds)
        if system != "diffusers":
            ours, ledgers = bench_pytorch.our_pipeline(Path(folder)), []
            calls["zimage_jax"] = lambda: ledgers.append(
                ours.generate(PROMPT, seed=SEED, steps=steps, **words).ledger
            )
            stages["zimage_jax"] = lambda: {
                s: sum(ledger.seconds[s] for ledger in ledgers)
                for s in ("text", "context", "denoise", "decode")
            }
        return _in_turn(calls, stages, cell.get("repeats", 7))


def _in_turn(calls: dict[str, Callable], stages: dict[str, Callable], repeats: int) -> dict:
    for call in calls.values():
        call()
    before = {name: stage() for name, stage in stages.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            busy, began = time.process_time(), time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - busy)
    each = {
        name: {
            "seconds": round(statistics.median(seconds[name]), 4),
            "seconds_of_repeats": [round(s, 4) for s in seconds[name]],
            "cpu_seconds": round(statistics.median(cpu[name]), 4),
            "seconds_by_stage": {
                s: round((v - before[name][s]) / repeats, 4) for s, v in stages[name]().items()
            },
        }
        for name in calls
    }
    row: dict = {"process_peak_bytes": process_peak_bytes(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        row["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    if len(each) == 1:
        return row | next(iter(each.values()))
    ours, theirs = each["zimage_jax"], each["diffusers"]
    return (
        row
        | each
        | {
            f"ratio_of_{key}": round(ours[key] / theirs[key], 3)
            for key in ("seconds", "cpu_seconds")
        }
    )


def answer(cell: dict) -> dict:
    try:
        return rival(cell)
    except sweep.UsageError as fault:
        return {"error": str(fault)}


@torch.no_grad()
def main() -> None:
    for cell in json.load(sys.stdin):
        print(json.dumps(answer(cell)), flush=True)


if __name__ == "__main__":
    main()
