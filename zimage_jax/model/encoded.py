"""Matrices in fewer bits than the dtype they are computed in, and their products.

A Linear's kernel is an array or one of these trees of arrays, which weights/encodings.py makes on
the host. Each is decoded inside the program that uses it, just before its product. cuBLAS, which
computes the products on a GPU, needs the decoded matrix in memory; one at a time is there.

Axes: n rows of x, i and o a matrix's inputs and outputs, E exceptions.
"""

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int8, Int32, Shaped, UInt8, UInt16

from . import ops

CODES = 16  # exponents that have a code of four bits


class Packed(NamedTuple):
    """A bfloat16 matrix in 12 bits per weight, bit for bit. (As DFloat11, arXiv 2504.11651, it
    spares the exponent, but with codes of one length, which need no kernel of their own.)

    A weight is a byte, sign << 7 | mantissa, and a code of four bits: its exponent is `base` +
    code. The few weights whose exponent has no code are exceptions, listed whole.
    """

    # each row: o bytes of sign and mantissa, then o / 2 bytes of codes, that of column 2c in the
    # low four bits and that of column 2c + 1 in the high ones
    plane: UInt8[Array | np.ndarray, "i packed"]
    base: UInt16[Array | np.ndarray, ""]
    # places of exceptions, row * o + column, strictly ascending; those from i * o on are unused
    places: Int32[Array | np.ndarray, "E"]
    exact: UInt16[Array | np.ndarray, "E"]  # the bits of the weights there

    def decoded(self, dtype) -> Float[Array, "i o"]:
        """The matrix in `dtype`. XLA makes one elementwise kernel and one scatter in place.

        The shift over a trailing axis of 2 is the form that fuses: `stack` makes a concatenation,
        and `repeat` ten kernels.
        """
        rows, columns = self.plane.shape[0], self.plane.shape[1] * 2 // 3
        low = jnp.asarray(self.plane)[:, :columns].astype(jnp.uint16)
        pairs = jnp.asarray(self.plane)[:, columns:, None]
        shifts = lax.broadcasted_iota(jnp.uint8, (1, 1, 2), 2) * jnp.uint8(4)
        codes = (pairs >> shifts & jnp.uint8(CODES - 1)).astype(jnp.uint16).reshape(rows, columns)
        sixteen = jnp.uint16
        bits = (
            (low & sixteen(0x80)) << sixteen(8)
            | (codes + self.base) << sixteen(7)
            | low & sixteen(0x7F)
        )
        bits = bits.reshape(-1)
        bits = bits.at[self.places].set(
            self.exact, mode="drop", unique_indices=True, indices_are_sorted=True
        )
        return lax.bitcast_convert_type(bits.reshape(rows, columns), jnp.bfloat16).astype(dtype)

    def product(self, x: Float[Array, "n i"], dtype) -> Float[Array, "n o"]:
        return ops.product(x, self.decoded(x.dtype), dtype)


class Scaled(NamedTuple):
    """A matrix in int8 with one scale per column: values * scale."""

    values: Int8[Array | np.ndarray, "i o"]
    scale: Float32[Array | np.ndarray, "o"]

    def decoded(self, dtype) -> Float[Array, "i o"]:
        """The matrix in `dtype`. The scale could also come after the product: Triton's products
        would then convert int8 as they read it. Those are off (runtime/program.py), and before
        cuBLAS's a scaled product would be in float32: 135 MiB instead of 54 (sm_89, 1024x1024)."""
        scale = ops.last_axis(jnp.asarray(self.scale), 2)
        return (jnp.asarray(self.values, jnp.float32) * scale).astype(dtype)

    def product(self, x: Float[Array, "n i"], dtype) -> Float[Array, "n o"]:
        return ops.product(x, self.decoded(x.dtype), dtype)


class Rotated(NamedTuple):
    """As Scaled, of a matrix whose inputs were rotated in groups, which spreads outliers. (ComfyUI
    `convrot`)"""

    values: Int8[Array | np.ndarray, "i o"]
    scale: Float32[Array | np.ndarray, "o"]

    def product(self, x: Float[Array, "n i"], dtype) -> Float[Array, "n o"]:
        """x is rotated by the same matrix, which is its own inverse."""
        turned = rotated(x)
        matrix = Scaled(self.values, self.scale)
        if x.dtype != jnp.float16:
            return matrix.product(turned.astype(x.dtype), dtype)
        # a rotated group may be 16 times as large as x
        rows, factor = ops.rows_in_range(turned)
        return (matrix.product(rows, jnp.float32) * factor).astype(dtype)


ENCODED = Packed, Scaled, Rotated


def product(x: Float[Array, "n i"], kernel: Any, dtype) -> Float[Array, "n o"]:
    """x @ kernel, summed in float32 and rounded once to `dtype`. `kernel`: an array [i, o] of any
    dtype, or one of ENCODED."""
    if isinstance(kernel, ENCODED):
        return kernel.product(x, dtype)
    return ops.product(x, kernel.astype(x.dtype), dtype)


# Without these barriers XLA decodes several matrices of a feed-forward at once (75 MiB each), and
# those of several blocks, or it decodes once what a loop uses many times.

Block = TypeVar("Block")


def block_after(x: Shaped[Array, "..."], block: Block) -> tuple[Shaped[Array, "..."], Block]:
    """x and the module of a block, such that its encoded matrices are decoded when x is there."""
    kernels = jax.tree.leaves(block, is_leaf=lambda leaf: isinstance(leaf, ENCODED))
    encoded = any(isinstance(kernel, ENCODED) for kernel in kernels)
    return lax.optimization_barrier((x, block)) if encoded else (x, block)


def decoded_after(x: Shaped[Array, "*b i"], kernel: Any) -> tuple[Shaped[Array, "*b i"], Any]:
    """x and the kernel, such that an encoded kernel is decoded only when x is there."""
    return lax.optimization_barrier((x, kernel)) if isinstance(kernel, ENCODED) else (x, kernel)


def computed_after(
    first: Shaped[Array, "*b o"], x: Shaped[Array, "*b i"], kernel: Any
) -> tuple[Shaped[Array, "*b o"], Shaped[Array, "*b i"]]:
    """`first` and x, such that what uses x waits for `first`; unless the kernel that x is
    multiplied by is an array."""
    return lax.optimization_barrier((first, x)) if isinstance(kernel, ENCODED) else (first, x)


# -- rotation --------------------------------------------------------------------------------------

_H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)


def group_of(inputs: int) -> int:
    """Inputs that are rotated together: the largest power of 4, up to 256, that divides them."""
    return next(n for n in (256, 64, 16, 4, 1) if inputs % n == 0)


def rotation(group: int) -> Float32[np.ndarray, "group group"]:
    """The regular Hadamard matrix of `group` = 4^k rows over its root: symmetric, its own inverse.

    Every row has the same sum, unlike Sylvester's, whose first row is constant and gathers a mean
    into one value. (comfy-kitchen `convrot`)
    """
    made = np.ones((1, 1), np.float32)
    while len(made) < group:
        made = np.kron(made, _H4)
    return made / np.float32(math.sqrt(group))


def rotated(x: Float[Array, "n i"]) -> Float[Array, "n i"]:
    """x with each group of inputs multiplied by `rotation`, in float32."""
    group = group_of(x.shape[1])
    matrix = jnp.asarray(rotation(group), x.dtype)
    turned = lax.dot(x.reshape(-1, group), matrix, preferred_element_type=jnp.float32)
    return turned.reshape(x.shape)
