"""Writing a native checkpoint: unit by unit, resumable, renamed to DST only when it is complete.

    DST.partial.lock            locked while a writer is open
    DST.partial/
      plan.json                 the mark of an unfinished conversion: config, formats, source
      finished.jsonl            one line per finished unit, with the checksums of its arrays
      …                         the files of the checkpoint written so far

A line of finished.jsonl is written after the unit's bytes are on disk. The rename of the unit's
file may still be lost in a crash, so a resumed writer reads the file again (`Writer.done`).
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..dtypes import DTYPES
from ..errors import OutputError, ZImageError
from ..files import LARGEST_JSON, kind_of, open_regular, parse_json, read_json, read_regular
from ..model.layers import named_arrays
from ..units import size
from .checkpoint import (
    CONTROL,
    MODEL,
    VERSION,
    Record,
    config_json,
    formats_json,
    layout,
    manifest_checksum,
    stored_units,
)
from .components import COMPONENTS
from .formats import Storage, leaves_of

_MARK, _JOURNAL = "plan.json", "finished.jsonl"


def partial_folder(dst: Path) -> Path:
    """The folder of a checkpoint that is not complete yet."""
    return dst.with_name(dst.name + ".partial")


class Writer:
    """Writes a checkpoint unit by unit into `DST.partial`, which `finish` renames to DST.

    An interrupted writer can be resumed: `resumed` is then True; call `done` before writing a unit.
    `source` is JSON that identifies the input. If an existing DST.partial has another source,
    config or format, it is emptied; if it has no mark of a writer, it is not changed. Only one
    writer at a time can have DST: close it, or use it in a `with`.

    Raises OutputError if DST exists, if another writer has it, if DST.partial is not a writer's, or
    if the disk is full or cannot be written.
    """

    def __init__(self, dst: Path, storage: Storage, source: dict | None = None, kind: str = MODEL):
        self.storage, self._kind = storage, kind
        self.units = stored_units(storage, kind)
        self._dst, self._folder = dst, partial_folder(dst)
        self._records: dict[str, dict[str, dict[str, Record]]] = {c: {} for c in COMPONENTS}
        self._journal_lock = threading.Lock()
        self._lock: Lock | None = None
        self._refuse_existing()
        with _disk_errors(f"{dst}: cannot be written", "choose another place"):
            dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(dst)
        try:
            self._refuse_existing()  # the previous holder of the lock may have finished just now
            self._begin(source)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release DST for another writer. What was written remains."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _refuse_existing(self) -> None:
        if os.path.lexists(self._dst):
            raise OutputError(f"{self._dst}: already exists; remove it or choose another name")

    def _begin(self, source: dict | None) -> None:
        """Resume an earlier writer of the same plan, or start over. Checks the free disk space."""
        plan = {
            "format": self._kind,
            "version": VERSION,
            **config_json(self.storage, self._kind),
            **formats_json(self.storage),
            "plan": source,
        }
        mark = json.dumps(plan, sort_keys=True)
        with self._resumable_errors():
            found = self._mark_found()
            self.resumed = found == json.loads(mark)
            self._folder.mkdir(exist_ok=True)
            if found is not None and not self.resumed:
                self._empty()
            if not self.resumed:
                _put(self._folder / _MARK, mark.encode())
            for component in self._components:
                (self._folder / component).mkdir(exist_ok=True)
            self._finished = self._read_journal() if self.resumed else {}
            need, free = self.bytes_missing(), shutil.disk_usage(self._folder).free
        if need > free:
            raise OutputError(f"{self._dst}: needs {size(need)} of disk, {size(free)} are free")

    def _mark_found(self) -> dict | None:
        """The plan in DST.partial; None if there is no folder or an empty one.

        Raises OutputError if the folder is not a writer's of this version.
        """
        kind, mark = kind_of(self._folder, OutputError), self._folder / _MARK
        if not kind:
            return None
        if kind == "folder" and set(os.listdir(self._folder)) <= {_temporary(mark).name}:
            return None
        try:
            found = read_json(mark, fault=OutputError)
        except OutputError:
            found = {}
        if found.get("format") not in (MODEL, CONTROL):
            raise OutputError(
                f"{self._folder}: exists and is not an unfinished conversion of this version; "
                "move it away or choose another name"
            )
        return found

    def _empty(self) -> None:
        """Remove everything but the mark: after an interruption the folder is still a writer's."""
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _MARK:
                path.unlink()

    def _read_journal(self) -> dict[str, Any]:
        """Unit -> path -> checksum, from every complete line."""
        finished = {}
        journal = self._folder / _JOURNAL
        if kind_of(journal, OutputError):
            for line in read_regular(journal, LARGEST_JSON, OutputError).splitlines():
                try:
                    entry = parse_json(line, str(journal), OutputError)
                    finished[str(entry["unit"])] = entry["checksums"]
                except (ZImageError, KeyError):
                    continue  # an incomplete line: the unit is not finished
        return finished

    def bytes_missing(self) -> int:
        """Stored bytes of the units that have no file yet."""
        return sum(
            self.storage.nbytes(component, unit)
            for component, unit in self.units
            if not self._file(component, unit).exists()
        )

    @property
    def _components(self) -> list[str]:
        return list(dict.fromkeys(component for component, _ in self.units))

    def _file(self, component: str, unit: str) -> Path:
        return self._folder / component / f"{unit}.safetensors"

    def done(self, component: str, unit: str) -> bool:
        """Whether an earlier writer finished this unit, and no byte of its file has changed."""
        file, checksums = self._file(component, unit), self._finished.get(f"{component}/{unit}")
        if checksums is None or kind_of(file, OutputError) != "file":
            return False
        header, records = layout(self.storage, component, unit)
        end = max(r.offset + r.nbytes for r in records.values())
        with self._resumable_errors(), open_regular(file, OutputError, buffering=-1) as f:
            if os.fstat(f.fileno()).st_size != end or f.read(len(header)) != header:
                return False
            for path, record in records.items():
                digest = xxhash.xxh3_64()
                for start in range(0, record.nbytes, 1 << 24):
                    digest.update(f.read(min(1 << 24, record.nbytes - start)))
                records[path] = _with_checksum(record, digest)
        if {path: r.checksum for path, r in records.items()} != checksums:
            return False
        self._records[component][unit] = records
        return True

    def write(
        self, component: str, unit: str, pieces: Iterable[tuple[str, Iterator[np.ndarray]]]
    ) -> None:
        """Write one unit's file. It appears complete or not at all.

        `pieces`: (path, runs) for every array, in the unit's order; the runs are consecutive parts
        of the array, of any size. Raises OutputError if the disk is full or cannot be written.
        """
        header, records = layout(self.storage, component, unit)
        file = self._file(component, unit)
        with self._resumable_errors():
            with _temporary(file).open("wb") as f:
                f.write(header)
                for (path, runs), (expected, record) in zip(
                    pieces, list(records.items()), strict=True
                ):
                    assert path == expected, (path, expected)
                    digest = xxhash.xxh3_64()
                    for run in runs:
                        run = np.ascontiguousarray(run, DTYPES[record.dtype])
                        run = run.view(np.uint8).reshape(-1)
                        digest.update(run.data)
                        f.write(run.data)
                    assert f.tell() == record.offset + record.nbytes, path
                    records[path] = _with_checksum(record, digest)
                _place(f, file)
            checksums = {path: r.checksum for path, r in records.items()}
            line = json.dumps({"unit": f"{component}/{unit}", "checksums": checksums})
            with self._journal_lock, (self._folder / _JOURNAL).open("ab") as f:
                f.write(f"\n{line}\n".encode())  # the first \n ends an incomplete line
                f.flush()
                os.fsync(f.fileno())
        self._records[component][unit] = records

    def finish(self, tokenizer: bytes | None, provenance: dict) -> Path:
        """Write tokenizer.json and the manifest, rename DST.partial to DST, and return DST.

        Every unit must be written or `done`. `tokenizer`: the bytes of a tokenizer.json; None for a
        ControlNet.
        `provenance`: JSON about the source. Raises OutputError.
        """
        arrays: dict[str, dict[str, Any]] = {component: {} for component in self._components}
        for component, unit in self.units:
            arrays[component][unit] = {
                path: [r.dtype, list(r.shape), r.offset, r.checksum]
                for path, r in self._records[component][unit].items()
            }
        manifest = {
            "format": self._kind,
            "version": VERSION,
            **formats_json(self.storage),
            **config_json(self.storage, self._kind),
            "provenance": provenance,
            "arrays": arrays,
        }
        if tokenizer is not None:
            manifest["tokenizer"] = xxhash.xxh3_64_hexdigest(tokenizer)
        with self._resumable_errors():
            if tokenizer is not None:
                _put(self._folder / "tokenizer.json", tokenizer)
            save_manifest(self._folder, manifest)
            for folder in (*self._components, "manifest", "."):
                _sync(self._folder / folder)
            os.replace(self._folder, self._dst)
            for name in (_MARK, _JOURNAL):
                (self._dst / name).unlink(missing_ok=True)
            _sync(self._dst.parent)
        self.close()
        return self._dst

    def _resumable_errors(self):
        """Turns an OSError into an OutputError that says how to resume."""
        return _disk_errors(
            f"{self._dst}: cannot be written",
            f"finished units remain in {self._folder.name}; run the same command again to resume",
        )


