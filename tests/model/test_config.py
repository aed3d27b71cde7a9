import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.errors import ConfigError
from zimage_jax.model.config import (
    PRESETS,
    TURBO,
    DefaultsConfig,
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)

PUBLISHED = (
    Path(__file__).parent.parent.parent.parent / "shared" / "reference" / "z-image-turbo.json"
)
KINDS = [DiTConfig, TextEncoderConfig, VAEConfig, SigmasConfig]

# as diffusers 0.42 and transformers 5.23 save them, beside the published forms
SAVED = {
    DiTConfig: {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": "0.42.1",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [8, 8, 8],
        "axes_lens": [128, 64, 64],
        "cap_feat_dim": 32,
        "dim": 48,
        "in_channels": 16,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "rope_theta": 256.0,
        "siglip_feat_dim": None,
        "t_scale": 1000.0,
    },
    TextEncoderConfig: {
        "architectures": ["Qwen3Model"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": None,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 100,
    },
    VAEConfig: {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [32, 32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    SigmasConfig: {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": False,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    },
}


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published reference is not beside this checkout"
)
def test_the_published_configs_are_the_defaults():
    configs = json.loads(PUBLISHED.read_text())["configs"]
    assert DiTConfig.from_json(configs["transformer/config.json"]) == TURBO.transformer
    assert TextEncoderConfig.from_json(configs["text_encoder/config.json"]) == TURBO.text_encoder
    assert VAEConfig.from_json(configs["vae/config.json"]) == TURBO.vae
    assert SigmasConfig.from_json(configs["scheduler/scheduler_config.json"]) == TURBO.scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_saved_configs_are_read(kind):
    config = kind.from_json(SAVED[kind])
    for field in dataclasses.fields(kind):
        if field.name in SAVED[kind]:
            value = SAVED[kind][field.name]
            assert getattr(config, field.name) == (
                tuple(value) if isinstance(value, list) else value
            )


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_named(kind):
    with pytest.raises(ConfigError, match=r"unknown key 'extra_gate' = 3"):
        kind.from_json(SAVED[kind] | {"extra_gate": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_key_is_named(kind):
    names = [f.name for f in dataclasses.fields(kind) if f.name in SAVED[kind]]
    with pytest.raises(ConfigError) as fault:
        kind.from_json({k: v for k, v in SAVED[kind].items() if k not in names})
    assert all(name in str(fault.value) for name in names)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (DiTConfig, {"qk_norm": False}, "qk_norm = False is not supported"),
        (DiTConfig, {"n_kv_heads": 1}, "n_kv_heads = 1"),
        (DiTConfig, {"all_patch_size": [2, 4]}, "all_patch_size"),
        (DiTConfig, {"siglip_feat_dim": 1152}, "siglip_feat_dim = 1152: Z-Image Omni or Edit"),
        (DiTConfig, {"dim": 47}, "not a multiple of n_heads"),
        (DiTConfig, {"axes_dims": [8, 8, 4]}, "add up to"),
        (DiTConfig, {"dim": "48"}, "dim must be a whole number"),
        (DiTConfig, {"n_layers": 10**9}, "n_layers must be"),
        (DiTConfig, {"n_layers": 100_000}, "at most 512"),
        (DiTConfig, {"norm_eps": float("nan")}, "norm_eps must be a number"),
        (DiTConfig, {"n_heads": True}, "n_heads must be"),
        (TextEncoderConfig, {"hidden_act": "gelu"}, "hidden_act"),
        (TextEncoderConfig, {"attention_bias": True}, "attention_bias"),
        (TextEncoderConfig, {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        (
            TextEncoderConfig,
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}},
            "rope_type = 'yarn'",
        ),
        (TextEncoderConfig, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (TextEncoderConfig, {"layer_types": 5}, "layer_types 5"),
        (TextEncoderConfig, {"layer_types": True}, "layer_types True"),
        (TextEncoderConfig, {"layer_types": [[1]]}, "layer_types [[1]]"),
        (TextEncoderConfig, {"layer_types": [{}]}, "layer_types [{}]"),
        (TextEncoderConfig, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (TextEncoderConfig, {"num_hidden_layers": 1}, "at least 2"),
        (VAEConfig, {"use_quant_conv": True}, "use_quant_conv"),
        (VAEConfig, {"latents_mean": [0.1]}, "latents_mean"),
        (VAEConfig, {"mid_block_add_attention": False}, "mid_block_add_attention"),
        (VAEConfig, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
        (VAEConfig, {"scaling_factor": 0}, "scaling_factor"),
        (VAEConfig, {"block_out_channels": 5}, "block_out_channels must be a short list"),
        (VAEConfig, {"block_out_channels": 1.5}, "block_out_channels must be a short list"),
        (VAEConfig, {"block_out_channels": True}, "block_out_channels must be a short list"),
        (SigmasConfig, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (SigmasConfig, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (SigmasConfig, {"shift": -1}, "shift must be positive"),
    ],
)
def test_what_would_change_arithmetic_is_refused(kind, change, words):
    with pytest.raises(ConfigError) as fault:
        kind.from_json(SAVED[kind] | change, "here.json")
    assert words in str(fault.value)
    assert str(fault.value).startswith("here.json")


def test_strangers_text_is_escaped_and_cut():
    """In keys and values, however many, long and deep they are."""
    deep: list = []
    for _ in range(500):
        deep = [deep]
    changes = {f"\x1b[31m{k}" + "x" * 100_000: "y\n" * 100_000 for k in range(100)}
    many = (
        (SigmasConfig, changes),
        (SigmasConfig, {"shift": "z\n" * 100_000}),
        (SigmasConfig, {"shift": deep}),
    )
    for kind, data in (*many, (DiTConfig, {"n_heads": "z\n" * 100_000, "n_kv_heads": 5})):
        with pytest.raises(ConfigError) as fault:
            kind.from_json(data)
        assert str(fault.value).isprintable()
        assert len(str(fault.value)) < 2000


def test_defaults_follow_from_the_shift():
    """The two published models have the same tensors and differ in this."""
    assert DefaultsConfig.of(SigmasConfig(3.0)) == DefaultsConfig(8, 0.0)
    assert DefaultsConfig.of(SigmasConfig(6.0)) == DefaultsConfig(28, 4.0)
    for wrong in ({"steps": 0}, {"steps": 1001}, {"guidance": -1}, {"guidance": 101}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DefaultsConfig.from_json({"steps": 8, "guidance": 0.0} | wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    assert ModelConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


def test_turbo_24_has_four_chunks_of_six():
    assert PRESETS["turbo-24"].transformer == dataclasses.replace(TURBO.transformer, n_layers=24)


def test_components_must_fit_together():
    with pytest.raises(ConfigError, match="features of width 2560"):
        ModelConfig(text_encoder=dataclasses.replace(TURBO.text_encoder, hidden_size=128))
    with pytest.raises(ConfigError, match="latent channels"):
        ModelConfig(vae=dataclasses.replace(TURBO.vae, latent_channels=4))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_json_is_read_or_refused(kind, data):
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(SAVED[kind])), anything, max_size=3))
    with contextlib.suppress(ConfigError):
        assert isinstance(kind.from_json(SAVED[kind] | changes), kind)


@given(anything)
def test_a_config_that_is_no_object_is_refused(data):
    for kind in KINDS:
        with pytest.raises(ConfigError):
            kind.from_json(data)
