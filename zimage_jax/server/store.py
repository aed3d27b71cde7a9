"""Jobs on disk: a SQLite database, the pictures that jobs began from, and those that were drawn.

    FOLDER/jobs.db              every job that was accepted, and every picture that was kept
    FOLDER/inputs/JOB-image     what a job began from (JOB-mask and JOB-control_image, too), until it has ended
    FOLDER/pictures/JOB-N.png   what it drew

A file is on disk before the database says so. One thread writes the database; any may read it.
"""

import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import OutputError
from ..files import lock, printable, write_whole

ACCEPTED, DONE, FAILED, CANCELLED = STATES = ("accepted", "done", "failed", "cancelled")
# the names that we write, and write_whole's temporary ones
_OURS = re.compile(r"\.?[0-9a-f]{24}-(image|mask|[0-9]+\.png)(\..*\.tmp)?")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL,
    state TEXT NOT NULL,
    arguments TEXT NOT NULL,
    seeds TEXT NOT NULL,
    inputs TEXT NOT NULL,
    created REAL NOT NULL,
    ended REAL,
    error TEXT,
    code TEXT,
    warnings TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE TABLE IF NOT EXISTS pictures (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A job as the database has it."""

    id: str
    origin: str  # the API that took it
    arguments: dict[str, Any]  # of ZImage.generate, as JSON, without seed and pictures
    seeds: tuple[int, ...]  # of each picture, fixed when the job was accepted
    inputs: tuple[str, ...]  # those of image, mask and control_image that it has
    created: float  # seconds since 1970
    number: int = 0  # 0 until it is stored
    state: str = ACCEPTED
    ended: float | None = None
    error: str | None = None
    code: str | None = None  # of the error
    warnings: tuple[str, ...] = ()
    pictures: dict[int, dict[str, Any]] = field(default_factory=dict)  # facts, by number


class Store:
    """The folder of one server. Raises OutputError if it cannot be written or another has it."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._inputs, self._pictures = self.folder / "inputs", self.folder / "pictures"
        try:
            for made in (self._inputs, self._pictures):
                made.mkdir(parents=True, exist_ok=True)
            self._lock: BinaryIO = open(self.folder / "lock", "ab")  # noqa: SIM115
        except OSError as fault:
            raise OutputError(
                f"{printable(folder)}: cannot be written ({fault.strerror}); choose another --data"
            ) from None
        if not lock(self._lock):
            self._lock.close()
            raise OutputError(f"{printable(folder)}: another server uses this folder")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="zimage database")
        self._reading = threading.Lock()
        try:
            self._database = self._writer.submit(self._open).result()
            self._reader = sqlite3.connect(
                f"{(self.folder / 'jobs.db').as_uri()}?mode=ro", uri=True, check_same_thread=False
            )
            self._reader.row_factory = sqlite3.Row
        except sqlite3.Error as fault:
            raise OutputError(
                f"{printable(self.folder)}: jobs.db is no database ({fault})"
            ) from None
        self._tidy()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.folder / "jobs.db", isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # a job that was accepted survives power loss
        database.execute("PRAGMA foreign_keys = ON")
        database.executescript(_SCHEMA)
        return database

    def _tidy(self) -> None:
        """Remove what a crash left: files that were never finished, or that no job needs."""
        wanted = {self.input(r.id, name).name for r in self.accepted() for name in r.inputs}
        drawn = {
            f"{row['job']}-{row['number']}.png"
            for row in self._rows("SELECT job, number FROM pictures")
        }
        for folder, keep in ((self._inputs, wanted), (self._pictures, drawn)):
            for path in folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name not in keep:
                    path.unlink()

    def close(self) -> None:
        self._writer.submit(self._database.close).result()
        self._writer.shutdown()
        self._reader.close()
        self._lock.close()

    # -- files -------------------------------------------------------------------------------------

    def input(self, job: str, name: str) -> Path:
        return self._inputs / f"{job}-{name}"

    def picture(self, job: str, number: int) -> Path:
        return self._pictures / f"{job}-{number}.png"

    def save(self, path: Path, data: bytes) -> None:
        """Write one of the files above, through to the disk. Raises OutputError."""
        write_whole(path, data, overwrite=True)
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)  # its name as well
        finally:
            os.close(handle)

    # -- writing -----------------------------------------------------------------------------------

    def add(self, record: Record) -> Future[int]:
        """Add a job whose inputs are saved. Its number, once it is on disk."""
        values = {
            "id": record.id,
            "origin": record.origin,
            "state": record.state,
            "arguments": json.dumps(record.arguments),
            "seeds": json.dumps(record.seeds),
            "inputs": json.dumps(record.inputs),
            "created": record.created,
        }
        names, places = ", ".join(values), ", ".join(f":{name}" for name in values)

        def write() -> int:
            added = self._database.execute(f"INSERT INTO jobs ({names}) VALUES ({places})", values)
            return added.lastrowid or 0

        return self._writer.submit(write)

    def keep(
        self,
        job: str,
        number: int,
        facts: dict[str, Any],
        *,
        warnings: Iterable[str] = (),
        is_last: bool,
    ) -> Future[bool]:
        """Note a picture that was saved; the last one makes its job done. False if the job has
        ended meanwhile."""

        def write() -> bool:
            with self._database:
                self._database.execute("BEGIN")
                row = (job, number, json.dumps(facts))
                found = self._database.execute(
                    "INSERT OR REPLACE INTO pictures SELECT ?, ?, ? "
                    "WHERE EXISTS (SELECT 1 FROM jobs WHERE id = ? AND state = ?)",
                    (*row, job, ACCEPTED),
                )
                if is_last and found.rowcount:
                    self._end(job, DONE, None, None, warnings)
                return found.rowcount > 0

        return self._writer.submit(write)

    def end(
        self,
        job: str,
        state: str,
        error: str | None = None,
        code: str | None = None,
        warnings: Iterable[str] = (),
    ) -> Future[bool]:
        """End a job that was accepted. False if it has ended already."""
        return self._writer.submit(self._end, job, state, error, code, warnings)

    def _end(
        self, job: str, state: str, error: str | None, code: str | None, warnings: Iterable[str]
    ) -> bool:
        values = (state, time.time(), error, code, json.dumps(list(warnings)), job, ACCEPTED)
        found = self._database.execute(
            "UPDATE jobs SET state = ?, ended = ?, error = ?, code = ?, warnings = ? "
            "WHERE id = ? AND state = ?",
            values,
        )
        for name in ("image", "mask"):
            self.input(job, name).unlink(missing_ok=True)
        return found.rowcount > 0

    def remove(self, job: str) -> Future[None]:
        """Remove a job that has ended, and its pictures."""

        def write() -> None:
            paths = [self.picture(job, n) for n in self.find(job).pictures]  # type: ignore[union-attr]
            self._database.execute("DELETE FROM jobs WHERE id = ?", (job,))
            for path in paths:
                path.unlink(missing_ok=True)

        return self._writer.submit(write)

    # -- reading -----------------------------------------------------------------------------------

    def find(self, job: str) -> Record | None:
        return next(iter(self._records("WHERE id = ?", job)), None)

    def accepted(self) -> list[Record]:
        """The jobs that are to be drawn, the oldest first."""
        return self._records("WHERE state = ? ORDER BY number", ACCEPTED)

    def latest(
        self, count: int, before: int | None = None, state: str | None = None
    ) -> list[Record]:
        """The newest jobs first; with `before`, those whose number is smaller."""
        return self._records(
            "WHERE (? IS NULL OR number < ?) AND (? IS NULL OR state = ?) ORDER BY number DESC LIMIT ?",
            *(before, before, state, state, count),
        )

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    def _records(self, where: str, *values: Any) -> list[Record]:
        rows = self._rows(f"SELECT * FROM jobs {where}", *values)
        marks = ", ".join("?" * len(rows))
        pictures: dict[str, dict[int, dict[str, Any]]] = {row["id"]: {} for row in rows}
        for found in self._rows(
            f"SELECT * FROM pictures WHERE job IN ({marks}) ORDER BY number", *pictures
        ):
            pictures[found["job"]][found["number"]] = json.loads(found["facts"])
        lists = ("seeds", "inputs", "warnings")
        return [
            Record(
                **dict(row)
                | {name: tuple(json.loads(row[name])) for name in lists}
                | {"arguments": json.loads(row["arguments"]), "pictures": pictures[row["id"]]}
            )
            for row in rows
        ]
