"""Small random models for tests: configs, weights by PyTorch name, and the same weights as our
modules.

Weights come from numpy alone, so that goldens need no weights on disk and the PyTorch side gets the
same ones."""

import zlib
from dataclasses import dataclass, replace
from functools import cache

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zimage_jax.model import control, dit, text_encoder, vae
from zimage_jax.model.config import (
    ControlConfig,
    DefaultsConfig,
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)
from zimage_jax.model.layers import with_arrays
from zimage_jax.weights import names as rules

MODELS = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}
TABLES = {
    "transformer": rules.DIT_DIFFUSERS,
    "text_encoder": rules.TEXT_ENCODER,
    "vae": rules.VAE_DIFFUSERS,
}


def small_config(
    *,
    dim=48,
    heads=2,
    axes=(8, 8, 8),
    layers=2,
    refiners=1,
    features=32,
    theta=256.0,
    text_layers=3,
    text_heads=(2, 1),
    text_width=16,
    channels=(16, 32),
    vae_layers=1,
    groups=8,
    vocab=320,
) -> ModelConfig:
    return ModelConfig(
        transformer=DiTConfig(
            dim=dim,
            n_layers=layers,
            n_refiner_layers=refiners,
            n_heads=heads,
            cap_feat_dim=features,
            axes_dims=axes,
            axes_lens=(640, 64, 64),
            rope_theta=theta,
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=vocab,
            hidden_size=features,
            intermediate_size=2 * features + 16,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads[0],
            num_key_value_heads=text_heads[1],
            head_dim=text_width,
            rope_theta=10000.0,
        ),
        vae=VAEConfig(
            block_out_channels=channels, layers_per_block=vae_layers, norm_num_groups=groups
        ),
    )


# Odd on purpose: heads of 24 and 40, one refiner and two, five blocks, one and four levels of the
# VAE, GQA of 1 to 4.
CONFIGS = {
    "plain": small_config(channels=(16, 16, 32, 32)),
    "five_blocks": small_config(
        layers=5, refiners=2, dim=80, axes=(16, 12, 12), channels=(16, 24, 40, 48)
    ),
    "one_head": small_config(
        dim=32,
        heads=1,
        axes=(8, 12, 12),
        text_heads=(4, 1),
        text_layers=2,
        channels=(8, 16, 16, 24),
    ),
    "wide_adaln": small_config(
        dim=264, heads=11, axes=(8, 8, 8), features=48, text_heads=(4, 2), channels=(16, 16, 16, 16)
    ),
    "deep_text": small_config(
        features=64, text_layers=6, text_heads=(4, 4), theta=100.0, vae_layers=2
    ),
    "eight_heads": small_config(
        dim=128, heads=8, axes=(4, 6, 6), layers=3, channels=(16, 32, 32, 32), groups=16
    ),
}


# ControlNets as published, of fewer blocks
CONTROLS = {
    "union 1.0": ControlConfig(2, 16, "none"),
    "union 2.0": ControlConfig(4, 33, "control_layers"),
    "union 2.1": ControlConfig(2, 33, "control_noise_refiner"),
    "union 2.1 lite": ControlConfig(1, 33, "control_noise_refiner"),
}
CONTROLLED = small_config(layers=4, refiners=2)
CONTROLLED = replace(CONTROLLED, vae=replace(CONTROLLED.vae, sample_size=256))  # draws no more
BASE = replace(  # the published base model differs from Turbo in its shift alone
    CONFIGS["plain"], scheduler=SigmasConfig(6.0), defaults=DefaultsConfig.of(SigmasConfig(6.0))
)
NATIVE = CONFIGS | {"controlled": CONTROLLED, "base": BASE}


