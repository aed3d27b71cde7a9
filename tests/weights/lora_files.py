"""LoRA files of small models in every spelling, and what each must change, by plain numpy."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from tests import small
from zimage_jax.model.config import ModelConfig

BLOCK = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
BLOCK += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"]
TEXT = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
QKV = "attention.to_q", "attention.to_k", "attention.to_v"
Tensors = dict[str, np.ndarray]
Changes = dict[tuple[str, str], np.ndarray]  # (component, diffusers' layer) -> what is added to W


@cache
def base(config: ModelConfig) -> dict[str, Tensors]:
    return small.random_tensors(config)


@dataclass
class Made:
    """A file's tensors, and what they change, for weight 1."""

    tensors: Tensors
    changes: Changes
    metadata: dict[str, str] | None = None


def layers(config: ModelConfig, names=BLOCK, groups=("layers", "noise_refiner")) -> list[str]:
    counts = {"layers": config.transformer.n_layers}
    few = config.transformer.n_refiner_layers
    found = [f"{g}.{i}.{n}" for g in groups for i in range(counts.get(g, few)) for n in names]
    return [name for name in found if f"{name}.weight" in base(config)["transformer"]]


def _random(rng, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def lora(
    config: ModelConfig,
    key: Callable[[str], str],
    ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
    *,
    rank: int = 4,
    alpha: float | None = None,
    component: str = "transformer",
    of: list[str] | None = None,
    seed: int = 0,
) -> Made:
    """`key`: the spelling of a layer's name; `ends`: what follows it in down and up."""
    rng, made = np.random.default_rng(seed), Made({}, {})
    for name in of or layers(config):
        rows, columns = base(config)[component][f"{name}.weight"].shape
        down, up = _random(rng, rank, columns), _random(rng, rows, rank)
        made.tensors |= {f"{key(name)}.{ends[0]}": down, f"{key(name)}.{ends[1]}": up}
        if alpha is not None:
            made.tensors[f"{key(name)}.alpha"] = np.array(alpha, np.float32)
        made.changes[component, name] = (1 if alpha is None else alpha / rank) * up @ down
    return made


def fused(config: ModelConfig, key: Callable[[str], str], ends, alpha: float | None) -> Made:
    """The names of ComfyUI's tree: q, k and v in one, to_out.0 as out."""
    rng, made = np.random.default_rng(3), Made({}, {})
    dim, rank = config.transformer.dim, 4
    scale = 1 if alpha is None else alpha / rank
    for block in ("layers.0", "layers.1", "context_refiner.0"):
        for name, rows, parts in (("qkv", 3 * dim, QKV), ("out", dim, ("attention.to_out.0",))):
            down, up = _random(rng, rank, dim), _random(rng, rows, rank)
            of = key(f"{block}.attention.{name}")
            made.tensors |= {f"{of}.{ends[0]}": down, f"{of}.{ends[1]}": up}
            if alpha is not None:
                made.tensors[f"{of}.alpha"] = np.array(alpha, np.float32)
            for part, rows_of in zip(parts, np.split(up, len(parts)), strict=True):
                made.changes["transformer", f"{block}.{part}"] = scale * rows_of @ down
    return made


def loha(config: ModelConfig, rank: int = 2) -> Made:
    rng, made = np.random.default_rng(4), Made({}, {})
    for name in layers(config):
        rows, columns = base(config)["transformer"][f"{name}.weight"].shape
        parts = {
            "hada_w1_a": _random(rng, rows, rank),
            "hada_w1_b": _random(rng, rank, columns),
            "hada_w2_a": _random(rng, rows, rank),
            "hada_w2_b": _random(rng, rank, columns),
        }
        key = "lycoris_" + name.replace(".", "_")
        made.tensors |= {f"{key}.{role}": values for role, values in parts.items()}
        made.tensors[f"{key}.alpha"] = np.array(1.0, np.float32)
        a1, b1, a2, b2 = parts.values()
        made.changes["transformer", name] = (a1 @ b1) * (a2 @ b2) / rank
    return made


def lokr(config: ModelConfig, form: str) -> Made:
    """`form`: "whole" (both factors direct, alpha ignored), "half" (w2 of low rank) or "low"."""
    rng, made, rank = np.random.default_rng(5), Made({}, {}), 2
    for name in layers(config):
        rows, columns = base(config)["transformer"][f"{name}.weight"].shape
        (a, b), (c, d) = (4, 4), (rows // 4, columns // 4)
        key = "lycoris_" + name.replace(".", "_")
        w1a, w1b = _random(rng, a, rank), _random(rng, rank, b)
        w2a, w2b = _random(rng, c, rank), _random(rng, rank, d)
        w1, w2 = _random(rng, a, b), _random(rng, c, d)
        if form == "low":
            made.tensors |= {f"{key}.lokr_w1_a": w1a, f"{key}.lokr_w1_b": w1b}
            w1 = w1a @ w1b
        else:
            made.tensors[f"{key}.lokr_w1"] = w1
        if form == "whole":
            made.tensors[f"{key}.lokr_w2"] = w2
        else:
            made.tensors |= {f"{key}.lokr_w2_a": w2a, f"{key}.lokr_w2_b": w2b}
            w2 = w2a @ w2b
        made.tensors[f"{key}.alpha"] = np.array(3.0, np.float32)
        made.changes["transformer", name] = np.kron(w1, w2) * (1 if form == "whole" else 3 / rank)
    return made


def dora(config: ModelConfig, axis: str, made: Made | None = None) -> Made:
    """`axis`: "out" (the old norm) or "in" of ComfyUI, or "peft". `made`: what it is a DoRA of."""
    ends = ("lora_down.weight", "lora_up.weight")
    if made is None:
        made = lora(config, lambda n: "lora_unet_" + n.replace(".", "_"), ends, alpha=2.0)
    start = next(iter(made.tensors)).partition("_layers")[0]
    rng = np.random.default_rng(6)
    for (component, name), change in made.changes.items():
        own = base(config)[component][f"{name}.weight"]
        of = own if axis == "out" else own + change
        norm = np.linalg.norm(of, axis=0 if axis == "in" else 1, keepdims=True)
        m = (norm * (1 + 0.1 * rng.standard_normal(norm.shape))).astype(np.float32)
        made.changes[component, name] = (own + change) * m / norm - own
        key = f"{start}_{name.replace('.', '_')}"
        role = "lora_magnitude_vector" if axis == "peft" else "dora_scale"
        made.tensors[f"{key}.{role}"] = m.reshape(-1) if axis == "peft" else m
    return made


def diff(config: ModelConfig, role: str) -> Made:
    """Whole changes, of matrices, biases and norms; or `set_weight`."""
    rng, made = np.random.default_rng(7), Made({}, {})
    names = ["layers.0.attention.to_k", "layers.1.adaLN_modulation.0", "layers.0.attention_norm1"]
    for name in names:
        own = base(config)["transformer"][f"{name}.weight"]
        values = (0.1 * rng.standard_normal(own.shape)).astype(np.float32)
        made.tensors[f"diffusion_model.{name}.{role}"] = values
        made.changes["transformer", name] = values - own if role == "set_weight" else values
    if role == "diff":
        bias = base(config)["transformer"]["layers.1.adaLN_modulation.0.bias"]
        values = rng.standard_normal(bias.shape).astype(np.float32)
        made.tensors["diffusion_model.layers.1.adaLN_modulation.0.diff_b"] = values
        made.changes["transformer", "layers.1.adaLN_modulation.0.bias"] = values
    return made


def anime(config: ModelConfig) -> Made:
    """Split layers, beside fused duplicates that must not count."""
    ends = ("lora.down.weight", "lora.up.weight")

    def key(name: str) -> str:
        return "diffusion_model." + name.replace("to_q", "to.q").replace("to_k", "to.k").replace(
            "to_v", "to.v"
        ).replace("to_out.0", "to.out.0")

    made = lora(config, key, ends, of=layers(config, BLOCK[:4]))
    twice = fused(config, lambda n: f"diffusion_model.{n}", ends, None)
    twice.tensors = {k: v for k, v in twice.tensors.items() if "context_refiner" not in k}
    made.tensors |= twice.tensors
    return made


def peft_metadata(config: ModelConfig) -> Made:
    """diffusers' own: alpha in the header only."""
    made = lora(config, lambda n: f"transformer.{n}")
    made.changes = {k: 2.0 * v for k, v in made.changes.items()}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": layers(config)}
    made.metadata = {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    }
    return made


def text(config: ModelConfig, key: Callable[[str], str], ends) -> Made:
    of = [f"layers.{i}.{n}" for i in range(config.text_encoder.n_layers) for n in TEXT]
    return lora(config, key, ends, component="text_encoder", of=of, seed=8)


AB, DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = "lora_A.default.weight", "lora_B.default.weight"


def _flat(name: str) -> str:
    return name.replace(".", "_")


SPELLINGS: dict[str, Callable[[ModelConfig], Made]] = {
    "diffusers": lambda c: lora(c, lambda n: f"transformer.{n}"),
    "diffusers, alpha in the header": peft_metadata,
    "PEFT": lambda c: lora(c, lambda n: f"base_model.model.{n}", DEFAULT),
    "PEFT of the transformer": lambda c: lora(c, lambda n: f"base_model.model.transformer.{n}"),
    "ai-toolkit": lambda c: lora(c, lambda n: f"diffusion_model.{n}"),
    "DiffSynth": lambda c: lora(c, lambda n: n, DEFAULT),
    "musubi": lambda c: lora(c, lambda n: f"lora_unet_{_flat(n)}", DOWN, alpha=1.0),
    "musubi, two underscores": lambda c: lora(c, lambda n: f"lora_unet__{_flat(n)}", DOWN, alpha=3),
    "fused, kohya": lambda c: fused(c, lambda n: f"lora_unet_{_flat(n)}", DOWN, 2.0),
    "fused, ComfyUI": lambda c: fused(c, lambda n: f"diffusion_model.{n}", AB, None),
    "Anime-Z": anime,
    "LoHa": loha,
    "LoHa of a high rank": lambda c: loha(c, rank=9),
    "LoKr, whole": lambda c: lokr(c, "whole"),
    "LoKr, half": lambda c: lokr(c, "half"),
    "LoKr, low": lambda c: lokr(c, "low"),
    "DoRA, out": lambda c: dora(c, "out"),
    "DoRA, in": lambda c: dora(c, "in"),
    "DoRA, PEFT": lambda c: dora(c, "peft"),
    "DoRA of LoHa": lambda c: dora(c, "in", loha(c)),
    "diff": lambda c: diff(c, "diff"),
    "set": lambda c: diff(c, "set_weight"),
    "text, diffusers": lambda c: text(c, lambda n: f"text_encoder.{n}", AB),
    "text, InvokeAI": lambda c: text(c, lambda n: f"base_model.model.text_encoder.model.{n}", AB),
    "text, ComfyUI": lambda c: text(
        c, lambda n: f"text_encoders.qwen3_4b.transformer.model.{n}", AB
    ),
}
