"""Quantised files with bytes cut, doubled and replaced: read, or refused in one line, in no more
memory than they say."""

import contextlib
import functools
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from scripts.measure.fuzz_files import changed
from tests import small
from tests.checkpoints_convert import gguf_files, quantised_files
from tests.checkpoints_convert.published import comfy_named
from zimage_jax.errors import ZImageError
from zimage_jax.weights import components
from zimage_jax.weights import names as rules
from zimage_jax.weights.origins import Origins, storage
from zimage_jax.weights.sources import Component, Source, open_file
from zimage_jax.weights.tensors import Tensor

CONFIG = small.CONFIGS["one_head"]
# python -m scripts.measure.fuzz_files --only quantised makes thousands
DEFAULT, MORE = 25, 250


class Nothing(Tensor):
    """A tensor of the components that are not read."""


@functools.cache
def others() -> dict[str, Component]:
    """Text encoder and VAE without faults."""
    parts = {}
    for name in ("text_encoder", "vae"):
        entries = rules.expected(small.TABLES[name], components.spec(CONFIG, name))
        tensors = {
            n: Nothing(Path("none"), n, entry.shape, "F32", 0, 0) for n, entry in entries.items()
        }
        parts[name] = Component(name, "diffusers", tensors)
    return parts


def read(file: Path) -> None:
    """All that a conversion or a model in place reads of a file."""
    parts = {"transformer": open_file("transformer", file)} | others()
    source = Source(parts, CONFIG, Path("none"))
    source.check()
    origins = {name: Origins(source, name) for name in source.components}
    kept = storage(source, origins)
    for unit in kept.units("transformer"):
        for path, encoding in kept.parameters("transformer", unit).items():
            if encoding is not None:
                origins["transformer"].encoded(path, encoding)
                continue
            for _ in origins["transformer"].runs(path, np.dtype(np.float32)):
                pass


def files(folder: Path) -> dict[str, Path]:
    """Kind -> a file."""
    tensors = comfy_named(small.random_tensors(CONFIG)["transformer"])
    every: dict = {}
    for k, (name, array) in enumerate(tensors.items()):
        if quantised_files.is_quantised(name, array):
            layout = quantised_files.LAYOUTS[k % len(quantised_files.LAYOUTS)]
            every |= quantised_files.quantise(name.removesuffix(".weight"), array, layout)[0]
        else:
            every[name] = array
    layers = '{"layers": {"layers.0.attention.out": {"format": "int8_tensorwise"}}}'
    metadata = {"_quantization_metadata": layers}
    return {
        "comfyui": quantised_files.write(folder / "q.safetensors", every, metadata),
        "gguf": gguf_files.write(folder / "q.gguf", gguf_files.mixed(tensors)[0]),
    }


@pytest.mark.parametrize("count", [DEFAULT, pytest.param(MORE, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["comfyui", "gguf"])
def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path, kind, count):
    file = files(tmp_path)[kind]
    read(file)
    data, rng, refused = file.read_bytes(), random.Random(count), 0
    for k in range(count):
        spoilt = changed(rng, data, file.suffix)
        file.write_bytes(spoilt)
        with traced() if k % 20 == 0 else contextlib.nullcontext([0]) as peak:
            said = outcome(file)
        # the widest tensor in float32, and what parsing JSON takes
        assert peak[0] < 60 * len(spoilt) + (4 << 20)
        refused += bool(said)
        assert all(line.isprintable() for line in said.splitlines()), spoilt[:2000]
        assert len(said) < 5000
    assert refused > count / 3


def outcome(file: Path) -> str:
    """What is said of a file; nothing if it is read."""
    try:
        read(file)
    except ZImageError as fault:
        return str(fault)
    return ""


@contextlib.contextmanager
def traced():
    """A list of the most bytes that were allocated at once. (It takes four times as long.)"""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
