"""The native checkpoint: one safetensors file per unit, and a manifest.

    model/
      manifest/                          written last, by orbax: the commit mark
        manifest.json                    format, config, provenance; dtype, shape, offset and
                                         checksum of every array; since version 2 a checksum of
                                         the manifest itself
      transformer/stem.safetensors, layers.0.safetensors, …
      text_encoder/embed_tokens.safetensors, layers.0.safetensors, …
      vae/decoder.safetensors, encoder.safetensors
      tokenizer.json

A ControlNet is a checkpoint of its own, of another kind: it has the files of transformer/ whose
names begin with control_, and no tokenizer.

The arrays are not in orbax's format, because orbax restores them at less than half the speed of
plain reading (scripts/bench/checkpoint.py; figures in scripts/results/speed.md). The manifest has
every array's offset, so that a unit is one read into one aligned buffer. Reading verifies the
checksums. On a CPU, JAX uses the buffer itself, without a copy.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import xxhash

from ..dtypes import DTYPES, SAFETENSORS
from ..errors import CheckpointError, ConfigError, DamagedError, ForeignError
from ..files import LARGEST_JSON, fill, kind_of, open_regular, printable, read_json, read_regular
from ..model.config import ControlConfig, ModelConfig
from ..model.control import is_of_branch
from ..units import tree_bytes
from . import components
from .components import COMPONENTS
from .formats import FORMATS, Storage

MODEL, CONTROL = "zimage_jax checkpoint", "zimage_jax control"  # kinds: "format" in the manifest
VERSION = 2
_READ = (1, 2)  # versions; in 1 the manifest has no checksum of itself
_LARGEST_MANIFEST = 16 << 20  # bytes
ALIGNMENT = 64  # bytes; XLA uses a host buffer without a copy if it is aligned so


@dataclass(frozen=True)
class Record:
    """One array in its unit's file."""

    dtype: str  # a name in units.DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    checksum: str  # xxh3, 64 bits, hex

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _Run(NamedTuple):
    """Bytes of a file that are read at once."""

    offset: int  # in the file
    nbytes: int
    place: int  # in the buffer

    @property
    def end(self) -> int:
        return self.place + self.nbytes


