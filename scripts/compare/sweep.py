"""A sweep as data: the cells that a TOML file declares, and the rows they left in a JSONL file.
Touches no device.

Each table of the file, [[measure]] for one, is a set of cells: the product of its values that are
lists. [defaults] holds for all tables that know the key. A cell is a flat dict with its kind and
what was declared, and nothing that was not."""

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

from zimage_jax.errors import UsageError

_JOB = {"model", "size", "steps", "schedule", "chunks", "resident_chunks"}
_PICTURE = {
    "model",
    "size",
    "steps",
    "prompt",
    "seed",
    "batch",
    "guidance",
    "dtype",
    "kv",
}  # what one depends on
KINDS = {
    # a job on this machine, in a process of its own
    "measure": _JOB
    | {
        "prompt",
        "seed",
        "batch",
        "guidance",
        "repeats",
        "dtype",
        "max_vram_mib",
        "text_encoder",
        "host_memory_mib",
        "vae_tile",
        "kv",
    },
    # the same for a card that is not there, by the planner; model: a name in config.PRESETS
    "simulate": _JOB | {"card", "batch", "max_vram_gib", "kv"},
    # another program, or ours, with the same random weights
    "rival": {"system", "mode", "size", "steps", "repeats"},
    # a program as its user starts it, with the full-size model; model: a folder that
    # scripts/bench/convert.py --keep left
    "program": {
        "model",
        "system",
        "mode",
        "size",
        "steps",
        "prompt",
        "seed",
        "max_vram_mib",
        "repeats",
    },
    # process start to the first picture, by part
    "cold": {"model", "cache", "repeats", "prompt"},
    # disk to pinned host memory
    "loading": {"blocks"},
}


def cells(file: Path, model: str | None = None) -> list[dict]:
    """The cells a TOML file declares, each once, a job's resident schedule before its others.

    `model` takes the place of the model of jobs on this machine. Raises UsageError for a file that
    cannot be read, an unknown table or key."""
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise UsageError(f"{file}: cannot be read as TOML ({fault})") from None
    defaults = tables.pop("defaults", {})
    if unknown := sorted(
        (tables.keys() - KINDS) | (defaults.keys() - set().union(*KINDS.values()))
    ):
        raise UsageError(
            f"{file}: unknown: {', '.join(unknown)}; expected tables {', '.join(KINDS)} and their keys"
        )
    found: dict[str, dict] = {}
    for kind, blocks in tables.items():
        if not isinstance(blocks, list):
            raise UsageError(f"{file}: [{kind}] is one table, expected a list of them: [[{kind}]]")
        for block in blocks:
            if unknown := sorted(block.keys() - KINDS[kind]):
                raise UsageError(
                    f"{file}: [[{kind}]] has no {', '.join(unknown)}; it takes {', '.join(sorted(KINDS[kind]))}"
                )
            values = {key: value for key, value in defaults.items() if key in KINDS[kind]} | block
            if model is not None and kind in ("measure", "program", "cold"):
                values["model"] = model
            found |= {identity(cell): cell for cell in _product(kind, values)}
    return list(found.values())


def _product(kind: str, values: dict) -> Iterator[dict]:
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    for chosen in itertools.product(*lists):
        yield {"kind": kind} | dict(zip(values, chosen, strict=True))


def identity(cell: dict) -> str:
    """The same for the same declaration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def job(cell: dict) -> str:
    """The same for cells whose pictures are the same, however they are made."""
    return identity({key: value for key, value in cell.items() if key in _PICTURE})


def rows(file: Path) -> list[dict]:
    """The rows of a results file; a last line that was cut off by an interruption is left out.

    Raises UsageError for another line that is not a row.
    """
    try:
        lines = file.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"{file}: cannot be read ({fault})") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["cell"], row["kind"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UsageError(
                f"{file}, line {number}: not a row that scripts/compare/schedules.py wrote"
            ) from None
        found.append(row)
    return found


def pixels(size: str) -> tuple[int, int]:
    """Width and height of "128x96". Raises UsageError for anything else."""
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise UsageError(f"size {size!r}: expected WIDTHxHEIGHT in pixels")
    return int(width), int(height)
