"""The parameters of a source as native arrays: which tensor each comes from, and its values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConversionError
from ..files import printable
from ..model.encoded import group_of
from . import components, formats
from . import names as rules
from .encodings import Encoding, Int8
from .formats import Format, Storage
from .quantised import ScaledTensor
from .sources import Source
from .tensors import Tensor

_RUN_BYTES = 32 << 20  # of the result, made at a time
_SQUARE = 256  # rows and columns that are transposed at a time
# item size -> (integer type, exponent bits) of bfloat16 and float32; all ones is infinity or NaN
_EXPONENT = {2: (np.uint16, 0x7F80), 4: (np.uint32, 0x7F800000)}


def _contiguous(view: np.ndarray) -> np.ndarray:
    """A copy of a transposed view. In squares that fit the cache: a matrix of 10240 x 3840 takes a
    third to a quarter of the time (one core of an AMD EPYC, 0.06 s in bfloat16)."""
    if view.ndim != 2:
        return np.ascontiguousarray(view)
    made = np.empty(view.shape, view.dtype)
    for a in range(0, view.shape[0], _SQUARE):
        for b in range(0, view.shape[1], _SQUARE):
            made[a : a + _SQUARE, b : b + _SQUARE] = view[a : a + _SQUARE, b : b + _SQUARE]
    return made


@dataclass(frozen=True)
class _Origin:
    """The part of a source tensor that becomes one native array: part `part` of `parts`."""

    tensor: Tensor
    transform: str
    part: int
    parts: int

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of the tensor, and that after the last."""
        count = self.tensor.shape[0] // self.parts
        return self.part * count, (self.part + 1) * count

    def carries(self, encoding: Encoding) -> bool:
        """Whether the tensor's values and scales are those of the encoding."""
        tensor = self.tensor
        if not (isinstance(tensor, ScaledTensor) and tensor.dtype == "I8"):
            return False
        group = group_of(tensor.shape[1]) if len(tensor.shape) == 2 else -1
        rotates = tensor.group > 0
        return encoding == Int8(rotates) and tensor.group in ((group,) if rotates else (0,))


class Origins:
    """The parameters of a component of a source, of all its units.

    For a source whose `check` has passed.
    """

    def __init__(self, source: Source, component: str):
        tensors = source.components[component].tensors
        self._of = {
            path: _Origin(tensors[name], entry.transform, part, len(entry.paths))
            for name, entry in source.entries(component).items()
            for part, path in enumerate(entry.paths)
        }

    def files(self, unit: str) -> set[Path]:
        """The files of a unit's tensors."""
        return {o.tensor.file for path, o in self._of.items() if components.unit_of(path) == unit}

    def has(self, unit: str) -> bool:
        """Whether the source has the unit: a ControlNet has no other than its own."""
        return any(components.unit_of(path) == unit for path in self._of)

    def carries(self, path: str, encoding: Encoding | None) -> bool:
        """Whether the source has this parameter in just this encoding."""
        return encoding is not None and self._of[path].carries(encoding)

    def encoded(self, path: str, encoding: Encoding) -> Any | None:
        """The tree of the parameter, if the source has it in just this encoding."""
        origin = self._of[path]
        if not origin.carries(encoding):
            return None
        assert isinstance(origin.tensor, ScaledTensor)
        values, scales = origin.tensor.int8(*origin.rows)
        return encoding.tree(_contiguous(values.T), scales)

    def runs(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Consecutive rows of the native array, cast to `dtype`. Raises ConversionError for NaN and
        infinity."""
        origin = self._of[path]
        tensor, (first, last) = origin.tensor, origin.rows
        if origin.transform == rules.SAME:
            row_bytes = dtype.itemsize * math.prod(tensor.shape[1:])
            step = max(1, _RUN_BYTES // max(1, row_bytes))
            parts = (tensor.rows(a, min(a + step, last), dtype) for a in range(first, last, step))
        else:
            # cast the whole matrix first, then transpose it
            native = rules.to_native(tensor.rows(first, last, dtype), origin.transform)
            step = _SQUARE if native.ndim == 2 else len(native)
            parts = (_contiguous(native[a : a + step]) for a in range(0, len(native), step))
        bits, ones = _EXPONENT[dtype.itemsize]
        for run in parts:
            if bool(((run.view(bits) & ones) == ones).any()):
                raise ConversionError(
                    f"{tensor.file}: {printable(tensor.name)} has NaN or infinity in {dtype.name}; "
                    f"the file is damaged or was cast badly (it would become {path})"
                )
            yield run


def storage(source: Source, origins: dict[str, Origins]) -> Storage:
    """The storage that carries a source as it is: what the source has in an encoding of ours stays
    in it, all else is bfloat16.

    `origins`: by component. A component's most frequent format is one row, and each unit that
    differs has rows of its own.
    """
    config, plain, rows = source.config, formats.FORMATS["bfloat16"], []
    eights = [f for f in formats.FORMATS.values() if isinstance(f.encoding, Int8)]

    def carried(component: str, path: str, leaf: Any) -> Format:
        return next(
            (f for f in eights if origins[component].carries(path, f.encoding_of(path, leaf))),
            plain,
        )

    for component, of in origins.items():
        units = components.units(config, component)
        found = {
            unit: {
                path: carried(component, path, leaf)
                for path, leaf in leaves.items()
                if any(f.encoding_of(path, leaf) for f in eights)
            }
            for unit, leaves in units.items()
            if of.has(unit)
        }
        every = [f for own in found.values() for f in own.values()]
        usual = max(eights, key=every.count)
        usual = usual if 2 * every.count(usual) > len(every) else plain
        if usual is not plain:
            rows.append((component, usual))
        for unit, own in found.items():
            kinds = set(own.values())
            if len(kinds) == 1 and kinds != {usual}:
                rows.append((f"{component}.{unit}", kinds.pop()))
            elif len(kinds) > 1:
                rows += [(f"{component}.{p}", f) for p, f in own.items() if f is not usual]
    return Storage(config, plain, tuple(rows))
