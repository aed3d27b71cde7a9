"""One table per component and layout: source tensor name -> path in our model, and a transform.

A row is (source template, target template or templates, transform). A placeholder like `{i}` or
`{j}` matches a number, a placeholder in _CHOICES one of its alternatives; other text matches
itself. A template must match the whole name. A row with several targets splits a fused tensor along
its first axis. `expected` gives the exact names and shapes a source must have, from a table and a
model's spec.

Layouts: "diffusers" (the published folder), "comfy" (ComfyUI's single files) and "flux" (the VAE
file `ae.safetensors` of Flux).
"""

import re
from dataclasses import dataclass

import numpy as np

from ..model.layers import named_arrays

_CHOICES = {
    "run": "layers|noise_refiner|context_refiner|control_layers|control_noise_refiner",
    "to": "to_q|to_k|to_v",
    "norm": "attention_norm1|attention_norm2|ffn_norm1|ffn_norm2",
    "w": "w1|w2|w3",
    "qk": "q|k",
    "proj": "q_proj|k_proj|v_proj|o_proj",
    "mlp": "gate_proj|up_proj|down_proj",
    "layernorm": "input_layernorm|post_attention_layernorm",
    "side": "encoder|decoder",
}

# -- transforms: from PyTorch's order of axes to ours ----------------------------------------------

SAME, LINEAR, CONV, POINTWISE = "same", "linear", "conv", "pointwise"


def to_native(tensor: np.ndarray, transform: str) -> np.ndarray:
    """A view of a PyTorch tensor in our order of axes.

    LINEAR: (out, in) -> (in, out). CONV: (O, I, h, w) -> (h, w, I, O). POINTWISE: (O, I, 1, 1) ->
    (I, O).
    """
    if transform == LINEAR:
        return tensor.T
    if transform == CONV:
        return tensor.transpose(2, 3, 1, 0)
    if transform == POINTWISE:
        return tensor[:, :, 0, 0].T
    return tensor


def to_source(array: np.ndarray, transform: str) -> np.ndarray:
    """A view of an array of ours in PyTorch's order of axes: the inverse of `to_native`."""
    if transform == LINEAR:
        return array.T
    if transform == CONV:
        return array.transpose(3, 2, 0, 1)
    if transform == POINTWISE:
        return array.T[:, :, None, None]
    return array


def source_shape(shape: tuple[int, ...], transform: str, parts: int = 1) -> tuple[int, ...]:
    """The PyTorch shape of `parts` arrays of native `shape`, fused along PyTorch's first axis."""
    if transform == LINEAR:
        shape = shape[::-1]
    elif transform == CONV:
        shape = (shape[3], shape[2], shape[0], shape[1])
    elif transform == POINTWISE:
        shape = (*shape[::-1], 1, 1)
    return (shape[0] * parts, *shape[1:])


# -- tables ----------------------------------------------------------------------------------------


def _bias(source: str, target: str, has_bias: bool) -> list:
    return [(f"{source}.bias", f"{target}.bias", SAME)] if has_bias else []


def _linear(source: str, target: str, *, bias: bool = False) -> list:
    return [(f"{source}.weight", f"{target}.kernel", LINEAR), *_bias(source, target, bias)]


def _conv(source: str, target: str, transform: str = CONV) -> list:
    return [(f"{source}.weight", f"{target}.kernel", transform), *_bias(source, target, True)]


def _norm(source: str, target: str, *, bias: bool = False) -> list:
    return [(f"{source}.weight", f"{target}.scale", SAME), *_bias(source, target, bias)]


_BLOCK_SHARED = [
    *_norm("{run}.{i}.{norm}", "{run}.{i}.{norm}"),
    *_linear("{run}.{i}.feed_forward.{w}", "{run}.{i}.feed_forward.{w}"),
    *_linear("{run}.{i}.adaLN_modulation.0", "{run}.{i}.modulation", bias=True),
]

