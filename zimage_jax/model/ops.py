"""Pure functions that the three models share.

Axes: B pictures, T tokens, N heads, H head width, D any width, h, w latent rows and columns, C
latent channels, I image tokens, P values of a patch (4 C), i and o a product's inputs and outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Real, Shaped


def last_axis(vector: Shaped[Array, "D"], ndim: int) -> Shaped[Array, "..."]:
    """The vector reshaped to broadcast along the last axis of an array with `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def product(x: Float[Array, "n i"], kernel: Float[Array, "i o"], dtype) -> Float[Array, "n o"]:
    """x @ kernel, summed in float32 and rounded once to `dtype`.

    On a CPU, XLA converts 16-bit operands to float32 first if the result is 16 bits too: 228
    GFLOP/s, against 720 with a float32 result (288x3840 by 3840x10240, two cores, AVX-512 BF16).
    """
    rounded = functools.partial(lax.dot, preferred_element_type=dtype)
    if jnp.dtype(dtype).itemsize == 4:
        return rounded(x, kernel)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda *both: lax.dot(*both, preferred_element_type=jnp.float32).astype(dtype),
        default=rounded,
    )


# -- float16 ---------------------------------------------------------------------------------------

# float16 ends at 65,504 and has its full 11 bits from 6e-5 on. A float16 residual stream holds
# values times 2^-6: it reaches 4.2 million, with 11 bits from 0.004 on. Within that range a power
# of two changes no bit of the significand.
TOKEN_SCALE = 2.0**-6
Either = TypeVar("Either", Array, np.ndarray)


def wide(dtype) -> np.dtype:
    """The dtype for values that may overflow float16 in a model computed in `dtype`: float32 for
    float16, else `dtype`."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def from_tokens(x: Float[Either, "*b D"]) -> Float[Either, "*b D"]:
    """The true values of the residual stream `x`, in the dtype `wide` gives (see TOKEN_SCALE)."""
    return x.astype(np.float32) / np.float32(TOKEN_SCALE) if x.dtype == jnp.float16 else x


def to_tokens(values: Float[Either, "*b D"], dtype) -> Float[Either, "*b D"]:
    """`values` as a residual stream of `dtype`: times TOKEN_SCALE in float16, else unscaled."""
    if jnp.dtype(dtype) == jnp.float16:
        values = values.astype(np.float32) * np.float32(TOKEN_SCALE)
    return values.astype(dtype)


def add_to_tokens(x: Float[Array, "*b D"], values: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """The residual stream `x` plus `values`, whose dtype is `wide(x.dtype)`."""
    return to_tokens(from_tokens(x) + values, x.dtype)


def rows_in_range(
    x: Float[Array, "*b D"],
) -> tuple[Float[Array, "*b D"], Float[Array, "*b 1"]]:
    """(y, scale) with x = y scale: y is float16, scale a power of two per row, float32.

    The largest element of each row of y is about 1, so that its product with a matrix does not
    overflow float16.
    """
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    scale = lax.reduce_precision(jnp.maximum(largest, jnp.finfo(x.dtype).tiny), 8, 0)
    return (x / scale).astype(jnp.float16), scale


# -- runs of tokens --------------------------------------------------------------------------------

# Most tokens in one run. Products of this size still fill a GPU, and the temporaries are half as
# large at 1024x1024 (4,160 tokens), an eighth at 2048x2048
RUN_TOKENS = 2112
Tree = TypeVar("Tree")


def in_runs(
    function: Callable[..., Tree], *arrays: Shaped[Array | np.ndarray, "B T ..."], together: int = 1
) -> Tree:
    """`function(*arrays)`, computed over runs of at most RUN_TOKENS tokens (axis 1).

    `function` must compute each token independently of all but its neighbours: of the `together`
    tokens that share a row of its result. The length of a run depends on the number of tokens and
    on `together` alone, and so do the bits of the result.
    """
    tokens = arrays[0].shape[1]
    runs = math.ceil(tokens / RUN_TOKENS)
    if runs == 1:
        return function(*arrays)
    multiple = math.lcm(32, together)
    length, padded = (math.ceil(n / multiple) * multiple for n in (tokens / runs, tokens))
    arrays = tuple(
        jnp.pad(a, ((0, 0), (0, padded - tokens), *[(0, 0)] * (a.ndim - 2))) for a in arrays
    )

    def step(run: Array, whole: Tree) -> Tree:
        # the last run repeats the end of the one before: padding would be a copy of every array
        start = jnp.minimum(run * length, padded - length)
        made = function(*(lax.dynamic_slice_in_dim(a, start, length, 1) for a in arrays))

        def put(whole: Shaped[Array, "B rows ..."], made: Shaped[Array, "B some ..."]) -> Array:
            at = start * made.shape[1] // length
            return lax.dynamic_update_slice_in_dim(whole, made, at, 1)

        return jax.tree.map(put, whole, made)

    def room(made: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return (made.shape[0], padded * made.shape[1] // length, *made.shape[2:])

    made = jax.eval_shape(function, *(a[:, :length] for a in arrays))
    whole = lax.fori_loop(0, runs, step, _room(arrays[0], made, room))
    return jax.tree.map(lambda a: a[:, : math.ceil(tokens * a.shape[1] / padded)], whole)


def mapped(function: Callable[..., Tree], *arrays: Shaped[Array, "runs ..."]) -> Tree:
    """`function` of one run after the other, stacked; the first array is of floating point."""
    runs = arrays[0].shape[0]

    def step(run: Array, whole: Tree) -> Tree:
        made = function(*(lax.dynamic_index_in_dim(a, run, keepdims=False) for a in arrays))
        put = functools.partial(lax.dynamic_update_index_in_dim, index=run, axis=0)
        return jax.tree.map(put, whole, made)

    made = jax.eval_shape(function, *(a[0] for a in arrays))
    return lax.fori_loop(0, runs, step, _room(arrays[0], made, lambda made: (runs, *made.shape)))


def _room(
    first: Float[Array | np.ndarray, "..."],
    made: Tree,
    shape: Callable[[jax.ShapeDtypeStruct], tuple[int, ...]],
) -> Tree:
    """Arrays of the `shape` and dtype of each of `made` for a loop over `first` to fill.

    Zeros would wait for nothing, and XLA makes those of all blocks of a chunk at once: 122 MiB a
    block at 1024x1024. These wait for `first`.
    """
    nothing = first[(0,) * first.ndim] * 0
    return jax.tree.map(lambda m: jnp.broadcast_to(nothing.astype(m.dtype), shape(m)), made)


# -- norms -----------------------------------------------------------------------------------------


def rms_norm(
    x: Float[Array, "*b D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "*b D"]:
    """Root-mean-square norm in float32; the caller rounds. (diffusers `RMSNorm`)"""
    x = x.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return normed * last_axis(weight.astype(jnp.float32), x.ndim)


def layer_norm(x: Float[Array, "*b D"], eps: float) -> Float[Array, "*b D"]:
    """Layer norm without scale and bias, in float32. (PyTorch `LayerNorm`)"""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def group_norm(
    x: Float[Array, "B h w C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    groups: int,
    eps: float,
) -> Float[Array, "B h w C"]:
    """Group norm with statistics in float32, rounded once. (torch `GroupNorm`)

    Sums run over rows and columns first and over a group's channels last: a reduction that keeps
    the channels is contiguous, ten times as fast on a CPU as one over a (groups, channels) reshape.
    """
    b, *_, c = x.shape
    y = x.astype(jnp.float32)

    def of_group(per_channel: Float[Array, "B C"]) -> Float[Array, "B 1 1 C"]:
        mean = jnp.mean(per_channel.reshape(b, groups, c // groups), -1)
        return jnp.repeat(mean, c // groups, axis=-1).reshape(b, 1, 1, c)

    y = y - of_group(jnp.mean(y, (1, 2)))
    factor = lax.rsqrt(of_group(jnp.mean(jnp.square(y), (1, 2))) + eps) * last_axis(
        scale.astype(jnp.float32), 4
    )
    return (y * factor + last_axis(bias.astype(jnp.float32), 4)).astype(x.dtype)


# -- rotary positions ------------------------------------------------------------------------------


def rope_table(
    positions: Real[np.ndarray, "*b axes"], axes_dims: tuple[int, ...], theta: float
) -> tuple[Float[np.ndarray, "*b half"], Float[np.ndarray, "*b half"]]:
    """float32 cos and sin of every position's angles, axis after axis (diffusers `RopeEmbedder`).

    Computed on the host in float64: the float32 product of position and frequency is 1e-4 rad off
    at position 1500.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequency = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(positions[..., axis, None].astype(np.float64) * frequency)
    angle = np.concatenate(angles, -1).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def rotate_pairs(
    x: Float[Array, "B T N H"],
    cos: Float[Array | np.ndarray, "B T half"],
    sin: Float[Array | np.ndarray, "B T half"],
) -> Float[Array, "B T N H"]:
    """RoPE of neighbouring pairs (x0, x1), (x2, x3), …, as Z-Image has it. Float32; the caller
    rounds."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b, cos, sin = x[..., 0], x[..., 1], cos[:, :, None], sin[:, :, None]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(*x.shape[:-2], -1)


def rotate_halves(
    x: Float[Array, "B T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "B T N H"]:
    """RoPE of pairs half a head apart, as Qwen3 has it. Float32; the caller rounds."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


# -- pictures and tokens ---------------------------------------------------------------------------


def patchify(x: Float[Array, "B h w C"]) -> Float[Array, "B I P"]:
    """2 x 2 patches in row order; within a patch the order is row, column, channel."""
    b, h, w, c = x.shape
    return (
        x.reshape(b, h // 2, 2, w // 2, 2, c)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(b, h * w // 4, 4 * c)
    )


def unpatchify(x: Float[Array, "B I P"], h: int, w: int) -> Float[Array, "B h w C"]:
    """The inverse of `patchify` for h x w latents."""
    b, _, width = x.shape
    c = width // 4
    return x.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
