"""What several processes cost on the tiny model: milliseconds of a picture by each way to a process, and host memory.

JAX_PLATFORMS=cpu python -m scripts.bench.cluster overhead|memory
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from zimage_jax import Memory, ZImageCluster, ZImagePool, ZImageProcess

JOB = {"prompt": "a star", "width": 32, "height": 32, "steps": 1}


@click.group()
def main() -> None:
    """Each command prints a table."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def seconds(engine: Any, count: int) -> float:
    """Seconds of a picture of JOB, of `count` that are submitted at once."""
    began = time.perf_counter()
    requests = [engine.submit(**JOB, seed=seed) for seed in range(count)]
    for request in requests:
        request.result()
    return (time.perf_counter() - began) / count


@main.command()
@click.option("--count", default=100, show_default=True, help="Pictures of a run.")
@click.option("--runs", default=3, show_default=True, help="Runs, of which the fastest counts.")
def overhead(count: int, runs: int) -> None:
    """Milliseconds of a picture of 32x32 and one step, in one process each."""
    ways: dict[str, Callable[[], Any]] = {
        "ZImageProcess": ZImageProcess,
        "ZImagePool, one device": lambda: ZImagePool(devices=(0,)),
        "ZImageCluster, local": lambda: ZImageCluster("local"),
    }
    click.echo("| way | ms per picture | start, s |\n|---|---|---|")
    for name, start in ways.items():
        began = time.perf_counter()
        with start() as engine:
            started = time.perf_counter() - began
            seconds(engine, 10)
            best = min(seconds(engine, count) for _ in range(runs))
        click.echo(f"| {name} | {1000 * best:.1f} | {started:.1f} |")


@main.command()
def memory() -> None:
    """MiB of host memory that processes have for themselves after a picture, under `ring`."""
    click.echo(
        "| processes | window, MiB | their own, MiB | weights kept, MiB |\n|---|---|---|---|"
    )
    for window in (None, 4 << 20):
        for count in (1, 2):
            options = Memory(schedule="ring", host_bytes=window)
            with ZImagePool(devices=range(count), memory=options) as pool:
                for process in pool.processes:
                    process.submit(**JOB, seed=0).result()
                own = sum(anonymous_bytes(process.pid) for process in pool.processes)
                kept = pool.host_bytes
            given = "none" if window is None else window >> 20
            click.echo(f"| {count} | {given} | {own >> 20} | {kept / 2**20:.1f} |")


def anonymous_bytes(pid: int) -> int:
    """Bytes of a process that no other shares."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
