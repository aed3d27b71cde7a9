"""LoRAs beside a model's parameters, or merged into them.

Beside: of all LoRAs that change a layer, one pair of matrices, A = [A1 A2] and B = [k1 B1; k2 B2],
with alpha / r and the weights k folded into B on the host. Another weight reads nothing of the base.
Ranks are padded with zeros to 16, 32, 64 and so on, so that LoRAs of many ranks share few programs.
LoHas and LoKrs are such a pair too, and DoRAs with a vector for the kernel's outputs or inputs. Where
that is no smaller than a whole matrix, or a layer has a `diff` or a `set`, all its changes are one
matrix beside the kernel: as many bytes as the layer in 16 bits. Each change is relative to the
model's own weights, whatever else is there.

Merged: summed wider, rounded once to the stored format, when a unit is read.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from ..errors import UsageError
from ..files import printable
from . import components, names
from .checkpoint import ModelFiles
from .formats import Beside, Storage, leaves_of
from .lora import Lora
from .patch import Patch

SMALLEST_RANK = 16
Arrays = dict[str, np.ndarray]  # path -> stored array


def padded(rank: int) -> int:
    """A rank rounded up to a power of two, and 16 at least; 0 stays."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length()) if rank else 0


class _Change(NamedTuple):
    """One LoRA's patch of one layer of ours: part `number` of the tensor."""

    patch: Patch
    number: int
    weight: float

    def part(self, values: np.ndarray) -> np.ndarray:
        """The layer's rows of a source's tensor."""
        rows = len(values) // len(self.patch.entry.paths)
        return values[self.number * rows : (self.number + 1) * rows]


Changes = dict[tuple[str, str], list[_Change]]  # by component and path of the layer


def _by_layer(loras: Sequence[tuple[Lora, float]]) -> Changes:
    found: Changes = {}
    for lora, weight in loras:
        for patch in lora.patches:
            for index, path in enumerate(patch.entry.paths):
                key = patch.component, path.rpartition(".")[0]
                found.setdefault(key, []).append(_Change(patch, index, weight))
    return found


def storage_beside(own: Storage, loras: Sequence[tuple[Lora, float]]) -> Storage:
    """A model's storage with what these LoRAs have beside its layers."""
    rows: dict[tuple[str, str, str], Beside] = {}
    sizes: dict[tuple[str, str, str], tuple[int, ...]] = {}  # outputs and inputs
    for (component, path), changes in _by_layer(loras).items():
        unit = components.unit_of(path)
        like, layer = own.units_alike(component, unit)[0], path.removeprefix(f"{unit}.")
        key = component, like, layer
        row, patches = rows.get(key, Beside(*key)), [c.patch for c in changes]
        entry = patches[0].entry
        sizes[key] = entry.shape[0] // len(entry.paths), *entry.shape[1:]
        of_weight = [patch for patch in patches if patch.changes_weight]
        rows[key] = row._replace(
            rank=max(row.rank, padded(sum(patch.rank for patch in of_weight))),
            kernel=row.kernel or any(not patch.rank for patch in of_weight),
            rows=row.rows or any(p.is_dora and not p.is_of_columns for p in of_weight),
            columns=row.columns or any(p.is_of_columns for p in of_weight),
            bias=row.bias or any(patch.changes_bias for patch in patches),
        )
    return replace(
        own, beside=tuple(sorted(_smaller(row, sizes[key]) for key, row in rows.items()))
    )


