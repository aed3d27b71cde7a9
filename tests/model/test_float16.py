"""float16: finite where plain float16 is not, and nearer to float32 than bfloat16 is.

Turing cards (T4, RTX 20) have no bfloat16. Tokens and weights here have outliers, so large that
every place that is guarded leaves float16's range."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from tests.model.test_models import relative
from tests.pipeline.test_pipeline import draw, psnr
from tests.schedules import every
from tests.small import CASES, CONFIGS
from zimage_jax import Memory, ZImage
from zimage_jax.model import dit, ops, text_encoder, vae
from zimage_jax.model.attention import Attend
from zimage_jax.model.config import TURBO
from zimage_jax.model.layers import with_arrays
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save

LARGEST = float(jnp.finfo(jnp.float16).max)
NARROW = jnp.float16, jnp.bfloat16
POOL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
CONFIG_BY_WIDTH = {
    config.dim: config
    for config in (
        CONFIGS["plain"].transformer,
        CONFIGS["wide_adaln"].transformer,
        TURBO.transformer,
    )
}
# what a parameter of a block is multiplied with, by the end of its path
LARGE = {
    "w1.kernel": 64.0,
    "w3.kernel": 64.0,
    "w2.kernel": 64.0,
    "to_q.kernel": 2.0**15,
    "to_v.kernel": 2.0**10,
    "to_out.kernel": 2.0**10,
    "ffn_norm2.scale": 2.0**15,
    "gate_proj.kernel": 64.0,
    "up_proj.kernel": 64.0,
    "down_proj.kernel": 64.0,
}


def outlying(*shape: int) -> jax.Array:
    """Normal numbers, ten times as large in 1 % of the channels, in one at least."""
    rng = np.random.default_rng(1)
    x, width = rng.standard_normal(shape, np.float32), shape[-1]
    x[..., rng.choice(width, max(1, width // 100), replace=False)] *= 10
    return jnp.asarray(x)


def enlarged(path: str) -> float:
    return next((factor for end, factor in LARGE.items() if path.endswith(end)), 1.0)


def filled(spec):
    """A module of random bfloat16 parameters that are LARGE. From a pool: to draw the 181 million
    of a published block takes 20 s."""

    def fill(path: str, leaf: jax.ShapeDtypeStruct):
        if path.endswith(".scale"):
            values = np.ones(leaf.shape, np.float32)
        else:
            values = np.resize(np.roll(POOL, zlib.crc32(path.encode())), leaf.shape)
            values = values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(values * np.float32(enlarged(path)), jnp.bfloat16)

    return with_arrays(spec, fill)


def errors(run, *args) -> dict:
    """Of `run(*args, dtype)` in float16 and bfloat16 against float32."""
    exact, *found = (run(*args, dtype) for dtype in (jnp.float32, *NARROW))
    assert float(jnp.abs(exact).max()) > LARGEST, "plain float16 would be enough"
    return {d: relative(f, exact) for d, f in zip(NARROW, found, strict=True)}


def assert_half_of_bfloat16s(found: dict) -> None:
    """11 bits against 8: an eighth is what is expected. NaN fails."""
    assert found[jnp.float16] <= found[jnp.bfloat16] / 2


# -- numbers ---------------------------------------------------------------------------------------


@given(st.floats(2.0**-8, 2.0**21, width=32), st.sampled_from([1, -1]))
def test_tokens_keep_float16s_bits_and_a_larger_range(value, sign):
    x = np.array([[value * sign]], np.float32)
    assert relative(ops.from_tokens(ops.to_tokens(x, jnp.float16)), x) <= 2.0**-11
    for dtype in (jnp.bfloat16, jnp.float32):
        np.testing.assert_array_equal(ops.to_tokens(x, dtype), x.astype(dtype))
        assert ops.from_tokens(x.astype(dtype)).dtype == dtype


@pytest.mark.exhaustive
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=5))
def test_a_row_comes_into_range_by_a_power_of_two(row):
    x = jnp.asarray([row], jnp.float32)
    rows, scale = ops.rows_in_range(x)
    largest = float(jnp.abs(x).max())
    assert np.frexp(float(scale[0, 0]))[0] == 0.5
    assert float(jnp.abs(rows).max()) <= 1.5
    np.testing.assert_allclose(
        rows.astype(jnp.float32) * scale, x, rtol=2.0**-11, atol=largest * 2.0**-24
    )


# -- the DiT ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_feed_forward_leaves_the_range_before_w2_and_after():
    config = CONFIGS["wide_adaln"].transformer
    module, x = filled(dit.spec(config).layers[0].feed_forward), outlying(1, 32, config.dim)
    assert float(jnp.abs(jax.nn.silu(module.w1(x)) * module.w3(x)).max()) > LARGEST
    assert_half_of_bfloat16s(errors(lambda m, x, dtype: m(x.astype(dtype)), module, x))


@pytest.mark.exhaustive
def test_the_attention_leaves_the_range_in_q_and_after_to_out():
    config = CONFIGS["wide_adaln"].transformer
    module, x = filled(dit.spec(config).layers[0].attention), outlying(1, 32, config.dim)
    side = dit.inputs(config, 4, 16, np.array([16]), 32).image
    assert float(jnp.abs(module.to_q(x)).max()) > LARGEST

    def run(module, x, dtype):
        return module(x.astype(dtype), side, Attend(), dit.kv.plain(dtype), None)[0]

    assert_half_of_bfloat16s(errors(run, module, x))


@pytest.mark.parametrize("width", every(CONFIG_BY_WIDTH, [min(CONFIG_BY_WIDTH)]))
def test_a_block_whose_tokens_leave_the_range(width):
    config = CONFIG_BY_WIDTH[width]
    side = dit.inputs(config, 4, 16, np.array([16]), 32).image
    side = side._replace(time=outlying(1, config.adaln_dim))

    def run(block, x, dtype):
        run_block = jax.jit(lambda block, x: dit.apply_blocks([block], x, side, Attend()))
        return ops.from_tokens(run_block(block, ops.to_tokens(x, dtype)))

    block = filled(dit.spec(config).layers[0])
    assert_half_of_bfloat16s(errors(run, block, outlying(1, 32, width)))


# -- the other models ------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_text_encoder_has_massive_activations():
    """As Qwen's first tokens have, which grow from block to block."""
    config = CONFIGS["deep_text"].text_encoder
    blocks = filled(text_encoder.spec(config)).layers

    def run(blocks, x, dtype):
        return ops.from_tokens(jax.jit(text_encoder.apply_blocks)(blocks, ops.to_tokens(x, dtype)))

    assert_half_of_bfloat16s(errors(run, blocks, outlying(1, 16, config.hidden_size)))


