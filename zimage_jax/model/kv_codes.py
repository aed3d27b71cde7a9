"""K and V packed in 4 to 8 bits a value.

A value is stored as a code, an unsigned integer; it is decoded as low + step * code. Two codings
differ in which values share low and step:

- by token and head: step is the largest magnitude of a key's channels over the largest code, low
  follows from it. What SageAttention (arXiv 2410.02367) does to K for a block of tokens.
- by channel, over runs of 64 neighbouring keys: low is the smallest value, step the range over the
  largest code. A channel of K has its own range, and neighbours agree in it (KIVI, arXiv
  2402.02750), before RoPE more than after (KVQuant, arXiv 2401.18079).

Six bits lose little without the rotations of QuaRot (arXiv 2404.00456), which did not pay here
(scripts/results/kv.md).

Axes: B pictures, S keys, N heads, H head width, R scales along the keys, C scales along a head.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import BFloat16, Bool, Float, Float32, UInt8

from .ops import last_axis

RUN = 64  # keys that share a channel's low and step: a row of tokens at 1024x1024


@dataclass(frozen=True)
class Coding:
    """How K, or V, is packed."""

    bits: int  # of a code
    by_channel: bool  # over runs of keys; otherwise by token and head

    @property
    def together(self) -> int:
        """Neighbouring keys that are coded together."""
        return RUN if self.by_channel else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane: the powers of two that sum up to `bits`."""
        return tuple(width for width in (8, 4, 2, 1) if self.bits & width)

    def nbytes(self, batch: int, keys: int, heads: int, width: int) -> int:
        """Bytes of `Codes`."""
        plane = sum(-(-width * bits // 8) for bits in self.widths)
        scales = -(-keys // RUN) * 2 * width if self.by_channel else keys
        return batch * heads * (keys * plane + 2 * scales)


class Codes(NamedTuple):
    """Packed K or V. The bits of a code lie in planes of 8, 4, 2 or 1 bits, the highest first; a
    byte of a plane has neighbouring channels, the first in its lowest bits."""

    planes: tuple[UInt8[Array, "B S N _"], ...]
    step: BFloat16[Array, "B R N C"]
    low: BFloat16[Array, "B R N C"] | None  # None: by token


def empty(coding: Coding, batch: int, keys: int, heads: int, width: int) -> Codes:
    """Zeros in the shape of packed K or V."""
    planes = (
        jnp.zeros((batch, keys, heads, -(-width * bits // 8)), jnp.uint8) for bits in coding.widths
    )
    rows, columns = -(-keys // coding.together), width if coding.by_channel else 1
    # each an array of its own: a program may donate all of them
    step, low = (jnp.zeros((batch, rows, heads, columns), jnp.bfloat16) for _ in range(2))
    return Codes(tuple(planes), step, low if coding.by_channel else None)


def encode(
    x: Float32[Array, "B S N H"], valid: Bool[Array | np.ndarray, "B S"], coding: Coding
) -> Codes:
    """`x` packed. Keys that are not `valid` move no scale: a batch gives the bits of single
    pictures."""
    most = 2**coding.bits - 1
    if coding.by_channel:
        low, high = _range_of_runs(x, valid)
        low = low.astype(jnp.bfloat16)
        step = _step((high - low.astype(jnp.float32)) / most)
        steps = _to_keys(step, x.shape[1])
        scaled = (x - _to_keys(low, x.shape[1])) / steps
    else:
        half = 2 ** (coding.bits - 1)
        low, step = None, _step(jnp.max(jnp.abs(x), -1, keepdims=True) / (half - 1))
        scaled = x / step.astype(jnp.float32) + half
    codes = jnp.clip(jnp.round(scaled), 0, most).astype(jnp.uint8)
    return Codes(pack(codes, coding), step, low)


def decode(codes: Codes, coding: Coding, width: int) -> Float32[Array, "B S N H"]:
    """The values of heads of `width` channels."""
    code = unpack(codes.planes, coding, width).astype(jnp.float32)
    if codes.low is None:
        return (code - 2 ** (coding.bits - 1)) * codes.step.astype(jnp.float32)
    keys = code.shape[1]
    return _to_keys(codes.low, keys) + code * _to_keys(codes.step, keys)


def _step(step: Float32[Array, "B R N C"]) -> BFloat16[Array, "B R N C"]:
    """Rounded; 1 where all values are equal."""
    step = step.astype(jnp.bfloat16)
    return jnp.where(step > 0, step, jnp.ones_like(step))


def _range_of_runs(
    x: Float32[Array, "B S N H"], valid: Bool[Array | np.ndarray, "B S"]
) -> tuple[Float32[Array, "B R N H"], Float32[Array, "B R N H"]]:
    """Each channel's smallest and largest valid value in each run of keys; zeros if there is
    none."""
    batch, keys, *head = x.shape

    def in_runs(fill: float) -> Float[Array, "B R run N H"]:
        filled = jnp.where(valid[..., None, None], x, fill)
        filled = jnp.pad(filled, ((0, 0), (0, -keys % RUN), (0, 0), (0, 0)), constant_values=fill)
        return filled.reshape(batch, -1, RUN, *head)

    low, high = jnp.min(in_runs(jnp.inf), 2), jnp.max(in_runs(-jnp.inf), 2)
    return jnp.where(low <= high, low, 0.0), jnp.where(low <= high, high, 0.0)


def _to_keys(scale: BFloat16[Array, "B R N H"], keys: int) -> Float32[Array, "B S N H"]:
    """Each run's scale for all of its keys."""
    return jnp.repeat(scale.astype(jnp.float32), RUN, axis=1)[:, :keys]


# -- planes of bits --------------------------------------------------------------------------------


def pack(codes: UInt8[Array, "B S N H"], coding: Coding) -> tuple[UInt8[Array, "B S N _"], ...]:
    """The planes of codes below 2 ** bits."""
    planes, shift = [], coding.bits
    for bits in coding.widths:
        shift -= bits
        part, per_byte = (codes >> shift) & (2**bits - 1), 8 // bits
        part = jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, -codes.shape[3] % per_byte)))
        part = part.reshape(*codes.shape[:3], -1, per_byte)
        shifted = (part[..., i] << (bits * i) for i in range(per_byte))
        planes.append(functools.reduce(jnp.bitwise_or, shifted))
    return tuple(planes)


def unpack(
    planes: tuple[UInt8[Array, "B S N _"], ...], coding: Coding, width: int
) -> UInt8[Array, "B S N H"]:
    """The codes of heads of `width` channels: the inverse of `pack`."""
    codes = None
    for plane, bits in zip(planes, coding.widths, strict=True):
        shifts = last_axis(jnp.arange(0, 8, bits, dtype=jnp.uint8), 5)
        part = (plane[..., None] >> shifts) & (2**bits - 1)
        part = part.reshape(*plane.shape[:3], -1)[..., :width]
        codes = part if codes is None else (codes << bits) | part
    assert codes is not None
    return codes
