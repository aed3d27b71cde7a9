"""Writing a native checkpoint: unit by unit, resumable, and named only when it is whole."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError
from ..model.layers import named_arrays
from ..units import DTYPES
from .checkpoint import FORMAT, VERSION, Record, formats_json, layout
from .components import COMPONENTS
from .formats import Storage


class Writer:
    """Writes a checkpoint unit by unit into `DST.partial`, which `finish` renames to DST.

    A unit's file appears whole or not at all, so an interrupted writer resumes: ask `done` before
    writing a unit. `source` is what the result depends on beside the storage; a partial folder of
    another source is started over."""

    def __init__(self, dst: Path, storage: Storage, source: dict | None = None):
        if dst.exists():
            raise OutputError(f"{dst}: already exists; remove it or choose another name")
        self.storage = storage
        self._dst, self._folder = dst, dst.with_name(dst.name + ".partial")
        self._records: dict[str, dict[str, dict[str, Record]]] = {c: {} for c in COMPONENTS}
        mark = json.dumps(
            {
                "version": VERSION,
                "config": storage.config.to_json(),
                **formats_json(storage),
                "plan": source,
            },
            sort_keys=True,
        )
        mark_file = self._folder / "plan.json"
        self.resumed = mark_file.exists() and mark_file.read_text() == mark
        with _disk_errors(dst):
            if not self.resumed and self._folder.exists():
                shutil.rmtree(self._folder)
            for component in COMPONENTS:
                (self._folder / component).mkdir(parents=True, exist_ok=True)
            mark_file.write_text(mark)
            need, free = self.bytes_missing(), shutil.disk_usage(self._folder).free
        if need > free:
            raise OutputError(
                f"{dst}: needs {need / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free"
            )

    def bytes_missing(self) -> int:
        return sum(
            self.storage.nbytes(component, unit)
            for component in COMPONENTS
            for unit in self.storage.units(component)
            if not self._file(component, unit).exists()
        )

    def _file(self, component: str, unit: str) -> Path:
        return self._folder / component / f"{unit}.safetensors"

    def done(self, component: str, unit: str) -> bool:
        """Whether this unit was written by an earlier run, and is what it should be."""
        file = self._file(component, unit)
        if not file.exists():
            return False
        header, records = layout(self.storage, component, unit)
        size = max(r.offset + r.nbytes for r in records.values())
        with file.open("rb") as f:
            if file.stat().st_size != size or f.read(len(header)) != header:
                return False
            for path, record in records.items():
                digest = xxhash.xxh3_64()
                for start in range(0, record.nbytes, 1 << 24):
                    digest.update(f.read(min(1 << 24, record.nbytes - start)))
                records[path] = _with_checksum(record, digest)
        self._records[component][unit] = records
        return True

    def write(
        self, component: str, unit: str, pieces: Iterable[tuple[str, Iterator[np.ndarray]]]
    ) -> None:
        """`pieces`: for every array of the unit, in the unit's order, its path and its bytes in
        runs of any size."""
        header, records = layout(self.storage, component, unit)
        file = self._file(component, unit)
        temporary = file.with_suffix(".tmp")
        with _disk_errors(self._dst), temporary.open("wb") as f:
            f.write(header)
            for (path, runs), (expected, record) in zip(pieces, list(records.items()), strict=True):
                assert path == expected, (path, expected)
                digest = xxhash.xxh3_64()
                for run in runs:
                    run = np.ascontiguousarray(run, DTYPES[record.dtype]).view(np.uint8).reshape(-1)
                    digest.update(run.data)
                    f.write(run.data)
                assert f.tell() == record.offset + record.nbytes, path
                records[path] = _with_checksum(record, digest)
            f.flush()
            os.replace(temporary, file)
        self._records[component][unit] = records

    def finish(self, tokenizer: bytes, provenance: dict) -> Path:
        """Write what is left, the manifest last, and give the folder its name."""
        with _disk_errors(self._dst):
            (self._folder / "tokenizer.json").write_bytes(tokenizer)
            _save_manifest(
                self._folder,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    **formats_json(self.storage),
                    "config": self.storage.config.to_json(),
                    "provenance": provenance,
                    "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer),
                    "arrays": {
                        component: {
                            unit: {
                                path: [r.dtype, list(r.shape), r.offset, r.checksum]
                                for path, r in records.items()
                            }
                            for unit, records in by_unit.items()
                        }
                        for component, by_unit in self._records.items()
                    },
                },
            )
            (self._folder / "plan.json").unlink()
            os.replace(self._folder, self._dst)
        return self._dst


def save(
    dst: Path, storage: Storage, models: dict[str, Any], tokenizer: bytes, provenance: dict
) -> Path:
    """Write a checkpoint of modules that are in memory, each as `storage` stores it."""
    writer = Writer(dst, storage)
    for component in COMPONENTS:
        arrays = named_arrays(models[component])
        for unit in storage.units(component):
            paths = storage.leaves(component, unit)
            writer.write(
                component, unit, ((path, iter([np.asarray(arrays[path])])) for path in paths)
            )
    return writer.finish(tokenizer, provenance)


def _with_checksum(record: Record, digest) -> Record:
    return Record(record.dtype, record.shape, record.offset, digest.hexdigest())


def _save_manifest(folder: Path, manifest: dict) -> None:
    import orbax.checkpoint as ocp  # 0.3 s of import that reading does not need

    shutil.rmtree(folder / "manifest", ignore_errors=True)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename="manifest.json")) as checkpointer:
        checkpointer.save((folder / "manifest").absolute(), args=ocp.args.JsonSave(manifest))
    # it names this machine's folders and nobody reads it: the rename that follows is the commit
    (folder / "manifest" / "commit_success.txt").unlink(missing_ok=True)


@contextmanager
def _disk_errors(dst: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one line."""
    try:
        yield
    except OSError as fault:
        raise OutputError(
            f"{dst}: cannot be written ({fault.strerror}); what is finished stays in {dst.name}.partial "
            "and the same command goes on from there"
        ) from None
