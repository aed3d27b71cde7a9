"""The native checkpoint: one safetensors file per unit (a block, or what is no block), and a
manifest.

    model/
      manifest/                          written last, by orbax: the commit mark
        manifest.json                    format, config, provenance; dtype, shape, place and checksum of every array;
                                         a checksum of all that (since version 2)
      transformer/stem.safetensors, layers.0.safetensors, …
      text_encoder/embed_tokens.safetensors, layers.0.safetensors, …
      vae/decoder.safetensors, encoder.safetensors
      tokenizer.json

The arrays lie beside orbax's metadata and not in its own format because orbax restores at less than
half of plain reading (scripts/bench/checkpoint.py; the README has the figures). The manifest knows
where each array lies, so a unit is one read into one aligned buffer, whose checksums are verified
on the way; on a CPU the arrays are that buffer."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CheckpointError, ConfigError, DamagedError, ForeignError
from ..files import LARGEST_JSON, kind_of, open_regular, printable, read_json, read_regular
from ..model.config import ModelConfig
from ..units import DTYPES, SAFETENSORS, tree_bytes
from . import components
from .components import COMPONENTS
from .formats import FORMATS, Storage

FORMAT, VERSION = "zimage_jax checkpoint", 2
_READ = (1, 2)  # 1: the manifest has no checksum of its own
_LARGEST_MANIFEST = 16 << 20
_ALIGNMENT = 64  # what XLA wants of a host buffer it can use as it is


@dataclass(frozen=True)
class Record:
    """One array in its unit's file. `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: str  # xxh3, 64 bits, hex

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def layout(storage: Storage, component: str, unit: str) -> tuple[bytes, dict[str, Record]]:
    """The safetensors header of a unit, padded so that data starts aligned, and where each array
    lies."""
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
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    records = {
        path: Record(leaf.dtype.name, leaf.shape, start + header[path]["data_offsets"][0], "")
        for path, leaf in leaves.items()
    }
    return len(text).to_bytes(8, "little") + text, records


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Of everything a manifest says, however its JSON is spaced and ordered."""
    text = json.dumps(
        {key: value for key, value in manifest.items() if key != "checksum"},
        sort_keys=True,
        separators=(",", ":"),
    )
    return xxhash.xxh3_64_hexdigest(text.encode())


def formats_json(storage: Storage) -> dict[str, Any]:
    """The storage's formats as the manifest has them."""
    special = {"formats": [[p, f.name] for p, f in storage.special]} if storage.special else {}
    return {"dtype": storage.format.name, **special}


def _storage(config: ModelConfig, manifest: dict) -> Storage:
    rows = manifest.get("formats", [])
    return Storage(config, FORMATS[manifest["dtype"]], tuple((p, FORMATS[f]) for p, f in rows))


