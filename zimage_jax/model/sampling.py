"""Noise, guidance, a sampler's step, and all NFEs as one lax.scan.

Axes: B pictures, G contexts (B, or 2 B with guidance: the prompts', then the negative prompts'),
h, w latent rows and columns, C latent channels, I image tokens, L caption tokens, T = I + L tokens,
D width, A adaLN width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import io_callback
from jaxtyping import Float

from ..errors import UsageError
from . import control, dit, kv
from .attention import Attend
from .config import ControlConfig, DiTConfig
from .kv import KV, Phase
from .regions import Regions
from .samplers import Update

# -- noise -----------------------------------------------------------------------------------------


def noise_torch(
    seed: int, h: int, w: int, channels: int, draw: int = 0
) -> Float[np.ndarray, "h w C"]:
    """PyTorch's `torch.randn(1, C, h, w)` after `manual_seed(seed)` on a CPU, equal to 5e-7.

    `draw`: how often it was called before. MT19937 seeded with the low 32 bits, 24-bit uniforms,
    and Box-Muller over runs of 16 numbers: 8 cosines, then 8 sines. Raises UsageError if h w C is
    not a multiple of 16; it is one if h and w are even and C is a multiple of 4.
    """
    count = h * w * channels
    if count % 16:
        raise UsageError(
            f"noise for {h} x {w} latents of {channels} channels: {count} is not a multiple of 16"
        )
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    generator.randint(0, 1 << 32, count * draw, np.uint32)
    bits = generator.randint(0, 1 << 32, count, np.uint32)
    uniform = ((bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log1p(-uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return np.ascontiguousarray(values.reshape(channels, h, w).transpose(1, 2, 0))


def noise_jax(
    seed: int, h: int, w: int, channels: int, draw: int = 0
) -> Float[np.ndarray, "h w C"]:
    """`jax.random.normal` with a threefry key of all 64 bits of the seed, folded with `draw`."""
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")
    if draw:
        key = jax.random.fold_in(key, draw)
    return np.asarray(jax.random.normal(key, (h, w, channels), jnp.float32))


NOISE = {"torch": noise_torch, "jax": noise_jax}


# -- one step --------------------------------------------------------------------------------------


def guided(
    velocity: Float[Array, "B2 h w C"],
    guidance: Float[Array, ""] | float,
    norm: Float[Array, ""] | float | None = None,
) -> Float[Array, "B h w C"]:
    """Classifier-free guidance in diffusers' scale: positive + guidance (positive - negative).

    `velocity` has the prompts' first, then the negative prompts'. (arXiv 2207.12598) `norm`: the
    result's norm is at most so many times the positive's. (diffusers `cfg_normalization`)
    """
    positive, negative = jnp.split(velocity, 2)
    found = positive + guidance * (positive - negative)
    if norm is None:
        return found
    most = norm * _norm(positive)
    return found * jnp.minimum(1, most / jnp.maximum(_norm(found), jnp.finfo(found.dtype).tiny))


def _norm(x: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(x), (1, 2, 3), keepdims=True))


class State(NamedTuple):
    """What a sampler carries from one NFE to the next."""

    latents: Any  # B h w C
    memory: Any = None  # Update's m, like the latents; or None

    @classmethod
    def first(
        cls, latents: Float[Array, "B H W C"], update: Update, regions: Regions | None = None
    ) -> "State":
        """The state before the first NFE; its memory has no weight yet."""
        if update.carry is None:
            return cls(latents)
        return cls(latents, jnp.zeros_like(apart(cls(latents), regions).latents))


class Kept(NamedTuple):
    """What a mask keeps: the picture's latents, the job's noise, and the mask (1 is redrawn)."""

    latents: Any  # B h w C
    noise: Any  # B h w C
    mask: Any  # B h w 1


def step(
    state: State,
    velocity: Float[Array, "B h w C"],
    update: Update,
    noise: Float[Array, "B h w C"] | None = None,
    kept: Kept | None = None,
) -> State:
    """The sampler's update after an NFE. `velocity` points from noise to picture.

    Outside the mask the latents become the picture's own at the next noise level. (diffusers
    `ZImageInpaintPipeline`)
    """
    x, memory = state
    latents = x + update.dt * velocity
    if update.carry is not None:
        now = update.of_x * x + update.of_v * velocity
        latents = latents + update.carry * (now - memory)
        memory = now
    if update.scale is not None:
        latents = update.scale * latents
    if update.noise is not None:
        latents = latents + update.noise * noise
    if kept is not None:
        mask = kept.mask
        if update.threshold is not None:
            mask = (mask >= update.threshold).astype(mask.dtype)
        picture = update.kept * kept.noise + (1 - update.kept) * kept.latents
        latents = mask * latents + (1 - mask) * picture
    return State(latents, memory)


def apart(state: State, regions: Regions | None) -> State:
    """The state with each region as a picture."""
    return state if regions is None else state._replace(latents=regions.split(state.latents))


def together(state: State, regions: Regions | None) -> State:
    """The state with whole pictures: their regions' latents, blended."""
    return state if regions is None else state._replace(latents=regions.blend(state.latents))


# -- the sampler -----------------------------------------------------------------------------------


