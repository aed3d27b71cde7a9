"""The full-size model, random weights, from prompt to PNG on this machine: each schedule in a
process of its own.

    python -m scripts.bench.full_size FOLDER [--size 256x256] [--steps 8] [--preset turbo]

Writes a bf16 checkpoint of 20.3 GB into FOLDER once. On a CPU parameters and their float32 casts
share the host's memory, so chunks are single blocks. One JSON line per run: seconds by stage, peaks
of the ledger and of the process."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from scripts.bench.convert import peak_memory, sync
from zimage_jax.dtypes import DTYPES
from zimage_jax.model.config import PRESETS, ModelConfig
from zimage_jax.weights.components import COMPONENTS, units
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import Writer

TOKENIZER = Path(__file__).parent.parent.parent / "zimage_jax/assets/tiny/tokenizer.json"
RUNS = {
    "ring from host memory": ["--schedule", "ring", "--chunks", "30"],
    "ring from disk, 4 GiB window": ["--schedule", "ring", "--chunks", "30", "--host-memory", "4"],
    "ring, K and V for two NFEs": ["--schedule", "ring", "--chunks", "30", "--kv-reuse", "2"],
    "low vram": ["--low-vram"],
}


def write_random(folder: Path, config: ModelConfig) -> None:
    """Kernels of variance 1 / fan-in from one pool of numbers, norms at one, biases at zero."""
    pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32)

    @cache
    def scaled(factor: float) -> np.ndarray:
        return (pool * np.float32(factor)).astype(DTYPES["bfloat16"])

    def values(path: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        if path.endswith((".scale", ".bias")):
            yield np.full(shape, path.endswith(".scale"), DTYPES["bfloat16"])
            return
        numbers = scaled(1 / math.sqrt(math.prod(shape[:-1])) if path.endswith(".kernel") else 1)
        left = math.prod(shape)
        while left:
            yield numbers[:left]
            left -= min(left, numbers.size)

    def write(writer: Writer, component: str, unit: str) -> None:
        if not writer.done(component, unit):
            pieces = (
                (path, values(path, leaf.shape))
                for path, leaf in units(config, component)[unit].items()
            )
            writer.write(component, unit, pieces)

    todo = [(component, unit) for component in COMPONENTS for unit in units(config, component)]
    with Writer(folder, uniform(config, "bfloat16")) as writer:
        with ThreadPoolExecutor() as threads, tqdm(total=len(todo), unit="unit") as bar:
            for _ in threads.map(lambda of: write(writer, *of), todo):
                bar.update()
        writer.finish(
            TOKENIZER.read_bytes(), {"made by": "scripts/bench/full_size.py", "weights": "random"}
        )


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="turbo", show_default=True)
@click.option("--size", default="256x256", show_default=True)
@click.option("--steps", default=8, show_default=True)
@click.option(
    "--run", "chosen", multiple=True, type=click.Choice(list(RUNS)), help="[default: all]"
)
@click.option("--write-only", is_flag=True, help="The checkpoint, and no run.")
def main(
    folder: Path, preset: str, size: str, steps: int, chosen: tuple[str, ...], write_only: bool
) -> None:
    model = folder / f"{preset}-random"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random(model, PRESETS[preset])
    for name in () if write_only else chosen or RUNS:
        sync()
        report = folder / "report.json"
        words = [
            "a lighthouse in fog",
            "--model",
            model,
            "--size",
            size,
            "--steps",
            steps,
            "--seed",
            1,
            *RUNS[name],
        ]
        command = [
            sys.executable,
            "-m",
            "zimage_jax.generate",
            *words,
            "-o",
            folder / "{seed}.png",
            "--report",
            report,
        ]
        process = subprocess.Popen([str(word) for word in command])
        peak = next(peak_memory(process))
        if process.returncode:
            raise click.ClickException(f"{name}: generate ended with code {process.returncode}")
        told = json.loads(report.read_text())
        keys = (
            "schedule",
            "chunks",
            "seconds",
            "predicted_peak_bytes",
            "peak_device_bytes",
            "copied_bytes",
            "copied_bytes_saved_by_reuse",
            "kv_bytes",
            "latents_sha256",
        )
        line = {"run": name, "size": size, "steps": steps} | {key: told[key] for key in keys}
        click.echo(
            json.dumps(
                line | {"process_peak_bytes": peak["resident"], "versions": told["versions"]}
            )
        )


if __name__ == "__main__":
    main()
