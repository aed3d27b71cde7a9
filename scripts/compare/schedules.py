"""Every memory schedule on the same work: what was predicted beside what was measured, a JSON line
per cell.

    python -m scripts.compare.schedules -o RESULTS.jsonl [SWEEP.toml] [--quick] [--model FOLDER] [--only KIND]

A sweep (scripts/compare/sweeps/default.toml) declares cells; each runs in a process of its own, and
a second run does those that are missing. On a machine with an NVIDIA GPU a cell's budget also caps
the allocator of its process. A job that cannot be done is a row too, with its error.
scripts/report/report.py draws the rows."""

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
from tqdm import tqdm

from scripts.compare import sweep
from scripts.compare.worker import answers
from zimage_jax import cli

HERE = Path(__file__).resolve().parent
SWEEPS = HERE / "sweeps"
MIB = 2**20


def machine() -> dict:
    """What the cells run on."""
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": fields.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }
    gpu = _nvidia("name,memory.total,driver_version")
    if gpu:
        name, mib, driver = gpu
        found |= {"gpu": name, "gpu_memory_bytes": int(mib) * MIB, "driver": driver}
    return found


def _nvidia(query: str) -> list[str] | None:
    """Properties of the first GPU; None where there is none."""
    try:
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(
            words, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return [value.strip() for value in lines[0].split(",")] if lines else None


def commit() -> str:
    """The commit of this checkout, with a mark when files differ from it."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "no git here"
    return told or "not a git checkout"


def outcomes(cells: list[dict], gpu_bytes: int | None) -> Iterator[dict]:
    """What came of each cell, one after the other. Simulated ones, for which nothing runs, share a
    process, and so do jobs on a GPU under one cap, for reading the full-size model takes longer
    than a picture."""

    def process(cell: dict) -> tuple:
        if cell["kind"] == "simulate" or (cell["kind"] == "measure" and gpu_bytes):
            return cell["kind"], cell.get("model"), cell.get("max_vram_mib")
        return (sweep.identity(cell),)

    for _, group in itertools.groupby(cells, process):
        together = list(group)
        if together[0]["kind"] in ("simulate", "measure"):
            yield from answers("scripts.compare.cell", together, **_cap(together[0], gpu_bytes))
        else:
            yield _outcome(together[0], gpu_bytes)


def _cap(cell: dict, gpu_bytes: int | None) -> dict[str, str]:
    """Environment that caps the allocator of a cell's process."""
    if not (gpu_bytes and "max_vram_mib" in cell):
        return {}
    return {"XLA_CLIENT_MEM_FRACTION": f"{cell['max_vram_mib'] * MIB / gpu_bytes:.6f}"}


def _outcome(cell: dict, gpu_bytes: int | None) -> dict:
    if cell["kind"] == "loading":
        return _one("scripts.bench.checkpoint", cell, "--blocks", str(cell["blocks"]))
    if cell["kind"] == "rival":
        if not gpu_bytes and cell.get("mode", "resident") != "resident":
            return {"not_measured": "needs an NVIDIA GPU"}
        return _one("scripts.compare.rival", cell)
    if cell["kind"] == "program":
        return _one("scripts.compare.program", cell, **_cap(cell, gpu_bytes))
    words = {}
    if cell["cache"] == "off":
        words["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        _one("scripts.compare.cell", cell, **words)  # fills the cache
    return _median_start(
        [_one("scripts.compare.cell", cell, **words) for _ in range(cell.get("repeats", 3))]
    )


def _one(module: str, cell: dict, *words: str, **environment: str) -> dict:
    """The answer to a cell that has a process of its own."""
    (answer,) = answers(module, [cell], *words, **environment)
    return answer


def _median_start(starts: list[dict]) -> dict:
    if failed := [start for start in starts if "error" in start]:
        return failed[0]

    def median(key: str) -> dict:
        return {
            part: round(statistics.median(s[key][part] for s in starts), 3)
            for part in starts[0][key]
        }

    return starts[0] | {
        "seconds": round(statistics.median(start["seconds"] for start in starts), 3),
        "seconds_of_repeats": [start["seconds"] for start in starts],
        "seconds_by_part": median("seconds_by_part"),
        "cpu_seconds_by_part": median("cpu_seconds_by_part"),
    }


def declared(cell: dict) -> dict:
    """A cell's declaration as a row has it."""
    row = {key: value for key, value in cell.items() if key != "size"}
    if "size" in cell:
        row["width"], row["height"] = sweep.pixels(cell["size"])
    if "model" in cell:
        row["model"] = Path(cell["model"]).name
    if "max_vram_mib" in cell:
        row["budget_bytes"] = int(cell["max_vram_mib"] * MIB)
    return row


def _compare_with_resident(row: dict, before: list[dict]) -> None:
    """A picture whose resident run another process made, as where the allocator is capped: the same
    bits, or not."""
    if "latents_sha256" in row and "identical_latents" not in row:
        others = [
            r for r in before if r.get("job") == row["job"] and r.get("schedule") == "resident"
        ]
        if others:
            row["identical_latents"] = row["latents_sha256"] == others[0]["latents_sha256"]
            row["psnr_db"] = "inf" if row["identical_latents"] else row["psnr_db"]


@click.command(help=__doc__)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSONL, added to.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="scripts/compare/sweeps/quick.toml: under two minutes on a CPU, the tiny model.",
)
@click.option(
    "--model",
    help="Folder of a checkpoint, in place of the sweep's model for jobs on this machine.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(sweep.KINDS)),
    help="Cells of this kind; may be repeated.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    help="Begin no cell after so many; a later run goes on.  [default: no end]",
)
def main(
    file: Path | None,
    output: Path,
    quick: bool,
    model: str | None,
    only: tuple[str, ...],
    minutes: float | None,
) -> None:
    if file and quick:
        raise click.UsageError("--quick is a sweep of its own: give it or a file")
    cells = sweep.cells(file or SWEEPS / ("quick.toml" if quick else "default.toml"), model)
    before = sweep.rows(output) if output.exists() else []
    done = {row["cell"] for row in before}
    todo = [c for c in cells if (not only or c["kind"] in only) and sweep.identity(c) not in done]
    shared = {"machine": machine(), "commit": commit()}
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    failed = ran = 0
    with (
        output.open("a", encoding="utf-8") as lines,
        tqdm(todo, unit="cell", desc="compare") as bar,
    ):
        results = outcomes(todo, shared["machine"].get("gpu_memory_bytes"))
        for cell in bar:
            if time.monotonic() >= end:
                break
            ran += 1
            bar.set_postfix_str(" ".join(str(value) for value in cell.values())[:60])
            began, load = time.monotonic(), os.getloadavg()[0]
            row = {
                "cell": sweep.identity(cell),
                "job": sweep.job(cell),
                **declared(cell),
                **next(results),
            }
            _compare_with_resident(row, before)
            before.append(row)
            row |= {
                "success": "error" not in row and "not_measured" not in row,
                "load_average": round(load, 1),
            }
            row |= {"cell_seconds": round(time.monotonic() - began, 1), **shared}
            row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            failed += "error" in row
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
    click.echo(
        f"{output}: {ran} cells done, {failed} of them with an error; {len(cells) - len(todo)} left as they were; "
        f"{len(todo) - ran} not begun in time"
    )


if __name__ == "__main__":
    cli.run(main, prog="scripts/compare/schedules.py")
