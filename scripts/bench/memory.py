"""Does memory stay flat over many pictures? The tiny model, one process per schedule, a picture
after another.

    python -m scripts.bench.memory [--pictures 100] [--schedule ring] [--schedule resident]

After each picture: bytes the ledger still holds, the process's resident memory, live arrays. One
JSON line per schedule, of the first and the last fifth; `--each` prints every picture."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import click
import jax

from zimage_jax import Memory, ZImage
from zimage_jax.planning import schedule as schedules_of
from zimage_jax.units import tree_bytes


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def draw(schedule: str, pictures: int, side: int, each: bool) -> dict:
    """What was held after each picture, as the span of the first and the last fifth."""
    pipe = ZImage.load(memory=Memory(schedule=schedule))
    told: dict[str, list[int]] = {"ledger_bytes": [], "live_bytes": [], "process_bytes": []}
    for seed in range(pictures):
        result = pipe.generate(
            "a red circle above a blue square", seed=seed, width=side, height=side
        )
        held = sum(pipe.held.values())
        del result
        gc.collect()
        now = (held, tree_bytes(jax.live_arrays()), resident_bytes())
        for values, value in zip(told.values(), now, strict=True):
            values.append(value)
        if each:
            click.echo(
                f"{schedule} {seed}: "
                + ", ".join(f"{k} {v}" for k, v in zip(told, now, strict=True)),
                err=True,
            )
    fifth = -(-pictures // 5)
    spans = {"first": slice(fifth), "last": slice(-fifth, None)}
    return {"schedule": schedule, "pictures": pictures, "side_pixels": side} | {
        f"{name}_{key}": [min(values[span]), max(values[span])]
        for key, values in told.items()
        for name, span in spans.items()
    }


@click.command(help=__doc__)
@click.option("--pictures", type=click.IntRange(1), default=100, show_default=True)
@click.option("--side", default=128, show_default=True, help="Pixels.")
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    type=click.Choice(schedules_of.names()),
    default=("ring", "resident"),
)
@click.option("--each", is_flag=True, help="A line per picture on standard error.")
def main(pictures: int, side: int, schedules: tuple[str, ...], each: bool) -> None:
    if len(schedules) == 1:
        click.echo(json.dumps(draw(schedules[0], pictures, side, each)))
        return
    words = ["--pictures", str(pictures), "--side", str(side), *(["--each"] if each else [])]
    for schedule in schedules:
        subprocess.run(
            [sys.executable, "-m", "scripts.bench.memory", *words, "--schedule", schedule],
            check=True,
        )


if __name__ == "__main__":
    main()
