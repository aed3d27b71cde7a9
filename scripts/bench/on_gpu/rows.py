"""What is open on a GPU, answered in one command: a row per question in OUTPUT/ROWS.jsonl, the most
urgent first, each there as soon as it is known.

    scripts/bench/gpu rows OUTPUT [--minutes 10] [--earlier ROWS.jsonl] [--card-out mine.json]

scripts/bench/on_gpu/parts.py says what is asked. Rows of an earlier run count as done, and are copied
to the output. What does not fit into the minutes is a row that says so, and is asked again by the next
run. --card-out writes the measured card that `python -m zimage_jax.plan --card FILE` reads.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import click

from scripts.bench.on_gpu import parts
from scripts.bench.on_gpu.parts import DRY, Group, Scale
from scripts.compare import schedules
from scripts.compare.worker import answers
from zimage_jax import cli
from zimage_jax.errors import UsageError
from zimage_jax.planning.cards import MeasuredCard

WORKER = "scripts.bench.on_gpu.worker"
WRITING = 150  # seconds that the full-size model may take
LEAST = 15  # seconds: no group is begun with less
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "flax",
    "diffusers",
    "torch",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def is_done(row: dict) -> bool:
    """An error is an answer; what was not begun is none."""
    return "skipped" not in row


class Rows:
    """The rows of a run by name, in its file as soon as they are known."""

    def __init__(self, file: Path, earlier: Iterable[Path], shared: dict):
        self._file, self._shared = file, shared
        known = [row for path in [*earlier, file] if path.exists() for row in read(path)]
        self.by_name = {row["row"]: row for row in known if is_done(row)}
        lines = [json.dumps(row, ensure_ascii=False) for row in self.by_name.values()]
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def add(self, cell: dict, answer: dict, seconds: float) -> None:
        row = {**cell, **answer, **self._shared, "spent_seconds": round(seconds, 1)}
        like = self.by_name.get(cell.get("like", ""), {})
        if "latents_sha256" in row and "latents_sha256" in like:
            row["identical_latents"] = row["latents_sha256"] == like["latents_sha256"]
        row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        if is_done(row):
            self.by_name[cell["row"]] = row
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        told = answer.get("error") or answer.get("skipped") or answer.get("not_measured") or "done"
        click.echo(f"{time.strftime('%X')} {cell['row']}: {told}", err=True)


def read(file: Path) -> list[dict]:
    """Raises UsageError for a line that is not a row; a last one that was cut off is left out."""
    found = []
    lines = file.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["row"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UsageError(f"{file}, line {number}: not a row of scripts/bench/gpu") from None
        found.append(row)
    return found


class Run:
    def __init__(self, rows: Rows, folder: Path, minutes: float, scratch: Path):
        self._rows, self._folder, self._scratch = rows, folder, scratch
        self._end, self._written = time.monotonic() + 60 * minutes, {"tiny"}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def group(self, group: Group) -> None:
        """Asks for what has no row yet."""
        todo = [cell for cell in group.cells if cell["row"] not in self._rows.by_name]
        if not todo:
            return
        if self.left >= LEAST and self._write(group.model):
            self._ask(todo, min(group.seconds, self.left), group.environment)
        known = self._rows.by_name
        for cell in todo:
            if cell["row"] not in known:
                self._rows.add(cell, {"skipped": f"no time: {max(0, self.left):.0f} s left"}, 0.0)

    def _write(self, model: str | None) -> bool:
        """Whether the model that a group needs is there now."""
        if model is None or model in self._written:
            return True
        name = f"write/{model}, {datetime.now(UTC):%FT%T}"  # a row of this run, whatever earlier ones did
        cell = {"row": name, "do": "write", "model": model}
        self._ask([cell], min(WRITING, self.left), {})
        if "error" in self._rows.by_name[name]:
            return False
        self._written.add(model)
        return True

    def _ask(self, todo: list[dict], seconds: float, environment: dict[str, str]) -> None:
        cells = [cell | {"folder": str(self._folder)} for cell in todo]
        # programs compiled by one process serve the next
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._scratch / "xla"))
        shared = {"JAX_COMPILATION_CACHE_DIR": cache}
        shared["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        began = time.monotonic()
        found = answers(WORKER, cells, seconds=seconds, **shared, **environment)
        for cell, answer in zip(todo, found, strict=False):
            self._rows.add(cell, answer, time.monotonic() - began)
            began = time.monotonic()


def merged(groups: Iterable[Group]) -> Group:
    """Of a dry run: a process on a CPU takes longer to start than to answer."""
    return Group(list(itertools.chain.from_iterable(group.cells for group in groups)), 600)


def card_of(rows: dict[str, dict], name: str, command: str) -> MeasuredCard:
    """The card that was measured. Raises UsageError where rows are missing."""
    device, reading = rows.get("rates/device", {}), rows.get("reading/as jobs do", {})
    if "flops" not in device or device.get("context_bytes") is None:
        raise UsageError("--card-out needs the row rates/device, which this run did not get")
    return MeasuredCard(
        name=name,
        device=device["device"],
        capability=(device["capability"][0], device["capability"][1]),
        memory=device["memory_bytes"],
        context_bytes=device["context_bytes"],
        flops=device["flops"],
        link=device["link"],
        disk=None,
        host_read=reading.get("bytes_per_sec"),
        dispatch_seconds=device["dispatch_seconds"],
        date=device["date"][:10],
        by=command[:200],
        versions=device["versions"] | {"driver": device["machine"].get("driver", "none")},
    )


def shared_by_all(command: str) -> dict:
    """What every row says of where it comes from."""
    return {
        "machine": schedules.machine(),
        "versions": versions(),
        "commit": schedules.commit(),
        "command": command,
    }


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(min=0))
@click.option(
    "--earlier",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Rows of a run before.",
)
@click.option("--card-out", type=click.Path(path_type=Path), help="The measured card, as JSON.")
@click.option(
    "--folder",
    default="/dev/shm",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where random models are written: 23 GB.",
)
@click.option("--dry", is_flag=True, help="On this machine's CPU with the tiny model: seconds.")
def main(
    output: Path,
    minutes: float,
    earlier: tuple[Path, ...],
    card_out: Path | None,
    folder: Path,
    dry: bool,
) -> None:
    command = shlex.join(["scripts/bench/gpu", "rows", *sys.argv[1:]])
    output.mkdir(parents=True, exist_ok=True)
    shared, scale = shared_by_all(command), DRY if dry else Scale()
    gpu_bytes = None if dry else shared["machine"].get("gpu_memory_bytes")
    if not dry and gpu_bytes is None:
        raise UsageError("no NVIDIA GPU: nvidia-smi found none (--dry runs on a CPU)")
    rows = Rows(output / "ROWS.jsonl", earlier, shared)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(rows, Path(scratch) if dry else folder, minutes, Path(scratch))
        if dry:  # one process for all that need no model written
            every_group = parts.groups(scale, rows.by_name, gpu_bytes)
            run.group(merged(g for g in every_group if g.model in (None, scale.full)))
        for group in parts.groups(scale, rows.by_name, gpu_bytes):
            run.group(group)
    if card_out is not None:
        name = rows.by_name.get("rates/device", {}).get("device", "card")
        card = card_of(rows.by_name, name, command)
        card_out.write_text(json.dumps(card.as_json(), indent=1) + "\n", "utf-8")
    every = read(output / "ROWS.jsonl")
    skipped = {row["row"] for row in every if not is_done(row)} - rows.by_name.keys()
    failed = sum("error" in row for row in rows.by_name.values())
    click.echo(
        f"{output / 'ROWS.jsonl'}: {len(rows.by_name)} rows, {failed} with an error; {len(skipped)} had no time"
    )


if __name__ == "__main__":
    cli.run(main, prog="scripts/bench/gpu rows")
