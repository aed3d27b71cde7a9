from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.model import ops


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_is_the_definition(groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8), np.float32) + 3
    scale, bias = rng.standard_normal((2, 8), np.float32)
    y = x.astype(np.float64).reshape(2, 15, groups, -1)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    expected = y.reshape(x.shape) * scale + bias
    got = ops.group_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), groups, 1e-6)
    np.testing.assert_allclose(got, expected, atol=1e-5)


# few shapes: each is compiled
@given(rows=st.sampled_from([1, 5]), columns=st.sampled_from([1, 4]), channels=st.integers(1, 2))
def test_patches_come_back(rows, columns, channels):
    shape = 2, 2 * rows, 2 * columns, channels
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    @jax.jit
    def there_and_back(x):
        patches = ops.patchify(x)
        return patches, ops.unpatchify(patches, 2 * rows, 2 * columns)

    patches, back = there_and_back(x)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(patches[0, 0].reshape(2, 2, channels), x[0, :2, :2])


@given(shift=st.integers(0, 400))
def test_rotated_scores_depend_on_distance_alone(shift):
    rng = np.random.default_rng(shift)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16), np.float32)) for _ in range(2))

    def score(rotate, a, b):
        tables = [ops.rope_table(np.array([[p]]), (16,), 100.0) for p in (a, b)]
        if rotate is ops.rotate_pairs:
            tables = [(c[None], s[None]) for c, s in tables]
        x, y = (
            rotate(v, jnp.asarray(c), jnp.asarray(s))
            for v, (c, s) in zip((q, k), tables, strict=True)
        )
        return float(jnp.sum(x * y))

    for rotate in (ops.rotate_pairs, ops.rotate_halves):
        assert score(rotate, 5, 9) == pytest.approx(score(rotate, 5 + shift, 9 + shift), abs=1e-3)


def test_the_rope_table_keeps_far_positions_exact():
    cos, sin = ops.rope_table(np.array([[1500]]), (32,), 256.0)
    angle = 1500 / 256 ** (np.arange(0, 32, 2) / 32)
    # one float32 rounding of the angle, 6e-5 at 1500, is all there is (and all PyTorch has)
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-4)


def test_a_value_that_does_not_fit_its_annotation_is_refused():
    with pytest.raises(Exception, match=r"(?i)type-check"):
        ops.product(jnp.zeros((2, 3)), jnp.zeros((4, 5)), jnp.float32)
    assert jax.config.jax_numpy_dtype_promotion == "strict"


@pytest.mark.parametrize(("platform", "sums"), [("cpu", "f32"), ("cuda", "bf16")])
def test_a_product_of_16_bits_is_summed_in_float32_and_rounded_once(platform, sums):
    """A CPU is asked for the sums, a GPU for the rounded product: both are the same numbers."""
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
        for shape in ((5, 96), (96, 7))
    )
    product = jax.jit(partial(ops.product, dtype=jnp.bfloat16))
    (line,) = (
        line
        for line in product.trace(x, kernel)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .splitlines()
        if "dot_general" in line
    )
    assert line.rstrip().endswith(f"-> tensor<5x7x{sums}>")
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_array_equal(np.asarray(product(x, kernel)), exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("tokens", [31, 64, 100])
def test_tokens_in_runs_are_what_they_are_at_once(monkeypatch, tokens):
    monkeypatch.setattr(ops, "RUN_TOKENS", 32)
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((2, tokens, n)), jnp.float32) for n in (3, 5))
    x = x.at[0, 0, 0].set(jnp.nan)  # is of its own token alone

    def function(x, y):
        return x * 2, (y.sum(-1, keepdims=True) > 0).astype(jnp.int32)

    found = jax.jit(lambda x, y: ops.in_runs(function, x, y))(x, y)
    for made, expected in zip(found, function(x, y), strict=True):
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("tokens", [31, 128, 160, 200])
def test_runs_of_tokens_keep_neighbours_together(monkeypatch, tokens):
    monkeypatch.setattr(ops, "RUN_TOKENS", 128)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, tokens, 3)), jnp.float32)

    def sums(x):
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 64), (0, 0)))
        return padded.reshape(2, -1, 64, 3).sum(2)

    found = jax.jit(lambda x: ops.in_runs(sums, x, together=64))(x)
    np.testing.assert_allclose(found, sums(x), rtol=1e-5, atol=1e-5)
