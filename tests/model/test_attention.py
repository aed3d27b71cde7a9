"""The rule, the chunks against the definition, the kernel against the chunks; and the kernel compiled
for cards that are not there."""

import itertools
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_jax.errors import UsageError
from zimage_jax.model.attention import CUDNN_BY_DEFAULT, Attend, Target, attention, flash, in_chunks
from zimage_jax.planning import cards
from zimage_jax.runtime import deviceless, placement
from zimage_jax.runtime.placement import Gate, Placement

F32, BF16, FP16 = jnp.float32, jnp.bfloat16, jnp.float16


# -- the definition --------------------------------------------------------------------------------


def attention_in_float64(q, k, v, lengths=None, causal=False):
    """The definition, one head at a time."""
    k, v = (np.repeat(np.asarray(a, np.float64), q.shape[2] // a.shape[2], 2) for a in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k) / np.sqrt(q.shape[-1])
    if lengths is not None:
        scores = np.where(
            np.arange(k.shape[1])[None, None, None] < lengths[:, None, None, None], scores, -np.inf
        )
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.exhaustive
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 33, 70]),  # few shapes: each is compiled
    groups=st.sampled_from([1, 3]),
    key_heads=st.integers(1, 2),
    chunk=st.sampled_from([1, 7, 32, None]),
    masked=st.booleans(),
    causal=st.booleans(),
)
@settings(max_examples=30)
def test_attention_in_any_chunk_is_the_definition(
    batch, tokens, groups, key_heads, chunk, masked, causal
):
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((batch, tokens, groups * key_heads, 8), np.float32)
    k, v = (rng.standard_normal((batch, tokens, key_heads, 8), np.float32) for _ in range(2))
    lengths = rng.integers(1, tokens + 1, batch) if masked and not causal else None
    run = jax.jit(partial(attention, causal=causal, attend=Attend(query_chunk=chunk)))
    got = run(q, k, v, lengths=lengths)
    np.testing.assert_allclose(got, attention_in_float64(q, k, v, lengths, causal), atol=2e-6)