_BLOCK_DIFFUSERS = [
    *_BLOCK_SHARED,
    *_linear("{run}.{i}.attention.{to}", "{run}.{i}.attention.{to}"),
    *_linear("{run}.{i}.attention.to_out.0", "{run}.{i}.attention.to_out"),
    *_norm("{run}.{i}.attention.norm_{qk}", "{run}.{i}.attention.norm_{qk}"),
]

_STEM_SHARED = [
    ("x_pad_token", "stem.x_pad_token", SAME),
    ("cap_pad_token", "stem.cap_pad_token", SAME),
    *_norm("cap_embedder.0", "stem.cap_norm"),
    *_linear("cap_embedder.1", "stem.cap_embedder", bias=True),
    *_linear("t_embedder.mlp.0", "stem.time_in", bias=True),
    *_linear("t_embedder.mlp.2", "stem.time_out", bias=True),
]

DIT_DIFFUSERS = [
    *_STEM_SHARED,
    *_BLOCK_DIFFUSERS,
    *_linear("all_x_embedder.2-1", "stem.x_embedder", bias=True),
    *_linear("all_final_layer.2-1.linear", "stem.final", bias=True),
    *_linear("all_final_layer.2-1.adaLN_modulation.1", "stem.final_modulation", bias=True),
]

# the ControlNet Union, as its authors and diffusers have it: beside its blocks, and as a whole
CONTROL_ALONE = [
    *_linear("control_all_x_embedder.2-1", "control_embedder.x_embedder", bias=True),
    *_linear("control_noise_refiner.0.before_proj", "control_embedder.before", bias=True),
    *_linear("control_layers.0.before_proj", "control_before", bias=True),
    *_linear("{run}.{i}.after_proj", "{run}.{i}.to_trunk", bias=True),
]
CONTROL = [*_BLOCK_DIFFUSERS, *CONTROL_ALONE]

DIT_COMFY = [
    *_STEM_SHARED,
    *_BLOCK_SHARED,
    *_linear("x_embedder", "stem.x_embedder", bias=True),
    *_linear("final_layer.linear", "stem.final", bias=True),
    *_linear("final_layer.adaLN_modulation.1", "stem.final_modulation", bias=True),
    (
        "{run}.{i}.attention.qkv.weight",
        (
            "{run}.{i}.attention.to_q.kernel",
            "{run}.{i}.attention.to_k.kernel",
            "{run}.{i}.attention.to_v.kernel",
        ),
        LINEAR,
    ),
    *_linear("{run}.{i}.attention.out", "{run}.{i}.attention.to_out"),
    *_norm("{run}.{i}.attention.{qk}_norm", "{run}.{i}.attention.norm_{qk}"),
]

TEXT_ENCODER = [
    ("embed_tokens.weight", "embed_tokens", SAME),
    *_linear("layers.{i}.self_attn.{proj}", "layers.{i}.self_attn.{proj}"),
    *_norm("layers.{i}.self_attn.{qk}_norm", "layers.{i}.self_attn.{qk}_norm"),
    *_linear("layers.{i}.mlp.{mlp}", "layers.{i}.mlp.{mlp}"),
    *_norm("layers.{i}.{layernorm}", "layers.{i}.{layernorm}"),
]


def _resnet(source: str, target: str, shortcut: str) -> list:
    return [
        *_norm(f"{source}.norm1", f"{target}.norm1", bias=True),
        *_conv(f"{source}.conv1", f"{target}.conv1"),
        *_norm(f"{source}.norm2", f"{target}.norm2", bias=True),
        *_conv(f"{source}.conv2", f"{target}.conv2"),
        *_conv(f"{source}.{shortcut}", f"{target}.conv_shortcut"),
    ]


_VAE_ENDS = [
    *_conv("{side}.conv_in", "{side}.conv_in"),
    *_conv("{side}.conv_out", "{side}.conv_out"),
]

