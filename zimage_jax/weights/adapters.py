"""LoRAs beside a model's parameters, or merged into them.

Beside: of all LoRAs that change a layer, one pair of matrices, A = [A1 A2] and B = [k1 B1; k2 B2],
with alpha / r and the weights k folded into B on the host. Another weight reads nothing of the base.
Ranks are padded with zeros to 16, 32, 64 and so on, so that LoRAs of many ranks share few programs.
A LoHa or LoKr is a pair too, as long as that is smaller than a whole matrix; else it, a DoRA, a
`diff` and a `set` are a whole matrix beside the kernel: as many bytes as the layer in 16 bits. Each
is relative to the model's own weights, whatever else is there.

Merged: summed wider, rounded once to the stored format, when a unit is read.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from ..errors import UsageError
from ..files import printable
from . import components, names
from .checkpoint import Checkpoint
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
    for (component, path), changes in _by_layer(loras).items():
        unit = components.unit_of(path)
        like, layer = own.units_alike(component, unit)[0], path.removeprefix(f"{unit}.")
        row = rows.get((component, like, layer), Beside(component, like, layer))
        rows[component, like, layer] = row._replace(
            rank=max(row.rank, padded(sum(c.patch.rank for c in changes))),
            kernel=row.kernel or any(_is_whole(c.patch) for c in changes),
            bias=row.bias or any("diff_b" in c.patch.tensors for c in changes),
        )
    return replace(own, beside=tuple(sorted(rows.values())))


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRAs with their weights, for one model."""

    checkpoint: Checkpoint
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

    @functools.cached_property
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
        """Sums are in float64: a weight may be beyond float32, which `_rounded` refuses."""
        own = self.checkpoint.storage.leaves(component, unit)
        base = _Base(self.checkpoint, component, unit)
        wanted = self.storage.leaves(component, unit)
        for path in wanted.keys() - own.keys():
            leaf = wanted[path]
            made = np.zeros(leaf.shape)
            if path.endswith(".change"):
                changes = self._of(component, path.removesuffix(".change"))
                made += sum(self._whole(change, base) for change in changes)
                yield path, _rounded(made, leaf.dtype, path)
                continue
            layer, _, which = path.rpartition(".side.")
            changes = self._of(component, layer)
            if which == "kernel":
                for change in changes:
                    if _is_whole(change.patch):
                        made += self._whole(change, base).T
            elif which == "bias":
                for change in changes:
                    if "diff_b" in change.patch.tensors:
                        made += change.weight * change.part(change.patch.bias()).astype(np.float64)
            else:
                at = 0
                for change in changes:
                    rank = change.patch.rank
                    if rank and which == "down":
                        made[:, at : at + rank] = change.patch.factors().down.T
                    elif rank:
                        up = change.part(change.patch.factors().up)
                        made[at : at + rank] = change.weight * up.T.astype(np.float64)
                    at += rank
            yield path, _rounded(made, leaf.dtype, layer)

    def _of(self, component: str, layer: str) -> list[_Change]:
        return self._changes.get((component, layer), [])

    def _whole(self, change: _Change, base: "_Base") -> Float64[np.ndarray, "..."]:
        """A change as a whole matrix (out, in), or a vector of a norm, with its weight. A `set`
        counts whole, whatever its weight."""
        patch = change.patch
        weight = 1.0 if "set" in patch.tensors else change.weight
        delta = change.part(patch.delta(lambda: base.source(patch)))
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
            changes = self._of(component, layer)
            if name == "bias":
                changes = [c for c in changes if "diff_b" in c.patch.tensors]
            elif name in ("kernel", "scale"):
                changes = [c for c in changes if c.patch.changes_weight]
            if not changes or name not in ("kernel", "scale", "bias"):
                continue
            whole = base.array(path)
            for change in changes:
                if name == "bias":
                    whole = whole + change.weight * change.part(change.patch.bias()).astype(
                        np.float64
                    )
                else:
                    whole = whole + self._whole(change, base).T
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


class Merged(Checkpoint):
    """A model's parameters with LoRAs merged into them, whenever a unit is read."""

    def __init__(self, adapters: Adapters):
        self.__dict__ |= adapters.checkpoint.__dict__
        self._adapters = adapters

    def read(self, component: str, unit: str, buffer: np.ndarray | None = None) -> Arrays:
        """As of the model itself. Raises UsageError where a format cannot hold the result."""
        own = self._adapters.checkpoint.read(component, unit, buffer)
        with np.errstate(all="ignore"):  # `_rounded` refuses what is not finite
            return self._adapters.merged(component, unit, own)


def _is_whole(patch: Patch) -> bool:
    return patch.changes_weight and not patch.rank


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
        self, checkpoint: Checkpoint, component: str, unit: str, leaves: Arrays | None = None
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
