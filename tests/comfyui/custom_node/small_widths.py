"""ComfyUI's own UNETLoader and CLIPLoader for a Z-Image and a Qwen3-4B of small widths.

ComfyUI knows both by their widths: Z-Image by a `dim` of 3840, Qwen3-4B by 2560, and takes from these
what a file does not say. Here the configs are given instead while a file is loaded. Classes, weights
and all that runs later are ComfyUI's.
"""

import json
from functools import partial
from unittest.mock import patch

import comfy.sd
from comfy import model_detection, supported_models
from comfy.text_encoders import llama
from nodes import CLIPLoader, UNETLoader


def detected(dit: dict) -> dict:
    """What comfy/model_detection.py makes of Z-Image's file, with the numbers of our DiTConfig."""
    return {
        **{"image_model": "lumina2", "patch_size": 2, "qk_norm": True, "z_image_modulation": True},
        **{"pad_tokens_multiple": 32, "ffn_dim_multiplier": 8 / 3, "multiple_of": 1},
        **{name: dit[name] for name in ("in_channels", "dim", "cap_feat_dim", "n_layers")},
        **{name: dit[name] for name in ("n_heads", "axes_dims", "axes_lens", "rope_theta")},
        **{"n_kv_heads": dit["n_heads"], "n_refiner_layers": dit["n_refiner_layers"]},
        **{"time_scale": dit["t_scale"], "norm_eps": dit["norm_eps"]},
    }


def qwen(text_encoder: dict) -> partial:
    """Qwen3_4BConfig with the numbers of our TextEncoderConfig."""
    own = dict(text_encoder)
    small = type("SmallQwen3", (llama.Qwen3_4BConfig,), {"head_dim": own.pop("head_dim")})
    return partial(small, **own)


class LoadSmall:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": ("STRING", {}), "config": ("STRING", {})}}

    def load(self, name, config):
        """`name`: of the files; `config`: JSON of our ModelConfig."""
        of = json.loads(config)
        dit = detected(of["transformer"])
        with (
            patch.object(model_detection, "detect_unet_config", lambda *_, **__: dict(dit)),
            patch.dict(supported_models.ZImage.unet_config, dim=dit["dim"]),
        ):
            (model,) = UNETLoader().load_unet(name, "default")
        with (
            patch.object(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.QWEN3_4B),
            patch.object(llama, "Qwen3_4BConfig", qwen(of["text_encoder"])),
        ):
            (clip,) = CLIPLoader().load_clip(name, "lumina2")
        return model, clip
