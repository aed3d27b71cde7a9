"""The K/V policy: precision, groups and reuse, alone and under every schedule."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import small
from tests.model.test_models import relative
from tests.schedules import MODEL
from zimage_jax import KVPolicy
from zimage_jax.errors import UsageError
from zimage_jax.model import dit, kv, kv_codes, ops, sampling
from zimage_jax.model.attention import Attend
from zimage_jax.model.kv import CODINGS, KV, KeyTable, KVFormat, Nfe, Phase
from zimage_jax.model.samplers import Trajectory
from zimage_jax.units import tree_bytes

TURBO_T = Trajectory.of(8, 3.0).scheduler_times
CONFIG = small.CONFIGS[MODEL]


def table(keys: int, lengths=None, batch: int = 2, half: int = 4) -> KeyTable:
    """Rotations of random angles."""
    angle = np.random.default_rng(keys).standard_normal((batch, keys, half)).astype(np.float32)
    return KeyTable(np.cos(angle), np.sin(angle), lengths)


# -- the words -------------------------------------------------------------------------------------


def test_the_switch_is_at_500_which_leaves_two_of_eight_nfes():
    early, late = KVPolicy().phases(TURBO_T, jnp.bfloat16, 8, 8)
    assert (early.kv_format.dtype, early.steps, late.kv_format.dtype, late.steps) == (
        "bf16",
        6,
        "fp16",
        2,
    )
    assert KVPolicy().phases(TURBO_T, jnp.float32, 8, 8) == (Phase(KVFormat("float32"), 8),)
    assert KVPolicy().phases(TURBO_T, jnp.float16, 8, 8) == (Phase(KVFormat("fp16"), 8),)


@pytest.mark.parametrize(
    ("words", "phases"),
    [
        ({"dtype": "fp16"}, [("fp16", 1, 8)]),
        ({"dtype": "fp8:bf16", "switch_t": 900}, [("fp8", 1, 2), ("bf16", 1, 6)]),
        ({"dtype": "k4v6:int8", "group": "2"}, [("k4v6", 2, 6), ("int8", 2, 2)]),
        ({"group": "4:2", "switch_t": 0}, [("float32", 4, 8)]),
        ({"group": "2:1"}, [("float32", 2, 6), ("float32", 1, 2)]),
        ({"switch_t": 1000, "dtype": "bf16:fp16"}, [("fp16", 1, 8)]),
    ],
)
def test_phases(words, phases):
    found = KVPolicy.parse(**words).phases(TURBO_T, jnp.float32, 8, 8)
    assert [(p.kv_format.dtype, p.kv_format.group, p.steps) for p in found] == phases


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"dtype": "int7"},
            "K/V dtype 'int7': expected one of float32, bf16, fp16, fp8, int8, int6, or k5v6 and the",
        ),
        ({"dtype": "k5v7"}, "K/V dtype 'k5v7': .* with 4 to 6 bits each"),
        ({"dtype": "fp8"}, "fp8 is for the early NFEs"),
        ({"dtype": "bf16:fp16:fp8"}, "expected one value, or EARLY:LATE"),
        ({"group": "3"}, "K/V group '3': expected 1, 2 or 4, or EARLY:LATE"),
        ({"group": "two"}, "expected 1, 2 or 4"),
        ({"reuse": 0}, r"K/V reuse 0: expected 1 \(none\) or more NFEs"),
        ({"switch_t": 1001}, "expected 0 to 1000"),
    ],
)
def test_words_that_are_wrong(words, message):
    with pytest.raises(UsageError, match=message):
        KVPolicy.parse(**words)


@given(
    st.sampled_from([None, "bf16:fp16", "fp8:fp16", "float32", "k5v6:int8"]),
    st.sampled_from(["1", "2", "4:1"]),
    st.integers(1, 5),
)
def test_words_come_back(dtype, group, reuse):
    policy = KVPolicy.parse(dtype, 400.0, group, reuse)
    assert KVPolicy.parse(**json.loads(json.dumps(policy.to_json()))) == policy


@given(st.integers(1, 20), st.integers(1, 6))
def test_each_nfe_keeps_for_a_later_one_or_reuses_an_earlier_one(steps, reuse):
    nfes = list(Phase(KVFormat("bf16"), steps, reuse).nfes())
    assert len(nfes) == steps
    for index, nfe in enumerate(nfes):
        assert nfe.reuses == (index % reuse > 0), (
            "a run of reuse starts with its phase and has `reuse` NFEs"
        )
        assert nfe.keeps == (not nfe.reuses and index + 1 < steps and nfes[index + 1].reuses)


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@settings(max_examples=15)  # each compiles
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4]))
def test_groups_have_their_true_count_and_centre(rows, columns, group):
    how = KVFormat("float32", group, (rows, columns))
    tokens = rows * columns + 3
    position = np.stack(
        np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1
    ).reshape(-1, 2)
    x = np.zeros((1, tokens, 1, 2), np.float32)
    x[0, : rows * columns, 0] = position
    x[0, rows * columns :] = 7
    pooled = np.asarray(jax.jit(partial(kv.pool, kv_format=how))(x))
    bias = kv.score_bias(how, how.keys(tokens))
    assert pooled.shape[1] == how.keys(tokens) == len(bias)
    centres = np.stack(
        np.meshgrid(kv.centres(rows, group), kv.centres(columns, group), indexing="ij"), -1
    ).reshape(-1, 2)
    np.testing.assert_allclose(pooled[0, :-3, 0], centres, rtol=1e-6)
    np.testing.assert_array_equal(pooled[0, -3:], x[0, -3:])
    np.testing.assert_allclose(np.exp(bias).sum(), tokens, rtol=1e-6)


@partial(jax.jit, static_argnames=("how", "attend"))
def attended(q, k, v, keys: KeyTable, how: KVFormat, attend: Attend):
    """Attention to K and V that are pooled before."""
    held = KV(kv.pool(k, how), kv.pool(v, how)) if how.group > 1 else KV(k, v)
    return kv.attention(q, held, keys, how, jnp.float32, attend)


@pytest.mark.parametrize("attend", [Attend(), Attend(query_chunk=32)])
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 3)])
def test_groups_of_equal_tokens_attend_as_the_tokens_do(grid, group, attend):
    """The identity that log(count) is there for; a mask and whole caption tokens beside."""
    rng, (rows, columns) = np.random.default_rng(0), grid
    how, captions = KVFormat("float32", group, grid), 20
    tokens = rows * columns + captions
    of_group = rng.standard_normal(
        (2, -(-rows // group), -(-columns // group), 2, 8, 2), np.float32
    )
    image = (
        of_group.repeat(group, 1)
        .repeat(group, 2)[:, :rows, :columns]
        .reshape(2, rows * columns, 2, 8, 2)
    )
    k, v = np.moveaxis(
        np.concatenate([image, rng.standard_normal((2, captions, 2, 8, 2), np.float32)], 1), -1, 0
    )
    q = rng.standard_normal((2, tokens, 2, 8), np.float32)
    lengths, pooled = np.array([13, 20], np.int32), how.keys(tokens) - captions
    keys = table(tokens, lengths + np.int32(rows * columns))
    expected = attended(q, k, v, keys, KVFormat("float32"), attend)
    keys = table(how.keys(tokens), lengths + np.int32(pooled))
    assert relative(attended(q, k, v, keys, how, attend), expected) <= 1e-5


def test_grouped_keys_take_the_centres_of_their_groups():
    lengths, config = np.array([21]), CONFIG.transformer
    keys = dit.grouped_keys(config, 12, 20, lengths, 32, KVFormat("float32", 2, (6, 10)))
    tokens = dit.inputs(config, 12, 20, lengths, 32).joint
    pads = dit.padded(60) - 60
    assert keys.cos.shape[1] == 15 + pads + 32
    assert keys.lengths == 15 + pads + 32
    np.testing.assert_array_equal(keys.cos[:, 15:], tokens.cos[:, 60:])
    # the first group's centre is at row and column 0.5: the mean angle of its tokens
    angle = np.arctan2(tokens.sin, tokens.cos)[0]
    np.testing.assert_allclose(
        np.arctan2(keys.sin, keys.cos)[0, 0, 8:],
        angle[[0, 1, 10, 11], 8:].mean(0),
        rtol=1e-4,
        atol=1e-6,
    )


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_k_and_v_are_rounded_once_and_saturate(dtype):
    x = np.random.default_rng(0).standard_normal((1, 50, 2, 8), np.float32) * np.float32(3e4)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1e38, -1e38
    valid = np.ones((1, 50), bool)
    held = jax.jit(lambda x: KV(*(kv.keep(y, valid, kv.DTYPES[dtype]) for y in (x, -x))))(x)
    of = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}[dtype]
    largest = np.float32(ml_dtypes.finfo(of).max)
    np.testing.assert_array_equal(np.asarray(held.k), np.clip(x, -largest, largest).astype(of))
    assert np.isfinite(np.asarray(held.v, np.float32)).all()


def test_fp8_has_a_scale_per_head_that_padding_does_not_move():
    x = np.random.default_rng(0).standard_normal((2, 40, 3, 8), np.float32) * np.array(
        [[1e-3], [1], [1e3]], np.float32
    )
    x[0, 30:] *= 100
    held = kv.keep(jnp.asarray(x), table(40, np.array([30, 40], np.int32)).valid, kv.FP8)
    meant = np.asarray(held.values, np.float32) * np.asarray(held.scale)
    np.testing.assert_allclose(
        meant[0, :30], x[0, :30], rtol=2**-4, atol=1e-2 * np.abs(x[0, :30]).max((0, 2)).min()
    )
    assert held.scale.shape == (2, 1, 3, 1)
    np.testing.assert_allclose(
        np.asarray(held.scale)[0, 0, :, 0] * 448, np.abs(x[0, :30]).max((0, 2)), rtol=1e-6
    )


def test_the_rounding_survives_compilation():
    """What is attended to is what was rounded, not what it was rounded from."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 2, 16), np.float32)
    keys, bf16 = table(64, batch=1, half=8), KVFormat("bf16")

    def attend(q, k, v, how):
        return kv.attention(q, KV(k, v), keys, how, jnp.float32, Attend())

    @jax.jit
    def rounding(q, k, v):
        return attend(q, *(kv.keep(x, keys.valid, kv.DTYPES["bf16"]) for x in (k, v)), bf16)

    rounded = [a.astype(ml_dtypes.bfloat16) for a in (q, k, v)]
    expected = jax.jit(partial(attend, how=bf16))(rounded[0].astype(np.float32), *rounded[1:])
    exact = jax.jit(partial(attend, how=KVFormat("float32")))(q, k, v)
    assert relative(rounding(q, k, v), expected) < relative(exact, expected) / 10


