"""python -m zimage_jax.batch JOBS -o FOLDER: draw each job once, however often it is stopped."""

from . import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the imports below, which take a third of a second

import hashlib
import inspect
import itertools
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import click
from tqdm import tqdm

from . import cli, options
from .errors import OutputError, UsageError, ZImageError
from .files import lock, open_regular, parse_json, printable
from .memory_options import (
    CLUSTER,
    DEVICES,
    engine_of,
    memory_of,
    memory_options,
    split_option,
    start_on,
)
from .options import FILE
from .talk import Talk

LONGEST_LINE = 256 << 10  # bytes
MOST_JOBS = 1_000_000
RESULTS, _ALL_RESULTS = "results.jsonl", "results*.jsonl"
_PATHS = ("image", "mask", "control_image")  # relative to the folder of JOBS, as LoRAs are


@dataclass(frozen=True)
class Part:
    """A share of the lines: every `of`-th, from line `number` on."""

    number: int
    of: int

    @property
    def results(self) -> str:
        return f"results-{self.number}of{self.of}.jsonl"

    def has(self, line: "Line") -> bool:
        return (line.number - self.number) % self.of == 0


class _PartType(click.ParamType):
    name = "part"

    def convert(self, value, param, context):
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--part {printable(value)}: expected I/N, as in 1/4 up to 4/4")
        return Part(int(match[1]), int(match[2]))


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
@options.CONTROL
@options.DTYPE
@memory_options
@DEVICES
@split_option("pictures")
@CLUSTER
@click.option(
    "--part",
    type=_PartType(),
    metavar="I/N",
    help="Draw the I-th of N shares of the lines only, as in 2/4: for job arrays, into one folder.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    help="Most jobs that share the weights on their way over the device (default: 16).",
)
@click.option("--strict", is_flag=True, help="Draw nothing if any line is no job.")
@click.option("--no-metadata", is_flag=True, help="Do not write prompt and settings into the PNGs.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print each line of results.jsonl as well.")
def command(
    jobs,
    output,
    model,
    control,
    dtype,
    devices,
    split,
    cluster,
    part,
    in_flight,
    strict,
    no_metadata,
    quiet,
    as_json,
    **memory_flags,
) -> None:
    """Draw the jobs of a file: one picture per line.

    JOBS is JSON lines (.jsonl), whose keys are the arguments of ZImage.generate, as in {"prompt":
    "a red circle", "seed": 7}, or text with a prompt per line. A line that is no job, or cannot be
    drawn, is reported with its number, and the others are drawn. Jobs are drawn several at a time,
    with one copy of the weights for all; each picture is the same as alone.
    """
    lines = [line for line in read(jobs) if part is None or part.has(line)]
    for line in lines:
        if line.fault:
            click.echo(f"error: {printable(jobs)}: {line.fault}", err=True)
    failed = sum(bool(line.fault) for line in lines)
    if failed and strict:
        raise UsageError(f"{failed} of {len(lines)} lines are no jobs: nothing is drawn")
    with Results.open(output, part) as results:
        todo = [line for line in lines if not line.fault and not results.has(line)]
        done = len(lines) - failed - len(todo)
        if done and not (quiet or as_json):
            click.echo(f"{done} pictures are drawn already", err=True)
        talk = Talk(quiet or as_json, is_tiny=model is None)
        places = {"devices": devices, "split": split, "cluster": cluster}
        given = {"control": control, "dtype": dtype, "in_flight": in_flight}
        with talk.warnings(), _opened(model, places, memory_flags, given, quiet) as pipe:
            talk.start(pipe, pipe.memory)
            with Progress(len(todo), silent=quiet or as_json) as progress:
                for line, found in _draw_all(pipe, todo):
                    where = f"{printable(jobs)}: line {line.number}"
                    if isinstance(found, str):
                        progress.say(f"warning: {where}: {found}")
                        continue
                    if isinstance(found, Exception):
                        failed += 1
                        progress.say(f"error: {where}: {found}")
                    else:
                        row = results.save(line, found, metadata=not no_metadata)
                        if as_json:
                            click.echo(cli.to_json(row))
                    progress.add(isinstance(found, Exception))
    if failed:
        raise click.ClickException(f"{failed} of {len(lines)} jobs were not drawn")


@contextmanager
def _opened(
    model: Path | None, places: dict, memory_flags: dict, given: dict, quiet: bool
) -> Iterator[Any]:
    """The model in this process, or the engine that `places` ask for."""
    if places["devices"] is None and places["cluster"] is None:
        device = start_on(None)
        from .pipeline.pipeline import ZImage

        yield ZImage.load(model, memory=memory_of(**memory_flags), device=device, **given)
        return

    def say(line: str) -> None:
        if not quiet:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    opened = engine_of(model, **places, say=say, memory_flags=memory_flags, **given)
    with opened() as engine:
        yield engine


