"""Layers: parameters and the one operation that uses them. A layer built from sizes alone *is* its
spec.

Every parameter starts as a ShapeDtypeStruct, so that building a 6 B model costs nothing, and is
filled later (`with_arrays`). nnx.Linear and its like trace an initialiser per parameter, 40 ms a
block under `nnx.eval_shape`, and carry a dozen static attributes that every dispatch compares.

A layer computes in the dtype of its input, whatever dtype its parameters are stored in.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from . import ops

Module = TypeVar("Module")


def parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


class Linear(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, bias: bool = True):
        self.kernel = parameter(d_in, d_out)
        self.bias = parameter(d_out) if bias else None

    def __call__(self, x: Float[Array, "*b i"], out_dtype=None) -> Float[Array, "*b o"]:
        # as one matrix: the kernel's gradient over two contracted axes is three times as slow on a
        # CPU
        rows = x.reshape(-1, x.shape[-1])
        y = ops.product(rows, self.kernel[...].astype(x.dtype), out_dtype or x.dtype).reshape(
            *x.shape[:-1], -1
        )
        return y if self.bias is None else y + ops.last_axis(self.bias[...].astype(y.dtype), y.ndim)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = parameter(width)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*b D"], factor: Array | None = None, out_dtype=None
    ) -> Float[Array, "*b D"]:
        """`factor` multiplies the result before it is rounded to `out_dtype` (x's, by default)."""
        y = ops.rms_norm(x, self.scale[...], self.eps)
        return (y if factor is None else y * factor).astype(out_dtype or x.dtype)


def gated(x: Float[Array, "*b D"], gate: Linear, up: Linear, down: Linear) -> Float[Array, "*b D"]:
    """down(silu(gate x) * up x), the feed-forward of DiT and text encoder, in the dtype `ops.wide`
    gives.

    The product of two outliers overflows float16, and so does what `down` makes of it
    (stable-diffusion.cpp divides its input by 128): each token's product is divided by a power of
    two, which multiplies the result."""
    opened, values = jax.nn.silu(gate(x)), up(x)
    if x.dtype != jnp.float16:
        return down(opened * values)
    hidden, scale = ops.rows_in_range(opened.astype(jnp.float32) * values.astype(jnp.float32))
    return down(hidden, jnp.float32) * scale


class Conv(nnx.Module):
    """2-D convolution, NHWC with HWIO kernels."""

    def __init__(self, c_in: int, c_out: int, size: int = 3):
        self.kernel = parameter(size, size, c_in, c_out)
        self.bias = parameter(c_out)

    def __call__(
        self, x: Float[Array, "B h w i"], *, stride: int = 1, padding=((1, 1), (1, 1))
    ) -> Array:
        y = lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + ops.last_axis(self.bias[...].astype(y.dtype), y.ndim)


class GroupNorm(nnx.Module):
    def __init__(self, channels: int, groups: int, eps: float = 1e-6):
        self.scale = parameter(channels)
        self.bias = parameter(channels)
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return ops.group_norm(x, self.scale[...], self.bias[...], self.groups, self.eps)


# -- modules as named arrays -----------------------------------------------------------------------


def named_arrays(module) -> dict[str, Any]:
    """Every parameter by its path, as in "layers.0.attention.to_q.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_name(path): leaf for path, leaf in leaves}


def with_arrays(module: Module, array_for: Callable[[str, jax.ShapeDtypeStruct], Any]) -> Module:
    """The same module with every leaf replaced by `array_for(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: array_for(_name(path), leaf), module)


def initialise(module: Module, key: Array, dtype=jnp.float32) -> Module:
    """Random arrays for a spec: kernels of variance 1 / fan-in, tables of variance 1, norms at one,
    biases at zero."""

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if path.endswith(".bias"):
            return jnp.zeros(leaf.shape, dtype)
        if path.endswith(".scale"):
            return jnp.ones(leaf.shape, dtype)
        fan_in = math.prod(leaf.shape[:-1]) if path.endswith(".kernel") else 1
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.normal(leaf_key, leaf.shape, dtype) / np.sqrt(fan_in).astype(dtype)

    return with_arrays(module, draw)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