# -- packed ----------------------------------------------------------------------------------------


def packed(how: KVFormat, keys: KeyTable, heads: int, width: int) -> KV:
    """Random K and V, packed."""
    rng, (batch, tokens, _) = np.random.default_rng(1), keys.cos.shape
    k, v = (
        jnp.asarray(rng.standard_normal((batch, tokens, heads, width), np.float32)) for _ in "kv"
    )

    @jax.jit
    def keep(k, v):
        kept = kv.keep_keys(k, keys.cos, keys.sin, keys.valid, how)
        return KV(kept, kv.keep(v, keys.valid, how.stored[1]))

    return keep(k, v)


@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", ["int8", "k5v6"])
def test_packed_keys_and_values_attend_as_what_they_decode_to(dtype, compute):
    """20 heads, two at a time; keys are rotated when they are read."""
    how, keys = KVFormat(dtype), table(70, np.array([70, 37], np.int32))
    held = packed(how, keys, 20, 8)
    q = np.random.default_rng(2).standard_normal((2, 33, 20, 8)).astype(compute)
    name = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}[jnp.dtype(compute).name]

    @jax.jit
    def decoded(held):
        k, v = (kv_codes.decode(codes, of, 8) for codes, of in zip(held, how.stored, strict=True))
        return KV(ops.rotate_pairs(k, keys.cos, keys.sin).astype(compute), v.astype(compute))

    plain = jax.jit(lambda q, at: kv.attention(q, at, keys, KVFormat(name), compute, Attend()))
    expected = plain(q, decoded(held))
    found = jax.jit(lambda q, held: kv.attention(q, held, keys, how, compute, Attend()))(q, held)
    assert found.dtype == compute
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[jnp.dtype(compute).name]
    assert relative(found, expected) <= tolerance


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (6, 1), (20, 2), (29, 1), (30, 3), (64, 4)])
def test_a_tenth_of_the_heads_is_decoded_at_once(heads, size):
    assert kv.heads_at_once(heads) == size


