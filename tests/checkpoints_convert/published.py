"""A small model as the published folder and ComfyUI's files have it, and what a conversion of it holds."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.convert import convert
from tests import small
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import components, sources
from zimage_jax.weights.checkpoint import Checkpoint

CONFIG = small.CONFIGS["five_blocks"]
TENSORS = small.random_tensors(CONFIG)  # copy before you change one
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}


@functools.cache
def expected_arrays(component: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """What a checkpoint of TENSORS holds."""
    return named_arrays(small.our_model(component, CONFIG, TENSORS[component], dtype))


def published_like(component: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """A component's tensors as the published folder has them: the text encoder with its unused last
    layer."""
    tensors = dict(TENSORS[component])
    if component == "text_encoder":
        last = CONFIG.text_encoder.n_layers
        tensors |= {
            n.replace("layers.0.", f"layers.{last}."): a
            for n, a in tensors.items()
            if n.startswith("layers.0.")
        } | {"norm.weight": np.ones(CONFIG.text_encoder.hidden_size, np.float32)}
    return {n: a.astype(dtype) for n, a in tensors.items()}


def write_configs(folder: Path) -> None:
    for name, (_, place) in sources.CONFIGS.items():
        part, file = CONFIG.to_json()[name], folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(part))
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(small.tokenizer().to_str())


def run(
    src: Path | None, dst: Path, files=None, config=None, tokenizer=None, dtype="float32"
) -> Checkpoint:
    source = sources.open_source(src, files or {}, config, tokenizer)
    return Checkpoint(convert(source, dst, dtype, quiet=True))


def arrays_of(found: Checkpoint, component: str) -> dict[str, np.ndarray]:
    return {p: a for unit in found.units(component) for p, a in found.read(component, unit).items()}


def assert_holds(found: Checkpoint, dtype=np.float32) -> None:
    for component in components.COMPONENTS:
        expected = expected_arrays(component, dtype)
        got = arrays_of(found, component)
        assert got.keys() == expected.keys()
        for path, array in got.items():
            np.testing.assert_array_equal(array, expected[path])


def comfy_named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' names of the DiT to ComfyUI's, with q, k and v fused."""
    renamed = {}
    for name, array in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", t)] for t in ("to_q", "to_k", "to_v")]
            renamed[name.replace("to_q", "qkv")] = np.concatenate(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            for old, new in {
                "all_x_embedder.2-1": "x_embedder",
                "all_final_layer.2-1": "final_layer",
                "to_out.0": "out",
                "norm_q": "q_norm",
                "norm_k": "k_norm",
            }.items():
                name = name.replace(old, new)
            renamed[name] = array
    return renamed


def comfy_files(folder: Path, *, prefix: str = "", flux_vae: bool = True) -> dict[str, Path]:
    """The same weights under ComfyUI's names, made by the inverse of nothing but NumPy."""
    folder.mkdir()
    tensors = TENSORS
    renamed = comfy_named(tensors["transformer"])
    renamed["norm_final.weight"] = np.ones(3, np.float32)
    dit_file, text_file, vae_file = (folder / f"{n}.safetensors" for n in ("dit", "text", "ae"))
    save_file({prefix + n: a for n, a in renamed.items()}, dit_file)
    save_file(
        {"model." + n: a for n, a in published_like("text_encoder").items()}
        | {"lm_head.weight": np.ones(2)},
        text_file,
    )
    save_file(flux_named(tensors["vae"]) if flux_vae else tensors["vae"], vae_file)
    return {"transformer": dit_file, "text_encoder": text_file, "vae": vae_file}


def flux_named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' VAE names to those of Flux's ae.safetensors, as BFL's autoencoder numbers its
    modules."""
    levels, named = len(CONFIG.vae.block_out_channels), {}
    for name, array in tensors.items():
        side, *rest = name.split(".")
        new = ".".join(rest)
        for i in range(levels):
            new = new.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.@").replace(
                f"down_blocks.{i}.", f"down.{i}."
            )
        new = new.replace("@", "")
        for old, other in {
            "resnets.": "block.",
            "upsamplers.0": "upsample",
            "downsamplers.0": "downsample",
            "conv_shortcut": "nin_shortcut",
            "mid_block.block.0": "mid.block_1",
            "mid_block.block.1": "mid.block_2",
            "mid_block.attentions.0": "mid.attn_1",
            "attn_1.group_norm": "attn_1.norm",
            "to_out.0": "proj_out",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "conv_norm_out": "norm_out",
        }.items():
            new = new.replace(old, other)
        is_point = "attn_1" in new and array.ndim == 2
        named[f"{side}.{new}"] = (
            np.ascontiguousarray(array[:, :, None, None]) if is_point else array
        )
    return named
