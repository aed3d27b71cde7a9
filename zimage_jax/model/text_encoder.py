"""Qwen3 up to hidden_states[-2], the text features of Z-Image (transformers `Qwen3Model`).

Axes: B prompts, T tokens (padded at the end; attention is causal, so padding does not change the
tokens before it), D width (2560), N query heads (32), M key heads (8), H head width (128), V
vocabulary.

The features are the output of the second-to-last layer. A native checkpoint has neither the last
layer nor the final norm.

A float16 residual stream holds tokens times ops.TOKEN_SCALE: a few elements of the first token
exceed 1e4 and grow from block to block.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from . import ops
from .attention import Attend, attention
from .config import TextEncoderConfig
from .encoded import block_after
from .layers import Linear, RMSNorm, gated, parameter


class SelfAttention(nnx.Module):
    """Causal grouped-query attention with QK norm and RoPE. (transformers `Qwen3Attention`)"""

    def __init__(self, config: TextEncoderConfig):
        dim, width = config.hidden_size, config.head_dim
        self.q_proj = Linear(dim, config.num_attention_heads * width, bias=False)
        self.k_proj = Linear(dim, config.num_key_value_heads * width, bias=False)
        self.v_proj = Linear(dim, config.num_key_value_heads * width, bias=False)
        self.o_proj = Linear(config.num_attention_heads * width, dim, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.head_dim, self.rope_theta = width, config.rope_theta

    def __call__(self, x: Float[Array, "B T D"], attend: Attend) -> Float[Array, "B T D"]:
        batch, tokens, _ = x.shape
        wide = ops.wide(x.dtype)
        q, k, v = (
            project(x, dtype).reshape(batch, tokens, -1, self.head_dim)
            for project, dtype in ((self.q_proj, wide), (self.k_proj, wide), (self.v_proj, x.dtype))
        )
        cos, sin = ops.rope_table(np.arange(tokens)[:, None], (self.head_dim,), self.rope_theta)
        q, k = (
            ops.rotate_halves(
                norm(y, out_dtype=jnp.float32), jnp.asarray(cos), jnp.asarray(sin)
            ).astype(x.dtype)
            for norm, y in ((self.q_norm, q), (self.k_norm, k))
        )
        out = attention(q, k, v, causal=True, attend=attend)
        return self.o_proj(out.reshape(batch, tokens, -1), wide)


class MLP(nnx.Module):
    """The gated feed-forward. (transformers `Qwen3MLP`)"""

    def __init__(self, config: TextEncoderConfig):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return gated(x, self.gate_proj, self.up_proj, self.down_proj)


class Block(nnx.Module):
    """Attention and feed-forward, each after an RMS norm. (transformers `Qwen3DecoderLayer`)"""

    def __init__(self, config: TextEncoderConfig):
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def __call__(
        self, x: Float[Array, "B T D"], attend: Attend = Attend()
    ) -> Float[Array, "B T D"]:
        dtype = x.dtype
        y = self.input_layernorm(ops.from_tokens(x), out_dtype=dtype)
        x = ops.add_to_tokens(x, self.self_attn(y, attend))
        y = self.post_attention_layernorm(ops.from_tokens(x), out_dtype=dtype)
        x = ops.add_to_tokens(x, self.mlp(y))
        return lax.optimization_barrier(x)  # as in the DiT: the same bits in a chunk of any size


class TextEncoder(nnx.Module):
    """The embedding table and the layers that run. (transformers `Qwen3Model`)"""

    def __init__(self, config: TextEncoderConfig):
        self.embed_tokens = parameter(config.vocab_size, config.hidden_size)
        self.layers = nnx.List(Block(config) for _ in range(config.n_layers))


def spec(config: TextEncoderConfig) -> TextEncoder:
    """The model with a ShapeDtypeStruct for every parameter: the one list of its tensors."""
    return TextEncoder(config)


def embed(
    table: Float[np.ndarray | Array, "V D"], ids: Int[np.ndarray, "B T"]
) -> Float[np.ndarray | Array, "B T D"]:
    """Rows of the embedding table. With a NumPy table the device never needs the table."""
    return table[ids]


def apply_blocks(
    blocks, x: Float[Array, "B T D"], attend: Attend = Attend()
) -> Float[Array, "B T D"]:
    """Apply consecutive blocks, for example those of a chunk."""
    for block in blocks:
        x, block = block_after(x, block)
        x = block(x, attend)
    return x
