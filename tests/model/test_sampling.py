import hashlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from zimage_jax.errors import UsageError
from zimage_jax.model import sampling
from zimage_jax.model.samplers import Trajectory

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


def test_the_norm_of_guidance_is_limited():
    rng = np.random.default_rng(0)
    velocity = jnp.asarray(rng.standard_normal((4, 3, 2, 5)), jnp.float32)
    free = np.asarray(sampling.guided(velocity, 4.0))
    for limit in (0.5, 1.0, 1000.0):
        found = np.asarray(sampling.guided(velocity, 4.0, limit))
        for one, whole, positive in zip(found, free, np.asarray(velocity[:2]), strict=True):
            most = limit * np.linalg.norm(positive)
            expected = whole * min(1, most / np.linalg.norm(whole))
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_the_velocity_points_from_noise_to_picture():
    picture, noise = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
    update = Trajectory.of(1, 3.0).step(0)
    found = sampling.step(sampling.State(noise), picture - noise, update)
    np.testing.assert_allclose(found.latents, picture)


@pytest.mark.parametrize("kind", sampling.NOISE)
def test_later_draws_are_new_noise(kind):
    draws = [sampling.NOISE[kind](3, 32, 32, 16, index) for index in range(3)]
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


@pytest.mark.live
def test_later_draws_are_those_of_torch():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(11)
    for index in range(3):
        expected = torch.randn((1, 16, 6, 4), generator=generator).numpy()[0]
        found = sampling.noise_torch(11, 6, 4, 16, index)
        np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=5e-7)


# -- masks -----------------------------------------------------------------------------------------


def test_outside_a_mask_the_picture_keeps_its_latents():
    rng = np.random.default_rng(1)
    picture, noise, x, velocity = (
        jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32) for _ in range(4)
    )
    mask = jnp.asarray(np.pad(np.ones((1, 2, 2, 1), np.float32), ((0, 0), (1, 1), (1, 1), (0, 0))))
    path = Trajectory.of(4, 3.0, is_masked=True)
    kept = sampling.Kept(picture, noise, mask)
    for index, after in enumerate((*path.sigmas[1:], 0)):
        found = sampling.step(sampling.State(x), velocity, path.step(index), None, kept).latents
        outside = after * noise + (1 - after) * picture
        inside = sampling.step(sampling.State(x), velocity, path.step(index)).latents
        np.testing.assert_allclose(found, jnp.where(mask == 1, inside, outside), atol=1e-6)
    np.testing.assert_array_equal(found[mask[..., 0] == 0], picture[mask[..., 0] == 0])


def test_a_differential_mask_says_from_which_step_on_a_place_is_redrawn():
    path = Trajectory.of(8, 3.0, is_masked=True, is_differential=True)
    mask = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4, 1)
    zeros = jnp.zeros((1, 3, 4, 1))
    kept = sampling.Kept(zeros, zeros, jnp.asarray(mask))
    for index, sigma in enumerate(path.sigmas):
        found = sampling.step(
            sampling.State(zeros + 7), zeros, path.step(index), None, kept
        ).latents
        np.testing.assert_array_equal(np.asarray(found) == 7, mask >= sigma)
