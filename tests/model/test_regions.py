"""Regions cover their canvas, overlap, and blend to it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_jax.model.regions import Regions, starts

even = st.integers(2, 40).map(lambda n: 2 * n)


@given(length=even, side=even)
def test_spans_cover_a_length_and_overlap_by_a_quarter(length, side):
    found = starts(length, side)
    assert found[0] == 0
    assert found[-1] + min(side, length) == length
    assert all(start % 2 == 0 for start in found)
    for before, after in itertools.pairwise(found):
        assert 0 < after - before <= side - side // 4 + 1


@settings(max_examples=12)  # each compiles
@given(height=even, width=even, side=even)
def test_what_was_cut_is_blended_to_what_it_was(height, width, side):
    regions = Regions(height, width, side)
    canvas = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    parts = regions.split(canvas)
    assert parts.shape == (2 * regions.count, *regions.shape, 3)
    blended = jax.jit(regions.blend)(parts)
    np.testing.assert_allclose(blended, canvas, rtol=1e-5, atol=1e-6)


def test_the_outermost_latents_of_a_region_hardly_count():
    regions = Regions(16, 28, 16)
    left, right = np.zeros((1, 16, 16, 1), np.float32), np.ones((1, 16, 16, 1), np.float32)
    right[:, :, 0] = 100  # a border
    row = np.asarray(regions.blend(jnp.asarray(np.concatenate([left, right]))))[0, 8, :, 0]
    np.testing.assert_array_equal(row[:12], 0)
    np.testing.assert_array_equal(row[16:], 1)
    assert row[12] < 1.5
    assert (np.diff(row[13:]) >= 0).all()
