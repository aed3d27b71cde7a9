"""A Turing card, which has no bfloat16 and none of the flash attentions: compiled for without one."""

import pytest

from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.planning.cards import Card
from zimage_jax.planning.planner import GIB, Visit, Work

MIB = 2**20
T4 = Card("t4", "Tesla T4", (7, 5), 40, 1.59, 4 * MIB, 320e9, 16 * GIB, 15.75e9)


@pytest.mark.parametrize(("side", "most"), [(512, 212), (1024, 514)])
def test_a_ring_step_in_float16_takes_what_one_in_bfloat16_takes(side, most, gpu_compiler):
    """As much as bfloat16 on an RTX 4090 with the same attention (211.2 and 513.2 MiB), though it
    sums in float32 what a norm follows, and converts the stored bfloat16; and the matrices of
    the next block, but for the modulation's (2 %), are copied from before the first product on."""
    from zimage_jax.runtime.compiled import CompiledCosts
    from zimage_jax.runtime.deviceless import CardPrograms, order
    from zimage_jax.runtime.staging import ring_step

    work = Work.of(TURBO, side, side, 8, KVPolicy(), "float16", bucket=64)
    programs, none = CardPrograms(TURBO, "bfloat16", "float16", T4), frozenset()
    visits = frozenset(Visit(1, 1, nfe=nfe) for nfe in work.nfes)
    assert CompiledCosts(programs).denoise(work, none, visits, 1) <= most * MIB
    (step,) = programs.executables(ring_step)
    runs = order(step)
    assert (runs[0][0], runs[-1]) == ("start", ("done", 8))
    assert runs[0][1] >= 7
    (module,) = step.hlo_modules()
    text = module.to_string()
    assert "__cublas" in text
    assert "triton" not in text
    assert "cudnn" not in text