def test_no_decoded_copy_of_all_heads():
    """Keys in floating point are of two heads of 20, nowhere of all."""
    how, keys = KVFormat("k5v6"), table(70)
    held, q = packed(how, keys, 20, 8), jnp.zeros((2, 33, 20, 8))
    text = str(
        jax.make_jaxpr(lambda q, held: kv.attention(q, held, keys, how, jnp.float32, Attend()))(
            q, held
        )
    )
    assert "f32[2,70,2,8]" in text
    assert "f32[2,70,20,8]" not in text


@pytest.mark.parametrize("dtype", [*kv.DTYPES, *CODINGS])
@pytest.mark.parametrize("group", [1, 2])
def test_the_bytes_of_a_format_are_those_of_its_arrays(dtype, group):
    how = KVFormat(dtype, group, (5, 7) if group > 1 else None)
    room = jax.eval_shape(lambda: kv.empty(how, 2, 100, 3, 24))
    assert tree_bytes(room) == how.nbytes(2, 100, 3, 24)


def test_six_bits_of_sixteen_are_sixty_percent_fewer():
    """At 1024x1024, with scales."""
    bytes_of = {dtype: KVFormat(dtype).nbytes(1, 4160, 30, 128) for dtype in ("bf16", *CODINGS)}
    bits = {dtype: round(16 * n / bytes_of["bf16"], 3) for dtype, n in bytes_of.items()}
    assert bits["int8"] == 8.125
    assert bits["int6"] == 6.125
    assert (bits["k6v6"], bits["k5v6"], bits["k5v5"], bits["k5v4"]) == (6.5, 6, 5.5, 5)
    assert bytes_of["k5v6"] <= 0.4 * bytes_of["bf16"]


