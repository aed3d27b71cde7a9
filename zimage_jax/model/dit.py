"""The S3-DiT of Z-Image: one stream of image and caption tokens (arXiv 2511.22699; diffusers
`ZImageTransformer2DModel`).

Axes:
  B  pictures                 h, w  latent rows and columns     C  latent channels (16)
  I  image tokens: h w / 4, padded to a multiple of 32
  L  caption tokens, padded to a bucket
  T  all tokens, I + L; the image comes first, so that padding is at the end and a length masks it
  S  keys: T, or fewer where the K/V policy groups image tokens
  R  tokens of one run (ops.in_runs)
  D  width (3840)             N  heads (30)       H  head width (128)
  F  feed-forward width (10240)                   A  adaLN width (256)
  E  text feature width (2560)                    half  rotations of a head, H / 2

The model does not manage memory: `Stem` has the parameters outside the blocks, a `Block` is what a
schedule moves. One NFE is `embed_image`, the noise refiner over I tokens, `join` with the context,
the main blocks over T tokens, and `velocity`. The context depends on the prompt alone:
`embed_caption` and the context refiner run once per prompt.

A float16 residual stream holds tokens times ops.TOKEN_SCALE: `embed_image` and `embed_caption`
scale them, `velocity` divides by it. Products that may overflow stay in float32 up to the norm that
follows.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from ..errors import ConfigError
from . import kv, ops
from .attention import Attend
from .config import DiTConfig
from .encoded import block_after
from .kv import KV, KeyTable, KVFormat
from .layers import Linear, RMSNorm, gated, parameter

# the reference pads image and caption to a multiple of this with learned tokens, which are attended
TOKEN_MULTIPLE = 32
TIME_WIDTH, TIME_HIDDEN = 256, 1024
# A block's halves in the order they run, with the attributes that each uses. A half is a Block whose
# other attributes are None
HALVES = {
    "attention": ("attention", "attention_norm1", "attention_norm2", "modulation"),
    "feed_forward": ("feed_forward", "ffn_norm1", "ffn_norm2", "to_trunk"),  # of control.Block
}
Count = TypeVar("Count", int, np.ndarray)


class BlockInputs(NamedTuple):
    """The inputs of every block beside its tokens."""

    cos: Float[Array | np.ndarray, "B T half"]
    sin: Float[Array | np.ndarray, "B T half"]
    # keys at this index and beyond are masked; None masks none
    lengths: Int[Array | np.ndarray, "B"] | None
    time: Float[Array, "B A"] | None  # None in the context refiner, which is not modulated
    keys: KeyTable | None = None  # None: every token is a key, with its own rotation


class Halfway(NamedTuple):
    """Tokens that may be between the halves of a block.

    `scale` and `gate` are of the feed-forward that follows; before a whole block they are not used.
    They are None where blocks are not modulated.
    """

    x: Float[Array, "B T D"]
    scale: Float[Array, "B 1 D"] | None
    gate: Float[Array, "B 1 D"] | None

    @classmethod
    def before(cls, x: Float[Array, "B T D"], *, modulated: bool = True) -> "Halfway":
        """Tokens before a whole block."""
        nothing = jnp.zeros((x.shape[0], 1, x.shape[2]), jnp.float32) if modulated else None
        return cls(x, nothing, nothing)


Tokens = TypeVar("Tokens", Array, Halfway)

# -- modules ---------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Self-attention with QK norm and RoPE. (diffusers `Attention`)"""

    def __init__(self, config: DiTConfig):
        dim = config.dim
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.norm_q, self.norm_k = (RMSNorm(config.head_dim, 1e-5) for _ in range(2))
        self.heads = config.n_heads

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: BlockInputs,
        attend: Attend,
        kv_format: KVFormat,
        held: KV | None,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """The output, in the dtype `ops.wide` gives, and the K and V used.

        `held`: K and V of an earlier NFE to use again; None computes new ones.
        """
        batch, tokens, dim = x.shape
        wide, query_dtype = ops.wide(x.dtype), kv_format.query_dtype(x.dtype)

        def queries(x: Float[Array, "B R D"], cos, sin) -> Float[Array, "B R N H"]:
            q = self.to_q(x, wide).reshape(*x.shape[:2], self.heads, -1)
            q = self.norm_q(q, out_dtype=jnp.float32)
            return ops.rotate_pairs(q, cos, sin).astype(query_dtype)

        q, keys = ops.in_runs(queries, x, inputs.cos, inputs.sin), inputs.keys
        keys = keys or KeyTable(*inputs[:3])
        if held is None:
            held = self._keys_values(x, keys, kv_format)
        out = kv.attention(q, held, keys, kv_format, x.dtype, attend)
        return self.to_out(out.reshape(batch, tokens, dim), wide), held

    def _keys_values(self, x: Float[Array, "B T D"], keys: KeyTable, kv_format: KVFormat) -> KV:
        """K and V of `x`, float32 from the projections on, then stored as `kv_format` says. V after
        K, so that one of them is in float32 at a time."""

        def project(to: Linear, x: Float[Array, "B R D"]) -> Float[Array, "B R N H"]:
            return to(x, jnp.float32).reshape(*x.shape[:2], self.heads, -1)

        def of_keys(x: Float[Array, "B R D"], cos, sin, valid):
            k = kv.pool(self.norm_k(project(self.to_k, x), out_dtype=jnp.float32), kv_format)
            return kv.keep_keys(k, cos, sin, valid, kv_format)

        def of_values(x: Float[Array, "B R D"], valid):
            return kv.keep(kv.pool(project(self.to_v, x), kv_format), valid, kv_format.stored[1])

        run, valid = kv_format.in_runs, keys.valid
        return KV(run(of_keys, x, keys.cos, keys.sin, valid), run(of_values, x, valid))


