"""Tensors in files of other programs: what a file's header says of them, and their values by rows.

Opening a file reads only its header; the safetensors library refuses a header with wrong sizes or
offsets.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import ConversionError
from ..files import fill, open_regular, parse_json, printable

READABLE = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_OF_BYTES = {  # dtype -> the number of each byte
    name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for name, dtype in READABLE.items()
    if dtype.itemsize == 1
}
_SLAB = 1 << 21  # weights widened at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    file: Path
    name: str  # in the file, with prefix
    shape: tuple[int, ...]  # of the weights
    dtype: str  # safetensors' name
    offset: int  # of its first byte in the file
    nbytes: int  # in the file, with its scales

    @property
    def kind(self) -> str:
        """How the weights are stored, for a person; the dtype, if it says all."""
        return self.dtype

    @property
    def is_readable(self) -> bool:
        """Whether `rows` can read it."""
        return self.dtype in READABLE

    def rows(self, first: int, last: int, dtype: np.dtype) -> np.ndarray:
        """Rows `first` to `last` (exclusive) of the first axis, rounded once to `dtype`.

        Raises ConversionError if the file has become shorter.
        """
        if self.dtype in READABLE and READABLE[self.dtype] == dtype:
            return self._widened(first, last)
        found = np.empty((last - first, *self.shape[1:]), dtype)
        step = max(1, _SLAB // max(1, math.prod(self.shape[1:])))
        for a in range(first, last, step):
            b = min(last, a + step)
            with np.errstate(all="ignore"):  # NaN and infinity are refused by who asked
                found[a - first : b - first] = self._widened(a, b)
        return found

    def number(self) -> np.float32:
        """The value of a tensor that has one."""
        return self._bytes(0, self.nbytes).view(READABLE[self.dtype]).astype(np.float32)[0]

    def _widened(self, first: int, last: int) -> np.ndarray:
        """Rows in float32, or bfloat16 if they are stored so."""
        values = self._stored(first, last, READABLE[self.dtype])
        if values.itemsize == 1:  # looked up: ml_dtypes converts at a tenth of the speed
            return _OF_BYTES[self.dtype][values.view(np.uint8)]
        return values if self.dtype in ("F32", "BF16") else values.astype(np.float32)

    def _stored(self, first: int, last: int, dtype: np.dtype) -> np.ndarray:
        """Rows as they are in the file, as items of `dtype`."""
        width = math.prod(self.shape[1:]) * dtype.itemsize
        data = self._bytes(first * width, (last - first) * width)
        return data.view(dtype).reshape(last - first, *self.shape[1:])

    def _bytes(self, start: int, nbytes: int) -> np.ndarray:
        """Bytes of the tensor from `start` on. The file is read and not memory-mapped: mapped pages
        count as this process's memory, and are read in small pieces."""
        data = np.empty(nbytes, np.uint8)
        with open_regular(self.file, ConversionError) as f:
            try:
                f.seek(self.offset + start)
                found = fill(data, f)
            except OSError as fault:
                raise ConversionError(
                    f"{self.file}: cannot be read ({fault.strerror or printable(fault)})"
                ) from None
        if found != nbytes:
            raise ConversionError(
                f"{self.file}: {printable(self.name)} ends early: the file became shorter while it "
                "was read"
            )
        return data


class Header(NamedTuple):
    """What a file's header says."""

    tensors: list[Tensor]
    metadata: dict[str, str]


def read_safetensors(file: Path) -> Header:
    """The header of a safetensors file. The library checks sizes and offsets against the file.

    Raises ConversionError for a file that is not a whole safetensors file.
    """
    # opened here first, because the library would wait for a FIFO
    with open_regular(file, ConversionError, buffering=-1) as f:
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as fault:
            raise ConversionError(
                f"{file}: not a whole safetensors file ({printable(fault)}); download it again"
            ) from None
        except OSError as fault:
            raise ConversionError(
                f"{file}: cannot be read ({fault.strerror or printable(fault)})"
            ) from None
        size = int.from_bytes(f.read(8), "little")
        header = parse_json(f.read(size), str(file), ConversionError)
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors.append(Tensor(file, name, shape, entry["dtype"], 8 + size + first, last - first))
    return Header(tensors, metadata)