def layout(storage: Storage, component: str, unit: str) -> tuple[bytes, dict[str, Record]]:
    """The bytes of a unit's safetensors header, padded so that the data is aligned, and path ->
    record without a checksum."""
    header, end = {}, 0
    leaves = storage.leaves(component, unit)
    for path, leaf in leaves.items():
        size = tree_bytes(leaf)
        header[path] = {
            "dtype": SAFETENSORS[leaf.dtype.name],
            "shape": list(leaf.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    records = {
        path: Record(leaf.dtype.name, leaf.shape, start + header[path]["data_offsets"][0], "")
        for path, leaf in leaves.items()
    }
    return len(text).to_bytes(8, "little") + text, records


def stored_units(storage: Storage, kind: str) -> list[tuple[str, str]]:
    """(component, unit) of each file of a checkpoint of this kind, in the model's order."""
    units = ((c, unit) for c in COMPONENTS for unit in storage.units(c))
    return [(c, unit) for c, unit in units if is_of_branch(unit) == (kind == CONTROL)]


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """xxh3 of the manifest without its own checksum; whitespace and order of keys do not count."""
    text = json.dumps(
        {key: value for key, value in manifest.items() if key != "checksum"},
        sort_keys=True,
        separators=(",", ":"),
    )
    return xxhash.xxh3_64_hexdigest(text.encode())


def formats_json(storage: Storage) -> dict[str, Any]:
    """The manifest's keys about formats: "dtype", and "formats" if some units are special."""
    special = {"formats": [[p, f.name] for p, f in storage.special]} if storage.special else {}
    return {"dtype": storage.format.name, **special}


def config_json(storage: Storage, kind: str) -> dict[str, Any]:
    """The manifest's keys about the model, and about what controls it."""
    found = {"config": storage.config.to_json()}
    if kind == CONTROL:
        assert storage.config.control is not None
        found["control"] = storage.config.control.to_json()
    return found


def _storage(config: ModelConfig, manifest: dict) -> Storage:
    rows = manifest.get("formats", [])
    return Storage(config, FORMATS[manifest["dtype"]], tuple((p, FORMATS[f]) for p, f in rows))


@runtime_checkable
class ModelFiles(Protocol):
    """A model's parameters in files, read unit by unit."""

    path: Path
    config: ModelConfig
    storage: Storage
    remarks: list[str]  # what a user should know of the files
    is_in_place: bool  # every read transposes and dequantises

    def tokenizer(self) -> Path: ...

    def units(self, component: str) -> list[str]: ...

    def nbytes(self, component: str, unit: str | None = None) -> int: ...

    def parameters(self, component: str) -> int: ...

    def buffer_bytes(self, component: str, unit: str) -> int: ...

    def read(
        self, component: str, unit: str, buffer: np.ndarray | None = None
    ) -> dict[str, np.ndarray]: ...


class Checkpoint:
    """A native checkpoint on disk. Opening it reads and checks the manifest, but no arrays.

    `kind`: MODEL or CONTROL; None is either. Raises ForeignError if `path` is not a native checkpoint of that kind,
    DamagedError if the manifest is not what was written, CheckpointError for another version or an
    unsupported config.
    """

    is_in_place = False

    def __init__(self, path: str | Path, kind: str | None = MODEL):
        self.path, self.remarks = Path(path), list[str]()
        manifest = self._read_manifest(kind)
        kind = manifest["format"]
        where = f"{self.path}/manifest"
        try:
            self.config = ModelConfig.from_json(manifest["config"], where)
            if kind == CONTROL:
                control = ControlConfig.from_json(manifest["control"], f"{where}, control")
                self.config = replace(self.config, control=control)
            self.storage = _storage(self.config, manifest)
            self.provenance = dict(manifest["provenance"])
            self._tokenizer_checksum = None if kind == CONTROL else manifest["tokenizer"]
            self._headers: dict[tuple[str, str], bytes] = {}
            units = stored_units(self.storage, kind)
            self._records = self._check_records(units, manifest["arrays"])
        except ConfigError as fault:
            raise CheckpointError(str(fault)) from None
        except (LookupError, TypeError, ValueError, AttributeError) as fault:
            raise DamagedError(
                f"{where}: the manifest is malformed ({printable(repr(fault))}); "
                "copy or convert again"
            ) from None

    def _read_manifest(self, kind: str | None) -> dict:
        file = self.path / "manifest" / "manifest.json"
        if not kind_of(file, CheckpointError):
            raise ForeignError(f"{self.path}: {_what_is_there(self.path, kind)}")
        manifest = read_json(file, _LARGEST_MANIFEST, DamagedError)
        found = manifest.get("format")
        if found not in ((kind,) if kind else (MODEL, CONTROL)):
            what = f"; it is a {found}" if found in (MODEL, CONTROL) else ""
            raise ForeignError(f"{file}: not the manifest of a {kind or MODEL}{what}")
        version = manifest.get("version")
        if version not in _READ:
            raise CheckpointError(
                f"{file}: format version {printable(repr(version))}, this zimage_jax reads "
                f"versions {' and '.join(map(str, _READ))}; update zimage_jax, or convert again"
            )
        if version != 1 and manifest.get("checksum") != manifest_checksum(manifest):
            raise DamagedError(
                f"{file}: not what was written (checksum differs); copy or convert again"
            )
        return manifest

    def _check_records(
        self, units: list[tuple[str, str]], arrays: dict
    ) -> dict[str, dict[str, dict[str, Record]]]:
        """Component -> unit -> path -> record, from the manifest's "arrays".

        Raises DamagedError if a row differs from what config and formats imply.
        """
        checked: dict[str, dict[str, dict[str, Record]]] = {c: {} for c in COMPONENTS}
        for component, unit in units:
            header, records = layout(self.storage, component, unit)
            rows = arrays[component][unit]
            for path in sorted(records.keys() | rows.keys()):
                r, row = records.get(path), rows.get(path)
                expected = [r.dtype, list(r.shape), r.offset] if r else "no such array"
                if row is None or row[:3] != expected:
                    got = "none" if row is None else printable(row)
                    raise DamagedError(
                        f"{self.path}/manifest: {component} {printable(path)}: "
                        f"expected {expected}, got {got}; copy or convert again"
                    )
            checked[component][unit] = {
                path: replace(r, checksum=rows[path][3]) for path, r in records.items()
            }
            self._headers[component, unit] = header
        return checked

    @property
    def checksum(self) -> str:
        """xxh3 of all that a picture follows from: config, formats, every array's checksum and the
        tokenizer's. Where the model came from does not count, nor its folder's name."""
        manifest = self._read_manifest(None)
        names = ("format", "config", "control", "dtype", "formats", "tokenizer", "arrays")
        return manifest_checksum({name: manifest[name] for name in names if name in manifest})

    def tokenizer(self) -> Path:
        """Path of the tokenizer.json. Raises DamagedError if it is not what was written."""
        file = self.path / "tokenizer.json"
        data = read_regular(file, LARGEST_JSON, DamagedError)
        if xxhash.xxh3_64_hexdigest(data) != self._tokenizer_checksum:
            raise DamagedError(
                f"{file}: not the file that was written (checksum differs); copy or convert again"
            )
        return file

    def units(self, component: str) -> list[str]:
        """A component's units, in the model's order."""
        return list(self._records[component])

    def records(self, component: str) -> dict[str, Record]:
        """Path -> record of a component's arrays."""
        return {path: r for unit in self._records[component].values() for path, r in unit.items()}

    def nbytes(self, component: str, unit: str | None = None) -> int:
        """Stored bytes of a unit, or of a whole component, without file headers."""
        units = self.units(component) if unit is None else [unit]
        return sum(r.nbytes for name in units for r in self._records[component][name].values())

    def parameters(self, component: str) -> int:
        """Number of a component's parameters."""
        of = components.units(self.config, component)
        return sum(leaf.size for unit in self.units(component) for leaf in of[unit].values())

    def buffer_bytes(self, component: str, unit: str) -> int:
        """Bytes of the smallest buffer that `read` takes for a unit or a half."""
        return self._runs(component, unit)[-1].end + ALIGNMENT

    def _runs(self, component: str, name: str) -> list["_Run"]:
        """What is read of a unit's file for a unit or a half: the header, and its arrays."""
        unit = components.unit_of(name)
        records = components.of_half(name, self._records[component][unit]).values()
        runs = [_Run(0, len(self._headers[component, unit]), 0)]
        for r in sorted(records, key=lambda r: r.offset):
            last = runs[-1]
            if r.offset == last.offset + last.nbytes:
                runs[-1] = last._replace(nbytes=last.nbytes + r.nbytes)
            else:  # as far from an aligned address as in the file
                place = last.end + (r.offset - last.end) % ALIGNMENT
                runs.append(_Run(r.offset, r.nbytes, place))
        return runs

    def read(
        self, component: str, unit: str, buffer: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Path -> array of a unit, or of half a block, as views of one aligned buffer; every checksum
        is verified.

        `buffer`: uint8, `buffer_bytes` or more, to read into; the arrays change when it is used
        again. Without it the buffer is new.

        Raises DamagedError if the file is missing, has another size, differs in any byte from what
        was written, or has an encoded matrix with values that its encoding does not allow.
        """
        name, unit = unit, components.unit_of(unit)
        of_unit = self._records[component][unit]
        file = self.path / component / f"{unit}.safetensors"
        size = max(r.offset + r.nbytes for r in of_unit.values())
        runs = self._runs(component, name)
        if buffer is None:
            buffer = np.empty(self.buffer_bytes(component, name), np.uint8)
        buffer = buffer[-buffer.ctypes.data % ALIGNMENT :]
        with open_regular(file, DamagedError) as f:
            found = os.fstat(f.fileno()).st_size
            try:
                for run in runs if found == size else ():
                    f.seek(run.offset)
                    read = fill(buffer[run.place : run.end], f)
                    if read != run.nbytes:  # cut while it was read
                        found = run.offset + read
                        break
            except OSError as fault:
                raise DamagedError(
                    f"{file}: cannot be read ({fault.strerror}); copy or convert again"
                ) from None
        if found != size:
            raise DamagedError(
                f"{file}: expected {size} bytes, found {found}; copy or convert again"
            )
        header = self._headers[component, unit]
        if buffer[: len(header)].tobytes() != header:
            raise DamagedError(f"{file}: its header is not what was written; copy or convert again")
        arrays = {}
        for path, record in components.of_half(name, of_unit).items():
            run = next(r for r in runs if r.offset <= record.offset < r.offset + r.nbytes)
            start = run.place + record.offset - run.offset
            data = buffer[start : start + record.nbytes]
            if xxhash.xxh3_64_hexdigest(data.data) != record.checksum:
                raise DamagedError(
                    f"{file}: {path} is not what was written (checksum differs); "
                    "copy or convert again"
                )
            arrays[path] = data.view(DTYPES[record.dtype]).reshape(record.shape)
        # the checksums may be right and the values not: a device would not notice
        for path, (encoding, tree) in self.storage.encoded(component, name, arrays).items():
            if wrong := encoding.fault(tree):
                raise DamagedError(f"{file}: {path}.{wrong}; convert again")
        return arrays


def _what_is_there(path: Path, of: str | None) -> str:
    """Why `path` is not a checkpoint, and what to do."""
    if of == CONTROL and kind_of(path, CheckpointError) == "file":
        return (
            "a file, not a native ControlNet; convert it first: python -m checkpoints_convert "
            f"{path} DST"
        )
    convert = f"convert it first: python -m checkpoints_convert {path} DST"
    kind = kind_of(path, CheckpointError)
    if not kind:
        flag = "--control" if of == CONTROL else "--model"
        return f"no such folder; give {flag} the folder that checkpoints_convert wrote"
    if kind_of(path / "model_index.json", CheckpointError):
        return f"a diffusers folder, not a native checkpoint; {convert}"
    if kind != "folder":
        return "a file, not a native checkpoint; see python -m checkpoints_convert --help"
    if path.name.endswith(".partial"):
        return (
            "an unfinished conversion; run the same checkpoints_convert command again to finish it"
        )
    return (
        "not a zimage_jax checkpoint (it has no manifest); "
        "give the folder that checkpoints_convert wrote"
    )
