"""Every model against the PyTorch class, on odd small configurations: from goldens always, live
where torch is."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.schedules import every
from tests.small import CONFIGS, MODELS, our_model, random_tensors
from tests.small import inputs as numpy_inputs
from zimage_jax.errors import ConfigError
from zimage_jax.model import dit, text_encoder, vae
from zimage_jax.model.attention import Attend
from zimage_jax.model.config import PRESETS, TURBO
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import components


def relative(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def inputs(config) -> dict:
    """The inputs as JAX arrays, but for what is used on the host."""
    host = {"ids", "lengths"}
    return {k: v if k in host else jnp.asarray(v) for k, v in numpy_inputs(config).items()}


@cache
def ours(config, dtype, attend=Attend()) -> dict:
    """What `reference.outputs` has of each model alone, and `velocity_at`: the velocity given a
    time embedding."""
    given, tensors = inputs(config), random_tensors(config)
    model = {name: our_model(name, config, tensors[name], dtype) for name in MODELS}
    lengths = given["lengths"].astype(np.int32)
    sides = dit.inputs(
        config.transformer, *given["latents"].shape[1:3], lengths, given["features"].shape[1]
    )

    @jax.jit
    def velocity(model, latents, features, lengths, sides, time):
        context = dit.context(model, features.astype(dtype), lengths, sides.caption, attend)
        return dit.denoise(model, latents, time, context, sides, attend)

    def velocity_at(time):
        return velocity(
            model["transformer"], given["latents"], given["features"], lengths, sides, time
        )

    text = model["text_encoder"]
    time = dit.embed_time(model["transformer"].stem, given["t"])
    return {
        "text": jax.jit(text_encoder.apply_blocks)(
            text.layers, text_encoder.embed(text.embed_tokens[...], given["ids"])
        ),
        "time": time,
        "velocity": velocity_at(time),
        "velocity_at": velocity_at,
        "decode": jax.jit(vae.decode, static_argnums=2)(model["vae"], given["latents"], dtype),
        "encode": jax.jit(vae.encode, static_argnums=2)(model["vae"], given["picture"], dtype),
    }


@pytest.mark.parametrize("name", every(CONFIGS, ["plain", "one_head"]))
def test_float32_agrees_with_pytorch(name, reference_outputs):
    expected, got = reference_outputs(name), ours(CONFIGS[name], jnp.float32)
    for key, tolerance in {
        "text": 1e-5,
        "decode": 1e-5,
        "encode": 1e-5,
        "velocity": 1e-4,
        "time": 5e-5,
    }.items():
        assert relative(got[key], expected[key]) <= tolerance, key
    assert relative(got["velocity_at"](jnp.asarray(expected["time"])), expected["velocity"]) <= 1e-5


@pytest.mark.parametrize("name", every(CONFIGS, ["plain"], []))
def test_bfloat16_errs_no_more_than_pytorch(name, reference_outputs):
    expected, got = reference_outputs(name), ours(CONFIGS[name], jnp.bfloat16)
    for key in ("text", "decode", "encode", "velocity"):
        theirs = relative(expected[key + "_bf16"], expected[key])
        assert relative(got[key], expected[key]) <= 1.2 * theirs, key


@pytest.mark.exhaustive
def test_query_chunks_do_not_move_the_velocity():
    config = CONFIGS["five_blocks"]
    whole, chunked = (
        ours(config, jnp.float32, attend=a)["velocity"] for a in (Attend(), Attend(query_chunk=32))
    )
    assert relative(chunked, whole) <= 1e-6


def test_padding_beyond_the_reference_is_masked():
    """A caption in a longer bucket gives the same velocity."""
    config, given = CONFIGS["plain"], inputs(CONFIGS["plain"])
    model = our_model("transformer", config, random_tensors(config)["transformer"])
    lengths = given["lengths"].astype(np.int32)
    features = jnp.pad(given["features"], ((0, 0), (0, 256 - 64), (0, 0)))
    sides = dit.inputs(config.transformer, 6, 10, lengths, 256)
    context = jax.jit(dit.context)(model, features, lengths, sides.caption)
    time = dit.embed_time(model.stem, given["t"])
    velocity = jax.jit(dit.denoise)(model, given["latents"], time, context, sides)
    assert relative(velocity, ours(config, jnp.float32)["velocity"]) <= 1e-6


def test_the_context_does_not_depend_on_garbage_behind_the_caption():
    config, given = CONFIGS["plain"], inputs(CONFIGS["plain"])
    model = our_model("transformer", config, random_tensors(config)["transformer"])
    lengths = given["lengths"].astype(np.int32)
    sides = dit.inputs(config.transformer, 6, 10, lengths, 64)
    spoilt = jnp.where(
        np.arange(64)[None, :, None] >= lengths[:, None, None], 1e3, given["features"]
    )
    clean, dirty = (
        jax.jit(dit.context)(model, f, lengths, sides.caption) for f in (given["features"], spoilt)
    )
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(
            clean[row, : dit.padded(int(n))], dirty[row, : dit.padded(int(n))]
        )


def test_positions():
    image = dit.image_positions(6, 10, np.array([21, 40]))
    assert image.shape == (2, 32, 3)
    assert image[0, 14].tolist() == [33, 2, 4]  # 21 caption tokens are padded to 32
    assert image[1, 5].tolist() == [65, 1, 0]
    assert image[0, 15:].max() == 0  # pad tokens sit at the origin
    assert dit.caption_positions(1, 64)[0, :3].tolist() == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]


def test_the_padded_caption_and_not_its_bucket_must_fit():
    """208 tokens are padded to 224; the bucket of 256 behind that is masked."""
    config = dataclasses.replace(CONFIGS["plain"].transformer, axes_lens=(256, 64, 64))
    assert dit.inputs(config, 4, 4, np.array([208]), 256).caption.cos.shape[1] == 256
    with pytest.raises(ConfigError, match="position 257 on axis 0"):
        dit.inputs(config, 4, 4, np.array([225]), 256)


def test_a_position_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="axis 1"):
        dit.inputs(CONFIGS["plain"].transformer, 130, 4, np.array([5]), 32)


def test_the_spec_lists_the_published_tensors():
    count = {
        name: len(named_arrays(model.spec(getattr(TURBO, name)))) for name, model in MODELS.items()
    }
    # 398 published for the text encoder, less the 11 of its last layer and the final norm
    assert count == {"transformer": 521, "text_encoder": 398 - 12, "vae": 244}
    blocks = components.units(PRESETS["turbo-24"], "transformer")
    assert sum(unit.startswith("layers.") for unit in blocks) == 24


def test_a_block_is_181_million_parameters():
    block = components.units(TURBO, "transformer")["layers.0"]
    assert sum(np.prod(leaf.shape) for leaf in block.values()) == pytest.approx(181e6, rel=0.01)
