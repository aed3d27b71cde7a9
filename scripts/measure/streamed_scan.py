"""The whole sampler as one program with its blocks in host memory: what a card's compiler makes of
it.

    pip install jax-cuda12-plugin==VERSION_OF_JAX jax-cuda12-pjrt==VERSION_OF_JAX      # no driver, no CUDA library
    python -m scripts.measure.streamed_scan [--card rtx-4090] [--side 512]

A scan over the NFEs around a scan over the 30 blocks, stacked in pinned_host memory; its body
copies a block to the device. `use` computes the block it copies, `ahead` the one that the iteration
before copied. Beside them the resident scan and a ring of single blocks with its two slots, by
stored figures. One JSON line each: bytes on the device beside the stem, and, for the streamed ones,
starts, kernels and awaited ends of copies in the body over a block, in order."""

import itertools
import json
import re
from collections.abc import Callable

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zimage_jax.model import dit, kv, sampling
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import Phase
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages.denoise import Denoise, DenoiseChoice
from zimage_jax.planning import cards, schedule
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.planning.stream_plan import cut, stream_plan
from zimage_jax.planning.work import Work
from zimage_jax.runtime.deviceless import CardPrograms
from zimage_jax.runtime.placement import HOST, Placement
from zimage_jax.weights.formats import uniform

DTYPE = "bfloat16"
STORAGE = uniform(TURBO, DTYPE)
MAIN = tuple(unit for unit in STORAGE.units("transformer") if unit.startswith("layers."))


def to_device(leaves: tuple) -> tuple:
    return tuple(jax.device_put(leaf, jax.memory.Space.Device) for leaf in leaves)


def use(apply: Callable, stacked: tuple, x):
    return lax.scan(lambda x, leaves: (apply(to_device(leaves), x), None), x, stacked)[0]


def ahead(apply: Callable, stacked: tuple, x):
    """`stacked` begins with the second block and ends with the first."""

    def body(carry, leaves):
        x, block = carry
        following = to_device(leaves)
        return (apply(block, x), following), None

    return lax.scan(body, (x, to_device(tuple(leaf[-1] for leaf in stacked))), stacked)[0][0]


def compiled(programs: CardPrograms, work: Work, run: Callable) -> tuple:
    """Executable and device bytes it takes beside its arguments."""
    (tree,) = STORAGE.trees("transformer", ["layers.0"])
    host = Placement.on_host().sharding(HOST)
    inputs = dit.inputs(
        TURBO.transformer, work.h, work.w, np.full(1, work.bucket, np.int32), work.bucket
    )
    attend = programs.attend(work)

    def stack(blocks: int) -> tuple:
        return tuple(
            jax.ShapeDtypeStruct((blocks, *leaf.shape), leaf.dtype, sharding=host)
            for leaf in STORAGE.specs("transformer", "layers.0")
        )

    def apply(inputs: dit.BlockInputs) -> Callable:
        return lambda block, x: dit.apply_blocks(
            [jax.tree.unflatten(tree, block)], x, inputs, attend
        )

    def sample(stem, refiner, layers, noise, updates, context):
        def step(state, update):
            x, time = sampling.before_blocks(
                stem, state.latents, update.t, is_guided=False, dtype=context.dtype
            )
            x = run(apply(inputs.image._replace(time=time)), refiner, x)
            x = run(apply(inputs.joint._replace(time=time)), layers, dit.join(x, context))
            return sampling.after_blocks(stem, x, time, state, update, None, None), None

        return lax.scan(step, sampling.State(noise), updates)[0]

    stem = programs.module("transformer", "stem")
    updates = Trajectory.of(work.steps, TURBO.scheduler.shift).update
    noise = jax.ShapeDtypeStruct((1, work.h, work.w, TURBO.transformer.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, work.bucket, TURBO.transformer.dim), DTYPE)
    blocks = stack(TURBO.transformer.n_refiner_layers), stack(TURBO.transformer.n_layers)
    return programs(sample).compiled(stem, *blocks, noise, updates, context)


def body_order(executable) -> list[tuple[str, int]]:
    """Of the loop over the main blocks: the last computation that starts a copy for each of a
    block's arrays."""
    (module,), copies = executable.hlo_modules(), len(STORAGE.specs("transformer", "layers.0"))
    for computation in reversed(module.to_string().split("\n\n")):
        parts = re.findall(r" (?:fusion|copy|custom-call)(-start|-done|)\(", computation)
        if parts.count("-start") == copies:
            kinds = (part.removeprefix("-") or "compute" for part in parts)
            return [(kind, len(list(same))) for kind, same in itertools.groupby(kinds)]
    raise click.ClickException("the compiled program has no loop that copies a block: see its HLO")


@click.command(help=__doc__)
@click.option(
    "--card", "name", type=click.Choice(list(cards.CARDS)), default="rtx-4090", show_default=True
)
@click.option("--side", default=512, show_default=True, help="Pixels.")
def main(name: str, side: int) -> None:
    card = cards.sheet(name)
    h = w = side // TURBO.vae.scale
    work = Work(1, 1, 64, h, w, (Phase(kv.plain(DTYPE), 8),))
    costs = StoredCosts(STORAGE, card)
    units = STORAGE.units("transformer")
    blocks = STORAGE.nbytes(
        "transformer", *(unit for unit in units if unit.startswith(("noise_refiner.", "layers.")))
    )

    def scratch(name: str, chunks: tuple[tuple[str, ...], ...]) -> int:
        made = schedule.make(name, len(chunks))
        choice = DenoiseChoice(stream_plan(STORAGE, "transformer", chunks, made))
        return costs.scratch(Denoise(), work, choice)

    singles = cut(MAIN, (1,) * len(MAIN))
    ring = scratch("ring", singles) + 2 * STORAGE.nbytes("transformer", MAIN[0])
    lines = {"resident": scratch("scan", (MAIN,)) + blocks, "ring of single blocks": ring}
    for what, held in lines.items():
        click.echo(json.dumps({"card": name, "side": side, "what": what, "device_bytes": held}))
    for run in (use, ahead):
        executable, own = compiled(CardPrograms(STORAGE, DTYPE, card), work, run)
        line = {
            "card": name,
            "side": side,
            "what": f"streamed, {run.__name__}",
            "device_bytes": own,
        }
        click.echo(json.dumps(line | {"body": body_order(executable)}))


if __name__ == "__main__":
    main()
