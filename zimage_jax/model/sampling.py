"""Sigmas, noise, guidance, the Euler step, and the sampler as one lax.scan over the NFEs.

Axes: B pictures, G contexts (B, or 2 B with guidance: the prompts', then the negative prompts'),
h, w latent rows and columns, C latent channels, I image tokens, L caption tokens, T = I + L tokens,
D width, A adaLN width; N NFEs have N + 1 noise levels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import io_callback
from jaxtyping import Float

from ..errors import UsageError
from . import dit, kv
from .attention import Attend
from .kv import KV, Phase

# -- noise levels ----------------------------------------------------------------------------------


def sigmas(steps: int, shift: float) -> Float[np.ndarray, "levels"]:
    """`steps` noise levels falling from 1, and a final 0. Raises UsageError for `steps` below 1.

    (diffusers `FlowMatchEulerDiscreteScheduler` with a static shift)
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    s = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    s = np.float32(shift) * s / (1 + np.float32(shift - 1) * s)
    return np.append(s, np.float32(0))


def times(sigmas: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "nfes"]:
    """The time given to the DiT at each NFE: (1000 - t) / 1000 in float32, where t = 1000 sigma is
    the scheduler's."""
    t = sigmas[:-1] * np.float32(1000)
    return (np.float32(1000) - t) / np.float32(1000)


# -- noise -----------------------------------------------------------------------------------------


