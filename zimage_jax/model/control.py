"""The ControlNet Union of Z-Image: blocks beside the DiT's that follow a control image and add
to its tokens (diffusers `ZImageControlNetModel`; alibaba-pai Z-Image-Turbo-Fun-Controlnet-Union
1.0, 2.0, 2.1 and lite).

Axes: B pictures, or contexts, h, w latent rows and columns, C latent channels, I image tokens, L
caption tokens, T = I + L tokens, D width.

The control image's latents become tokens, once per job (`embed`). In every NFE control blocks carry
them on: through the refiner over I tokens, then over T tokens beside the main blocks, each after
the main block of its place, to whose tokens it adds a linear map of its own, times the scale. What
follows what is a list of `Run`s.

diffusers gives the refiner's additions to the image tokens that the control blocks see, and not to
those that the main blocks begin from; VideoX-Fun and ComfyUI give them to both. This follows
diffusers: `Tokens.seen` are the former, of the refiner alone.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from . import dit, ops
from .attention import Attend
from .config import ControlConfig, DiTConfig
from .dit import BlockInputs, Halfway
from .kv import KV, KVFormat
from .layers import Linear


class Tokens(NamedTuple):
    """The tokens between chunks of blocks."""

    trunk: Halfway  # the DiT's own
    control: Halfway
    seen: Halfway | None  # image tokens with the refiner's additions; None where it adds nothing


class Run(NamedTuple):
    """Consecutive units of an NFE whose blocks have the same inputs, in the order they run."""

    units: tuple[str, ...]
    adds: bool = True  # whether control blocks add to other tokens


# -- modules ---------------------------------------------------------------------------------------


class Block(dit.Block):
    """A block over control tokens. `adds`: it has the map to the trunk's tokens. (diffusers
    `ZImageControlTransformerBlock`, `after_proj`)

    Its arrays begin with those of a dit.Block, in the same order, so that both use the same slots.
    """

    def __init__(self, config: DiTConfig, *, adds: bool = True):
        super().__init__(config)
        self.to_trunk = Linear(config.dim, config.dim) if adds else None


class Embedder(nnx.Module):
    """From latents to control tokens, once per job. `before`: the refiner's own first map.
    (diffusers `control_all_x_embedder`, `control_noise_refiner.0.before_proj`)"""

    def __init__(self, config: DiTConfig, control: ControlConfig):
        self.x_embedder = Linear(4 * control.in_channels, config.dim)
        has_own = control.refiner == "control_noise_refiner"
        self.before = Linear(config.dim, config.dim) if has_own else None
        self.in_channels = control.in_channels


class Branch(nnx.Module):
    """The parameters beside the DiT's. (diffusers `ZImageControlNetModel`)

    `control_before` is the map before the first block beside the main ones
    (`control_layers.0.before_proj`): it is not the block's, so that all blocks have equal arrays.
    """

    def __init__(self, config: DiTConfig, control: ControlConfig):
        self.control_embedder = Embedder(config, control)
        self.control_before = Linear(config.dim, config.dim)
        self.control_layers = nnx.List(Block(config) for _ in range(control.layers))
        own = 0 if control.refiner == "control_layers" else config.n_refiner_layers
        adds = control.refiner != "none"
        self.control_noise_refiner = nnx.List(Block(config, adds=adds) for _ in range(own))


class ControlledDiT(dit.DiT):
    """A DiT with the parameters of a `Branch`."""

    def __init__(self, config: DiTConfig, control: ControlConfig):
        super().__init__(config)
        branch = Branch(config, control)
        self.control_embedder = branch.control_embedder
        self.control_before = branch.control_before
        self.control_layers = branch.control_layers
        self.control_noise_refiner = branch.control_noise_refiner


def is_of_branch(unit: str) -> bool:
    """Whether a unit of a ControlledDiT is the Branch's."""
    return unit.startswith("control_")


