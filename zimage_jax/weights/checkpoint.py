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
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import xxhash
from jax.sharding import SingleDeviceSharding

from ..errors import CheckpointError, ConfigError, DamagedError, ForeignError, OutputError
from ..model.config import ModelConfig
from ..model.layers import named_arrays, with_arrays
from ..runtime.placement import GATE
from .components import COMPONENTS, DTYPES, spec, units

FORMAT, VERSION = "zimage_jax checkpoint", 1
_SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
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


# -- writing ---------------------------------------------------------------------------------------


class Writer:
    """Writes a checkpoint unit by unit into `DST.partial`, which `finish` renames to DST.

    A unit's file appears whole or not at all, so an interrupted writer resumes: ask `done` before
    writing a unit. `plan` is what the result depends on; a partial folder with another plan is
    started over."""

    def __init__(self, dst: Path, config: ModelConfig, dtype: str, plan: dict | None = None):
        if dst.exists():
            raise OutputError(f"{dst}: already exists; remove it or choose another name")
        self.config, self.dtype = config, dtype
        self._dst, self._folder = dst, dst.with_name(dst.name + ".partial")
        self._records: dict[str, dict[str, dict[str, Record]]] = {c: {} for c in COMPONENTS}
        mark = json.dumps(
            {"version": VERSION, "config": config.to_json(), "dtype": dtype, "plan": plan},
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
        item = DTYPES[self.dtype].itemsize
        return sum(
            item * sum(math.prod(leaf.shape) for leaf in leaves.values())
            for component in COMPONENTS
            for unit, leaves in units(self.config, component).items()
            if not self._file(component, unit).exists()
        )

    def _file(self, component: str, unit: str) -> Path:
        return self._folder / component / f"{unit}.safetensors"

    def done(self, component: str, unit: str) -> bool:
        """Whether this unit was written by an earlier run, and is what it should be."""
        leaves, file = units(self.config, component)[unit], self._file(component, unit)
        if not file.exists():
            return False
        header, records = _layout(leaves, self.dtype)
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
        header, records = _layout(units(self.config, component)[unit], self.dtype)
        file = self._file(component, unit)
        temporary = file.with_suffix(".tmp")
        with _disk_errors(self._dst), temporary.open("wb") as f:
            f.write(header)
            for (path, runs), (expected, record) in zip(pieces, list(records.items()), strict=True):
                assert path == expected, (path, expected)
                digest = xxhash.xxh3_64()
                for run in runs:
                    run = np.ascontiguousarray(run, DTYPES[self.dtype]).view(np.uint8).reshape(-1)
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
                    "dtype": self.dtype,
                    "config": self.config.to_json(),
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
    dst: Path,
    config: ModelConfig,
    models: dict,
    tokenizer: bytes,
    provenance: dict,
    dtype="bfloat16",
) -> Path:
    """Write a checkpoint of modules that are in memory."""
    writer = Writer(dst, config, dtype)
    for component in COMPONENTS:
        arrays = named_arrays(models[component])
        for unit, leaves in units(config, component).items():
            writer.write(
                component, unit, ((path, iter([np.asarray(arrays[path])])) for path in leaves)
            )
    return writer.finish(tokenizer, provenance)


def _layout(leaves: dict[str, jax.ShapeDtypeStruct], dtype: str) -> tuple[bytes, dict[str, Record]]:
    """The safetensors header of a unit, padded so that data starts aligned, and where each array
    lies."""
    header, end = {}, 0
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape) * DTYPES[dtype].itemsize
        header[path] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(leaf.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    records = {
        path: Record(dtype, tuple(entry["shape"]), start + entry["data_offsets"][0], "")
        for path, entry in header.items()
    }
    return len(text).to_bytes(8, "little") + text, records


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


# -- reading ---------------------------------------------------------------------------------------


class Checkpoint:
    """A checkpoint on disk: what it holds is known, nothing of it is loaded yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self._read_manifest()
        where = f"{self.path}/manifest"
        try:
            self.config = ModelConfig.from_json(manifest["config"], where)
            self.dtype, self.provenance = manifest["dtype"], manifest["provenance"]
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
            for unit, leaves in units(self.config, component).items():
                _, expected = _layout(leaves, self.dtype)
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
        return sum(math.prod(r.shape) for r in self.records(component).values())

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

    def restore(
        self,
        component: str,
        units: Iterable[str] | None = None,
        *,
        memory_kind: str = "device",
        device=None,
    ) -> dict[str, jax.Array]:
        """Arrays by path, all units or those named, in "device" or "pinned_host" memory, in their
        stored dtype."""
        device = device or jax.local_devices()[0]
        sharding = SingleDeviceSharding(device, memory_kind=memory_kind)
        # not on a CPU: a preview is made there while the scan's program runs
        gate = nullcontext if device.platform == "cpu" else GATE.together
        names = self.units(component) if units is None else list(units)

        def place(unit: str) -> dict[str, jax.Array]:
            arrays = self.read(component, unit)
            with gate():
                return jax.block_until_ready(
                    {path: jax.device_put(a, sharding) for path, a in arrays.items()}
                )

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return {path: array for part in pool.map(place, names) for path, array in part.items()}

    def load(self, component: str, *, memory_kind: str = "device", device=None):
        """The whole component as its module."""
        arrays = self.restore(component, memory_kind=memory_kind, device=device)
        return with_arrays(spec(self.config, component), lambda path, _: arrays[path])


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