@pytest.mark.long
def test_the_switch_is_static_in_the_sampler():
    """Two loops, one whose products are of bfloat16 operands and one of float16; with reuse a
    branch, not both ways."""
    traced = [_traced(KVPolicy.parse("bf16:fp16", switch_t=800.0, reuse=reuse)) for reuse in (1, 2)]
    plain, reused = (
        [str(eqn) for eqn in sampler.jaxpr.eqns if eqn.primitive.name == "scan"]
        for sampler in traced
    )
    assert len(plain) == len(reused) == 2
    early, late = plain
    assert "bf16[" in early
    assert "f16[" not in early.replace("bf16[", "")
    assert "f16[" in late
    assert "bf16[" not in late
    assert ["cond[" in scan for scan in plain + reused] == [False, False, True, True]
    compiled = [sampler.lower().compile().as_text() for sampler in traced]
    assert [(text.count(" while("), text.count(" conditional(")) for text in compiled] == [
        (2, 0),
        (2, 2),
    ]
    assert all(" bf16[" in text and " f16[" in text for text in compiled)


def _traced(policy: KVPolicy):
    """The sampler for 4 NFEs at 6 x 8 latents: two above t 800 and two below."""
    config, lengths = CONFIG.transformer, np.array([21])
    model = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), dit.spec(config)
    )
    path = Trajectory.of(4, 3.0)
    phases = policy.phases(path.scheduler_times, jnp.float32, 3, 4)
    run = partial(sampling.sample, attend=Attend(), phases=phases)
    context = jax.ShapeDtypeStruct((1, 32, config.dim), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 6, 8, 16), jnp.float32)
    rest = dit.inputs(config, 6, 8, lengths, 32), (None,) * len(phases)
    return jax.jit(run).trace(model, noise, path.update, context, *rest)


def test_nfe_is_what_a_visit_is_told():
    assert [tuple(n)[1:] for n in Phase(KVFormat("bf16"), 5, 2).nfes()] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert Nfe(KVFormat("bf16")) == Nfe(KVFormat("bf16"), keeps=False, reuses=False)
