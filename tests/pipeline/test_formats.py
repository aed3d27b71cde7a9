"""Encoded parameters under every schedule: the same bits."""

import functools
import itertools

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import JOB, KINDS, MODEL, SCAN, SCHEDULES, every
from zimage_jax import Memory, ZImage
from zimage_jax.weights.formats import parse
from zimage_jax.weights.writer import save

MIX = "lossless,layers.1=int8,layers.3=int8-hadamard,layers.*.to_out.kernel=bfloat16,text_encoder=lossless"
FORMATS = "bfloat16", "lossless", "int8", "int8-hadamard", MIX
UNDER = {
    name: (SCHEDULES | SCAN)[name]
    for name in (
        *("ring", "a chunk per block", "half a block", "half a block, swapped", "hybrid"),
        *("two chunks, swapped", "disk", "text on the host", "scan"),
    )
}
DTYPES = "float32", "bfloat16", "float16"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Name of a format -> a model stored so, whose parameters are bfloat16 to begin with."""
    config = small.CONFIGS[MODEL]
    tensors = small.random_tensors(config)
    models = {c: small.our_model(c, config, tensors[c], "bfloat16") for c in small.MODELS}
    folder, tokenizer = tmp_path_factory.mktemp("formats"), small.tokenizer().to_str().encode()

    @functools.cache
    def make(text: str):
        path = folder / text.replace("*", "_")
        return save(path, parse(config, text), models, tokenizer, {})

    return make


@pytest.fixture(scope="module")
def latents(stored):
    """(format, schedule, dtype) -> latents of the second picture, whose peaks are as predicted."""

    @functools.cache
    def draw(text: str, name: str, dtype: str) -> np.ndarray:
        memory = UNDER.get(name, Memory(schedule="resident"))
        pipe = ZImage.load(stored(text), dtype=dtype, memory=memory)
        pipe.generate("a red fox", **JOB)
        result = pipe.generate("a red fox", **JOB)
        assert result.report["peak_device_bytes_by_stage"] == dict(result.plan.peak_bytes_by_stage)
        return result.latents

    return draw


QUICK = {("half a block", "bfloat16")}
OFTEN = {(name, "bfloat16") for name in (*KINDS, "resident")} | {("ring", d) for d in DTYPES}


@pytest.mark.parametrize(
    "case", every(itertools.product(["resident", *UNDER], DTYPES), QUICK, OFTEN), ids=" in ".join
)
def test_a_lossless_model_draws_the_bits_of_a_bfloat16_one(case, latents):
    name, dtype = case
    found = latents("lossless", name, dtype)
    np.testing.assert_array_equal(found, latents("bfloat16", name, dtype))
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "case",
    every(
        itertools.product(["int8", "int8-hadamard", MIX], UNDER, DTYPES),
        [],
        {(MIX, name, "bfloat16") for name in UNDER}
        | {(MIX, "ring", dtype) for dtype in DTYPES}
        | {(f, n, "bfloat16") for f in ("int8", "int8-hadamard") for n in ("half a block", "scan")},
    ),
    ids=" in ".join,
)
def test_every_schedule_gives_the_same_bits_of_a_format(case, latents):
    text, name, dtype = case
    found, resident = latents(text, name, dtype), latents(text, "resident", dtype)
    if name == "scan":  # one program, in which XLA fuses across NFEs
        assert relative(found, resident) <= {"float32": 2e-6}.get(dtype, 2e-2)
    else:
        np.testing.assert_array_equal(found, resident)


@pytest.mark.parametrize("text", every(["int8", "int8-hadamard"], []))
def test_int8_changes_the_picture_and_keeps_it_near(text, latents):
    error = relative(
        latents(text, "resident", "float32"), latents("bfloat16", "resident", "float32")
    )
    assert 1e-4 < error < 0.05