def before_blocks(
    stem: dit.Stem, latents: Float[Array, "B h w C"], t: Float[Array, ""], *, is_guided: bool, dtype
) -> tuple[Float[Array, "G I D"], Float[Array, "G A"]]:
    """The part of an NFE before the blocks: image tokens of `dtype`, and the time embedding, for
    each context. `t` is an Update's."""
    batch = jnp.concatenate([latents, latents]) if is_guided else latents
    time = dit.embed_time(stem, jnp.broadcast_to(t, (batch.shape[0],)))
    return dit.embed_image(stem, batch, dtype), time


def after_blocks(
    stem: dit.Stem,
    x: Float[Array, "G T D"],
    time: Float[Array, "G A"],
    state: State,
    update: Update,
    noise: Float[Array, "B h w C"] | None,
    kept: Kept | None,
) -> State:
    """The part of an NFE after the blocks: velocity, guidance and the sampler's update."""
    velocity = dit.velocity(stem, x, time, *state.latents.shape[1:3])
    if update.guidance is not None:
        velocity = guided(velocity, update.guidance, update.norm)
    return step(state, velocity, update, noise, kept)


def sample(
    model: dit.DiT,
    latents: Float[Array, "#B H W C"],
    updates: Update,
    context: Float[Array, "G L D"],
    inputs: dit.Inputs,
    keys: tuple[dit.KeyTable | None, ...],
    noises: Float[Array, "nfes B h w C"] | None = None,
    kept: Kept | None = None,
    controlled: tuple[Float[Array, "G I D"], Float[Array, ""]] | None = None,
    *,
    attend: Attend,
    phases: tuple[Phase, ...],
    regions: Regions | None = None,
    parts: tuple[DiTConfig, ControlConfig] | None = None,
    on_step: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Float[Array, "#B H W C"]:
    """All NFEs, from the first `latents` to the last in float32: one lax.scan per phase.

    With `regions`, `latents` and the result are whole pictures, all else is of regions. `updates`
    has a row per NFE, and so have `noises`, for a sampler that adds some. `keys` has one entry per
    phase (`dit.grouped_keys`). `controlled`: control tokens and scale of a model that has a
    ControlNet, and `parts` its configs. If the phase reuses K and V, the carry has those of every main
    block. The program calls `on_step(index, latents)` on the host after each NFE.
    """
    state, first = State.first(latents, updates, regions), 0
    is_guided = updates.guidance is not None
    of_nfes = jnp.arange(len(updates.t)), updates, noises
    for phase, phase_keys in zip(phases, keys, strict=True):

        def nfe(carry, of_nfe, phase=phase, phase_keys=phase_keys):
            state, cache = carry
            state = apart(state, regions)
            reuses, index, update, noise = of_nfe
            x, time = before_blocks(
                model.stem, state.latents, update.t, is_guided=is_guided, dtype=context.dtype
            )
            image = inputs.image._replace(time=time)
            joint = inputs.joint._replace(time=time, keys=phase_keys)
            if controlled is None:
                x = dit.join(dit.apply_blocks(model.noise_refiner, x, image, attend), context)
                x, cache = _main_blocks(
                    dit, model.layers, (x, cache), (joint,), attend, phase.kv_format, reuses
                )
            else:
                assert isinstance(model, control.ControlledDiT)
                assert parts is not None
                given, scale = controlled
                tokens = control.before_main(model, parts, x, given, context, image, scale, attend)
                main = control.blocks_of(model, control.runs(*parts)[-1])
                tokens, cache = _main_blocks(
                    control, main, (tokens, cache), (joint, scale), attend, phase.kv_format, reuses
                )
                x = tokens.trunk.x
            state = after_blocks(model.stem, x, time, state, update, noise, kept)
            state = together(state, regions)
            if on_step is not None:
                io_callback(on_step, None, index, state.latents, ordered=True)
            return (state, cache), None

        cache: tuple[KV, ...] | None = None
        if phase.caches:
            heads = model.layers[0].attention.heads
            width = context.shape[-1] // heads
            tokens = inputs.joint.cos.shape[1]
            cache = tuple(
                kv.empty(phase.kv_format, context.shape[0], tokens, heads, width)
                for _ in range(len(model.layers) + (parts[1].layers if parts else 0))
            )
        end = first + phase.steps
        rows = jax.tree.map(lambda values: values[first:end], of_nfes)  # noqa: B023
        reuses = np.array([nfe.reuses for nfe in phase.nfes()])
        (state, _), _ = lax.scan(nfe, (state, cache), (reuses, *rows))
        first = end
    return state.latents


def _main_blocks(
    of: Any,
    blocks,
    carry,
    joint: tuple,
    attend: Attend,
    kv_format: kv.KVFormat,
    reuses: Array,
):
    """The main blocks of one NFE, applied by the module `of`, dit or control. The carry is the
    tokens and the cache of K and V, or None."""
    x, cache = carry
    if cache is None:
        return of.apply_blocks(blocks, x, *joint, attend, kv_format), None

    def apply(carry, *, reuses: bool):
        return of.apply_blocks_cached(blocks, carry, *joint, attend, kv_format, reuses)

    reuse, compute = functools.partial(apply, reuses=True), functools.partial(apply, reuses=False)
    return lax.cond(reuses, reuse, compute, carry)
