"""Packed K and V: bits, scales, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_jax.model import kv_codes, ops
from zimage_jax.model.kv import KVFormat
from zimage_jax.model.kv_codes import RUN, Coding

BY_TOKEN = [Coding(bits, by_channel=False) for bits in (4, 5, 6, 7, 8)]
BY_CHANNEL = [Coding(bits, by_channel=True) for bits in (4, 5, 6)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random values, of each head and channel around a mean of its own."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 3 * rng.standard_normal(shape[2:])).astype(np.float32)


def decoded(x: np.ndarray, coding: Coding, valid: np.ndarray | None = None) -> np.ndarray:
    valid = np.ones(x.shape[:2], bool) if valid is None else valid

    @jax.jit
    def through(x, valid):
        return kv_codes.decode(kv_codes.encode(x, valid, coding), coding, x.shape[-1])

    return np.asarray(through(x, valid))


@settings(max_examples=15)
@given(st.sampled_from(BY_TOKEN), st.sampled_from([3, 8, 20]), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_what_comes_out(coding, width, seed):
    codes = np.random.default_rng(seed).integers(0, 2**coding.bits, (2, 3, 2, width), np.uint8)

    @jax.jit
    def there_and_back(codes):
        planes = kv_codes.pack(codes, coding)
        return planes, kv_codes.unpack(planes, coding, width)

    planes, back = there_and_back(codes)
    np.testing.assert_array_equal(back, codes)
    assert sum(plane.shape[-1] for plane in planes) == sum(
        -(-width * bits // 8) for bits in coding.widths
    )


def test_a_byte_has_neighbouring_channels_the_first_in_its_lowest_bits():
    codes = jnp.asarray([0b10110, 0b01001], jnp.uint8).reshape(1, 1, 1, 2)
    high, low = kv_codes.pack(codes, Coding(5, by_channel=True))
    assert (int(high[0, 0, 0, 0]), int(low[0, 0, 0, 0])) == (0b0100_1011, 0b10)


@pytest.mark.parametrize("coding", BY_TOKEN, ids=str)
def test_by_token_the_error_is_half_a_step_and_zero_is_zero(coding):
    x = normal(2, 40, 3, 24)
    x[0, 7] = 0
    found, largest = decoded(x, coding), np.abs(x).max(-1, keepdims=True)
    half = largest / (2 ** (coding.bits - 1) - 1) / 2
    # bfloat16's step is up to 2^-8 off, and so is the largest value
    assert (np.abs(found - x) <= half * (1 + 2**-7) + largest * 2**-8).all()
    assert not found[0, 7].any()


@pytest.mark.parametrize("coding", BY_CHANNEL, ids=str)
@pytest.mark.parametrize("keys", [1, RUN, RUN + 33])
def test_by_channel_the_error_is_half_a_step_of_the_run(coding, keys):
    x = normal(2, keys, 3, 24)
    found = decoded(x, coding)
    for first in range(0, keys, RUN):
        run, values = found[:, first : first + RUN], x[:, first : first + RUN]
        half = np.ptp(values, 1, keepdims=True) / (2**coding.bits - 1) / 2
        largest = np.abs(values).max(1, keepdims=True)  # low is in bfloat16
        assert (np.abs(run - values) <= half * 1.01 + largest * 2**-7).all()


@pytest.mark.parametrize("coding", [BY_TOKEN[2], BY_CHANNEL[1]], ids=str)
def test_masked_keys_move_no_scale(coding):
    """A picture alone, and in a batch with a longer one."""
    x, valid = normal(2, RUN + 40, 3, 24), np.ones((2, RUN + 40), bool)
    valid[0, RUN - 9 :] = False
    x[0, RUN - 9 :] *= 1000
    found = decoded(x, coding, valid)
    np.testing.assert_array_equal(found[:1, : RUN - 9], decoded(x[:1, : RUN - 9], coding))
    np.testing.assert_array_equal(found[1:], decoded(x[1:], coding))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("coding", [BY_TOKEN[2], BY_CHANNEL[1]], ids=str)
def test_equal_values_and_empty_runs_are_finite(coding):
    x = np.full((1, 2 * RUN, 1, 8), -2.5, np.float32)
    valid = np.arange(2 * RUN)[None] < RUN
    found = decoded(x, coding, valid)
    np.testing.assert_allclose(found[:, :RUN], x[:, :RUN], rtol=2**-8)  # step is in bfloat16
    assert np.isfinite(found).all()


@pytest.mark.parametrize("coding", [*BY_TOKEN, *BY_CHANNEL], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 65, 3, 24), (1, 128, 2, 20)])
def test_bytes_and_empty_arrays_are_those_of_codes(coding, shape):
    codes = jax.eval_shape(
        lambda: kv_codes.encode(jnp.zeros(shape), jnp.ones(shape[:2], bool), coding)
    )
    room = jax.eval_shape(lambda: kv_codes.empty(coding, *shape))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), room) == jax.tree.map(
        lambda a: (a.shape, a.dtype), codes
    )
    assert coding.nbytes(*shape) == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(codes))


@pytest.mark.parametrize("dtype", ["int6", "k5v6"])
@pytest.mark.parametrize("keys", [2 * RUN + 32, 4 * RUN, 4 * RUN + 32])
def test_codes_do_not_depend_on_runs_of_tokens(dtype, keys, monkeypatch):
    """Runs of tokens end where runs of keys end."""
    how, x, valid = KVFormat(dtype), jnp.asarray(normal(2, keys, 1, 8)), jnp.ones((2, keys), bool)

    def encode(x, valid):
        return kv_codes.encode(x, valid, how.stored[0])

    whole = jax.jit(encode)(x, valid)
    monkeypatch.setattr(ops, "RUN_TOKENS", 2 * RUN)
    found = jax.jit(lambda *both: how.in_runs(encode, *both))(x, valid)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