def test_the_vae_computes_in_float32_where_the_rest_computes_in_float16():
    assert [vae.compute_dtype(d) for d in ("float16", "bfloat16", "float32")] == [
        np.dtype(jnp.float32),
        np.dtype(jnp.bfloat16),
        np.dtype(jnp.float32),
    ]


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    every([("one_head", "ring"), ("wide_adaln", "scan")], [], []),
)
def test_a_pipeline_whose_weights_have_outliers(case, tmp_path):
    """Text features and tokens leave the range, and the latents err less than bfloat16's. With
    guidance."""
    name, schedule = case
    config, tensors = CONFIGS[name], small.random_tensors(CONFIGS[name])
    models = {}
    for component in small.MODELS:
        model = small.our_model(component, config, tensors[component])
        factor = enlarged if component != "vae" else (lambda path: 1.0)
        models[component] = with_arrays(
            model, lambda path, leaf, factor=factor: leaf * jnp.float32(factor(path))
        )
    tokenizer = small.tokenizer().to_str().encode()
    folder = save(tmp_path / name, uniform(config, "float32"), models, tokenizer, {})
    memory = Memory(schedule=schedule)
    exact, *found = (
        draw(ZImage.load(folder, dtype=dtype), CASES[name], steps=2, memory=memory).latents
        for dtype in ("float32", "float16", "bfloat16")
    )
    of_float16, of_bfloat16 = (relative(latents, exact) for latents in found)
    assert of_float16 <= of_bfloat16 / 2
    (features,) = ZImage.load(folder, dtype="float16").encode(["a red circle"])
    assert LARGEST < np.abs(features).max() < np.inf


@pytest.mark.exhaustive
def test_the_tiny_model_draws_what_it_draws_in_float32():
    exact, *found = (
        ZImage.load(dtype=dtype).generate("a red circle", seed=42).pictures[0].pixels
        for dtype in ("float32", "float16", "bfloat16")
    )
    of_float16, of_bfloat16 = (psnr(pixels, exact) for pixels in found)
    assert of_float16 > max(of_bfloat16, 60)