def runs(config: DiTConfig, control: ControlConfig) -> tuple[Run, ...]:
    """The blocks of an NFE by name: those over image tokens, in one run or two, then those over all
    tokens."""
    refiner = [f"noise_refiner.{i}" for i in range(config.n_refiner_layers)]
    layers = [f"control_layers.{i}" for i in range(control.layers)]
    own = [f"control_noise_refiner.{i}" for i in range(config.n_refiner_layers)]
    main = []
    followers = dict(zip(control.places(config.n_layers), layers, strict=True))
    for i in range(config.n_layers):
        main += [f"layers.{i}", *([followers[i]] if i in followers else ())]
    if control.refiner == "none":
        early = [Run((*refiner, *own))]
    elif control.refiner == "control_noise_refiner":
        early = [Run(_paired(refiner, own))]
    else:  # all control layers refine; diffusers uses what the first ones add
        count = len(refiner)
        early = [Run(_paired(refiner, layers[:count]))]
        early += [Run(tuple(layers[count:]), adds=False)] if layers[count:] else []
    return (*early, Run(tuple(main)))


def _paired(first: list[str], second: list[str]) -> tuple[str, ...]:
    return tuple(name for pair in zip(first, second, strict=True) for name in pair)


# -- the parts of one NFE --------------------------------------------------------------------------


def embed(
    embedder: Embedder,
    stem: dit.Stem,
    before: Linear | None,
    latents: Float[Array | np.ndarray, "B h w C"],
    dtype,
) -> Float[Array, "B I D"]:
    """Control tokens (a residual stream, see ops.from_tokens) before the refiner. They do not depend
    on time: once per job.

    `before`: control_before, where the control layers refine. Channels for inpainting are 0, as in
    diffusers' text-to-image pipeline.
    """
    missing = embedder.in_channels - latents.shape[-1]
    padded = jnp.pad(jnp.asarray(latents), ((0, 0), (0, 0), (0, 0), (0, missing)))
    x = dit.embed_image(stem, padded, dtype, embedder.x_embedder)
    first = before or embedder.before
    return x if first is None else ops.to_tokens(_mapped(first, x), dtype)