def _smaller(row: Beside, size: tuple[int, ...]) -> Beside:
    """A row with a whole matrix alone, if there must be one or the others are no smaller."""
    if row.kernel or row.rank * sum(size) >= math.prod(size):
        is_whole = row.kernel or row.rank > 0
        return row._replace(rank=0, rows=False, columns=False, kernel=is_whole)
    return row


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRAs with their weights, for one model."""

    checkpoint: ModelFiles
    loras: tuple[tuple[Lora, float], ...]
    is_merged: bool = False

    @property
    def key(self) -> tuple:
        """Equal for those that draw the same."""
        return self.is_merged, *((lora.sha256, weight) for lora, weight in self.loras)

    def to_json(self) -> list[dict[str, Any]]:
        """What a picture's metadata says: names, weights, checksums."""
        merged = {"merged": True} if self.is_merged else {}
        return [
            {"name": lora.file.name, "weight": weight, "sha256": lora.sha256, **merged}
            for lora, weight in self.loras
        ]

    @functools.cached_property
    def _changes(self) -> Changes:
        return _by_layer(self.loras)

    @functools.cached_property
    def storage(self) -> Storage:
        """The model's storage with what is beside its layers."""
        own = self.checkpoint.storage
        return own if self.is_merged else storage_beside(own, self.loras)

    def arrays(self) -> dict[tuple[str, str], Arrays]:
        """(component, unit) -> the arrays that are stored beside its own, by path: all that
        `storage` has more. Raises ConversionError for values that are not finite."""
        own, more = self.checkpoint.storage, self.storage
        with np.errstate(all="ignore"):  # `_rounded` refuses what is not finite
            return {
                (component, unit): dict(self._beside(component, unit))
                for component in ("transformer", "text_encoder")
                for unit in more.units(component)
                if more.leaves(component, unit).keys() > own.leaves(component, unit).keys()
            }

    def _beside(self, component: str, unit: str) -> Iterator[tuple[str, np.ndarray]]:
        own = self.checkpoint.storage.leaves(component, unit)
        base = _Base(self.checkpoint, component, unit)
        wanted = self.storage.leaves(component, unit)
        by_layer: dict[str, dict[str, str]] = {}
        for path in wanted.keys() - own.keys():
            layer, _, which = path.removesuffix(".change").partition(".side.")
            by_layer.setdefault(layer, {})[which or "change"] = path
        for layer, paths in by_layer.items():
            shapes = {which: wanted[path].shape for which, path in paths.items()}
            for which, values in self._added(component, layer, shapes, base).items():
                path = paths[which]
                yield path, _rounded(values, wanted[path].dtype, layer)

    def _added(
        self, component: str, layer: str, shapes: Mapping[str, tuple[int, ...]], base: "_Base"
    ) -> dict[str, Float64[np.ndarray, "..."]]:
        """The arrays beside one layer, by their names in a Side. Sums are in float64: a weight may
        be beyond float32, which `_rounded` refuses."""
        made, at = {which: np.zeros(shape) for which, shape in shapes.items()}, 0
        for change in self._changes.get((component, layer), []):
            patch, weight = change.patch, change.weight
            if patch.changes_bias:
                made["bias"] += self._bias(change)
            if not patch.changes_weight:
                continue
            if "change" in made:
                made["change"] += self._whole(change, base)
            elif "kernel" in made:
                made["kernel"] += self._whole(change, base).T
            else:
                up, down, rows, columns = patch.factors(functools.partial(base.source, patch))
                place = slice(at, at + patch.rank)
                made["down"][:, place] = down.T
                made["up"][place] = weight * change.part(up).T.astype(np.float64)
                at += patch.rank
                if rows is not None:
                    made["rows"] += weight * change.part(rows).astype(np.float64)
                if columns is not None:
                    made["columns"] += weight * columns.astype(np.float64)
        return made

    def _bias(self, change: _Change) -> Float64[np.ndarray, "o"]:
        return change.weight * change.part(change.patch.bias()).astype(np.float64)

    def _whole(self, change: _Change, base: "_Base") -> Float64[np.ndarray, "..."]:
        """A change as a whole matrix (out, in), or a vector of a norm, with its weight. A `set`
        counts whole, whatever its weight."""
        patch = change.patch
        weight = 1.0 if "set" in patch.tensors else change.weight
        delta = change.part(patch.delta(functools.partial(base.source, patch)))
        return weight * delta.astype(np.float64)

    def merged(self, component: str, unit: str, leaves: Arrays) -> Arrays:
        """A unit's stored arrays with the LoRAs merged into them.

        Raises UsageError for a matrix whose format cannot hold the result.
        """
        storage = self.checkpoint.storage
        base = _Base(self.checkpoint, component, unit, leaves)
        found = dict(leaves)
        for path, encoding in storage.parameters(component, unit).items():
            layer, _, name = path.rpartition(".")
            changes = self._changes.get((component, layer), [])
            if name == "bias":
                added = [self._bias(c) for c in changes if c.patch.changes_bias]
            elif name in ("kernel", "scale"):
                added = [self._whole(c, base).T for c in changes if c.patch.changes_weight]
                if f"{layer}.bias" not in leaves and any(c.patch.changes_bias for c in changes):
                    raise UsageError(
                        f"{layer} has no bias to merge a LoRA's into; leave out --lora-merge"
                    )
            else:
                continue
            if not added:
                continue
            whole = sum(added, base.array(path).astype(np.float64))
            if encoding is None:
                found[path] = _rounded(whole, leaves[path].dtype, path)
                continue
            try:
                tree = encoding.encode(_rounded(whole, encoding.takes, path))
            except ValueError as fault:
                raise UsageError(
                    f"{path}: merged, it does not fit its format ({printable(fault)}); leave out "
                    "--lora-merge"
                ) from None
            found |= dict(leaves_of(path, tree))
        return found


class Merged:
    """A model's files with LoRAs merged into the parameters, whenever a unit is read."""

    def __init__(self, adapters: Adapters):
        self._adapters, own = adapters, adapters.checkpoint
        self.path, self.config, self.storage = own.path, own.config, own.storage
        self.remarks, self.is_in_place, self.tokenizer = own.remarks, own.is_in_place, own.tokenizer
        self.units, self.nbytes, self.parameters = own.units, own.nbytes, own.parameters
        self.buffer_bytes = own.buffer_bytes

    def read(self, component: str, unit: str, buffer: np.ndarray | None = None) -> Arrays:
        """As of the model itself. Raises UsageError where a format cannot hold the result."""
        own = self._adapters.checkpoint.read(component, unit, buffer)
        with np.errstate(all="ignore"):  # `_rounded` refuses what is not finite
            return self._adapters.merged(component, unit, own)


def _rounded(values: np.ndarray, dtype: np.dtype, layer: str) -> np.ndarray:
    """Raises UsageError where a number is beyond the dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = values.astype(dtype)
    if not np.isfinite(found.astype(np.float32)).all():
        raise UsageError(
            f"{layer}: the LoRAs' weights make numbers beyond {dtype}; use smaller ones"
        )
    return found


class _Base:
    """A unit's own parameters in float32, read when they are first needed."""

    def __init__(
        self, checkpoint: ModelFiles, component: str, unit: str, leaves: Arrays | None = None
    ):
        self._checkpoint, self._of, self._leaves = checkpoint, (component, unit), leaves

    def array(self, path: str) -> Float32[np.ndarray, "..."]:
        if self._leaves is None:
            self._leaves = self._checkpoint.read(*self._of)
        trees = self._checkpoint.storage.encoded(*self._of, self._leaves)
        if path in trees:
            encoding, tree = trees[path]
            return encoding.decode(tree).astype(np.float32)
        return self._leaves[path].astype(np.float32)

    def source(self, patch: Patch) -> Float32[np.ndarray, "..."]:
        """The tensor of the source's layout that a patch changes."""
        parts = [
            names.to_source(self.array(path), patch.entry.transform) for path in patch.entry.paths
        ]
        return np.concatenate(parts)