def test_masked_keys_do_not_count_whatever_they_hold():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 2, 8), np.float32) for _ in range(3))
    lengths, run = np.array([33], np.int32), jax.jit(attention)
    out = np.asarray(run(q, k, v, lengths=lengths))
    k[:, 33:], v[:, 33:] = 1e4, 1e4
    np.testing.assert_array_equal(out, run(q, k, v, lengths=lengths))


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "chosen"),
    [
        (None, BF16, 128, "chunks"),  # a CPU
        ((7, 5), FP16, 128, "chunks"),  # Turing
        ((8, 0), BF16, 128, "flash"),
        ((8, 6), FP16, 32, "flash"),
        ((8, 6), F32, 128, "chunks"),
        ((8, 9), BF16, 20, "flash"),
        ((8, 9), BF16, 512, "chunks"),  # the VAE's
        ((9, 0), BF16, 128, "flash"),
        ((12, 0), FP16, 128, "flash"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_auto_follows_from_capability_dtype_and_width(capability, dtype, width, chosen, biased):
    attend = Attend(target=Target("gpu" if capability else "cpu", capability))
    assert attend.implementation(dtype, width, biased=biased) == chosen
    if chosen == "chunks":
        with pytest.raises(UsageError, match=r"attention 'flash' .*; use auto or chunks"):
            Attend("flash", attend.target).implementation(dtype, width)
    else:
        assert Attend("flash", attend.target).implementation(dtype, width) == "flash"
    assert Attend("chunks", attend.target).implementation(dtype, width) == "chunks"


ADA = Target("gpu", (8, 9))


@pytest.mark.parametrize(
    ("wanted", "target", "dtype", "width", "biased", "message"),
    [
        ("flash", Target("cpu"), BF16, 128, False, "capability 8.0 or newer, this is cpu"),
        ("flash", Target("gpu", (7, 5)), FP16, 64, False, "8.0 or newer, this is sm_75"),
        ("flash", Target("gpu"), FP16, 64, False, "8.0 or newer, this is gpu"),  # AMD's
        ("flash", ADA, F32, 128, False, "takes bfloat16 and float16, got float32"),
        ("flash", ADA, BF16, 136, False, "heads of at most 128 channels, got 136"),
        ("cudnn", ADA, F32, 128, False, "takes bfloat16 and float16, got float32"),
        ("cudnn", ADA, BF16, 20, False, "a multiple of 8 channels, got 20"),
        ("cudnn", ADA, BF16, 128, True, r"grouped keys \(--kv-group\) to 16 bits"),
        ("cudnn", Target("gpu", (7, 5)), FP16, 64, False, "8.0 or newer, this is sm_75"),
    ],
)
def test_a_kernel_that_cannot_is_an_error(wanted, target, dtype, width, biased, message):
    with pytest.raises(UsageError, match=f"attention '{wanted}' .*{message}; use auto or chunks"):
        Attend(wanted, target).implementation(dtype, width, biased=biased)


def test_an_unknown_word():
    with pytest.raises(UsageError, match="'xla': expected one of auto, flash, cudnn, chunks"):
        Attend("xla")


def test_a_capability_in_the_table_takes_cudnn_where_it_can(monkeypatch):
    assert not CUDNN_BY_DEFAULT
    monkeypatch.setattr("zimage_jax.model.attention.CUDNN_BY_DEFAULT", frozenset({(8, 9)}))
    attend = Attend(target=ADA)
    assert attend.implementation(BF16, 128) == "cudnn"
    assert attend.implementation(BF16, 128, biased=True) == "flash"
    assert attend.implementation(F32, 128) == "chunks"
    assert Attend(target=Target("gpu", (8, 6))).implementation(BF16, 128) == "flash"


def test_scores_stay_bounded_by_the_chunk():
    chunk = Attend().queries_at_once(1, 4608, 4608, 30)
    assert chunk * 30 * 4608 * 4 <= 2**25 * 1.5
    assert chunk % 32 == 0
    assert Attend().queries_at_once(1, 96, 96, 6) == 96
    assert Attend(query_chunk=64).queries_at_once(1, 96, 96, 6) == 64
    assert Attend(target=ADA).queries_at_once(1, 4608, 4608, 30) == 480


def test_captions_are_scored_at_once():
    """512 tokens of two prompts with 32 heads would be two chunks."""
    q = jax.ShapeDtypeStruct((2, 512, 32, 8), F32)
    k = jax.ShapeDtypeStruct((2, 512, 8, 8), F32)
    assert Attend().queries_at_once(2, 512, 512, 32) == 256
    for causal in (False, True):
        text = str(jax.make_jaxpr(partial(attention, causal=causal))(q, k, k))
        assert ("scan" in text) == (not causal)


def test_a_jax_without_pallas_is_an_error_not_another_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    q = jax.ShapeDtypeStruct((1, 4, 2, 16), BF16)
    with pytest.raises(UsageError, match=r"needs Pallas-Triton, which jax .* lacks"):
        jax.make_jaxpr(partial(attention, attend=Attend(target=ADA)))(q, q, q)


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """Its masks and dtypes pass JAX's own checks."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda *_: 91002
    )
    q, lengths = jax.ShapeDtypeStruct((1, 1088, 30, 128), BF16), jax.ShapeDtypeStruct((1,), "int32")
    run = jax.jit(lambda q, n: attention(q, q, q, lengths=n, attend=Attend("cudnn", ADA)))
    traced = run.trace(q, lengths)
    assert traced.out_info.shape == q.shape
    assert "dot_product_attention_fwd" in str(traced.jaxpr)


@pytest.mark.parametrize(
    ("version", "found"), [(None, "none"), (91001, "9.10.1"), (91002, None), (92800, None)]
)
def test_cudnn_must_be_there_and_new_enough(monkeypatch, version, found):
    there = version and SimpleNamespace(cudnn_get_version=lambda: version)
    monkeypatch.setattr("jax._src.lib.cuda_versions", there)
    if found is None:
        placement.require_cudnn()
    else:
        with pytest.raises(UsageError, match=f"needs cuDNN 9.10.2 or newer, found {found}"):
            placement.require_cudnn()


@pytest.mark.parametrize(
    ("platform", "word", "expected"),
    [
        ("cpu", None, None),
        ("gpu", "8.9", (8, 9)),
        ("gpu", "12.0", (12, 0)),
        ("gpu", "gfx90a", None),
    ],
)
def test_the_target_is_the_device(platform, word, expected):
    device = Mock(spec=jax.Device, platform=platform)
    device.compute_capability = word or ""
    assert Placement(device, Gate()).target == Target(platform, expected)


# -- the kernel ------------------------------------------------------------------------------------

TILE = (32, 16)
CASES = {  # batch, queries, keys, heads, key heads, width; lengths, bias, causal
    "whole tiles": (1, 64, 64, 2, 2, 32, False, False, False),
    "a part of a tile": (1, 70, 37, 2, 2, 64, False, False, False),
    "fewer than a tile": (2, 3, 5, 1, 1, 32, False, False, False),
    "lengths": (3, 40, 70, 2, 2, 32, True, False, False),
    "counts of groups": (2, 50, 33, 2, 2, 32, False, True, False),
    "both": (2, 50, 81, 2, 2, 128, True, True, False),
    "causal, key heads": (2, 75, 75, 8, 2, 32, False, False, True),
    "causal, lengths, one key head": (2, 64, 64, 4, 1, 64, True, False, True),
    "all": (2, 45, 45, 4, 2, 128, True, True, True),
    "24 channels": (1, 40, 50, 2, 2, 24, True, True, False),
    "8 channels": (1, 20, 50, 2, 1, 8, False, False, False),
    "120 channels": (1, 33, 18, 1, 1, 120, True, False, False),
}


def arrays(case, dtype=F32) -> tuple[tuple, dict]:
    batch, queries, keys, heads, key_heads, width, masked, biased, causal = case
    rng = np.random.default_rng(queries * keys)
    q = rng.standard_normal((batch, queries, heads, width), np.float32)
    k, v = (rng.standard_normal((batch, keys, key_heads, width), np.float32) for _ in range(2))
    lengths = rng.integers(1, keys + 1, batch).astype(np.int32) if masked else None
    bias = np.log(rng.integers(1, 17, keys)).astype(np.float32) if biased else None
    given = tuple(jnp.asarray(a.astype(dtype)) for a in (q, k, v))
    return given, {"lengths": lengths, "bias": bias, "causal": causal}


kernel = jax.jit(flash, static_argnames=("causal", "tile", "interpret"))


def at_once(*given, lengths, bias, causal):
    run = partial(in_chunks, bias=bias, causal=causal, chunk=1 << 30)
    return jax.jit(run)(*given, lengths=lengths)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_chunks_in_float32(name):
    given, how = arrays(CASES[name])
    got = kernel(*given, **how, tile=TILE, interpret=True)
    np.testing.assert_allclose(got, at_once(*given, **how), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_errs_no_more_than_the_chunks_in_16_bits(name, dtype):
    given, how = arrays(CASES[name], dtype)
    exact = np.asarray(at_once(*(np.asarray(a, np.float32) for a in given), **how))

    def error(out) -> float:
        assert out.dtype == dtype
        return np.linalg.norm(np.asarray(out, np.float32) - exact)

    chunks = error(at_once(*given, **how))
    assert 0 < error(kernel(*given, **how, tile=TILE, interpret=True)) <= 1.2 * chunks


def test_the_bias_is_not_rounded():
    """In bfloat16 log 16 would be 0.06 % less, and log 4 0.35 % of a weight."""
    (q, k, v), _ = arrays((1, 32, 40, 1, 1, 32, False, False, False))
    bias = np.full(40, np.log(4), np.float32)
    bias[20:] = 0
    got = kernel(q * 0, k, v, bias=bias, tile=TILE, interpret=True)
    weights = np.where(np.arange(40) < 20, 4.0, 1.0) / 100
    expected = np.einsum("s,bsmh->bmh", weights, np.asarray(v, np.float64))[:, None]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=1e-6)


def test_the_kernel_reads_nothing_beyond_the_lengths():
    (q, k, v), _ = arrays((2, 40, 70, 2, 2, 32, False, False, False))
    lengths = jnp.array([33, 64])
    spoilt = (a.at[0, 33:].set(jnp.nan).at[1, 64:].set(jnp.inf) for a in (k, v))
    run = partial(kernel, lengths=lengths, tile=TILE, interpret=True)
    np.testing.assert_array_equal(run(q, k, v), run(q, *spoilt))


def test_the_tile_that_runs_on_a_gpu():
    given, how = arrays((1, 150, 200, 2, 1, 128, True, True, False))
    got = kernel(*given, **how, interpret=True)
    np.testing.assert_allclose(got, at_once(*given, **how), atol=1e-5, rtol=0)


# -- the compiler for a card that is not there -----------------------------------------------------

TOKENS = 4224  # of 1024 x 1024 pixels, and a caption in a bucket of 128
COMPILED = {  # heads, key heads, width; lengths, bias, causal
    "lengths and bias": (30, 30, 128, True, True, False),
    "causal, key heads": (32, 8, 128, False, False, True),
    "32 channels": (6, 6, 32, True, True, False),
    "32 channels, causal, key heads": (4, 2, 32, False, False, True),
}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["rtx-3060", "rtx-4090", "h100", "rtx-5090"])
def test_compiled_for_a_card_the_kernel_stores_no_scores(gpu_compiler, name):
    card = cards.find(name)
    compile_for_card, attend = (
        deviceless.compiler(card),
        Attend(target=Target("gpu", card.capability)),
    )
    for (heads, key_heads, width, masked, biased, causal), dtype in itertools.product(
        COMPILED.values(), (BF16, FP16)
    ):
        q, k = (jax.ShapeDtypeStruct((1, TOKENS, n, width), dtype) for n in (heads, key_heads))
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32) if masked else None
        bias = np.log(np.arange(TOKENS) % 4 + 1).astype(np.float32) if biased else None
        run = partial(attention, bias=bias, causal=causal, attend=attend)
        with deviceless.pallas_for(card):
            traced = jax.jit(lambda q, k, v, n, run=run: run(q, k, v, lengths=n)).trace(
                q, k, k, lengths
            )
            executable = compile_for_card(traced.lower(lowering_platforms=("cuda",)))
        (module,) = executable.hlo_modules()
        assert "__gpu$xla.gpu.triton" in module.to_string()
        assert executable.get_compiled_memory_stats().temp_size_in_bytes < 2**20
