"""Half a block: its parameters, and the bits of two halves against those of the block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.schedules import MODEL, STORAGE
from zimage_jax.model import dit, kv
from zimage_jax.model.attention import Attend
from zimage_jax.model.layers import named_arrays, with_arrays
from zimage_jax.weights import components

CONFIG = small.CONFIGS[MODEL].transformer
UNITS = ["layers.1", "context_refiner.0"]


@pytest.mark.parametrize("unit", UNITS)
def test_halves_share_the_parameters_of_their_block(unit):
    halves = components.halves("transformer", unit)
    assert halves == (f"{unit}.attention", f"{unit}.feed_forward")
    assert [components.half_of(name) for name in halves] == list(dit.HALVES)
    assert {components.unit_of(name) for name in halves} == {unit}
    paths = itertools.chain(*(STORAGE.leaves("transformer", name) for name in halves))
    assert sorted(paths) == sorted(STORAGE.leaves("transformer", unit))
    whole = STORAGE.nbytes("transformer", unit)
    assert sum(STORAGE.nbytes("transformer", name) for name in halves) == whole


def test_what_is_no_block_of_the_transformer_has_no_halves():
    for component, unit in (("transformer", "stem"), ("text_encoder", "layers.0")):
        assert components.halves(component, unit) == ()
        assert components.half_of(unit) is None


def halves_of(block: dit.Block, unit: str) -> list[dit.Block]:
    """The block's arrays in the structures of its halves, as a slot holds them."""
    names, leaves = components.halves("transformer", unit), jax.tree.leaves(block)
    trees = STORAGE.trees("transformer", names)
    own = [STORAGE.of_half("transformer", name, leaves) for name in names]
    return [jax.tree.unflatten(tree, of) for tree, of in zip(trees, own, strict=True)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_programs_of_a_half_give_the_bits_of_one(unit, dtype):
    """Twice two halves against two blocks in one program: tokens, K and V."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / 4)

    block = components.child(dit.spec(CONFIG), unit)
    block = with_arrays(block, lambda _, leaf: drawn(*leaf.shape))
    side = dit.inputs(CONFIG, 4, 8, np.array([9]), 32).image
    if unit in UNITS[:1]:
        side = side._replace(time=drawn(1, CONFIG.adaln_dim))
    x = drawn(1, side.cos.shape[1], CONFIG.dim).astype(dtype)
    kv_format = kv.plain(x.dtype)
    room = kv.empty(kv_format, 1, x.shape[1], CONFIG.n_heads, CONFIG.head_dim)

    @jax.jit
    def run(blocks, tokens):
        cache = (room,) * sum(block.attention is not None for block in blocks)
        return dit.apply_blocks_cached(
            blocks, (tokens, cache), side, Attend(), kv_format, reuses=False
        )

    expected, used = run([block, block], x)
    at, found = dit.Halfway.before(x, modulated=side.time is not None), []
    for half in halves_of(block, unit) * 2:
        at, kept = run([half], at)
        found += kept
    np.testing.assert_array_equal(at.x, expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(list(used)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_half_is_applied_without_the_other_parameters():
    first, second = halves_of(
        with_arrays(dit.spec(CONFIG).layers[0], lambda _, leaf: jnp.zeros(leaf.shape)), "layers.0"
    )
    assert first.feed_forward is None
    assert second.attention is None
    assert second.modulation is None
    assert not set(named_arrays(first)) & set(named_arrays(second))
