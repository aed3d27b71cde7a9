"""The VAE for a device that cannot hold whole maps: in row strips (exact) or tiles (inexact).

A map is the array between two layers. Maps stay on the host; the device holds the weights, one
strip of a layer's input and output, and the program's temporaries. A layer is [norm, silu,]
[upsampling,] convolution [and residual], and computes each strip from its input rows and a halo of
one row. Rows outside the picture are set to zero after norm and silu, as the whole VAE pads there.
Each program also returns the moments of its strip, so that the next norm has the statistics of the
whole map without reading it again. The middle attention runs on the whole map, at latent
resolution, in query chunks.

The host holds at most three maps: a layer's input, its output and the residual.

Axes: B pictures, h, w rows and columns of a map, C channels at any level, H, W pixels; of a strip r
or i input rows, o output rows, v output columns, D output and S residual channels. All arrays are
NHWC.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..errors import UsageError
from .attention import Attend
from .layers import Conv, GroupNorm
from .ops import last_axis
from .vae import VAE, Decoder, Encoder, MiddleAttention, ResnetBlock, decode, upsample

Shape = tuple[int, int, int, int]  # B h w C
# run(function, *arguments, **static): compile once per shapes and static keywords, then run
Run = Callable


class Resample(NamedTuple):
    """How a convolution changes the size of its map: times `up`, divided by `down`."""

    up: int = 1
    down: int = 1
    before: int = 1  # rows of padding above the map; below it is always one


SAME, UP, DOWN = Resample(), Resample(up=2), Resample(down=2, before=0)


@dataclass(frozen=True)
class Map:
    """The array between two layers, with mean and variance over its rows and columns."""

    values: Float[np.ndarray, "B h w C"]
    mean: Float[np.ndarray, "B C"]
    variance: Float[np.ndarray, "B C"]

    def window(
        self, first: int, count: int
    ) -> tuple[Float[np.ndarray, "B r w C"], Bool[np.ndarray, "r"]]:
        """`count` rows from row `first` on, zero outside the map, and a mask of the rows inside."""
        rows = np.arange(first, first + count)
        begin, end = max(first, 0), min(first + count, self.values.shape[1])
        values, outside = self.values[:, begin:end], (begin - first, first + count - end)
        if any(outside):
            values = np.pad(values, ((0, 0), outside, (0, 0), (0, 0)))
        return values, (rows >= begin) & (rows < end)

    def statistics(
        self, norm: GroupNorm
    ) -> tuple[Float[np.ndarray, "B 1 1 C"], Float[np.ndarray, "B 1 1 C"]]:
        """Mean and reciprocal standard deviation of each channel's group, float32."""
        b, c = self.mean.shape

        def of_group(per_channel: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
            mean = per_channel.reshape(b, norm.groups, c // norm.groups).mean(-1)
            return np.repeat(mean, c // norm.groups, -1)

        mean = of_group(self.mean)
        factor = 1 / np.sqrt(of_group(self.variance + np.square(self.mean - mean)) + norm.eps)
        shape = b, 1, 1, c
        return mean.astype(np.float32).reshape(shape), factor.astype(np.float32).reshape(shape)


def _unmeasured(values: Float[np.ndarray, "B h w C"]) -> Map:
    """A map without a norm behind it: its moments are zeros, and unused."""
    moments = np.zeros((values.shape[0], values.shape[3]))
    return Map(values, moments, moments)


# -- programs --------------------------------------------------------------------------------------


def _convolve(
    modules: tuple[Conv, GroupNorm | None, Conv | None],
    x: Float[Array, "B i w C"],
    inside: Bool[Array, "i"],
    statistics: tuple[Float[Array, "B 1 1 C"], ...],
    residual: Float[Array, "B o v S"] | None,
    kept: Int[Array, ""],
    *,
    resample: Resample,
) -> tuple[Float[Array, "B o v D"], Float[Array, "B D"], Float[Array, "B D"]]:
    """A strip of output, and mean and variance of its first `kept` rows. The other rows are below
    the picture."""
    conv, norm, shortcut = modules
    if norm is not None:
        x = jax.nn.silu(_normalise(norm, x, *statistics)).astype(x.dtype)
    x = jnp.where(inside[None, :, None, None], x, 0)
    if resample.up == 2:
        x = upsample(x)[:, 1:-1]
    y = conv(x, stride=resample.down, padding=((0, 0), (resample.before, 1)))
    if residual is not None:
        y = y + (residual if shortcut is None else shortcut(residual, padding="VALID"))
    return y, *_moments(y, kept)


def _attend(
    attention: MiddleAttention, x: Float[Array, "B h w C"], *, attend: Attend
) -> tuple[Float[Array, "B h w C"], Float[Array, "B C"], Float[Array, "B C"]]:
    """The middle attention of a whole map, with the mean and variance of the result."""
    y = attention(x, attend)
    return y, *_moments(y, jnp.int32(y.shape[1]))


def _normalise(
    norm: GroupNorm,
    x: Float[Array, "B h w C"],
    mean: Float[Array, "B 1 1 C"],
    factor: Float[Array, "B 1 1 C"],
) -> Float[Array, "B h w C"]:
    """ops.group_norm with given statistics (Map.statistics). Float32; the caller rounds."""
    scale, bias = (last_axis(p[...].astype(jnp.float32), 4) for p in (norm.scale, norm.bias))
    return (x.astype(jnp.float32) - mean) * (factor * scale) + bias


def _moments(
    y: Float[Array, "B h w C"], kept: Int[Array, ""]
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Mean and variance over the first `kept` rows, float32."""
    y, is_kept = y.astype(jnp.float32), (jnp.arange(y.shape[1]) < kept)[None, :, None, None]
    pixels = (kept * y.shape[2]).astype(jnp.float32)
    mean = jnp.sum(jnp.where(is_kept, y, 0), (1, 2)) / pixels
    squares = jnp.square(y - mean[:, None, None])
    return mean, jnp.sum(jnp.where(is_kept, squares, 0), (1, 2)) / pixels


# -- layers ----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The arguments of `run` for one strip of one layer."""

    function: Callable
    arguments: tuple  # the weights, then the arrays of the strip
    static: dict


@dataclass(frozen=True)
class Convolution:
    """[norm, silu,] [upsampling,] convolution [and, at the end of a residual block, the residual].

    The residual is the block's input, through `shortcut` where the number of channels changes.
    """

    conv: Conv
    norm: GroupNorm | None = None
    resample: Resample = SAME
    ends_block: bool = False
    shortcut: Conv | None = None

    def shape(self, x: Shape) -> Shape:
        """The output's shape for an input of shape `x`."""
        (b, h, w, _), (up, down, _) = x, self.resample
        return b, h * up // down, w * up // down, self.conv.kernel.shape[3]

    def row_size(self, x: Shape) -> int:
        """Elements on the device per row of output: the input as copied and as convolved
        (upsampled), the residual, and the output before and after its rounding."""
        (b, _, w, c), (_, _, v, d), (up, down, _) = x, self.shape(x), self.resample
        residual = (self.shortcut or self.conv).kernel.shape[2] if self.ends_block else 0
        return b * (w * c * down // up + w * c * down * up + v * (residual + 2 * d))

    def costs(self, x: Shape) -> tuple[int, int]:
        """Multiply-adds, and elements copied to the device and back in strips, without halos."""
        read, made = math.prod(x), math.prod(self.shape(x))
        inner = self.conv.kernel.size
        if self.ends_block:
            block_input = (self.shortcut or self.conv).kernel.shape[2]
            read += made // self.conv.kernel.shape[3] * block_input
            inner += self.shortcut.kernel.size if self.shortcut is not None else 0
        return made // self.conv.kernel.shape[3] * inner, read + made

    def strip_rows(self, x: Shape, size: int) -> int:
        """Rows of output per strip, for strips of at most `size` elements (but at least one row,
        or two after upsampling) and of equal height."""
        up = self.resample.up
        height = self.shape(x)[1] // up
        strips = math.ceil(height / max(1, size // (up * self.row_size(x))))
        return up * math.ceil(height / strips)

    def call(self, x: Map, block_input: Map, first: int, size: int) -> Call:
        """The strip whose output begins at row `first`. All strips of a layer have one shape."""
        (up, down, before), shape = self.resample, x.values.shape
        rows = self.strip_rows(shape, size)
        window, inside = x.window(first * down // up - before, rows * down // up + before + 1)
        statistics = () if self.norm is None else x.statistics(self.norm)
        residual = block_input.window(first, rows)[0] if self.ends_block else None
        kept = np.int32(min(rows, self.shape(shape)[1] - first))
        modules = self.conv, self.norm, self.shortcut
        return Call(
            _convolve,
            (modules, window, inside, statistics, residual, kept),
            {"resample": self.resample},
        )


@dataclass(frozen=True)
class Attention:
    """The middle attention, as a layer with one strip: the whole map. Methods as Convolution's."""

    attention: MiddleAttention
    attend: Attend

    def shape(self, x: Shape) -> Shape:
        return x

    def row_size(self, x: Shape) -> int:
        return 0

    def costs(self, x: Shape) -> tuple[int, int]:
        b, h, w, c = x
        return b * h * w * (4 * c * c + 2 * h * w * c), 2 * math.prod(x)

    def strip_rows(self, x: Shape, size: int) -> int:
        return x[1]

    def call(self, x: Map, block_input: Map, first: int, size: int) -> Call:
        b, h, w, _ = x.values.shape
        # per score: the score and its weight, each in float32 and rounded: four elements of a strip
        attend = replace(self.attend, query_chunk=max(1, size // (4 * b * h * w)))
        return Call(_attend, (self.attention, x.values), {"attend": attend})


def _layers(half: Decoder | Encoder, attend: Attend) -> list[Convolution | Attention]:
    """The layers of the module's __call__, in order."""

    def resnet(block: ResnetBlock) -> list[Convolution | Attention]:
        return [
            Convolution(block.conv1, block.norm1),
            Convolution(block.conv2, block.norm2, ends_block=True, shortcut=block.conv_shortcut),
        ]

    if isinstance(half, Decoder):
        blocks = [(block.resnets, block.upsampler, UP) for block in half.up_blocks]
    else:
        blocks = [(block.resnets, block.downsampler, DOWN) for block in half.down_blocks]
    levels: list[Convolution | Attention] = []
    for resnets, resampler, resample in blocks:
        levels += [layer for block in resnets for layer in resnet(block)]
        if resampler is not None:
            levels.append(Convolution(resampler, resample=resample))
    before, after = half.middle.resnets
    middle = [*resnet(before), Attention(half.middle.attention, attend), *resnet(after)]
    inner = middle + levels if isinstance(half, Decoder) else levels + middle
    return [Convolution(half.conv_in), *inner, Convolution(half.conv_out, half.norm_out)]


def _strip_size(layers: list, shape: Shape, rows: int) -> int:
    """Elements of a strip of `rows` rows in the layer with the widest rows."""
    widest = 0
    for layer in layers:
        widest, shape = max(widest, layer.row_size(shape)), layer.shape(shape)
    return rows * widest


# -- the walk --------------------------------------------------------------------------------------


def _walk(
    half: Decoder | Encoder,
    values: Float[np.ndarray, "B h w C"],
    rows: int,
    run: Run,
    attend: Attend,
) -> np.ndarray:
    """`half` applied to `values`, layer by layer."""
    layers = _layers(half, attend)
    size = _strip_size(layers, values.shape, rows)
    x = block_input = _unmeasured(values)
    for layer in layers:
        # a residual block is two layers: the block's input is the previous layer's input
        block_input, x = x, _by_strips(layer, x, block_input, size, run)
    return x.values


def _by_strips(
    layer: Convolution | Attention, x: Map, block_input: Map, size: int, run: Run
) -> Map:
    """The output of one layer, strip by strip. Its moments combine those of the strips."""
    shape = layer.shape(x.values.shape)
    rows, values = layer.strip_rows(x.values.shape, size), np.empty(shape, x.values.dtype)
    moments = []
    for first in range(0, shape[1], rows):
        function, arguments, static = layer.call(x, block_input, first, size)
        y, *strip_moments = map(np.asarray, run(function, *arguments, **static))
        part = values[:, first : first + rows]
        part[...] = y[:, : part.shape[1]]
        moments.append((part.shape[1] / shape[1], *strip_moments))
    shares, means, variances = (np.stack(m).astype(np.float64) for m in zip(*moments, strict=True))
    mean = np.tensordot(shares, means, 1)
    return Map(values, mean, np.tensordot(shares, variances + np.square(means - mean), 1))


def decode_strips(
    vae: VAE,
    latents: Float[Array | np.ndarray, "B h w C"],
    dtype,
    rows: int,
    run: Run,
    attend: Attend = Attend(),
) -> Float[np.ndarray, "B H W 3"]:
    """`vae.decode` in strips; it differs by rounding (under 1e-6 in float32).

    A strip has `rows` rows in the layer with the widest rows, and about as many bytes in the other
    layers. Raises UsageError for `rows` below 1.
    """
    z = vae.from_sampler(jnp.asarray(latents)).astype(dtype)
    return _walk(vae.decoder, np.asarray(z), _at_least_one(rows), run, attend).astype(np.float32)


def encode_strips(
    vae: VAE,
    picture: Float[Array | np.ndarray, "B H W 3"],
    dtype,
    rows: int,
    run: Run,
    attend: Attend = Attend(),
) -> Float[np.ndarray, "B h w C"]:
    """`vae.encode` in strips, like `decode_strips`."""
    out = _walk(vae.encoder, np.asarray(picture).astype(dtype), _at_least_one(rows), run, attend)
    mean, _ = np.split(out.astype(np.float32), 2, -1)
    return np.asarray(vae.to_sampler(jnp.asarray(mean)))


def _at_least_one(rows: int) -> int:
    if rows < 1:
        raise UsageError(f"rows of a VAE strip: expected at least one row, got {rows}")
    return rows


def strip_programs(
    half: Decoder | Encoder, shape: Shape, dtype, rows: int, attend: Attend = Attend()
) -> list[Call]:
    """Every program that `decode_strips` or `encode_strips` runs, with ShapeDtypeStruct arguments:
    compile one for any device and read its memory_analysis().

    The attention comes first, then the convolutions, those with the largest strips first. `shape`:
    the latents' or the picture's. `half` may be a spec.
    """
    layers = _layers(half, attend)
    size = _strip_size(layers, shape, rows)
    x = block_input = _blank(shape, dtype)
    programs = {}
    for layer in layers:
        function, arguments, static = layer.call(x, block_input, 0, size)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        leaves, tree = jax.tree.flatten(abstract)
        shape = x.values.shape
        width = (
            math.inf
            if isinstance(layer, Attention)
            else layer.strip_rows(shape, size) * layer.row_size(shape)
        )
        key = function, tree, *((a.shape, a.dtype) for a in leaves), *static.items()
        programs[key] = width, Call(function, abstract, static)
        block_input, x = x, _blank(layer.shape(shape), dtype)
    return [call for _, call in sorted(programs.values(), key=lambda program: -program[0])]


def layer_costs(half: Decoder | Encoder, shape: Shape) -> Iterator[tuple[int, int]]:
    """For each layer in order: multiply-adds, and elements copied to the device and back when it
    runs in strips. `shape`: the latents' or the picture's."""
    for layer in _layers(half, Attend()):
        yield layer.costs(shape)
        shape = layer.shape(shape)


def _blank(shape: Shape, dtype) -> Map:
    """A map of zeros that takes no memory."""
    return _unmeasured(np.broadcast_to(np.zeros((), dtype), shape))


# -- tiles -----------------------------------------------------------------------------------------


def decode_tiles(
    vae: VAE,
    latents: Float[Array | np.ndarray, "B h w C"],
    dtype,
    tile: int,
    run: Run,
    attend: Attend = Attend(),
) -> Float[np.ndarray, "B H W 3"]:
    """`vae.decode` of square tiles, which overlap by a quarter or more and are blended linearly.

    Fast and inexact: each tile's norms use the tile's statistics. Exact if one tile covers the
    picture. `tile`: side in pixels. Raises UsageError if it is not a multiple of two latents.
    """
    latents, scale = np.asarray(latents), vae.scale
    if tile < 1 or tile % (2 * scale):
        raise UsageError(f"the side of a tile must be a multiple of {2 * scale} pixels, got {tile}")
    b, h, w, _ = latents.shape
    side = tile // scale
    picture = np.zeros((b, h * scale, w * scale, 3), np.float32)
    total = np.zeros((h * scale, w * scale, 1), np.float32)
    for top, row_weights in _spans(h, side, scale):
        for left, column_weights in _spans(w, side, scale):
            square = latents[:, top : top + side, left : left + side]
            decoded = run(decode, vae, square, dtype=dtype, attend=attend)
            weights = np.outer(row_weights, column_weights)[:, :, None]
            rows, columns = (slice(at * scale, (at + side) * scale) for at in (top, left))
            picture[:, rows, columns] += weights * np.asarray(decoded)
            total[rows, columns] += weights
    return picture / total


def _spans(length: int, side: int, scale: int) -> Iterator[tuple[int, Float[np.ndarray, "t"]]]:
    """The tiles along one axis: start in latents, and weight of each pixel. Weights fall towards
    the next tile, over the overlap, but not towards the picture's edge."""
    last, overlap = max(length - side, 0), math.ceil(side / 4)
    pixels, ramp = min(side, length) * scale, overlap * scale
    distance = (np.arange(pixels, dtype=np.float32) + 0.5) / ramp
    for begin in [*range(0, last, side - overlap), last]:
        weights = np.ones(pixels, np.float32)
        if begin > 0:
            weights = np.minimum(weights, distance)
        if begin < last:
            weights = np.minimum(weights, distance[::-1])
        yield begin, weights
