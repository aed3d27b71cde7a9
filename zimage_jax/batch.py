"""python -m zimage_jax.batch JOBS -o FOLDER: draw each job once, however often it is stopped."""

from . import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the imports below, which take a third of a second

import hashlib
import inspect
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
from tqdm import tqdm

from . import cli, options
from .errors import OutputError, UsageError, ZImageError
from .files import open_regular, parse_json, printable
from .options import FILE
from .talk import Talk

LONGEST_LINE = 256 << 10  # bytes
MOST_JOBS = 1_000_000
RESULTS = "results.jsonl"
_PATHS = ("image", "mask")  # relative to the folder of JOBS


@click.command()
@click.argument("jobs", type=FILE)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the pictures, named by line, and for results.jsonl. A second run goes on.",
)
@options.MODEL
@options.DTYPE
@options.memory_options
@click.option("--strict", is_flag=True, help="Draw nothing if any line is no job.")
@click.option("--no-metadata", is_flag=True, help="Do not write prompt and settings into the PNGs.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print each line of results.jsonl as well.")
def command(
    jobs, output, model, dtype, strict, no_metadata, quiet, as_json, **memory_flags
) -> None:
    """Draw the jobs of a file: one picture per line.

    JOBS is JSON lines (.jsonl), whose keys are the arguments of ZImage.generate, as in {"prompt":
    "a red circle", "seed": 7}, or text with a prompt per line. A line that is no job, or cannot be
    drawn, is reported with its number, and the others are drawn.
    """
    lines = list(read(jobs))
    for line in lines:
        if line.fault:
            click.echo(f"error: {printable(jobs)}: {line.fault}", err=True)
    failed = sum(bool(line.fault) for line in lines)
    if failed and strict:
        raise UsageError(f"{failed} of {len(lines)} lines are no jobs: nothing is drawn")
    with Results.open(output) as results:
        todo = [line for line in lines if not line.fault and not results.has(line)]
        talk = Talk(quiet or as_json, is_tiny=model is None)
        with talk.warnings():
            cli.start_jax()
            from .pipeline.pipeline import ZImage

            memory = options.memory_of(**memory_flags)
            pipe = ZImage.load(model, dtype=dtype, memory=memory)
            talk.start(pipe, memory)
            done = len(lines) - failed - len(todo)
            with _bar(len(todo), done, silent=quiet or as_json) as bar:
                for line in todo:
                    fault = _draw(pipe, line, results, metadata=not no_metadata, as_json=as_json)
                    if fault is not None:
                        failed += 1
                        with bar.external_write_mode():
                            click.echo(f"error: {printable(jobs)}: {fault}", err=True)
                    bar.update()
    if failed:
        raise click.ClickException(f"{failed} of {len(lines)} jobs were not drawn")


def _bar(count: int, done: int, *, silent: bool) -> tqdm:
    hidden = silent or not sys.stderr.isatty()
    if done and not silent:
        click.echo(f"{done} pictures are drawn already", err=True)
    return tqdm(total=count, unit="picture", desc="batch", disable=hidden)


def _draw(pipe, line: "Line", results: "Results", *, metadata: bool, as_json: bool) -> str | None:
    """Draw a job and record it. Returns what is wrong with a job that cannot be drawn."""
    interrupts.check()
    try:
        began = time.perf_counter()
        result = pipe.generate(**line.arguments(), on_step=lambda _: interrupts.check())
    except ZImageError as fault:
        return f"line {line.number}: {fault}"
    path = results.folder / f"{line.number:06}.png"
    result.pictures[0].save(path, metadata=metadata, overwrite=True)
    row = {
        "line": line.number,
        "job": line.key,
        "file": path.name,
        "seconds_of_job": round(time.perf_counter() - began, 4),
        **result.report,
    }
    results.add(row)
    if as_json:
        click.echo(cli.to_json(row))
    return None


