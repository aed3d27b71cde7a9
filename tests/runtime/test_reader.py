"""Blocks from disk: windows, and files that were damaged."""

import shutil

import pytest

from tests.schedules import BLOCK, JOB, MODEL, SCHEDULES
from zimage_jax import Memory, ZImage
from zimage_jax.errors import DamagedError, UsageError
from zimage_jax.runtime.placement import Placement
from zimage_jax.runtime.reader import WindowSource
from zimage_jax.runtime.recorder import Recorder
from zimage_jax.units import tree_bytes
from zimage_jax.weights.checkpoint import Checkpoint


def test_a_window_smaller_than_a_chunk(native):
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring", host_bytes=BLOCK // 2))
    with pytest.raises(
        UsageError, match=r"--host-memory .* is smaller than a chunk of .*: use more chunks"
    ):
        pipe.generate("a", **JOB)


def test_a_window_larger_than_all_that_is_asked_for(native):
    source = WindowSource(Checkpoint(native(MODEL)), "transformer", 1, 2**50)
    source.open(
        [], Recorder(), Placement.on()
    ).close()  # a stage whose chunks are all pinned streams none
    reader = source.open([("layers.0",)], Recorder(), Placement.on())
    assert [tree_bytes(block) for block in reader.take()] == [BLOCK]
    reader.close()


def test_a_damaged_block_is_named_from_the_reading_thread(native, tmp_path):
    copy = shutil.copytree(native(MODEL), tmp_path / "damaged")
    file = copy / "transformer" / "layers.3.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"layers\.3"):
        ZImage.load(copy, memory=SCHEDULES["disk"]).generate("a", **JOB)
