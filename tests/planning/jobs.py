"""Jobs and plans that the tests of this folder share."""

import jax.numpy as jnp

from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVFormat, KVPolicy, Phase
from zimage_jax.planning import cards
from zimage_jax.planning.planner import Memory, Plan, Planner, Work
from zimage_jax.planning.stored import StoredCosts


def square(side: int, bucket: int = 64, kv: KVPolicy = KVPolicy()) -> Work:  # noqa: B008
    return Work.of(TURBO, side, side, 8, kv, jnp.bfloat16, bucket=bucket)


def one_phase(steps: int, reuse: int = 1) -> tuple[Phase, ...]:
    return (Phase(KVFormat("bf16"), steps, reuse),)


def plan_of(memory: Memory, work: Work, budget: int = 2**40) -> Plan:
    """Of the published model on an RTX 4090."""
    costs = StoredCosts(TURBO, cards.sheet("rtx-4090"))
    return Planner(TURBO, "bfloat16", 2, costs).plan(work, memory, budget)
