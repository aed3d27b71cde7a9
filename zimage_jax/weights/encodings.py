"""Encodings: matrices as trees of arrays in fewer bits, made and checked on the host.

model/encoded.py has the trees and their products.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8, UInt16

from ..model.encoded import CODES, Packed, Rotated, Scaled, group_of, rotation

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@runtime_checkable
class Encoding(Protocol):
    """How a matrix is stored. Instances are hashable."""

    @property
    def tree(self) -> Any:
        """The class of the trees: a NamedTuple of arrays."""

    @property
    def takes(self) -> np.dtype:
        """The dtype in which `encode` takes a matrix."""

    def admits(self, path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        """Whether it stores this parameter of a block; a format stores others as arrays."""

    def stored(self, leaf: jax.ShapeDtypeStruct) -> Any:
        """The tree that stores a matrix, with a ShapeDtypeStruct for each array."""

    def encode(self, matrix: np.ndarray) -> Any:
        """The tree that stores `matrix`, of the dtype `takes`."""

    @property
    def is_exact(self) -> bool:
        """Whether `decode` gives every bit of what was encoded."""

    def decode(self, stored: Any) -> np.ndarray:
        """The matrix that a tree stores, in the dtype `takes`."""

    def fault(self, stored: Any) -> str | None:
        """What is wrong with a tree of numpy arrays that was read; None if nothing is."""


def is_matrix(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether a parameter is the kernel of a Linear."""
    return path.endswith(".kernel") and len(leaf.shape) == 2


# -- lossless --------------------------------------------------------------------------------------

_SLAB = 1 << 18  # weights encoded at a time: their temporaries stay in a core's cache
_SHARE, _LEAST = 2048, 8  # room for exceptions: one weight in 2,048, and 8 of the smallest matrix