# -- the jobs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of JOBS: a job, or what is wrong with it."""

    number: int  # from 1
    key: str  # of its text
    job: dict[str, Any]
    folder: Path
    fault: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The job as arguments of ZImage.generate.

        Without a seed, or with -1, the seed follows from the line and its number: the same when the
        batch is run again.
        """
        from .model.kv import KVPolicy

        given = dict(self.job)
        if given.get("seed", -1) == -1:
            given["seed"] = int(
                hashlib.sha256(f"{self.number} {self.key}".encode()).hexdigest()[:8], 16
            )
        if "kv" in given:
            given["kv"] = KVPolicy.parse(**given["kv"])
        return given | {name: self.folder / given[name] for name in _PATHS if name in given}


def read(path: Path) -> Iterator[Line]:
    """The lines of a file of jobs, without empty ones. Raises UsageError for a file of too many."""
    is_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    with open_regular(path, buffering=-1) as file:
        for number, data in enumerate(_lines(file, path), 1):
            if not data.strip():
                continue
            key = hashlib.sha256(data.strip()).hexdigest()[:16]
            job: dict[str, Any] = {}
            fault = None
            try:
                job = _job(data, number) if is_json else {"prompt": _text(data, number)}
            except UsageError as error:
                fault = str(error)
            yield Line(number, key, job, path.parent, fault)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    for number in range(1, MOST_JOBS + 2):
        data = file.readline(LONGEST_LINE + 1)
        if not data:
            return
        if len(data) > LONGEST_LINE or number > MOST_JOBS:
            raise UsageError(
                f"{printable(path)}: expected at most {MOST_JOBS:,} lines of {LONGEST_LINE >> 10} "
                f"KiB, line {number} is beyond"
            )
        yield data


def _text(data: bytes, number: int) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as fault:
        raise UsageError(f"line {number} is not UTF-8 text (byte {fault.start})") from None


def _job(data: bytes, number: int) -> dict[str, Any]:
    job = parse_json(_text(data, number), f"line {number}")
    from .pipeline.picture import KV_FIELDS, check_metadata

    known = allowed()
    for name in job:
        if name not in known:
            raise UsageError(
                f"line {number}: no such key: {printable(name, 40)}; keys are the arguments of "
                "ZImage.generate"
            )
    for name, kind in (("prompt", str), ("seed", int), *((p, str) for p in _PATHS)):
        if name in job and (not isinstance(job[name], kind) or isinstance(job[name], bool)):
            expected = "text" if kind is str else "a whole number"
            raise UsageError(f"line {number}: {name} must be {expected}")
    if "prompt" not in job:
        raise UsageError(f"line {number}: prompt is missing")
    if "kv" in job:
        check_metadata(f"line {number}: kv", job["kv"], KV_FIELDS, only_these=True)
    return job


def allowed() -> set[str]:
    """The keys of a job."""
    from .pipeline.pipeline import ZImage

    return set(inspect.signature(ZImage.generate).parameters) - {
        *("self", "memory", "on_plan", "on_step")
    }


# -- the results -----------------------------------------------------------------------------------


@dataclass
class Results:
    """results.jsonl of a folder: a line per drawn job, on disk before the next job begins."""

    folder: Path
    file: BinaryIO
    keys: dict[int, str]  # of the jobs that are drawn, by line

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """Raises OutputError if the folder cannot be written or another batch draws into it."""
        path = folder / RESULTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except OSError as fault:
            raise OutputError(f"{printable(path)}: cannot be written ({fault.strerror})") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OutputError(f"{printable(path)}: expected a file, found a device, pipe or socket")
        file = os.fdopen(handle, "r+b")
        if not _lock(file):
            file.close()
            raise OutputError(f"{printable(folder)}: another batch draws into this folder")
        keys = {}
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that was cut off is drawn again
        for row in whole.splitlines():
            found = parse_json(row, printable(path), OutputError)
            keys[found.get("line", 0)] = found.get("job", "")
        if len(whole) < len(data):
            file.truncate(len(whole))
        file.seek(0, os.SEEK_END)
        return cls(folder, file, keys)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def has(self, line: Line) -> bool:
        """Whether the job is drawn. Raises UsageError if its line was another job then."""
        key = self.keys.get(line.number)
        if key is not None and key != line.key:
            raise UsageError(
                f"line {line.number} was another job when {printable(self.folder)} was begun: "
                "choose another folder with -o"
            )
        return key is not None

    def add(self, row: dict) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def _lock(file: BinaryIO) -> bool:
    """Lock a file against other processes until it is closed; False if another has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def main() -> None:
    interrupts.install()
    cli.run(command, prog="python -m zimage_jax.batch")


if __name__ == "__main__":
    main()
