"""The VAE by row strips equals the whole VAE; tiles come close."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.schedules import every
from zimage_jax.errors import UsageError
from zimage_jax.model import vae, vae_strips
from zimage_jax.model.config import TURBO

CONFIGS = {
    "two_levels": small.small_config(channels=(8, 16)),
    "four_levels": small.CONFIGS["plain"],
}
WHOLE = {"decode": vae.decode, "encode": vae.encode}
STRIPS = {"decode": vae_strips.decode_strips, "encode": vae_strips.encode_strips}

# batch, latent rows and columns, rows per strip: one, some that divide nothing, and more than there
# are
CASES = [
    ("two_levels", (1, 8, 8), 1),
    ("two_levels", (2, 9, 5), 5),
    ("four_levels", (1, 2, 2), 1000),
]


@cache
def compiled(function, **static):
    return jax.jit(partial(function, **static))


def run(function, *arguments, **static):
    return compiled(function, **static)(*arguments)


@cache
def model(name: str, seed: int = 0) -> vae.VAE:
    return small.our_model("vae", CONFIGS[name], small.random_tensors(CONFIGS[name], seed)["vae"])


def given(half: str, name: str, latents: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    (b, h, w), scale = latents, CONFIGS[name].vae.scale
    shape = (b, h, w, 16) if half == "decode" else (b, h * scale, w * scale, 3)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("half", WHOLE)
@pytest.mark.parametrize("case", every(CASES, CASES[:2]))
def test_strips_equal_the_whole_in_float32(half, case):
    name, latents, rows = case
    x = given(half, name, latents)
    strips = STRIPS[half](model(name), x, jnp.float32, rows, run)
    assert strips.dtype == np.float32
    assert relative(strips, run(WHOLE[half], model(name), x, dtype=jnp.float32)) <= 1e-6


@pytest.mark.parametrize("half", WHOLE)
@pytest.mark.exhaustive
def test_strips_err_no_more_than_the_whole_in_bfloat16(half):
    _, latents, rows = CASES[1]
    errors = []
    for seed in range(6):
        vae_model, x = model("two_levels", seed), given(half, "two_levels", latents, seed)
        exact, whole = (
            run(WHOLE[half], vae_model, x, dtype=d) for d in (jnp.float32, jnp.bfloat16)
        )
        strips = STRIPS[half](vae_model, x, jnp.bfloat16, rows, run)
        errors.append((relative(strips, exact), relative(whole, exact)))
    strips, whole = np.sqrt(np.mean(np.square(errors), 0))
    assert strips <= 1.05 * whole


def test_every_program_is_known_before_it_runs():
    """One shape per layer whatever the strip, and those that strip_programs lists."""
    x, seen = given("decode", "two_levels", CASES[1][1]), set()

    def shapes(arguments):
        return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))

    def recording(function, *arguments, **static):
        seen.add((function, shapes(arguments), *static.items()))
        return run(function, *arguments, **static)

    vae_strips.decode_strips(model("two_levels"), x, jnp.float32, 5, recording)
    decoder = vae.spec(CONFIGS["two_levels"].vae).decoder
    listed = vae_strips.strip_programs(decoder, x.shape, jnp.float32, 5)
    assert seen == {(f, shapes(arguments), *static.items()) for f, arguments, static in listed}
    assert len(listed) == len(seen)


def test_the_published_decoder_takes_few_programs_of_a_size_that_follows_the_rows():
    def strip_elements(rows):
        programs = vae_strips.strip_programs(
            vae.spec(TURBO.vae).decoder, (1, 128, 128, 16), jnp.bfloat16, rows
        )
        assert len(programs) == 18
        return sum(leaf.size for leaf in jax.tree.leaves(programs[1].arguments[1:]))

    # with two rows of halo
    assert strip_elements(128) / strip_elements(16) == pytest.approx((128 + 2) / (16 + 2), rel=0.1)


def test_a_strip_has_rows():
    for half, strips in STRIPS.items():
        with pytest.raises(UsageError, match="at least one row"):
            strips(model("four_levels"), given(half, "four_levels", (1, 2, 2)), jnp.float32, 0, run)


# -- tiles -----------------------------------------------------------------------------------------


def smooth(h: int, w: int) -> np.ndarray:
    rows, columns = np.linspace(0, 3, h)[:, None, None], np.linspace(0, 2, w)[:, None]
    phases = np.arange(16)
    return np.sin(rows + columns + phases).astype(np.float32)[None]


def test_one_tile_is_the_whole():
    x = np.concatenate([smooth(12, 7)] * 2)
    tiles = vae_strips.decode_tiles(model("two_levels"), x, jnp.float32, 24, run)
    np.testing.assert_array_equal(tiles, run(vae.decode, model("two_levels"), x, dtype=jnp.float32))


@pytest.mark.parametrize(("h", "w", "tile"), [(20, 20, 24), (9, 30, 32)])
def test_tiles_come_close(h, w, tile):
    x = smooth(h, w)
    whole = np.asarray(run(vae.decode, model("two_levels"), x, dtype=jnp.float32))
    tiles = vae_strips.decode_tiles(model("two_levels"), x, jnp.float32, tile, run)
    assert -10 * np.log10(np.mean(np.square(tiles - whole)) / np.ptp(whole) ** 2) > 18  # dB


def test_a_tile_is_a_multiple_of_two_latents():
    for tile in (0, -16, 18):
        with pytest.raises(UsageError, match="multiple of 4"):
            vae_strips.decode_tiles(model("two_levels"), smooth(4, 4), jnp.float32, tile, run)
