"""The sweep of schedules under caps at full size, and rivals on the same card; OUTPUT/RESULTS.jsonl.

    scripts/bench/gpu sweep OUTPUT [--minutes 10] [--earlier RESULTS.jsonl]

scripts/compare/sweeps/gpu.toml, then gpu_rivals.toml: diffusers where it is installed. Cells that an
earlier run did are left as they are.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from scripts.bench.convert import SINGLE_FILES, write_sources
from scripts.bench.on_gpu.models import CONFIGS, folder_of, write
from scripts.compare import schedules
from zimage_jax import cli
from zimage_jax.errors import UsageError
from zimage_jax.model.config import ModelConfig

SHARE = 0.6  # of the minutes, for our own sweep


def prepare(folder: Path, model: str) -> tuple[Path, Path]:
    """Our checkpoint, and the folder of whole programs: ours as `native`, and, for diffusers where it
    is installed, `sources` of the same shapes."""
    cell = {"model": model, "folder": str(folder)}
    native, programs = folder_of(cell), folder / f"{model}-programs"
    if model in CONFIGS:
        click.echo(json.dumps({"wrote": str(native), **write(cell)}), err=True)
    programs.mkdir(parents=True, exist_ok=True)
    if not (programs / "native").exists():
        (programs / "native").symlink_to(native)
    if importlib.util.find_spec("diffusers") and not (programs / "sources").exists():
        write_sources(programs / "sources", _config(native), SINGLE_FILES)
    return native, programs


def _config(native: Path) -> ModelConfig:
    from zimage_jax.weights.checkpoint import Checkpoint

    return Checkpoint(native).config


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(min=0))
@click.option(
    "--earlier", type=click.Path(path_type=Path, exists=True), help="Results of a run before."
)
@click.option(
    "--folder",
    default="/dev/shm",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where random models are written: 41 GB with diffusers.",
)
@click.option("--dry", is_flag=True, help="On this machine's CPU with the tiny model.")
def main(output: Path, minutes: float, earlier: Path | None, folder: Path, dry: bool) -> None:
    end = time.monotonic() + 60 * minutes
    if not dry and "gpu" not in schedules.machine():
        raise UsageError("no NVIDIA GPU: nvidia-smi found none (--dry runs on a CPU)")
    output.mkdir(parents=True, exist_ok=True)
    results = output / "RESULTS.jsonl"
    if earlier is not None and not results.exists():
        shutil.copy(earlier, results)
    native, programs = prepare(folder, "tiny" if dry else "full")
    sweeps = {"gpu_dry.toml": None} if dry else {"gpu.toml": native, "gpu_rivals.toml": programs}
    for number, (name, model) in enumerate(sweeps.items()):
        left = max(0.0, end - time.monotonic()) / 60
        part = left if number else left * SHARE
        words = ["--model", str(model or programs)]
        words += ["-o", str(results), "--minutes", f"{part:.2f}"]
        file = str(schedules.SWEEPS / name)
        command = [sys.executable, "-m", "scripts.compare.schedules", file, *words]
        subprocess.run(command, check=True)
    if not importlib.util.find_spec("matplotlib"):
        click.echo(f"{results}: no report, for matplotlib is not installed", err=True)
        return
    report = [sys.executable, "-m", "scripts.report.report", str(results), "-o", str(output)]
    subprocess.run(report, check=True)


if __name__ == "__main__":
    cli.run(main, prog="scripts/bench/gpu sweep")