def room_of(size: int) -> int:
    """Exceptions for which a matrix of `size` weights has room.

    A share of the size, so that one program serves the matrices of all blocks. Trained weights have
    a third of it: in the tiny model 1 weight in 3,600 at worst, Gaussian ones 1 in 13,000.
    """
    return max(_LEAST, -(-size // _SHARE))


@dataclass(frozen=True)
class Lossless:
    """bfloat16 in 12 bits (model.encoded.Packed): every bit of a picture stays."""

    tree, takes, is_exact = Packed, BFLOAT16, True

    def admits(self, path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        if not is_matrix(path, leaf) or leaf.shape[1] % 2:
            return False
        spared = leaf.size // 2 - 6 * room_of(leaf.size) - 2
        return spared > 0 and leaf.size + room_of(leaf.size) < 2**31  # positions are int32

    def stored(self, leaf: jax.ShapeDtypeStruct) -> Packed:
        (rows, columns), room = leaf.shape, room_of(leaf.size)
        made: Any = (
            jax.ShapeDtypeStruct((rows, columns * 3 // 2), np.uint8),
            jax.ShapeDtypeStruct((), np.uint16),
            jax.ShapeDtypeStruct((room,), np.int32),
            jax.ShapeDtypeStruct((room,), np.uint16),
        )
        return Packed(*made)

    def exceptions(self, matrix: Float[np.ndarray, "i o"]) -> int:
        """Weights of a bfloat16 matrix that `encode` must list."""
        bits = np.ascontiguousarray(matrix).view(np.uint16)
        base = _base(bits)
        slabs = (bits[a:b] for a, b in _slabs(bits.shape))
        return sum(int(np.count_nonzero(_codes(slab, base) >= CODES)) for slab in slabs)

    def has_room(self, matrix: Float[np.ndarray, "i o"]) -> bool:
        """Whether a matrix can be stored so."""
        return self.exceptions(matrix) <= room_of(matrix.size)

    def encode(self, matrix: Float[np.ndarray, "i o"]) -> Packed:
        """Raises ValueError if the matrix has more exceptions than there is room for."""
        bits = np.ascontiguousarray(matrix).view(np.uint16)
        (rows, columns), room, base = bits.shape, room_of(bits.size), _base(bits)
        plane, found = np.empty((rows, columns * 3 // 2), np.uint8), []
        for a, b in _slabs(bits.shape):
            slab, codes = bits[a:b], _codes(bits[a:b], base)
            plane[a:b, :columns] = slab >> 8 & 0x80 | slab & 0x7F
            beyond = codes >= CODES
            found.append(np.flatnonzero(beyond) + a * columns)
            codes[beyond] = 0
            pairs = codes.view("<u2")  # the even column is the low byte
            plane[a:b, columns:] = pairs | pairs >> 4  # the cast keeps the low byte
        index = np.concatenate(found)
        if len(index) > room:
            raise ValueError(f"{len(index)} exceptions, there is room for {room}")
        unused = np.arange(bits.size, bits.size + room - len(index))
        exact = np.zeros(room, np.uint16)
        exact[: len(index)] = bits.reshape(-1)[index]
        return Packed(
            plane,
            np.array(base, np.uint16),
            np.concatenate([index, unused]).astype(np.int32),
            exact,
        )

    def decode(self, stored: Packed) -> Float[np.ndarray, "i o"]:
        plane, (rows, packed) = np.asarray(stored.plane), stored.plane.shape
        columns = packed * 2 // 3
        bits = np.empty((rows, columns), np.uint16)
        for a, b in _slabs(bits.shape):
            low = plane[a:b, :columns].astype(np.uint16)
            bits[a:b] = (low & 0x80) << 8 | low & 0x7F
            codes = np.empty((b - a, columns), np.uint16)
            codes[:, ::2], codes[:, 1::2] = plane[a:b, columns:] & 15, plane[a:b, columns:] >> 4
            bits[a:b] |= codes + stored.base << 7
        used = np.asarray(stored.places) < bits.size
        bits.reshape(-1)[np.asarray(stored.places)[used]] = np.asarray(stored.exact)[used]
        return bits.view(BFLOAT16)

    def fault(self, stored: Packed) -> str | None:
        index = np.asarray(stored.places)
        if stored.base > 256 - CODES:
            return f"base: expected 0 to {256 - CODES}, got {int(stored.base)}"
        # strictly ascending from 0: distinct and sorted, as the device is told they are
        if len(index) and (index[0] < 0 or bool((index[1:] <= index[:-1]).any())):
            return "places: expected strictly ascending positions from 0"
        return None


def _slabs(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, last) of runs of rows with about _SLAB weights."""
    rows, step = shape[0], max(1, _SLAB // max(1, shape[1]))
    return [(a, min(rows, a + step)) for a in range(0, rows, step)]


def _codes(bits: UInt16[np.ndarray, "i o"], base: int) -> UInt8[np.ndarray, "i o"]:
    """exponent - base, modulo 256."""
    return (bits >> 7).astype(np.uint8) - np.uint8(base)


def _base(bits: UInt16[np.ndarray, "i o"]) -> int:
    """The first of the 16 consecutive exponents that most weights have, by a sample of the rows.

    Any base is correct; another one has other exceptions.
    """
    sample = bits[:: max(1, bits.size // (1 << 20))]
    counts = np.bincount((sample >> 7 & 0xFF).reshape(-1), minlength=256)
    return int(np.convolve(counts, np.ones(CODES, np.int64), "valid").argmax())


# -- int8 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8:
    """int8 with a float32 scale per output (model.encoded.Scaled, or Rotated): values from -127 to
    127, the largest of a column ±127.

    adaLN's matrices stay as they are: their outputs multiply all channels of all tokens, and they
    are 2 % of a block.
    """

    rotates: bool = False
    takes, is_exact = np.dtype(np.float32), False

    @property
    def tree(self) -> type[Scaled] | type[Rotated]:
        return Rotated if self.rotates else Scaled

    def admits(self, path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        return is_matrix(path, leaf) and not path.endswith("modulation.kernel")

    def stored(self, leaf: jax.ShapeDtypeStruct) -> Scaled | Rotated:
        made: Any = (
            jax.ShapeDtypeStruct(leaf.shape, np.int8),
            jax.ShapeDtypeStruct(leaf.shape[1:], np.float32),
        )
        return self.tree(*made)

    def encode(self, matrix: Float[np.ndarray, "i o"]) -> Scaled | Rotated:
        matrix = self._turned(matrix)
        scale = np.maximum(np.abs(matrix).max(0), np.finfo(np.float32).tiny * 128) / np.float32(127)
        return self.tree(np.rint(matrix / scale[None]).astype(np.int8), scale)

    def decode(self, stored: Any) -> Float[np.ndarray, "i o"]:
        return self._turned(np.asarray(stored.values) * np.asarray(stored.scale)[None])

    def _turned(self, matrix: Float[np.ndarray, "i o"]) -> Float[np.ndarray, "i o"]:
        """The matrix with its inputs rotated, or rotated back."""
        if not self.rotates:
            return matrix
        turn = rotation(group_of(len(matrix)))
        groups = matrix.reshape(-1, len(turn), matrix.shape[1])
        return np.matmul(turn, groups).reshape(matrix.shape)

    def fault(self, stored: Any) -> str | None:
        if not bool((np.isfinite(stored.scale) & (np.asarray(stored.scale) > 0)).all()):
            return "scale: expected finite numbers above 0"
        return None
