"""Sizes from words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_jax.errors import UsageError
from zimage_jax.pipeline import size


@given(a=st.integers(1, 40), b=st.integers(1, 40), side=st.sampled_from([128, 512, 1024, 1280]))
def test_a_ratio_keeps_to_the_area(a, b, side):
    width, height = size.parse_size(f"{a}:{b}", side, 16)
    assert width % 16 == height % 16 == 0
    assert min(width, height) >= 16
    assert width * height <= side * side * 1.3 or min(width, height) == 16
    if width * b == height * a:  # exact: and nothing larger of that ratio fits
        assert width * height <= side * side


def test_the_ratios_people_use():
    assert size.parse_size("16:9", 1024, 16) == (1280, 720)
    assert size.parse_size("9:16", 1024, 16) == (720, 1280)
    assert size.parse_size("4:3", 1024, 16) == (1152, 864)
    assert size.parse_size("3:2", 1024, 16) == (1248, 832)
    assert size.parse_size("2:2", 1024, 16) == (1024, 1024)
    assert size.parse_size("16:9", 128, 16) == (176, 96)
    assert size.parse_size("1280x720", 64, 16) == (1280, 720)
    with pytest.raises(UsageError):
        size.parse_size("16:9:4", 64, 16)
