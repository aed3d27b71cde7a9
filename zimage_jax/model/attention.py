"""Attention of all three models, and the rule that chooses its implementation.

Axes: B pictures, T queries, S keys, N query heads, M key heads (N is a multiple of M), H head
width.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from ..errors import UsageError
from .ops import last_axis, mapped

CHOICES = ("auto", "flash", "cudnn", "chunks")

# -- the rule --------------------------------------------------------------------------------------

KERNELS_FROM = (8, 0)  # compute capability; tensor cores of Turing (7.5) do not take bfloat16
WIDEST_HEAD = 128  # cuDNN's limit before Hopper; our tiles fit the 99 KiB shared memory of sm_86
# Capabilities where "auto" means cuDNN's kernel. None so far: its first run captures a CUDA stream,
# which a copy from another thread breaks, and no GPU measurement shows that it is faster than ours
CUDNN_BY_DEFAULT: frozenset[tuple[int, int]] = frozenset()
# bytes of the float32 scores computed at once; 32 MiB stay in a CPU's cache
CPU_SCORES, GPU_SCORES = 2**25, 2**28


class Target(NamedTuple):
    """The device that programs are compiled for."""

    platform: str  # JAX's name: "cpu", "gpu"
    capability: tuple[int, int] | None = None  # compute capability; None if not an NVIDIA GPU

    def __str__(self) -> str:
        return "sm_{}{}".format(*self.capability) if self.capability else self.platform


@dataclass(frozen=True)
class Attend:
    """How attention is computed on `target`. `wanted` is the job's option:

    - "chunks": XLA computes attention over one query chunk after another. The size of a query chunk
      keeps the float32 scores within 32 MiB on a CPU and 256 MiB on a GPU, and is at most
      `query_chunk` queries. Causal attention (the text encoder's, at most 512 tokens) is one chunk.
    - "flash": a Pallas-Triton kernel that stores no scores. It takes float16 and bfloat16, heads of
      at most 128 channels, and capability 8.0 or newer. It does not take float32: TF32 is less
      precise, and without tensor cores Triton's products (64 x 32 tiles, sm_86) read 296 times 16
      bytes of shared memory per 2,048 multiply-adds of a thread, which limits them to 43 % of the
      GPU's FLOP/s. cuBLAS, which computes the chunks, has no such limit.
    - "cudnn": cuDNN's kernel. It takes what "flash" takes, if the head width is a multiple of 8 and
      there is no bias: cuDNN would round the bias to 16 bits (a key that stands for 16 tokens would
      weigh 0.7 % less).
    - "auto": "flash" where it takes the dtype and the heads, else "chunks".

    The implementation changes the last bits of the result. It therefore depends on the job, the
    device and the shapes, never on the memory budget or on installed packages: where "auto" means
    "flash" and Pallas-Triton is missing, `attention` raises UsageError.

    Raises UsageError if `wanted` is not in CHOICES.
    """

    wanted: str = "auto"
    target: Target = Target("cpu")
    query_chunk: int | None = None

    def __post_init__(self):
        if self.wanted not in CHOICES:
            raise UsageError(f"attention {self.wanted!r}: expected one of {', '.join(CHOICES)}")

    def implementation(
        self, dtype, width: int, *, biased: bool = False
    ) -> Literal["chunks", "flash", "cudnn"]:
        """The implementation for heads of `width` channels.

        Raises UsageError if the wanted kernel does not take the dtype, width, bias or target.
        """
        if self.wanted == "chunks":
            return "chunks"
        flash, cudnn = self._obstacle(dtype, width), self._cudnn_obstacle(dtype, width, biased)
        if self.wanted == "auto":
            if cudnn is None and self.target.capability in CUDNN_BY_DEFAULT:
                return "cudnn"
            return "chunks" if flash else "flash"
        obstacle = flash if self.wanted == "flash" else cudnn
        if obstacle:
            raise UsageError(f"attention {self.wanted!r} {obstacle}; use auto or chunks")
        return "flash" if self.wanted == "flash" else "cudnn"

    def _obstacle(self, dtype, width: int) -> str | None:
        if self.target.capability is None or self.target.capability < KERNELS_FROM:
            return f"needs an NVIDIA GPU of capability 8.0 or newer, this is {self.target}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"takes bfloat16 and float16, got {jnp.dtype(dtype)}"
        if width > WIDEST_HEAD:
            return f"takes heads of at most {WIDEST_HEAD} channels, got {width}"
        return None

    def _cudnn_obstacle(self, dtype, width: int, biased: bool) -> str | None:
        if width % 8:
            return f"takes heads of a multiple of 8 channels, got {width}"
        if biased:
            return "would round the weights of grouped keys (--kv-group) to 16 bits"
        return self._obstacle(dtype, width)

    def queries_at_once(self, batch: int, queries: int, keys: int, heads: int) -> int:
        """Size of a query chunk: queries whose scores are computed at once under "chunks"."""
        most = CPU_SCORES if self.target.platform == "cpu" else GPU_SCORES
        chunks = math.ceil(queries * 4 * batch * heads * keys / most)
        chunk = math.ceil(queries / chunks / 32) * 32
        return min(chunk, queries, self.query_chunk or queries)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M H"],
    *,
    lengths: Int[Array | np.ndarray, "B"] | None = None,
    bias: Float[np.ndarray, "S"] | None = None,
    causal: bool = False,
    attend: Attend = Attend(),
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H) + bias) v, in q's dtype; scores, bias and softmax are float32.

    Keys at index `lengths` and beyond are masked; `causal` masks keys behind the query. (PyTorch
    `scaled_dot_product_attention`)

    Raises UsageError if `attend` wants a kernel that does not take these arrays.
    """
    kind = attend.implementation(q.dtype, q.shape[-1], biased=bias is not None)
    if kind == "flash":
        return flash(q, k, v, lengths=lengths, bias=bias, causal=causal)
    if kind == "cudnn":
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            query_seq_lengths=None if lengths is None else jnp.full_like(lengths, q.shape[1]),
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    batch, queries, heads, _ = q.shape
    chunk = attend.queries_at_once(batch, queries, k.shape[1], heads)
    if causal:
        chunk = attend.query_chunk or queries
    return in_chunks(q, k, v, lengths=lengths, bias=bias, causal=causal, chunk=chunk)


# -- chunks ----------------------------------------------------------------------------------------


def in_chunks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M H"],
    *,
    lengths: Int[Array | np.ndarray, "B"] | None = None,
    bias: Float[np.ndarray, "S"] | None = None,
    causal: bool = False,
    chunk: int,
) -> Float[Array, "B T N H"]:
    """`attention` by XLA, `chunk` queries at a time."""
    queries = q.shape[1]
    if chunk >= queries:
        return _attend_chunk(q, k, v, lengths, bias, 0 if causal else None)
    # the padded chunks have one shape and share one loop body; the padding is dropped at the end
    count = math.ceil(queries / chunk)
    q = jnp.pad(q, ((0, 0), (0, count * chunk - queries), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(q.shape[0], count, chunk, *q.shape[2:]), 1, 0)
    starts = jnp.arange(count) * chunk
    out = mapped(
        lambda q, start: _attend_chunk(q, k, v, lengths, bias, start if causal else None), q, starts
    )
    return jnp.moveaxis(out, 0, 1).reshape(k.shape[0], count * chunk, *q.shape[3:])[:, :queries]


def _attend_chunk(q, k, v, lengths, bias, first_query):
    batch, queries, heads, width = q.shape
    # With heads before tokens both products are plain batched matrix products, twice as fast on a
    # CPU. The rows t are the queries of all query heads that share key head m
    q = q.swapaxes(1, 2).reshape(batch, k.shape[2], -1, width)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bmth,bmsh->bmts", q, k, preferred_element_type=jnp.float32) / math.sqrt(
        width
    )
    if bias is not None:
        scores = scores + last_axis(jnp.asarray(bias), 4)
    key = jnp.arange(k.shape[2])[None, None, None]
    if lengths is not None:
        scores = jnp.where(key < lengths[:, None, None, None], scores, -jnp.inf)
    if first_query is not None:
        query = jnp.tile(first_query + jnp.arange(queries), heads // k.shape[1])
        scores = jnp.where(key <= query[None, None, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bmts,bmsh->bmth", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, queries, width).swapaxes(1, 2).astype(q.dtype)


# -- flash -----------------------------------------------------------------------------------------

TILE = (128, 64)  # queries, keys: 96 KiB of shared memory for heads of 128 channels in 16 bits
MASKED = -1e30  # a masked score; finite, because the difference of two infinities is NaN
LOG2E = math.log2(math.e)  # the kernel computes 2^x, for which a GPU has an instruction


def _pallas():
    """The modules Pallas and Pallas-Triton. JAX 0.11 announces the removal of the latter.

    Imported on first use: a CPU needs neither. Raises UsageError if this JAX lacks them.
    """
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError:
        raise UsageError(
            f"attention on this GPU needs Pallas-Triton, which jax {jax.__version__} lacks: "
            "install jax 0.10 or 0.11, or use --attention chunks"
        ) from None
    return pallas, triton


def flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M H"],
    *,
    lengths: Int[Array | np.ndarray, "B"] | None = None,
    bias: Float[Array | np.ndarray, "S"] | None = None,
    causal: bool = False,
    tile: tuple[int, int] = TILE,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attention` by one kernel that stores no scores. (FlashAttention-2, arXiv 2307.08691)

    For each tile of queries it keeps running sums over tiles of keys. `tile`: (queries, keys),
    powers of 2, at least 16. `interpret`: run on any device, slowly.

    Raises UsageError if this JAX has no Pallas-Triton.
    """
    pallas, triton = _pallas()
    (batch, queries, heads, width), (keys, key_heads) = q.shape, k.shape[1:3]
    padded = max(16, pallas.next_power_of_2(width))  # a tensor core takes 16 channels or more
    of_queries = pallas.BlockSpec(
        (None, tile[0], None, padded), lambda tile, picture, head: (picture, tile, head, 0)
    )
    of_keys = pallas.BlockSpec(
        (None, keys, None, padded),
        lambda tile, picture, head: (picture, 0, head // (heads // key_heads), 0),
    )
    arrays, specs = [q, k, v], [of_queries, of_keys, of_keys]
    if lengths is not None:
        arrays.append(jnp.asarray(lengths, jnp.int32))
        specs.append(pallas.BlockSpec((None,), lambda tile, picture, head: (picture,)))
    if bias is not None:
        arrays.append(jnp.asarray(bias, jnp.float32))
        specs.append(pallas.BlockSpec((keys,), lambda tile, picture, head: (0,)))
    kernel = functools.partial(
        _kernel,
        shape=(queries, keys, width),
        tile=tile,
        causal=causal,
        has_lengths=lengths is not None,
        has_bias=bias is not None,
    )
    return pallas.pallas_call(
        kernel,
        grid=(pallas.cdiv(queries, tile[0]), batch, heads),
        in_specs=specs,
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # heads of 128 channels spill 376 bytes of registers with 4 warps, none with 8
        # (sm_86 to sm_120)
        compiler_params=triton.CompilerParams(num_warps=8 if padded > 64 else 4, num_stages=2),
        interpret=interpret,
        name="flash",
    )(*arrays)


def _kernel(*refs, shape, tile, causal, has_lengths, has_bias):
    """Attention of one tile of queries of one head.

    The last tiles reach beyond the queries, the keys and the width; Triton does not mask them, so
    every load and store here has a mask.
    """
    pallas, triton = _pallas()
    (queries, keys, width), (tile_queries, tile_keys) = shape, tile
    q_ref, k_ref, v_ref, *optional, out_ref = refs
    end = jnp.minimum(optional.pop(0)[...], keys) if has_lengths else keys
    bias_ref = optional.pop(0) if has_bias else None
    first = pallas.program_id(0) * tile_queries
    query = first + jnp.arange(tile_queries)
    channel = (jnp.arange(out_ref.shape[-1]) < width)[None, :]
    inside = (query < queries)[:, None] & channel
    q = triton.load(q_ref, mask=inside, other=0.0)

    def step(index, carry):
        out, largest, total = carry
        at, key = pallas.ds(index * tile_keys, tile_keys), index * tile_keys + jnp.arange(tile_keys)
        counts = key < end
        read = functools.partial(triton.load, mask=counts[:, None] & channel, other=0.0)
        scores = _dot(q, read(k_ref.at[at, :]), 1) * (LOG2E / math.sqrt(width))
        if bias_ref is not None:
            bias = triton.load(bias_ref.at[at], mask=counts, other=0.0)
            scores = scores + bias[None, :] * LOG2E
        seen = counts[None, :]
        if causal:
            seen = seen & (key[None, :] <= query[:, None])
        scores = jnp.where(seen, scores, MASKED)
        before, largest = largest, jnp.maximum(largest, jnp.max(scores, 1))
        weights, fall = jnp.exp2(scores - largest[:, None]), jnp.exp2(before - largest)
        v = read(v_ref.at[at, :])
        out = out * fall[:, None] + _dot(weights.astype(v.dtype), v, 0)
        return out, largest, total * fall + jnp.sum(weights, 1)

    if causal:
        end = jnp.minimum(end, first + tile_queries)
    zeros = jnp.zeros(tile_queries, jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), zeros + MASKED, zeros
    out, _, total = lax.fori_loop(0, pallas.cdiv(end, tile_keys), step, start)
    triton.store(out_ref, (out / total[:, None]).astype(out_ref.dtype), mask=inside)


def _dot(a: Array, b: Array, contracted: int) -> Array:
    """Product of a and b over axis 1 of a and axis `contracted` of b, summed in float32."""
    return lax.dot_general(
        a, b, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
    )