@dataclass(frozen=True)
class Case:
    """One job for the whole pipeline, drawn by ours and by diffusers'."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: int  # of image tokens
    columns: int
    steps: int = 8
    guidance: float = 0.0
    negative_prompt: str = ""

    def size(self, config: ModelConfig) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.columns * config.pixel_multiple, self.rows * config.pixel_multiple


LONG = "a small red circle, left of a big blue square and above a green star, 画在白色背景上 🎨, as a child would draw it"
CASES = {
    "plain": Case(("a red circle",), (42,), 8, 8),
    "five_blocks": Case(
        ("红色的圆形", LONG), (0, 2**32 - 1), 5, 7, steps=4
    ),  # 35 tokens, unequal captions
    "one_head": Case((LONG,), (7,), 3, 5, guidance=3.0, negative_prompt="blurry"),
    "wide_adaln": Case(("a", "b c d e f"), (1, 2), 4, 6, steps=2, guidance=1.5),
    "deep_text": Case(("🙂 three\n lines\n of text",), (9,), 12, 6, steps=9),
    "eight_heads": Case((LONG, "a star", "二"), (3, 4, 5), 2, 9, steps=1),
}


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE with Qwen's special tokens and a few merges."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    made.train_from_iterator(["user assistant a red circle a blue square"] * 10, trainer)
    return made


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """float32 tensors by component and PyTorch name, of a size that keeps activations near one."""
    tensors = {}
    for component, model in MODELS.items():
        part = getattr(config, component)
        tensors[component] = {
            name: _random(name, entry.shape, seed)
            for name, entry in rules.expected(TABLES[component], model.spec(part)).items()
        }
    return tensors


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return 0.1 * values
    if ("norm" in name and len(shape) == 1) or name == "cap_embedder.0.weight":
        return 1 + 0.1 * values
    if len(shape) < 2 or "pad_token" in name or "embed_tokens" in name:
        return values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def our_model(
    component: str, config: ModelConfig, tensors: dict[str, np.ndarray], dtype=jnp.float32
):
    """Our module of one component, filled with the tensors of `random_tensors`."""
    spec = MODELS[component].spec(getattr(config, component))
    return _filled(spec, rules.expected(TABLES[component], spec), tensors, dtype)


def _filled(spec, entries: dict[str, rules.Entry], tensors: dict[str, np.ndarray], dtype):
    arrays = {}
    for name, entry in entries.items():
        for path, part in zip(entry.paths, np.split(tensors[name], len(entry.paths)), strict=True):
            arrays[path] = rules.to_native(part, entry.transform)
    # rounded by numpy: JAX would compile a program for every shape
    return with_arrays(spec, lambda path, leaf: jnp.asarray(arrays[path].astype(dtype)))


def control_tensors(config: ModelConfig, of: ControlConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors of a ControlNet by PyTorch name."""
    branch = control.Branch(config.transformer, of)
    entries = rules.expected(rules.CONTROL, branch)
    return {name: _random(name, entry.shape, seed) for name, entry in entries.items()}


def our_controlled(
    config: ModelConfig, of: ControlConfig, dtype=jnp.float32
) -> control.ControlledDiT:
    """Our DiT with a ControlNet, filled with `random_tensors` and `control_tensors`."""
    spec = control.ControlledDiT(config.transformer, of)
    entries = rules.expected([*rules.DIT_DIFFUSERS, *rules.CONTROL_ALONE], spec)
    tensors = random_tensors(config)["transformer"] | control_tensors(config, of)
    return _filled(spec, entries, tensors, dtype)


def inputs(config: ModelConfig) -> dict[str, np.ndarray]:
    """Inputs for each model alone: 15 image tokens (no multiple of 32), captions of 21 and 40
    tokens."""
    rng = np.random.default_rng(1)
    lengths = np.array([21, 40])
    features = rng.standard_normal((2, 64, config.transformer.cap_feat_dim), np.float32)
    features[np.arange(64)[None] >= lengths[:, None]] = 0
    h, w = 6, 10
    return {
        "ids": rng.integers(0, config.text_encoder.vocab_size, (2, 21)),
        "features": features,
        "lengths": lengths,
        "t": np.array([0.0455, 0.7], np.float32),
        "latents": rng.standard_normal((2, h, w, 16), np.float32),
        "picture": rng.standard_normal(
            (1, h * config.vae.scale, w * config.vae.scale, 3), np.float32
        ),
    }


def control_inputs(config: ModelConfig, of: ControlConfig) -> tuple[np.ndarray, np.ndarray, float]:
    """Latents, a control image's latents with channels for inpainting that are 0, and a scale."""
    latents = inputs(config)["latents"]
    image = np.random.default_rng(2).standard_normal(latents.shape, np.float32)
    more = np.zeros((*latents.shape[:3], of.in_channels - latents.shape[3]), np.float32)
    return latents, np.concatenate([image, more], -1), 0.7
