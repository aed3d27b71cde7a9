"""A job on a card that is not there, by the planner alone."""

import math

from scripts.compare import sweep
from scripts.compare.jobs import memory_of

GIB = 2**30
BUCKET = 64  # caption tokens: a sentence or two


def simulate(cell: dict) -> dict:
    from zimage_jax.dtypes import DTYPES
    from zimage_jax.model.attention import Target
    from zimage_jax.model.config import PRESETS
    from zimage_jax.model.kv import KVPolicy
    from zimage_jax.model.samplers import Trajectory
    from zimage_jax.pipeline.stages import STAGES
    from zimage_jax.planning import cards
    from zimage_jax.planning.plan import Sizes
    from zimage_jax.planning.planner import Planner
    from zimage_jax.planning.seconds import bound_by, seconds
    from zimage_jax.planning.stored import StoredCosts
    from zimage_jax.planning.work import Work
    from zimage_jax.runtime.placement import default_dtype
    from zimage_jax.weights.formats import uniform

    name = cell.get("model", "turbo")
    if name not in PRESETS:
        raise sweep.UsageError(
            f"model {name!r}: a card is simulated with one of {', '.join(PRESETS)}"
        )
    storage, card = uniform(PRESETS[name], "bfloat16"), cards.find(cell["card"])
    dtype = default_dtype(Target("gpu", card.capability))
    sizes, costs = Sizes(storage, DTYPES[dtype].itemsize), StoredCosts(storage, card)
    work = Work.of(
        storage.config,
        *sweep.pixels(cell["size"]),
        Trajectory.of(cell.get("steps", 8), storage.config.scheduler.shift),
        KVPolicy.parse(**cell.get("kv", {})),
        dtype,
        bucket=BUCKET,
        batch=cell.get("batch", 1),
    )
    budget = (
        min(card.usable, int(cell["max_vram_gib"] * GIB)) if "max_vram_gib" in cell else card.usable
    )
    planner = Planner(STAGES, storage, sizes.compute_bytes, costs)
    plan = planner.plan(work, memory_of(cell), budget)
    by_stage = seconds(STAGES, plan, work, sizes, card.rates)
    computing = card.rates._replace(link=math.inf, disk=math.inf)
    alone = seconds(STAGES, plan, work, sizes, computing)
    return {
        "schedule": plan.schedule,
        "chunks": len(plan.denoise.main_chunks),
        "resident_chunks": plan.denoise.resident_chunks,
        "vae_rows": plan.choices["decode"].rows,
        "budget_bytes": budget,
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
        "predicted_seconds": round(sum(by_stage.values()), 4),
        "predicted_seconds_by_stage": {stage: round(value, 4) for stage, value in by_stage.items()},
        "predicted_compute_seconds_by_stage": {
            stage: round(value, 4) for stage, value in alone.items()
        },
        "bound_by": bound_by(STAGES, plan, work, sizes, card.rates),
        "temporaries": costs.source,
        "rates": card.source,
    }