VAE_DIFFUSERS = [
    *_VAE_ENDS,
    *_norm("{side}.conv_norm_out", "{side}.norm_out", bias=True),
    *_resnet("{side}.mid_block.resnets.{j}", "{side}.middle.resnets.{j}", "conv_shortcut"),
    *_norm(
        "{side}.mid_block.attentions.0.group_norm", "{side}.middle.attention.group_norm", bias=True
    ),
    *_linear("{side}.mid_block.attentions.0.{to}", "{side}.middle.attention.{to}", bias=True),
    *_linear("{side}.mid_block.attentions.0.to_out.0", "{side}.middle.attention.to_out", bias=True),
    *_resnet(
        "encoder.down_blocks.{i}.resnets.{j}",
        "encoder.down_blocks.{i}.resnets.{j}",
        "conv_shortcut",
    ),
    *_conv("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down_blocks.{i}.downsampler"),
    *_resnet(
        "decoder.up_blocks.{i}.resnets.{j}", "decoder.up_blocks.{i}.resnets.{j}", "conv_shortcut"
    ),
    *_conv("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up_blocks.{i}.upsampler"),
]


def vae_flux(levels: int) -> list:
    """The "flux" table of a VAE with this many levels.

    Flux counts the decoder's levels from the picture, we (and diffusers) from the latents.
    """
    rows = [
        *_VAE_ENDS,
        *_norm("{side}.norm_out", "{side}.norm_out", bias=True),
        *_norm("{side}.mid.attn_1.norm", "{side}.middle.attention.group_norm", bias=True),
        *_conv("{side}.mid.attn_1.proj_out", "{side}.middle.attention.to_out", POINTWISE),
        *_resnet(
            "encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", "nin_shortcut"
        ),
        *_conv("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsampler"),
    ]
    for name in "qkv":
        rows += _conv("{side}.mid.attn_1." + name, "{side}.middle.attention.to_" + name, POINTWISE)
    for name, j in (("block_1", "0"), ("block_2", "1")):
        rows += _resnet("{side}.mid." + name, "{side}.middle.resnets." + j, "nin_shortcut")
    for i in range(levels):
        level = levels - 1 - i
        rows += _resnet(
            f"decoder.up.{level}.block.{{j}}",
            f"decoder.up_blocks.{i}.resnets.{{j}}",
            "nin_shortcut",
        )
        rows += _conv(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{i}.upsampler")
    return rows


# -- reading a table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One source tensor: the paths of its parts in our model, and the shape it must have."""

    paths: tuple[str, ...]
    transform: str
    shape: tuple[int, ...]


def expected(table: list, model) -> dict[str, Entry]:
    """Source name -> Entry, for every source tensor that a model's spec needs."""
    patterns = []
    for source, targets, transform in table:
        targets = (targets,) if isinstance(targets, str) else targets
        patterns.append((_pattern(targets[0]), source, targets, transform))
    followers = {t for _, _, targets, _ in patterns for t in targets[1:]}
    follower_patterns = [_pattern(t) for t in followers]

    shapes = {path: leaf.shape for path, leaf in named_arrays(model).items()}
    entries = {}
    for path, shape in shapes.items():
        rows = [(m, *row) for pattern, *row in patterns if (m := pattern.fullmatch(path))]
        if not rows and any(p.fullmatch(path) for p in follower_patterns):
            continue  # a later part of a fused tensor: the entry of its first part has it
        # a path with no row, or with two, is a fault of the table: this raises ValueError
        ((match, source, targets, transform),) = rows
        paths = tuple(_fill(t, match) for t in targets)
        name = _fill(source, match)
        entries[name] = Entry(paths, transform, source_shape(shape, transform, len(paths)))
    return entries


def _pattern(template: str) -> re.Pattern:
    """A regular expression with a named group for each placeholder."""

    def group(placeholder: re.Match) -> str:
        name = placeholder[1]
        return f"(?P<{name}>{_CHOICES.get(name, '[0-9]+')})"

    # re.escape writes { and } as \{ and \}
    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template)))


def _fill(template: str, match: re.Match) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: match[m[1]], template)