class Checkpoint:
    """A checkpoint on disk: what it holds is known, nothing of it is loaded yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self._read_manifest()
        where = f"{self.path}/manifest"
        try:
            self.config = ModelConfig.from_json(manifest["config"], where)
            self.storage = _storage(self.config, manifest)
            self.provenance = dict(manifest["provenance"])
            self._tokenizer_checksum = manifest["tokenizer"]
            self._headers: dict[tuple[str, str], bytes] = {}
            self._records = self._check_records(manifest["arrays"])
        except ConfigError as fault:
            raise CheckpointError(str(fault)) from None
        except (LookupError, TypeError, ValueError, AttributeError) as fault:
            raise DamagedError(
                f"{where}: the manifest is malformed ({printable(repr(fault))}); copy or convert again"
            ) from None

    def _read_manifest(self) -> dict:
        file = self.path / "manifest" / "manifest.json"
        if not kind_of(file, CheckpointError):
            raise ForeignError(f"{self.path}: {_what_is_there(self.path)}")
        manifest = read_json(file, _LARGEST_MANIFEST, DamagedError)
        if manifest.get("format") != FORMAT:
            raise ForeignError(f"{file}: not the manifest of a {FORMAT}")
        version = manifest.get("version")
        if version not in _READ:
            raise CheckpointError(
                f"{file}: format version {printable(repr(version))}, this zimage_jax reads "
                f"{' and '.join(map(str, _READ))}; update zimage_jax, or convert again"
            )
        if version != 1 and manifest.get("checksum") != manifest_checksum(manifest):
            raise DamagedError(
                f"{file}: not what was written (checksum differs); copy or convert again"
            )
        return manifest

    def _check_records(self, arrays: dict) -> dict[str, dict[str, dict[str, Record]]]:
        """The manifest's arrays as records, each checked against the config's own list of
        tensors."""
        checked: dict[str, dict[str, dict[str, Record]]] = {}
        for component in COMPONENTS:
            checked[component] = {}
            for unit in self.storage.units(component):
                header, records = layout(self.storage, component, unit)
                rows = arrays[component][unit]
                for path in sorted(records.keys() | rows.keys()):
                    r, row = records.get(path), rows.get(path)
                    wanted = r and [r.dtype, list(r.shape), r.offset]
                    if row is None or row[:3] != wanted:
                        raise DamagedError(
                            f"{self.path}/manifest: {component} {printable(path)}: "
                            f"expected {wanted}, got {printable(row)}; copy or convert again"
                        )
                checked[component][unit] = {
                    path: replace(r, checksum=rows[path][3]) for path, r in records.items()
                }
                self._headers[component, unit] = header
        return checked

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json, after its checksum was verified."""
        file = self.path / "tokenizer.json"
        data = read_regular(file, LARGEST_JSON, DamagedError)
        if xxhash.xxh3_64_hexdigest(data) != self._tokenizer_checksum:
            raise DamagedError(
                f"{file}: not the file that was written (checksum differs); copy or convert again"
            )
        return file

    def units(self, component: str) -> list[str]:
        return list(self._records[component])

    def records(self, component: str) -> dict[str, Record]:
        return {path: r for unit in self._records[component].values() for path, r in unit.items()}

    def nbytes(self, component: str, unit: str | None = None) -> int:
        chosen = (
            self._records[component] if unit is None else {unit: self._records[component][unit]}
        )
        return sum(r.nbytes for records in chosen.values() for r in records.values())

    def parameters(self, component: str) -> int:
        leaves = components.units(self.config, component).values()
        return sum(leaf.size for unit in leaves for leaf in unit.values())

    def buffer_bytes(self, component: str, unit: str) -> int:
        """Size of a buffer that `read` can use for a unit."""
        records = self._records[component][unit].values()
        return max(r.offset + r.nbytes for r in records) + _ALIGNMENT

    def read(
        self, component: str, unit: str, buffer: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """One unit's arrays by path, views of one aligned buffer, every checksum verified.

        The buffer is new, or the `buffer` of bytes given if it is large enough (`buffer_bytes`):
        the arrays are then overwritten when it is used again.

        Raises DamagedError when the file is missing, short, or any byte of it is not what was
        written."""
        records = self._records[component][unit]
        file = self.path / component / f"{unit}.safetensors"
        size = self.buffer_bytes(component, unit) - _ALIGNMENT
        if buffer is None:
            buffer = np.empty(size + _ALIGNMENT, np.uint8)
        buffer = buffer[-buffer.ctypes.data % _ALIGNMENT :][:size]
        with open_regular(file, DamagedError) as f:
            actual, got = os.fstat(f.fileno()).st_size, 0
            try:
                # readinto: BinaryIO does not say that a file opened unbuffered has it
                while actual == size and got < size and (count := f.readinto(buffer.data[got:])):  # type: ignore[attr-defined]
                    got += count
            except OSError as fault:
                raise DamagedError(
                    f"{file}: cannot be read ({fault.strerror}); copy or convert again"
                ) from None
        if got != size:
            raise DamagedError(
                f"{file}: expected {size} bytes, found {actual}; copy or convert again"
            )
        header = self._headers[component, unit]
        if buffer[: len(header)].tobytes() != header:
            raise DamagedError(f"{file}: its header is not what was written; copy or convert again")
        arrays = {}
        for path, record in records.items():
            data = buffer[record.offset : record.offset + record.nbytes]
            if xxhash.xxh3_64_hexdigest(data.data) != record.checksum:
                raise DamagedError(
                    f"{file}: {path} is not what was written (checksum differs); copy or convert again"
                )
            arrays[path] = data.view(DTYPES[record.dtype]).reshape(record.shape)
        return arrays


def _what_is_there(path: Path) -> str:
    convert = f"convert it first: python -m checkpoints_convert {path} DST"
    kind = kind_of(path, CheckpointError)
    if not kind:
        return "no such folder; give --model the folder that checkpoints_convert wrote"
    if kind_of(path / "model_index.json", CheckpointError):
        return f"a diffusers folder, not a native checkpoint; {convert}"
    if kind != "folder":
        return "a file, not a native checkpoint; see python -m checkpoints_convert --help"
    if path.name.endswith(".partial"):
        return (
            "an unfinished conversion; run the same checkpoints_convert command again to finish it"
        )
    return "not a zimage_jax checkpoint (it has no manifest); give the folder that checkpoints_convert wrote"