def save(
    dst: Path, storage: Storage, models: dict[str, Any], tokenizer: bytes, provenance: dict
) -> Path:
    """Write a checkpoint from `models`, component -> module of arrays, in the formats of `storage`.

    Returns `dst`. `tokenizer` and `provenance`: see Writer.finish. Raises OutputError.
    """
    with Writer(dst, storage) as writer:
        arrays = {component: named_arrays(models[component]) for component in COMPONENTS}
        for component, unit in writer.units:
            writer.write(component, unit, _pieces(storage, component, unit, arrays[component]))
        return writer.finish(tokenizer, provenance)


def _pieces(
    storage: Storage, component: str, unit: str, arrays: dict[str, Any]
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    for path, encoding in storage.parameters(component, unit).items():
        array = np.asarray(arrays[path])
        if encoding is None:
            yield path, iter([array])
        else:
            tree = encoding.encode(array.astype(encoding.takes))
            yield from ((name, iter([leaf])) for name, leaf in leaves_of(path, tree))


def save_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest/ into a checkpoint's folder, with the manifest's own checksum added."""
    import orbax.checkpoint as ocp  # here: the import takes 0.3 s, and reading does not need it

    shutil.rmtree(folder / "manifest", ignore_errors=True)
    signed = manifest | {"checksum": manifest_checksum(manifest)}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename="manifest.json")) as checkpointer:
        checkpointer.save((folder / "manifest").absolute(), args=ocp.args.JsonSave(signed))
    # One has this machine's paths, the other the time: without them the same source gives the same
    # bytes. Orbax can restore without them
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
        (folder / "manifest" / name).unlink(missing_ok=True)
    _sync(folder / "manifest" / "manifest.json")


class Lock:
    """DST.partial.lock, an empty file locked by one process. `release` removes it.

    Raises OutputError if another process has the lock, or if the file is not a writer's.
    """

    def __init__(self, dst: Path):
        self._path = dst.with_name(dst.name + ".partial.lock")
        while True:
            self._handle = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            try:
                self._acquire(dst)
                if self._is_ours():
                    return
            except BaseException:
                os.close(self._handle)
                raise
            os.close(self._handle)  # the previous holder removed it between our open and our lock

    def _acquire(self, dst: Path) -> None:
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise OutputError(
                f"{self._path}: is in the way of the lock file; move it or choose another name"
            )
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{dst}: another process is writing it; wait for it or choose another name"
            ) from None
        except OSError as error:
            # some network filesystems have no locks: there two writers are the user's risk
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise

    def _is_ours(self) -> bool:
        """Whether the path still names the file we locked."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and unlock it."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


def _with_checksum(record: Record, digest) -> Record:
    return Record(record.dtype, record.shape, record.offset, digest.hexdigest())


def _temporary(file: Path) -> Path:
    return file.with_suffix(".tmp")


def _put(file: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with _temporary(file).open("wb") as f:
        f.write(data)
        _place(f, file)


def _place(f, file: Path) -> None:
    """Flush an open temporary file to disk, then rename it to `file`."""
    f.flush()
    os.fsync(f.fileno())
    os.replace(f.name, file)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(what: str, then: str) -> Iterator[None]:
    """Turns an OSError into an OutputError "`what` (the reason); `then`"."""
    try:
        yield
    except OSError as fault:
        raise OutputError(f"{what} ({fault.strerror or fault}); {then}") from None
