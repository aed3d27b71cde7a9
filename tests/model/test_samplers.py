"""Samplers and noise levels against the formulas of ComfyUI, written down here as they are there:
for a denoiser that predicts the picture, step by step."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.errors import UsageError
from zimage_jax.model import choices, samplers, sampling
from zimage_jax.model.samplers import Trajectory


def test_every_name_is_one_that_can_be_chosen():
    for name in ("SAMPLERS", "SCHEDULES", "STRENGTH_RULES"):
        assert tuple(getattr(samplers, name)) == getattr(choices, name)


# -- noise levels ----------------------------------------------------------------------------------


def test_the_times_of_eight_nfes():
    path = Trajectory.of(8, 3.0)
    expected = [1000, 954.5, 900, 833.3, 750, 642.9, 500, 300]
    np.testing.assert_allclose(path.scheduler_times, expected, atol=0.05)
    np.testing.assert_allclose(path.update.t, 1 - path.sigmas, atol=1e-6)
    np.testing.assert_allclose(path.update.dt.sum(), 1, atol=1e-6)


@given(
    name=st.sampled_from(sorted(samplers.SCHEDULES)),
    steps=st.integers(1, 100),
    shift=st.floats(0.1, 10),
)
def test_levels_fall_from_one_to_zero(name, steps, shift):
    levels = samplers.SCHEDULES[name](steps, shift)
    if name == "beta":  # repeated levels are left out
        assert 2 <= len(levels) <= steps + 1
    else:
        assert levels.shape == (steps + 1,)
    assert levels[0] == pytest.approx(1, abs=1e-6)
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


# of ComfyUI's schedulers with 8 steps and shift 3
COMFYUI = {
    "simple": [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0],
    "beta": [1, 0.980, 0.934, 0.860, 0.751, 0.596, 0.392, 0.156, 0],
    "linear_quadratic": [1, 0.9938, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219, 0],
}


@pytest.mark.parametrize("name", COMFYUI)
def test_levels_are_those_of_comfyui(name):
    np.testing.assert_allclose(samplers.SCHEDULES[name](8, 3.0), COMFYUI[name], atol=6e-4)


def test_sgm_uniform_is_near_simple():
    simple, uniform = (samplers.SCHEDULES[n](8, 3.0) for n in ("simple", "sgm_uniform"))
    np.testing.assert_allclose(simple, uniform, atol=6e-3)
    assert not np.array_equal(simple, uniform)


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        Trajectory.of(0, 3.0)


# -- samplers --------------------------------------------------------------------------------------


def denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
    """A predicted picture that bends with x and sigma."""
    return np.tanh(0.7 * x) * (1 - 0.3 * sigma) + 0.2 * np.cos(3 * sigma)


def comfyui(name: str, x: np.ndarray, sigmas: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """The sampler's published loop, in float64."""
    before = None
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas.astype(np.float64))):
        denoised = denoiser(x, sigma)
        slope = (x - denoised) / sigma
        if name == "euler_ancestral" and after > 0:
            down = after * (1 + (after / sigma - 1))
            renoise = np.sqrt(after**2 - down**2 * (1 - after) ** 2 / (1 - down) ** 2)
            x = down / sigma * x + (1 - down / sigma) * denoised
            x = (1 - after) / (1 - down) * x + noises[i] * renoise
        elif name == "heun" and after > 0:
            there = x + slope * (after - sigma)
            second = (there - denoiser(there, after)) / after
            x = x + (slope + second) / 2 * (after - sigma)
        elif name in ("dpmpp_2m", "res_multistep") and before is not None and after > 0:
            h, h_before = np.log(sigma / after), np.log(sigmas[i - 1] / sigma)
            if name == "dpmpp_2m":
                mixed = (1 + h / (2 * h_before)) * denoised - h / (2 * h_before) * before
                x = after / sigma * x - np.expm1(-h) * mixed
            else:
                phi1 = np.expm1(-h) / -h
                phi2, c2 = (phi1 - 1) / -h, -h_before / h
                mixed = (phi1 - phi2 / c2) * denoised + phi2 / c2 * before
                x = np.exp(-h) * x + h * mixed
        else:
            x = x + slope * (after - sigma)
        before = denoised
    return x


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("schedule", samplers.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_sampler_takes_the_steps_of_comfyui(name, schedule, steps):
    rng = np.random.default_rng(2)
    start = rng.standard_normal((1, 4, 4, 3))
    noises = rng.standard_normal((steps, 1, 4, 4, 3))
    levels = samplers.SCHEDULES[schedule](steps, 3.0)
    expected = comfyui(name, start, levels, noises)
    path = Trajectory.of(steps, 3.0, sampler=name, schedule=schedule)
    state = sampling.State.first(jnp.asarray(start, jnp.float32), path.update)
    for index in range(path.nfes):
        x, sigma = np.asarray(state.latents, np.float64), float(path.sigmas[index])
        velocity = jnp.asarray((denoiser(x, sigma) - x) / sigma, jnp.float32)
        noise = jnp.asarray(noises[min(index, steps - 1)], jnp.float32)
        state = sampling.step(state, velocity, path.step(index), noise)
    np.testing.assert_allclose(state.latents, expected, atol=1e-5)


def test_heun_evaluates_twice_but_at_the_end():
    path = Trajectory.of(4, 3.0, sampler="heun")
    levels = samplers.simple(4, 3.0)
    np.testing.assert_array_equal(path.sigmas, levels[[0, 1, 1, 2, 2, 3, 3]])


# -- from a picture --------------------------------------------------------------------------------

# strength: first level and NFEs of 8 steps with shift 3
DIFFUSERS = {0.3: (0.643, 3), 0.5: (0.750, 4), 0.6: (0.833, 5), 0.75: (0.9, 6), 0.9: (1.0, 8)}
OF_COMFYUI = {0.3: (0.571, 8), 0.5: (0.75, 8), 0.6: (0.828, 8), 0.75: (0.923, 8), 0.9: (1.0, 8)}


@pytest.mark.parametrize(("rule", "table"), [("diffusers", DIFFUSERS), ("comfyui", OF_COMFYUI)])
def test_strengths_mean_what_they_mean_there(rule, table):
    for strength, (start, nfes) in table.items():
        path = Trajectory.of(8, 3.0, strength=strength, rule=rule)
        assert path.start == pytest.approx(start, abs=6e-3)
        assert path.nfes == nfes


@given(strength=st.floats(0.001, 1), steps=st.integers(1, 40))
def test_by_noise_a_strength_is_the_first_level(strength, steps):
    path = Trajectory.of(steps, 3.0, strength=strength)
    assert path.start == pytest.approx(strength, abs=1e-4)
    assert 1 <= path.nfes <= steps
    widest = np.max(-np.diff(samplers.simple(steps, 3.0)))
    assert np.max(path.update.dt) <= widest + 1e-4
    np.testing.assert_allclose(path.update.dt.sum(), path.start, atol=1e-5)


def test_a_strength_that_is_a_level_takes_the_schedules_own_steps():
    levels = samplers.simple(8, 3.0)
    for index, level in enumerate(levels[:-1]):
        path = Trajectory.of(8, 3.0, strength=float(level))
        np.testing.assert_array_equal(path.sigmas, levels[index:-1])


@pytest.mark.parametrize("rule", samplers.STRENGTH_RULES)
def test_no_strength_is_no_nfe_and_all_is_text_to_image(rule):
    assert Trajectory.of(8, 3.0, strength=0.0, rule=rule).nfes == 0
    whole = Trajectory.of(8, 3.0, strength=1.0, rule=rule)
    np.testing.assert_array_equal(whole.sigmas, Trajectory.of(8, 3.0).sigmas)
    assert whole.start == 1


def test_guidance_ends_where_it_is_truncated():
    path = Trajectory.of(8, 3.0, guidance=2.0, normalization=1.0, truncation=0.2)
    late = 1 - path.sigmas > 0.2
    np.testing.assert_array_equal(path.update.guidance, np.where(late, 0, 2).astype(np.float32))
    np.testing.assert_array_equal(np.isinf(path.update.norm), late)
