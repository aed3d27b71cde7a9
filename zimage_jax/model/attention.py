"""Attention for every case the model has, and the rule by which it is computed.

Axes: B pictures, T queries, S keys, N query heads, M key heads (N is a multiple of M), H head
width."""

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

KERNELS_FROM = (8, 0)  # capability; the tensor cores of Turing, 7.5, know no bfloat16
WIDEST_HEAD = 128  # of cuDNN before Hopper; ours is built to fit sm_86's 99 KiB of shared memory
# Capabilities where "auto" means cuDNN's kernel. None: its first run captures a stream that copies
# of other threads then break, and no measurement on a GPU shows yet that it is faster than ours
CUDNN_BY_DEFAULT: frozenset[tuple[int, int]] = frozenset()
CPU_SCORES, GPU_SCORES = 2**25, 2**28  # bytes of float32 scores at once: a CPU's stay in cache


class Target(NamedTuple):
    """The device that programs are compiled for."""

    platform: str  # as JAX names it: "cpu", "gpu"
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU

    def __str__(self) -> str:
        return "sm_{}{}".format(*self.capability) if self.capability else self.platform


@dataclass(frozen=True)
class Attend:
    """How attention is computed on `target`, from what the job asks for in `wanted`:

    - "chunks": XLA computes the scores of some queries at a time: of as many as keep them within
      32 MiB on a CPU and 256 MiB on a GPU, and of at most `query_chunk`. Causal scores, which are
      the text encoder's over at most 512 tokens, are computed at once.
    - "flash": a Pallas-Triton kernel that stores no scores. Takes float16 and bfloat16, heads of at
      most 128, capability 8.0 or newer. Not float32: TF32 would not be float32, and without tensor
      cores Triton's products (64 x 32 tiles, sm_86) read 296 times 16 bytes of shared memory for
      2,048 multiply-adds of a thread, which bounds them to 43 % of the FLOP/s; cuBLAS, which
      computes the chunks, has no such bound.
    - "cudnn": cuDNN's kernel. Takes what "flash" takes if heads are a multiple of 8 wide and there
      is no bias: cuDNN would round it to 16 bits (a key that stands for 16 would weigh 0.7 % less).
    - "auto": "flash" where it takes the dtype and the heads, else "chunks".

    The kernel changes the last bits. It therefore follows from the job, the device and the shapes;
    never from the memory budget, and never from which packages are installed: where "auto" is
    "flash" and Pallas-Triton is missing, that is an error.

    Raises UsageError for an unknown word."""

    wanted: str = "auto"
    target: Target = Target("cpu")
    query_chunk: int | None = None

    def __post_init__(self):
        if self.wanted not in CHOICES:
            raise UsageError(f"attention {self.wanted!r}: expected one of {', '.join(CHOICES)}")

    def implementation(
        self, dtype, width: int, *, biased: bool = False
    ) -> Literal["chunks", "flash", "cudnn"]:
        """The rule, for heads of one width. Raises UsageError where the wanted kernel does not take
        them."""
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
        """Queries whose scores are computed at once under "chunks"."""
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
    """softmax(q k / sqrt(H) + bias) v. Keys from `lengths` on are masked. Scores, bias and softmax
    are in float32.

    Raises UsageError where `attend` wants a kernel that does not take these arrays."""
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
    """`attention` by XLA, with the scores of `chunk` queries at once."""
    queries = q.shape[1]
    if chunk >= queries:
        return _attend_chunk(q, k, v, lengths, bias, 0 if causal else None)
    # Every chunk has the same shape, so one loop body serves them all; the surplus queries are
    # dropped.
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
    # heads before tokens: both products are then plain batched matrix products, twice as fast on a
    # CPU. The query heads of one key head stand in one run of rows
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

TILE = (128, 64)  # queries and keys at once: 96 KiB of shared memory for heads of 128 in 16 bits
MASKED = -1e30  # a score: finite, for the difference of two infinities is no number
LOG2E = math.log2(math.e)  # a GPU has an instruction for powers of 2


def _pallas():
    """Pallas and its Triton parts, which JAX 0.11 announces will be removed. Loaded on first use:
    a CPU needs neither."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError:
        raise UsageError(
            f"attention on this GPU needs Pallas-Triton, which jax {jax.__version__} lacks: "
            "install jax 0.10 or 0.11, or ask for --attention chunks"
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
    """`attention` by one kernel that keeps running sums of a tile of queries and stores no scores.
    (FlashAttention-2, arXiv 2307.08691)

    `tile` is queries and keys at once, powers of 2 of at least 16. With `interpret` it runs on any
    device, slowly.

    Raises UsageError where this JAX has no Pallas-Triton."""
    pallas, triton = _pallas()
    (batch, queries, heads, width), (keys, key_heads) = q.shape, k.shape[1:3]
    padded = max(16, pallas.next_power_of_2(width))  # a tensor core multiplies 16 channels at least
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
        # with 4 warps heads of 128 spill 376 bytes of registers, with 8 none (sm_86 to sm_120)
        compiler_params=triton.CompilerParams(num_warps=8 if padded > 64 else 4, num_stages=2),
        interpret=interpret,
        name="flash",
    )(*arrays)


def _kernel(*refs, shape, tile, causal, has_lengths, has_bias):
    """One tile of queries of one head. Triton masks nothing by itself: tiles reach beyond the last
    query, the last key and the width."""
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
    """a times b over this axis of b, summed in float32."""
    return lax.dot_general(
        a, b, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
    )
