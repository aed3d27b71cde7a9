"""Sigmas, noise, guidance, the Euler step, and the sampler as one lax.scan over the NFEs.

Axes: B pictures, h, w latent rows and columns, C latent channels, L caption tokens. N NFEs have N +
1 noise levels."""

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
    """N noise levels from 1 down and a final 0 (diffusers `FlowMatchEulerDiscreteScheduler`, static
    shift)."""
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    s = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    s = np.float32(shift) * s / (1 + np.float32(shift - 1) * s)
    return np.append(s, np.float32(0))


def times(sigmas: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "nfes"]:
    """What the model is told at each NFE: (1000 - t) / 1000 of the scheduler's t = 1000 sigma, in
    float32."""
    t = sigmas[:-1] * np.float32(1000)
    return (np.float32(1000) - t) / np.float32(1000)


# -- noise -----------------------------------------------------------------------------------------


def noise_torch(seed: int, h: int, w: int, channels: int) -> Float[np.ndarray, "h w C"]:
    """What `torch.randn(1, C, h, w)` gives after `manual_seed(seed)` on a CPU, to 5e-7.

    MT19937, 24-bit uniforms, Box-Muller over runs of 16 numbers: 8 cosines, then 8 sines. PyTorch
    seeds with the low 32 bits. The size is a multiple of 16 whenever h and w are even and there are
    four channels or more."""
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
    """Normal numbers from a JAX key that holds all 64 bits of the seed."""
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return np.asarray(jax.random.normal(key, (h, w, channels), jnp.float32))


NOISE = {"torch": noise_torch, "jax": noise_jax}


# -- one step --------------------------------------------------------------------------------------


def guided(
    velocity: Float[Array, "B2 h w C"], guidance: Float[Array, ""] | float
) -> Float[Array, "B h w C"]:
    """Classifier-free guidance as diffusers scales it: pos + g (pos - neg). The batch is positives,
    then negatives."""
    positive, negative = jnp.split(velocity, 2)
    return positive + guidance * (positive - negative)


def euler(
    latents: Float[Array, "B h w C"],
    velocity: Float[Array, "B h w C"],
    sigma: Array | float,
    sigma_next: Array | float,
) -> Float[Array, "B h w C"]:
    """The model's velocity points from noise to picture, hence the minus."""
    return latents - (sigma_next - sigma) * velocity


# -- the sampler -----------------------------------------------------------------------------------


def before_blocks(
    stem: dit.Stem, latents: Float[Array, "B h w C"], t: Float[Array, ""], *, is_guided: bool, dtype
) -> tuple[Float[Array, "G I D"], Float[Array, "G A"]]:
    """What an NFE does before the blocks: image tokens and time of each context."""
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
    """What it does after them: the velocity, guidance, and the Euler step."""
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
    """All NFEs: a lax.scan for each phase of the K/V policy, float32 latents in the carry, and the
    K and V of every main block where later NFEs reuse them.

    With `is_guided`, G = 2 B: contexts of the prompts, then of the negative prompts; else G = B.
    `keys` has an entry per phase; `on_step(index, latents)` is called from within."""
    levels = jnp.arange(len(times)), sigmas[:-1], sigmas[1:], times
    latents, first = noise, 0
    for phase, of_phase in zip(phases, keys, strict=True):

        def step(carry, now, phase=phase, of_phase=of_phase):
            latents, cache = carry
            index, reuses, sigma, sigma_next, t = now
            x, time = before_blocks(
                model.stem, latents, t, is_guided=is_guided, dtype=context.dtype
            )
            x = dit.apply_blocks(model.noise_refiner, x, inputs.image._replace(time=time), attend)
            x, joint = dit.join(x, context), inputs.joint._replace(time=time, keys=of_phase)
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
        now = slice(first, first + phase.steps)
        index, *rest = (level[now] for level in levels)
        reuses = np.array([nfe.reuses for nfe in phase.nfes()])
        (latents, _), _ = lax.scan(step, (latents, cache), (index, reuses, *rest))
        first = now.stop
    return latents


def _main_blocks(
    blocks, carry, joint: dit.BlockInputs, attend: Attend, kv_format: kv.KVFormat, reuses: Array
):
    """The main blocks of one NFE, with a cache of K and V in the carry or none. Of the two ways
    only one runs."""
    x, cache = carry
    if cache is None:
        return dit.apply_blocks(blocks, x, joint, attend, kv_format), None
    make, take = (
        lambda carry, reuses=reuses: dit.apply_blocks_cached(
            blocks, carry, joint, attend, kv_format, reuses
        )
        for reuses in (False, True)
    )
    return lax.cond(reuses, take, make, carry)