class FeedForward(nnx.Module):
    """w2(silu(w1 x) * w3 x). (diffusers `FeedForward` of `transformer_z_image`)"""

    def __init__(self, config: DiTConfig):
        self.w1 = Linear(config.dim, config.ff_dim, bias=False)
        self.w2 = Linear(config.ff_dim, config.dim, bias=False)
        self.w3 = Linear(config.dim, config.ff_dim, bias=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return ops.in_runs(lambda x: gated(x, self.w1, self.w3, self.w2), x)


class Block(nnx.Module):
    """Attention and feed-forward, each between two RMS norms; `modulated`: scaled and gated by
    time. (diffusers `ZImageTransformerBlock`)"""

    def __init__(self, config: DiTConfig, *, modulated: bool = True):
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            RMSNorm(config.dim, config.norm_eps) for _ in range(4)
        )
        self.modulation = Linear(config.adaln_dim, 4 * config.dim) if modulated else None

    # Without a barrier XLA fuses across halves and skips a rounding in bf16 (1e-2 apart). With it, a
    # half gives the same bits in a chunk of any size

    def attention_half(
        self,
        x: Float[Array, "B T D"],
        inputs: BlockInputs,
        attend: Attend,
        kv_format: KVFormat,
        held: KV | None = None,
    ) -> tuple[Halfway, KV]:
        """The first half. Returns what the second takes, and the K and V that it used: `held`, if
        given, else new ones."""
        scale1, gate1, scale2, gate2 = self._modulate(inputs.time, x.dtype)
        y = self.attention_norm1(ops.from_tokens(x), scale1, x.dtype)
        y, held = self.attention(y, inputs, attend, kv_format, held)
        x = ops.add_to_tokens(x, self.attention_norm2(y, gate1))
        return lax.optimization_barrier(Halfway(x, scale2, gate2)), held

    def feed_forward_half(self, halfway: Halfway) -> Float[Array, "B T D"]:
        """The second half."""
        x, scale, gate = halfway
        y = self.feed_forward(self.ffn_norm1(ops.from_tokens(x), scale, x.dtype))
        return lax.optimization_barrier(ops.add_to_tokens(x, self.ffn_norm2(y, gate)))

    def _modulate(
        self, time: Float[Array, "B A"] | None, dtype
    ) -> list[Float[Array, "B 1 D"]] | list[None]:
        if self.modulation is None or time is None:
            return [None] * 4
        m = self.modulation(time.astype(dtype), ops.wide(dtype)).astype(jnp.float32)[:, None]
        scale1, gate1, scale2, gate2 = jnp.split(m, 4, -1)
        return [1 + scale1, jnp.tanh(gate1), 1 + scale2, jnp.tanh(gate2)]