def _mapped(linear: Linear, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """A linear map of the true values of tokens, which may be beyond float16's range, in the dtype
    that `ops.wide` gives."""
    if x.dtype != jnp.float16:
        return linear(x, in_turn=True)
    assert linear.bias is not None
    rows, factor = ops.rows_in_range(ops.from_tokens(x))
    bias = ops.last_axis(linear.bias[...].astype(jnp.float32), x.ndim)
    return (linear(rows, jnp.float32, in_turn=True) - bias) * factor + bias


def enter(trunk: Float[Array, "B I D"], control: Float[Array, "B I D"], refiner: str) -> Tokens:
    """The tokens before the refiner, from `dit.embed_image` and `embed`."""
    x = Halfway.before(trunk)
    if refiner == "none":
        return Tokens(x, Halfway.before(control), None)
    both = ops.add_to_tokens(trunk, ops.from_tokens(control))
    # an array of its own: both are donated
    seen = Halfway.before(lax.optimization_barrier(trunk))
    return Tokens(x, Halfway.before(both), seen)


def join(before: Linear, tokens: Tokens, context: Float[Array, "B L D"]) -> Tokens:
    """All tokens, from those of the image and the context; control's are mapped by
    control_before."""
    seen = tokens.trunk if tokens.seen is None else tokens.seen
    control = _mapped(before, dit.join(tokens.control.x, context))
    control = ops.add_to_tokens(dit.join(seen.x, context), control)
    trunk = dit.join(tokens.trunk.x, context)
    return Tokens(Halfway.before(trunk), Halfway.before(control), None)


def apply_blocks(
    blocks,
    tokens: Tokens,
    inputs: BlockInputs,
    scale: Float[Array, ""] | None,
    attend: Attend,
    kv_format: KVFormat | None = None,
) -> Tokens:
    """Like dit.apply_blocks, of both kinds of blocks. `scale`: of what control blocks add; None
    where they add nothing."""
    return _applied(blocks, tokens, inputs, scale, attend, kv_format, None)[0]


def apply_blocks_cached(
    blocks,
    carry: tuple[Tokens, tuple[KV, ...]],
    inputs: BlockInputs,
    scale: Float[Array, ""] | None,
    attend: Attend,
    kv_format: KVFormat,
    reuses: bool,
) -> tuple[Tokens, tuple[KV, ...]]:
    """Like dit.apply_blocks_cached, of both kinds of blocks."""
    tokens, cache = carry
    held = cache if reuses else None
    return _applied(blocks, tokens, inputs, scale, attend, kv_format, held)


def _applied(
    blocks,
    tokens: Tokens,
    inputs: BlockInputs,
    scale: Float[Array, ""] | None,
    attend: Attend,
    kv_format: KVFormat | None,
    held: tuple[KV, ...] | None,
) -> tuple[Tokens, tuple[KV, ...]]:
    used: tuple[KV, ...] = ()

    def through(block, at: Halfway) -> Halfway:
        nonlocal used
        own = None if held is None else held[len(used) :]
        at, kept = dit.applied([block], at, inputs, attend, kv_format, own)
        used = (*used, *kept)
        return at

    for block in blocks:
        if isinstance(block, Block):
            tokens = tokens._replace(control=through(block, tokens.control))
            if block.to_trunk is not None and scale is not None:
                tokens = _added(block.to_trunk, tokens, scale)
            continue
        tokens = tokens._replace(trunk=through(block, tokens.trunk))
        if tokens.seen is not None:
            tokens = tokens._replace(seen=through(block, tokens.seen))
    return tokens, used


def _added(to_trunk: Linear, tokens: Tokens, scale: Float[Array, ""]) -> Tokens:
    """What a control block adds: to what the control blocks see of the image, else to the trunk."""
    values = _mapped(to_trunk, tokens.control.x)
    at = tokens.trunk if tokens.seen is None else tokens.seen
    x = ops.add_to_tokens(at.x, (scale * values.astype(jnp.float32)).astype(values.dtype))
    at = at._replace(x=lax.optimization_barrier(x))  # the same bits in a chunk of any size
    return tokens._replace(trunk=at) if tokens.seen is None else tokens._replace(seen=at)


# -- the model as a whole --------------------------------------------------------------------------


def denoise(
    model: ControlledDiT,
    latents: Float[Array, "B h w C"],
    time: Float[Array, "B A"],
    context: Float[Array, "B L D"],
    inputs: dit.Inputs,
    control: Float[Array, "B I D"],
    scale: Float[Array, ""],
    config: tuple[DiTConfig, ControlConfig],
    attend: Attend = Attend(),
) -> Float[Array, "B h w C"]:
    """One NFE: dit.denoise with control tokens, `embed`'s."""
    x = dit.embed_image(model.stem, latents, context.dtype)
    image, joint = (of._replace(time=time) for of in (inputs.image, inputs.joint))
    tokens = before_main(model, config, x, control, context, image, scale, attend)
    main = blocks_of(model, runs(*config)[-1])
    tokens = apply_blocks(main, tokens, joint, scale, attend)
    return dit.velocity(model.stem, tokens.trunk.x, time, *latents.shape[1:3])


def before_main(
    model: ControlledDiT,
    config: tuple[DiTConfig, ControlConfig],
    x: Float[Array, "B I D"],
    control: Float[Array, "B I D"],
    context: Float[Array, "B L D"],
    image: BlockInputs,
    scale: Float[Array, ""],
    attend: Attend,
) -> Tokens:
    """All tokens before the main blocks, from dit.embed_image's and `embed`'s."""
    tokens = enter(x, control, config[1].refiner)
    for run in runs(*config)[:-1]:
        of_run = scale if run.adds else None
        tokens = apply_blocks(blocks_of(model, run), tokens, image, of_run, attend)
    return join(model.control_before, tokens, context)


def blocks_of(model: ControlledDiT, run: Run) -> list:
    """The modules of a run's units."""
    found = []
    for unit in run.units:
        group, index = unit.split(".")
        found.append(getattr(model, group)[int(index)])
    return found
