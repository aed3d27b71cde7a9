"""Jobs and plans that the tests of this folder share."""

import jax.numpy as jnp

from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVFormat, KVPolicy, Phase
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.planning import cards
from zimage_jax.planning.plan import Memory, Plan, Sizes
from zimage_jax.planning.planner import Planner
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.planning.work import Work
from zimage_jax.weights.formats import Storage, uniform

STORAGE = uniform(TURBO, "bfloat16")
SIZES = Sizes(STORAGE, 2)


def square(side: int, bucket: int = 64, kv: KVPolicy = KVPolicy()) -> Work:  # noqa: B008
    path = Trajectory.of(8, TURBO.scheduler.shift)
    return Work.of(TURBO, side, side, path, kv, jnp.bfloat16, bucket=bucket)


def one_phase(steps: int, reuse: int = 1) -> tuple[Phase, ...]:
    return (Phase(KVFormat("bf16"), steps, reuse),)


def planner(card: str = "rtx-4090", storage: Storage = STORAGE) -> Planner:
    """Of a model of the published widths that computes in bfloat16."""
    return Planner(STAGES, storage, 2, StoredCosts(storage, cards.find(card)))


def plan_of(memory: Memory, work: Work, budget: int = 2**40) -> Plan:
    """Of the published model on an RTX 4090."""
    return planner().plan(work, memory, budget)
