"""Layers: parameters and the one operation that uses them.

A new layer is a spec: its parameters are ShapeDtypeStructs, so that building a 6 B model is cheap.
`with_arrays` replaces them by arrays. nnx.Linear and the like trace an initialiser per parameter
(40 ms per block under `nnx.eval_shape`) and have a dozen static attributes that every dispatch
compares.

A layer computes in the dtype of its input; its parameters may be stored in another dtype.

Axes: B pictures, h, w rows and columns, C channels, D width, i and o a layer's inputs and outputs,
*b any leading axes.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from . import encoded, ops

Module = TypeVar("Module")


def parameter(*shape: int) -> nnx.Param:
    """A parameter without an array yet: a float32 ShapeDtypeStruct."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


class Side(NamedTuple):
    """What LoRAs add to a Linear's result: x @ down @ up + x @ kernel + bias, and of DoRAs, with K
    the Linear's own kernel, (x @ K) * rows + (x * columns) @ K.

    `kernel` is for changes that no matrices of low rank make.
    """

    down: Float[Array | np.ndarray, "i r"] | None = None
    up: Float[Array | np.ndarray, "r o"] | None = None
    kernel: Float[Array | np.ndarray, "i o"] | None = None
    rows: Float[Array | np.ndarray, "o"] | None = None
    columns: Float[Array | np.ndarray, "i"] | None = None
    bias: Float[Array | np.ndarray, "o"] | None = None

    def of_own(self, x: Float[Array, "n i"], own: Any, dtype) -> Float[Array, "n o"]:
        """What the Linear's own kernel gives with rows and columns: x @ K without them."""
        if self.columns is None:
            y = encoded.product(x, own, dtype)
            return y if self.rows is None else _times_one_more(y, self.rows)
        y = encoded.product(_times_one_more(x, self.columns), own, dtype)
        if self.rows is None:
            return y
        # DoRAs of both kinds: (x * (1 + columns)) @ K + (x @ K) * rows
        of_rows = encoded.product(x, own, dtype).astype(jnp.float32)
        added = of_rows * ops.last_axis(jnp.asarray(self.rows, jnp.float32), 2)
        return (y.astype(jnp.float32) + added).astype(dtype)

    def added(self, y: Float[Array, "n o"], x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """`y` and what this side adds for `x`, in y's dtype.

        In float16 x @ down may be beyond its range, and is scaled for the second product.
        """
        if self.down is not None:
            assert self.up is not None
            low, factor = encoded.product(x, self.down, ops.wide(x.dtype)), None
            if x.dtype == jnp.float16:
                low, factor = ops.rows_in_range(low)
            high = encoded.product(low, self.up, ops.wide(y.dtype))
            y = y + (high if factor is None else high * factor).astype(y.dtype)
        if self.kernel is not None:
            y = y + encoded.product(x, self.kernel, y.dtype)
        return y if self.bias is None else y + ops.last_axis(jnp.asarray(self.bias, y.dtype), 2)


def _times_one_more(
    x: Float[Array, "n D"], more: Float[Array | np.ndarray, "D"]
) -> Float[Array, "n D"]:
    """x * (1 + more), rounded once to x's dtype."""
    factor = 1 + ops.last_axis(jnp.asarray(more, jnp.float32), 2)
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel + bias; the result is in `out_dtype`, by default x's. (PyTorch `Linear`)

    The kernel is an array, or one of the trees of model.encoded. `side`: a parameter with a Side,
    where LoRAs change the layer.
    """

    side: nnx.Param | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True):
        self.kernel = parameter(d_in, d_out)
        self.bias = parameter(d_out) if bias else None

    def __call__(
        self, x: Float[Array, "*b i"], out_dtype=None, *, in_turn: bool = False
    ) -> Float[Array, "*b o"]:
        """`in_turn`: an encoded kernel is decoded when x is there, not before."""
        kernel = self.kernel.get_value()
        if in_turn:
            x, kernel = encoded.decoded_after(x, kernel)
        # one matrix: on a CPU the kernel's gradient is three times as slow over two contracted axes
        rows = x.reshape(-1, x.shape[-1])
        dtype = out_dtype or x.dtype
        if self.side is None:
            y = encoded.product(rows, kernel, dtype)
        else:
            side = self.side.get_value()
            y = side.added(side.of_own(rows, kernel, dtype), rows)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + ops.last_axis(self.bias[...].astype(y.dtype), y.ndim)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with statistics in float32. (PyTorch `RMSNorm`)

    `change`: a parameter that LoRAs add to the scale.
    """

    change: nnx.Param | None = None

    def __init__(self, width: int, eps: float):
        self.scale = parameter(width)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*b D"], factor: Array | None = None, out_dtype=None
    ) -> Float[Array, "*b D"]:
        """`factor` multiplies the result before it is rounded to `out_dtype` (default: x's)."""
        scale = self.scale[...]
        if self.change is not None:
            scale = scale.astype(jnp.float32) + self.change[...].astype(jnp.float32)
        y = ops.rms_norm(x, scale, self.eps)
        return (y if factor is None else y * factor).astype(out_dtype or x.dtype)


def gated(x: Float[Array, "*b D"], gate: Linear, up: Linear, down: Linear) -> Float[Array, "*b D"]:
    """down(silu(gate x) * up x), the feed-forward of DiT and text encoder, in the dtype `ops.wide`
    gives.

    In float16 the product of two outliers overflows, and so does the output of `down`
    (stable-diffusion.cpp divides its input by 128). Each token's product is therefore divided by a
    power of two, and the output multiplied by it.
    """
    opened = gate(x, in_turn=True)
    opened, x = encoded.computed_after(opened, x, up.kernel.get_value())
    opened, values = jax.nn.silu(opened), up(x, in_turn=True)
    if x.dtype != jnp.float16:
        return down(opened * values, in_turn=True)
    hidden, scale = ops.rows_in_range(opened.astype(jnp.float32) * values.astype(jnp.float32))
    return down(hidden, jnp.float32, in_turn=True) * scale


class Conv(nnx.Module):
    """2-D convolution, NHWC with HWIO kernels. (PyTorch `Conv2d`)"""

    def __init__(self, c_in: int, c_out: int, size: int = 3):
        self.kernel = parameter(size, size, c_in, c_out)
        self.bias = parameter(c_out)

    def __call__(
        self, x: Float[Array, "B h w i"], *, stride: int = 1, padding=((1, 1), (1, 1))
    ) -> Float[Array, "B h2 w2 o"]:
        y = lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + ops.last_axis(self.bias[...].astype(y.dtype), y.ndim)


class GroupNorm(nnx.Module):
    """Group norm with statistics in float32. (PyTorch `GroupNorm`)"""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6):
        self.scale = parameter(channels)
        self.bias = parameter(channels)
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return ops.group_norm(x, self.scale[...], self.bias[...], self.groups, self.eps)


# -- modules as named arrays -----------------------------------------------------------------------


def named_arrays(module) -> dict[str, Any]:
    """Path -> parameter; a path is like "layers.0.attention.to_q.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_name(path): leaf for path, leaf in leaves}


def with_arrays(module: Module, array_for: Callable[[str, jax.ShapeDtypeStruct], Any]) -> Module:
    """A copy of `module` with every leaf replaced by `array_for(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: array_for(_name(path), leaf), module)


def initialise(module: Module, key: Array, dtype=jnp.float32) -> Module:
    """A spec with random arrays: kernels of variance 1 / fan-in, tables of variance 1; norms are 1
    and biases 0."""

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
    # an nnx.Param shows its array, or tree of arrays, as "value"
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return ".".join(name for name in names if name != "value")