class Progress:
    """A bar with pictures a minute and the time left; where there is no terminal, a line at the
    end."""

    def __init__(self, count: int, *, silent: bool):
        self._began, self._drawn, self._silent = time.perf_counter(), 0, silent
        self._bar = tqdm(
            total=count,
            desc="batch",
            disable=silent or not sys.stderr.isatty(),
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}, {remaining} left",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._bar.disable and not self._silent and self._drawn:
            click.echo(f"{self._drawn} pictures, {self._rate:.1f} a minute", err=True)

    @property
    def _rate(self) -> float:
        return 60 * self._drawn / (time.perf_counter() - self._began)

    def say(self, line: str) -> None:
        with self._bar.external_write_mode():
            click.echo(line, err=True)

    def add(self, failed: bool) -> None:
        self._drawn += not failed
        self._bar.set_postfix_str(f"{self._rate:.1f} a minute", refresh=False)
        self._bar.update()


def _draw_all(pipe, lines: list["Line"]) -> Iterator[tuple["Line", Any]]:
    """Each line with its result, or with the error that its job cannot be drawn for, as they come;
    and before, with its warnings.

    Twice as many as can be in flight are submitted and not done, so that those that wait can join
    together.
    """
    left, heard = iter(lines), SimpleQueue[tuple[Line, Any]]()
    submitted: dict[int, Any] = {}
    try:
        while True:
            interrupts.check()
            room = max(0, 2 * pipe.in_flight - len(submitted))  # machines come and go
            for line in itertools.islice(left, room):
                try:
                    submitted[line.number] = pipe.submit(
                        **line.arguments(), on_event=_listener(heard, line)
                    )
                except ZImageError as fault:
                    yield line, fault
            if not submitted:
                return
            line, event = heard.get()
            if event is None:
                try:
                    event = submitted.pop(line.number).result()
                except Exception as fault:  # its own: the others are drawn
                    event = fault
            yield line, event
    finally:
        for request in submitted.values():
            request.cancel()
        for request in submitted.values():
            request.wait()


def _listener(heard: SimpleQueue, line: "Line") -> Callable[[Any], None]:
    def hear(event: Any) -> None:
        if event is None or isinstance(event, str):
            heard.put((line, event))

    return hear


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
        if "lora" in given:
            given["lora"] = [(self.folder / file, weight) for file, weight in given["lora"]]
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
    if "lora" in job:
        _check_loras(job["lora"], number)
    if "kv" in job:
        check_metadata(f"line {number}: kv", job["kv"], KV_FIELDS, only_these=True)
    return job


def _check_loras(loras: Any, number: int) -> None:
    """Raises UsageError."""
    for pair in loras if isinstance(loras, list) else [None]:
        file, weight = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(file, str) or not is_number:
            raise UsageError(
                f'line {number}: lora must be a list of pairs, as in [["style.safetensors", 0.8]]'
            )


def allowed() -> set[str]:
    """The keys of a job."""
    from .pipeline.given import ARGUMENTS
    from .pipeline.pipeline import ZImage

    return set(inspect.signature(ZImage.generate).parameters) - {
        *("self", "memory", "on_plan", "on_step", *ARGUMENTS)
    }


# -- the results -----------------------------------------------------------------------------------


@dataclass
class Results:
    """results.jsonl of a folder: a line per drawn job, on disk after its picture."""

    folder: Path
    file: BinaryIO
    keys: dict[int, str]  # of the jobs that are drawn, by line

    @classmethod
    def open(cls, folder: Path, part: Part | None = None) -> "Results":
        """Raises OutputError if the folder cannot be written or another batch draws into it.

        A part has a file of its own, so that all parts can draw at once; what any of them drew is
        drawn for the others too.
        """
        path = folder / (RESULTS if part is None else part.results)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except OSError as fault:
            raise OutputError(f"{printable(path)}: cannot be written ({fault.strerror})") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OutputError(f"{printable(path)}: expected a file, found a device, pipe or socket")
        file = os.fdopen(handle, "r+b")
        if not lock(file):
            file.close()
            raise OutputError(f"{printable(folder)}: another batch draws into this folder")
        data = file.read()
        whole = _whole(data)  # a line that was cut off is drawn again
        keys = _keys(whole, path)
        if len(whole) < len(data):
            file.truncate(len(whole))
        file.seek(0, os.SEEK_END)
        for other in folder.glob(_ALL_RESULTS):
            if other != path:
                with open_regular(other) as of_another:
                    keys |= _keys(_whole(of_another.read()), other)
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

    def save(self, line: Line, result, *, metadata: bool) -> dict:
        """Write a job's picture, then its line. Returns what the line says."""
        path = self.folder / f"{line.number:06}.png"
        result.pictures[0].save(path, metadata=metadata, overwrite=True)
        row = {"line": line.number, "job": line.key, "file": path.name, **result.report}
        self.add(row)
        return row

    def add(self, row: dict) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def _whole(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _keys(data: bytes, path: Path) -> dict[int, str]:
    rows = (parse_json(row, printable(path), OutputError) for row in data.splitlines())
    return {row.get("line", 0): row.get("job", "") for row in rows}


def main() -> None:
    interrupts.install()
    cli.run(command, prog="python -m zimage_jax.batch")


if __name__ == "__main__":
    main()