class Stem(nnx.Module):
    """Embedders, pad tokens and final layer: the parameters outside the blocks."""

    def __init__(self, config: DiTConfig):
        self.x_embedder = Linear(config.patch_dim, config.dim)
        self.x_pad_token = parameter(1, config.dim)
        self.cap_norm = RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.cap_embedder = Linear(config.cap_feat_dim, config.dim)
        self.cap_pad_token = parameter(1, config.dim)
        self.time_in = Linear(TIME_WIDTH, TIME_HIDDEN)
        self.time_out = Linear(TIME_HIDDEN, config.adaln_dim)
        self.final_modulation = Linear(config.adaln_dim, config.dim)
        self.final = Linear(config.dim, config.patch_dim)
        self.t_scale = config.t_scale


class DiT(nnx.Module):
    """The whole model. (diffusers `ZImageTransformer2DModel`)"""

    def __init__(self, config: DiTConfig):
        self.stem = Stem(config)
        self.noise_refiner = nnx.List(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nnx.List(
            Block(config, modulated=False) for _ in range(config.n_refiner_layers)
        )
        self.layers = nnx.List(Block(config) for _ in range(config.n_layers))


def spec(config: DiTConfig) -> DiT:
    """The model with a ShapeDtypeStruct for every parameter: the one list of its tensors."""
    return DiT(config)


# -- shapes and positions, on the host -------------------------------------------------------------


def padded(tokens: Count) -> Count:
    """A token count, or an array of counts, rounded up to a multiple of TOKEN_MULTIPLE."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def caption_positions(batch: int, bucket: int) -> Float[np.ndarray, "B L 3"]:
    """Caption tokens and their pad tokens count from 1 on axis 0; axes 1 and 2 are 0."""
    positions = np.zeros((batch, bucket, 3))
    positions[..., 0] = 1 + np.arange(bucket)
    return positions


def image_positions(
    h: int, w: int, lengths: Int[np.ndarray, "B"], group: int = 1
) -> Float[np.ndarray, "B I 3"]:
    """Positions of image tokens: on axis 0 one past the padded caption, on axes 1 and 2 the row and
    column of the token, or of the centre of its group. Pad tokens have position 0 on all axes.

    `lengths`: caption tokens of each picture before padding. `group`: the side of a group in
    tokens.
    """
    rows, columns = (kv.centres(n // 2, group) for n in (h, w))
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    pads = padded(h * w // 4) - h * w // 4
    positions = np.zeros((len(lengths), len(grid) + pads, 3))
    positions[:, : len(grid), 0] = (padded(lengths) + 1)[:, None]
    positions[:, : len(grid), 1:] = grid
    return positions


class Inputs(NamedTuple):
    """Block inputs of the context refiner, the noise refiner and the main blocks. `time` is set for
    each NFE."""

    caption: BlockInputs
    image: BlockInputs
    joint: BlockInputs


def inputs(config: DiTConfig, h: int, w: int, lengths: Int[np.ndarray, "B"], bucket: int) -> Inputs:
    """Rotations and masks of pictures of h x w latents with captions of `lengths` tokens, padded to
    `bucket` tokens.

    Raises ConfigError if a position exceeds the model's `axes_lens`.
    """
    caption, image = caption_positions(len(lengths), bucket), image_positions(h, w, lengths)
    for axis, limit in enumerate(config.axes_lens):
        # the image's position follows the padded caption; caption tokens beyond that are masked
        if (last := image[..., axis].max()) >= limit:
            raise ConfigError(
                f"position {last:.0f} on axis {axis}: this model takes positions below {limit}; "
                "use a smaller size or a shorter prompt"
            )
    caption_lengths = padded(lengths).astype(np.int32)

    def of(positions: Float[np.ndarray, "B T 3"], lengths) -> BlockInputs:
        cos, sin = ops.rope_table(positions, config.axes_dims, config.rope_theta)
        return BlockInputs(cos, sin, lengths, None)

    return Inputs(
        of(caption, caption_lengths),
        of(image, None),
        of(np.concatenate([image, caption], 1), caption_lengths + np.int32(image.shape[1])),
    )


def grouped_keys(
    config: DiTConfig,
    h: int,
    w: int,
    lengths: Int[np.ndarray, "B"],
    bucket: int,
    kv_format: KVFormat,
) -> KeyTable | None:
    """Rotations and mask of the main blocks' keys, if `kv_format` groups image tokens, else None.
    The other arguments are those of `inputs`."""
    if kv_format.grid is None:
        return None
    caption, image = (
        caption_positions(len(lengths), bucket),
        image_positions(h, w, lengths, kv_format.group),
    )
    cos, sin = ops.rope_table(
        np.concatenate([image, caption], 1), config.axes_dims, config.rope_theta
    )
    return KeyTable(cos, sin, padded(lengths).astype(np.int32) + np.int32(image.shape[1]))


# -- the parts of one NFE --------------------------------------------------------------------------


def embed_time(stem: Stem, t: Float[Array, "B"]) -> Float[Array, "B A"]:
    """The embedding of t = 1 - sigma, in [0, 1). Float32. (diffusers `TimestepEmbedder`)"""
    half = TIME_WIDTH // 2
    frequency = np.exp(
        np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    angle = (t.astype(jnp.float32) * stem.t_scale)[:, None] * jnp.asarray(frequency)[None]
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    return stem.time_out(jax.nn.silu(stem.time_in(x)))


def embed_caption(
    stem: Stem, features: Float[Array, "B L E"], lengths: Int[Array, "B"]
) -> Float[Array, "B L D"]:
    """Caption tokens from text features (a residual stream, see ops.from_tokens). Rows at `lengths`
    and beyond become the learned pad token."""
    dtype = features.dtype
    x = stem.cap_norm(ops.from_tokens(features), out_dtype=dtype)
    x = ops.to_tokens(stem.cap_embedder(x, ops.wide(dtype)), dtype)
    valid = (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None]
    return jnp.where(valid, x, ops.to_tokens(stem.cap_pad_token[...], dtype)[None])


def embed_image(
    stem: Stem, latents: Float[Array, "B h w _"], dtype, embedder: Linear | None = None
) -> Float[Array, "B I D"]:
    """Image tokens of `dtype` from patches of the latents, padded with the learned pad token.
    `embedder`: instead of the stem's."""
    embedder = embedder or stem.x_embedder
    x = embedder(ops.patchify(latents).astype(dtype), ops.wide(dtype))
    x, pad = (ops.to_tokens(values, dtype) for values in (x, stem.x_pad_token[...]))
    batch, tokens, dim = x.shape
    pad = jnp.broadcast_to(pad[None], (batch, padded(tokens) - tokens, dim))
    return jnp.concatenate([x, pad], 1)


def join(image: Float[Array, "B I D"], context: Float[Array, "B L D"]) -> Float[Array, "B T D"]:
    """All tokens: the image, then the context."""
    return jnp.concatenate([image, context], 1)


def velocity(
    stem: Stem, x: Float[Array, "B T D"], time: Float[Array, "B A"], h: int, w: int
) -> Float[Array, "B h w C"]:
    """The final layer: layer norm, scale, linear; the velocity of h x w latents in float32.
    (diffusers `FinalLayer`)"""
    x, dtype, wide = x[:, : h * w // 4], x.dtype, ops.wide(x.dtype)
    scale = 1 + stem.final_modulation(jax.nn.silu(time.astype(dtype)), wide).astype(jnp.float32)
    x = ops.layer_norm(ops.from_tokens(x), 1e-6) * scale[:, None]
    x = stem.final(x.astype(dtype), wide)
    return ops.unpatchify(x, h, w).astype(jnp.float32)


def apply_blocks(
    blocks,
    x: Tokens,
    inputs: BlockInputs,
    attend: Attend,
    kv_format: KVFormat | None = None,
) -> Tokens:
    """Apply consecutive blocks, for example those of a chunk. Without a `kv_format`, K and V are
    ungrouped and in x's dtype.

    Blocks may be halves if `x` is a Halfway; else it has axes B T D.
    """
    return applied(blocks, x, inputs, attend, kv_format, None)[0]


def apply_blocks_cached(
    blocks,
    carry: tuple[Tokens, tuple[KV, ...]],
    inputs: BlockInputs,
    attend: Attend,
    kv_format: KVFormat,
    reuses: bool,
) -> tuple[Tokens, tuple[KV, ...]]:
    """Like `apply_blocks`, with the K and V of every attention in the carry: used if `reuses`, else
    replaced by new ones."""
    x, cache = carry
    if reuses:
        return applied(blocks, x, inputs, attend, kv_format, cache)
    return applied(blocks, x, inputs, attend, kv_format, None)


def applied(
    blocks,
    x: Tokens,
    inputs: BlockInputs,
    attend: Attend,
    kv_format: KVFormat | None,
    held: tuple[KV, ...] | None,
) -> tuple[Tokens, tuple[KV, ...]]:
    """The tokens after blocks or halves, and the K and V of their attentions: those `held`, if
    given."""
    at = x if isinstance(x, Halfway) else Halfway.before(x, modulated=inputs.time is not None)
    kv_format = kv_format or kv.plain(at.x.dtype)
    used: list[KV] = []
    for block in blocks:
        tokens, block = block_after(at.x, block)
        at = at._replace(x=tokens)
        if block.attention is not None:
            own = held[len(used)] if held is not None else None
            at, kept = block.attention_half(at.x, inputs, attend, kv_format, own)
            used.append(kept)
        if block.feed_forward is not None:
            at = at._replace(x=block.feed_forward_half(at))
    return (at if isinstance(x, Halfway) else at.x), tuple(used)


# -- the model as a whole --------------------------------------------------------------------------


def context(
    dit: DiT,
    features: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    inputs: BlockInputs,
    attend: Attend = Attend(),
) -> Float[Array, "B L D"]:
    """The refined context of text features. It does not depend on time: once per prompt."""
    return apply_blocks(
        dit.context_refiner, embed_caption(dit.stem, features, lengths), inputs, attend
    )


def denoise(
    dit: DiT,
    latents: Float[Array, "B h w C"],
    time: Float[Array, "B A"],
    context: Float[Array, "B L D"],
    inputs: Inputs,
    attend: Attend = Attend(),
) -> Float[Array, "B h w C"]:
    """One NFE: the velocity of `latents`, float32, computed in the dtype of `context`. `time` is
    `embed_time`'s."""
    x = embed_image(dit.stem, latents, context.dtype)
    x = apply_blocks(dit.noise_refiner, x, inputs.image._replace(time=time), attend)
    x = apply_blocks(dit.layers, join(x, context), inputs.joint._replace(time=time), attend)
    return velocity(dit.stem, x, time, *latents.shape[1:3])
