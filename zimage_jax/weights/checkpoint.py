"""The native checkpoint: one safetensors file per unit (a block, or what is no block), and a
manifest.

    model/
      manifest/                          written last, by orbax: the commit mark
        manifest.json                    format, config, provenance; dtype, shape, place and checksum of every array
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CheckpointError, ConfigError, DamagedError, ForeignError
from ..model.config import ModelConfig
from ..units import DTYPES, SAFETENSORS, tree_bytes
from . import components
from .components import COMPONENTS
from .formats import FORMATS, Storage

FORMAT, VERSION = "zimage_jax checkpoint", 1
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
            self.provenance = manifest["provenance"]
            self._tokenizer_checksum = manifest["tokenizer"]
            self._records = self._check_records(manifest["arrays"])
        except ConfigError as fault:
            raise CheckpointError(str(fault)) from None
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise DamagedError(
                f"{where}: the manifest is malformed ({fault!r}); copy or convert again"
            ) from None

    def _read_manifest(self) -> dict:
        file = self.path / "manifest" / "manifest.json"
        if not file.is_file():
            raise ForeignError(f"{self.path}: {_what_is_there(self.path)}")
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise DamagedError(f"{file}: {file.stat().st_size} bytes is too large for a manifest")
        try:
            manifest = json.loads(file.read_text("utf-8"))
        except ValueError as fault:
            raise DamagedError(f"{file}: not JSON ({fault}); copy or convert again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ForeignError(f"{file}: not the manifest of a {FORMAT}")
        if manifest.get("version") != VERSION:
            raise CheckpointError(
                f"{file}: format version {manifest.get('version')!r}, this zimage_jax reads {VERSION}; convert again"
            )
        return manifest

    def _check_records(self, arrays: dict) -> dict[str, dict[str, dict[str, Record]]]:
        """The manifest's arrays as records, each checked against the config's own list of
        tensors."""
        checked: dict[str, dict[str, dict[str, Record]]] = {}
        for component in COMPONENTS:
            checked[component] = {}
            for unit in self.storage.units(component):
                _, expected = layout(self.storage, component, unit)
                found = {
                    path: Record(r[0], tuple(r[1]), r[2], r[3])
                    for path, r in arrays[component][unit].items()
                }
                bare = {path: Record(r.dtype, r.shape, r.offset, "") for path, r in found.items()}
                if bare != expected:
                    wrong = sorted(
                        p for p in expected.keys() | bare.keys() if bare.get(p) != expected.get(p)
                    )
                    raise DamagedError(
                        f"{self.path}/manifest: {component} {wrong[0]}: expected {expected.get(wrong[0])}, "
                        f"got {bare.get(wrong[0])}; copy or convert again"
                    )
                checked[component][unit] = found
        return checked

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json, after its checksum was verified."""
        file = self.path / "tokenizer.json"
        try:
            checksum = xxhash.xxh3_64_hexdigest(file.read_bytes())
        except OSError as fault:
            raise DamagedError(
                f"{file}: cannot be read ({fault.strerror}); copy or convert again"
            ) from None
        if checksum != self._tokenizer_checksum:
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

    def read(self, component: str, unit: str) -> dict[str, np.ndarray]:
        """One unit's arrays by path, views of one aligned buffer, every checksum verified.

        Raises DamagedError when the file is missing, short, or any byte of it is not what was
        written."""
        records = self._records[component][unit]
        file = self.path / component / f"{unit}.safetensors"
        size = max(r.offset + r.nbytes for r in records.values())
        buffer = np.empty(size + _ALIGNMENT, np.uint8)
        buffer = buffer[-buffer.ctypes.data % _ALIGNMENT :][:size]
        try:
            with file.open("rb", buffering=0) as f:
                actual = os.fstat(f.fileno()).st_size
                got = 0
                while actual == size and got < size and (count := f.readinto(buffer.data[got:])):
                    got += count
        except OSError as fault:
            raise DamagedError(
                f"{file}: cannot be read ({fault.strerror}); copy or convert again"
            ) from None
        if got != size:
            raise DamagedError(
                f"{file}: expected {size} bytes, found {actual}; copy or convert again"
            )
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
    if not path.exists():
        return "no such folder; give --model the folder that checkpoints_convert wrote"
    if (path / "model_index.json").exists():
        return f"a diffusers folder, not a native checkpoint; {convert}"
    if path.is_file():
        return "a file, not a native checkpoint; see python -m checkpoints_convert --help"
    if path.name.endswith(".partial"):
        return (
            "an unfinished conversion; run the same checkpoints_convert command again to finish it"
        )
    return "not a zimage_jax checkpoint (it has no manifest); give the folder that checkpoints_convert wrote"
