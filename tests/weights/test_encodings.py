"""Encoded matrices: exact where they claim it, near where they do not, refused where damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.model import encoded
from zimage_jax.weights import encodings
from zimage_jax.weights.encodings import BFLOAT16, Int8, Lossless, room_of

LOSSLESS = Lossless()
DECODE = jax.jit(lambda packed: packed.decoded(jnp.bfloat16))


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def bits(matrix) -> np.ndarray:
    return np.asarray(matrix).view(np.uint16)


def of(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.uint16).view(BFLOAT16)


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns), np.float32) / 60).astype(BFLOAT16)


def test_every_pattern_of_sixteen_bits_comes_back(monkeypatch):
    """Zeros, subnormals, infinities and NaNs of every payload, each at its place."""
    monkeypatch.setattr(encodings, "room_of", lambda size: size)
    matrix = of(np.arange(65536).reshape(128, 512))
    packed = LOSSLESS.encode(matrix)
    assert LOSSLESS.exceptions(matrix) == 65536 - 16 * 256
    np.testing.assert_array_equal(bits(LOSSLESS.decode(packed)), bits(matrix))
    np.testing.assert_array_equal(bits(DECODE(on_device(packed))), bits(matrix))


@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(0, 255),
    st.integers(0, 8),
    st.integers(0, 2**32 - 1),
)
def test_matrices_of_any_shape_come_back(rows, half, exponent, strays, seed):
    """Weights around one exponent, and as many elsewhere as there is room for."""
    rng = np.random.default_rng(seed)
    shape = rows, 2 * half
    near = np.clip(exponent + rng.integers(0, 16, shape), 0, 255)
    numbers = rng.integers(0, 2, shape) << 15 | near << 7 | rng.integers(0, 128, shape)
    strays = min(strays, numbers.size)
    numbers.reshape(-1)[rng.permutation(numbers.size)[:strays]] = rng.integers(0, 65536, strays)
    matrix = of(numbers)
    assert LOSSLESS.has_room(matrix)
    packed = LOSSLESS.encode(matrix)
    assert LOSSLESS.fault(packed) is None
    np.testing.assert_array_equal(bits(LOSSLESS.decode(packed)), bits(matrix))
    np.testing.assert_array_equal(bits(DECODE(on_device(packed))), bits(matrix))


def test_too_many_exceptions_are_refused():
    matrix = normal(256, 256)
    matrix[0, : room_of(matrix.size) + 1] = 1e30
    assert not LOSSLESS.has_room(matrix)
    with pytest.raises(ValueError, match=r"\d+ exceptions, there is room for 32"):
        LOSSLESS.encode(matrix)
    matrix[0, :20] = 0.01
    np.testing.assert_array_equal(bits(LOSSLESS.decode(LOSSLESS.encode(matrix))), bits(matrix))


def test_the_stored_spec_is_the_shape_of_what_is_encoded():
    for encoding in (LOSSLESS, Int8(), Int8(rotates=True)):
        made = encoding.encode(normal(48, 30).astype(encoding.takes))
        spec = encoding.stored(jax.ShapeDtypeStruct((48, 30), jnp.float32))
        assert type(made) is type(spec)
        assert [(a.shape, a.dtype) for a in made] == [(a.shape, a.dtype) for a in spec]


def test_a_packed_weight_takes_twelve_bits():
    stored = LOSSLESS.stored(jax.ShapeDtypeStruct((3840, 10240), jnp.float32))
    nbytes = sum(np.prod(a.shape, dtype=int) * a.dtype.itemsize for a in stored)
    assert 8 * nbytes / (3840 * 10240) == pytest.approx(12.0234, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": np.uint16(241)}, "base: expected 0 to 240, got 241"),
        ({"base": np.uint16(65535)}, "base: expected 0 to 240, got 65535"),
        ({"places": [-1, 3]}, "places: expected strictly ascending"),
        ({"places": [5, 3]}, "places: expected strictly ascending"),
        ({"places": [5, 5]}, "places: expected strictly ascending"),
    ],
)
def test_values_that_the_device_would_misread_are_faults(change, said):
    packed = LOSSLESS.encode(normal(64, 32))
    if "places" in change:
        index = packed.places.copy()
        index[:2] = change["places"]
        change = {"places": index}
    assert LOSSLESS.fault(packed._replace(**change)).startswith(said)


def test_positions_beyond_the_matrix_are_dropped_by_the_device():
    packed = LOSSLESS.encode(normal(64, 32))
    far = packed._replace(
        places=np.arange(2**31 - 8, 2**31, dtype=np.int64).astype(np.int32),
        exact=np.full(8, 0x7F80, np.uint16),
    )
    assert LOSSLESS.fault(far) is None
    np.testing.assert_array_equal(bits(DECODE(on_device(far))), bits(LOSSLESS.decode(packed)))


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_no_scale_is_a_fault(scale):
    made = Int8().encode(normal(16, 4).astype(np.float32))
    made.scale[2] = scale
    assert Int8().fault(made).startswith("scale: expected finite numbers above 0")


# -- products -------------------------------------------------------------------------------------


def error(found, expected) -> float:
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rotates", [False, True])
def test_an_int8_product_is_near(rotates, dtype):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((512, 96), np.float32)
    x = rng.standard_normal((40, 512), np.float32)
    made = on_device(Int8(rotates).encode(matrix))
    found = encoded.product(jnp.asarray(x, dtype), made, jnp.float32)
    assert error(found, x.astype(np.float64) @ matrix) < 0.01


def test_a_rotation_spreads_outliers():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((512, 96), np.float32)
    matrix[rng.permutation(512)[:5]] *= 30
    x = rng.standard_normal((40, 512), np.float32)
    errors = [
        error(
            encoded.product(jnp.asarray(x), on_device(Int8(r).encode(matrix)), jnp.float32),
            x.astype(np.float64) @ matrix,
        )
        for r in (False, True)
    ]
    assert errors[1] < errors[0] / 2


def test_a_float16_product_with_large_inputs_does_not_overflow():
    """Rows of a constant grow 16-fold when they are rotated."""
    x = jnp.full((2, 256), 30000, jnp.float16)
    matrix = np.full((256, 2), 0.001, np.float32)
    for rotates in (False, True):
        made = on_device(Int8(rotates).encode(matrix))
        found = encoded.product(x, made, jnp.float32)
        np.testing.assert_allclose(found, 7680, rtol=0.01)


@pytest.mark.parametrize(
    ("inputs", "group"), [(3840, 256), (10240, 256), (2560, 256), (9728, 256), (48, 16), (33, 1)]
)
def test_groups_are_powers_of_four(inputs, group):
    assert encoded.group_of(inputs) == group


@pytest.mark.parametrize("group", [1, 4, 16, 64, 256])
def test_a_rotation_is_its_own_inverse(group):
    turn = encoded.rotation(group)
    np.testing.assert_array_equal(turn, turn.T)
    np.testing.assert_allclose(turn @ turn, np.eye(group), atol=1e-6)


def test_a_column_of_zeros_stays_zero():
    matrix = normal(16, 4).astype(np.float32)
    matrix[:, 1] = 0
    made = Int8().encode(matrix)
    assert not made.values[:, 1].any()
    assert Int8().fault(made) is None


@pytest.mark.parametrize("rotates", [False, True])
def test_int8_decodes_to_what_its_product_multiplies_by(rotates):
    encoding, matrix = Int8(rotates), normal(48, 30).astype(np.float32)
    made = encoding.encode(matrix)
    decoded = encoding.decode(made)
    assert error(decoded, matrix) < 0.01
    found = encoded.product(jnp.eye(48), on_device(made), jnp.float32)
    np.testing.assert_allclose(found, decoded, atol=1e-6)