def noise_torch(seed: int, h: int, w: int, channels: int) -> Float[np.ndarray, "h w C"]:
    """PyTorch's `torch.randn(1, C, h, w)` after `manual_seed(seed)` on a CPU, equal to 5e-7.

    MT19937 seeded with the low 32 bits, 24-bit uniforms, and Box-Muller over runs of 16 numbers: 8
    cosines, then 8 sines. Raises UsageError if h w C is not a multiple of 16; it is one if h and w
    are even and C is a multiple of 4.
    """
    count = h * w * channels
    if count % 16:
        raise UsageError(
            f"noise for {h} x {w} latents of {channels} channels: {count} is not a multiple of 16"
        )
    bits = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, count, np.uint32)
    uniform = ((bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log1p(-uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return np.ascontiguousarray(values.reshape(channels, h, w).transpose(1, 2, 0))


def noise_jax(seed: int, h: int, w: int, channels: int) -> Float[np.ndarray, "h w C"]:
    """`jax.random.normal` with a threefry key of all 64 bits of the seed."""
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")
    return np.asarray(jax.random.normal(key, (h, w, channels), jnp.float32))


NOISE = {"torch": noise_torch, "jax": noise_jax}


# -- one step --------------------------------------------------------------------------------------


def guided(
    velocity: Float[Array, "B2 h w C"], guidance: Float[Array, ""] | float
) -> Float[Array, "B h w C"]:
    """Classifier-free guidance in diffusers' scale: positive + guidance (positive - negative).

    `velocity` has the prompts' first, then the negative prompts'. (arXiv 2207.12598)
    """
    positive, negative = jnp.split(velocity, 2)
    return positive + guidance * (positive - negative)


def euler(
    latents: Float[Array, "B h w C"],
    velocity: Float[Array, "B h w C"],
    sigma: Array | float,
    sigma_next: Array | float,
) -> Float[Array, "B h w C"]:
    """The Euler step from `sigma` to `sigma_next`. The minus: the DiT's velocity points from noise
    to picture. (diffusers `FlowMatchEulerDiscreteScheduler.step`)"""
    return latents - (sigma_next - sigma) * velocity


# -- the sampler -----------------------------------------------------------------------------------


def before_blocks(
    stem: dit.Stem, latents: Float[Array, "B h w C"], t: Float[Array, ""], *, is_guided: bool, dtype
) -> tuple[Float[Array, "G I D"], Float[Array, "G A"]]:
    """The part of an NFE before the blocks: image tokens of `dtype`, and the time embedding, for
    each context. `t` is one of `times`."""
    batch = jnp.concatenate([latents, latents]) if is_guided else latents
    time = dit.embed_time(stem, jnp.broadcast_to(t, (batch.shape[0],)))
    return dit.embed_image(stem, batch, dtype), time


def after_blocks(
    stem: dit.Stem,
    x: Float[Array, "G T D"],
    time: Float[Array, "G A"],
    latents: Float[Array, "B h w C"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
    guidance: Float[Array, ""],
    *,
    is_guided: bool,
) -> Float[Array, "B h w C"]:
    """The part of an NFE after the blocks: velocity, guidance and the Euler step. Returns the next
    latents."""
    velocity = dit.velocity(stem, x, time, *latents.shape[1:3])
    return euler(latents, guided(velocity, guidance) if is_guided else velocity, sigma, sigma_next)


def sample(
    model: dit.DiT,
    noise: Float[Array, "B h w C"],
    sigmas: Float[Array, "levels"],
    times: Float[Array, "nfes"],
    context: Float[Array, "G L D"],
    inputs: dit.Inputs,
    keys: tuple[dit.KeyTable | None, ...],
    guidance: Float[Array, ""],
    *,
    is_guided: bool,
    attend: Attend,
    phases: tuple[Phase, ...],
    on_step: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Float[Array, "B h w C"]:
    """All NFEs, from `noise` to the final latents in float32: one lax.scan per phase.

    The carry has the latents and, if the phase reuses K and V, those of every main block. `keys`
    has one entry per phase (`dit.grouped_keys`). The program calls `on_step(index, latents)` on the
    host after each NFE.
    """
    levels = jnp.arange(len(times)), sigmas[:-1], sigmas[1:], times
    latents, first = noise, 0
    for phase, phase_keys in zip(phases, keys, strict=True):

        def step(carry, level, phase=phase, phase_keys=phase_keys):
            latents, cache = carry
            index, reuses, sigma, sigma_next, t = level
            x, time = before_blocks(
                model.stem, latents, t, is_guided=is_guided, dtype=context.dtype
            )
            x = dit.apply_blocks(model.noise_refiner, x, inputs.image._replace(time=time), attend)
            x, joint = dit.join(x, context), inputs.joint._replace(time=time, keys=phase_keys)
            x, cache = _main_blocks(
                model.layers, (x, cache), joint, attend, phase.kv_format, reuses
            )
            latents = after_blocks(
                model.stem, x, time, latents, sigma, sigma_next, guidance, is_guided=is_guided
            )
            if on_step is not None:
                io_callback(on_step, None, index, latents, ordered=True)
            return (latents, cache), None

        cache: tuple[KV, ...] | None = None
        if phase.caches:
            heads = model.layers[0].attention.heads
            width = context.shape[-1] // heads
            tokens = inputs.joint.cos.shape[1]
            cache = tuple(
                kv.empty(phase.kv_format, context.shape[0], tokens, heads, width)
                for _ in model.layers
            )
        end = first + phase.steps
        index, *rest = (values[first:end] for values in levels)
        reuses = np.array([nfe.reuses for nfe in phase.nfes()])
        (latents, _), _ = lax.scan(step, (latents, cache), (index, reuses, *rest))
        first = end
    return latents


def _main_blocks(
    blocks, carry, joint: dit.BlockInputs, attend: Attend, kv_format: kv.KVFormat, reuses: Array
):
    """The main blocks of one NFE. The carry is the tokens and the cache of K and V, or None."""
    x, cache = carry
    if cache is None:
        return dit.apply_blocks(blocks, x, joint, attend, kv_format), None

    def apply(carry, *, reuses: bool):
        return dit.apply_blocks_cached(blocks, carry, joint, attend, kv_format, reuses)

    reuse, compute = functools.partial(apply, reuses=True), functools.partial(apply, reuses=False)
    return lax.cond(reuses, reuse, compute, carry)
