import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.errors import UsageError
from zimage_jax.model import sampling


def test_the_times_of_eight_nfes():
    sigmas = sampling.sigmas(8, 3.0)
    np.testing.assert_allclose(
        1000 * sigmas[:-1], [1000, 954.5, 900, 833.3, 750, 642.9, 500, 300], atol=0.05
    )
    assert sigmas[-1] == 0
    np.testing.assert_allclose(sampling.times(sigmas), 1 - sigmas[:-1], atol=1e-6)


@given(steps=st.integers(1, 100), shift=st.floats(0.1, 10))
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = sampling.sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == pytest.approx(1, abs=1e-6)
    assert (np.diff(sigmas) < 0).all()


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        sampling.sigmas(0, 3.0)


# the first three numbers of torch.randn(1, 16, 4, 4) of torch 2.13 after manual_seed(seed)
TORCH = {
    0: (-1.1258398294448853, -1.1523602008819580, -0.2505785822868347),
    42: (1.9269152879714966, 1.4872840642929077, 0.9007171988487244),
    2**32 - 1: None,
    2**63 + 5: None,
}


@pytest.mark.parametrize("seed", [0, 42])
def test_torch_noise_starts_as_torch_does(seed):
    channels_first = sampling.noise_torch(seed, 4, 4, 16).transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(channels_first[:3], TORCH[seed], atol=5e-7)


@pytest.mark.live
@pytest.mark.parametrize("seed", TORCH)
def test_torch_noise_is_torch_noise(seed):
    torch = pytest.importorskip("torch")
    expected = torch.randn((1, 16, 12, 20), generator=torch.Generator().manual_seed(seed)).numpy()[
        0
    ]
    np.testing.assert_allclose(
        sampling.noise_torch(seed, 12, 20, 16), expected.transpose(1, 2, 0), atol=5e-7
    )


def test_torch_noise_wants_runs_of_sixteen():
    with pytest.raises(UsageError, match="multiple of 16"):
        sampling.noise_torch(0, 1, 3, 16 - 1)


def test_seeds_of_64_bits():
    def digest(kind, seed):
        return hashlib.sha256(sampling.NOISE[kind](seed, 2, 2, 16)).hexdigest()

    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({digest("jax", s) for s in seeds}) == len(seeds)
    assert digest("torch", 2**32 + 1) == digest("torch", 1)  # PyTorch uses 32 bits


@pytest.mark.parametrize("kind", sampling.NOISE)
def test_noise_is_normal(kind):
    values = sampling.NOISE[kind](3, 64, 64, 16)
    assert abs(values.mean()) < 0.015
    assert abs(values.std() - 1) < 0.01
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01


def test_guidance_goes_from_the_negative_through_the_positive():
    velocity = jnp.stack([jnp.full((2, 2, 1), 3.0), jnp.full((2, 2, 1), 1.0)])
    np.testing.assert_array_equal(
        sampling.guided(velocity, 2.0), jnp.full((1, 2, 2, 1), 3 + 2 * (3 - 1))
    )


def test_the_velocity_points_from_noise_to_picture():
    picture, noise = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
    np.testing.assert_allclose(sampling.euler(noise, picture - noise, 1.0, 0.0), picture)
