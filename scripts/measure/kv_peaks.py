"""What K and V take of a card by format: bytes held, and what the compiler takes for attention and
for a block beside their arguments.

    pip install jax-cuda12-plugin==VERSION_OF_JAX jax-cuda12-pjrt==VERSION_OF_JAX      # no driver, no CUDA library
    JAX_PLATFORMS=cpu python -m scripts.measure.kv_peaks --size 1024 bf16 k5v6

Compiles the published widths for a card that need not be there; a caption of 64 tokens."""

import click

from zimage_jax.model import kv
from zimage_jax.model.attention import Target
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages.denoise import Denoise, DenoiseChoice
from zimage_jax.planning import cards, schedule
from zimage_jax.planning.plan import Sizes
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.planning.stream_plan import stream_plan
from zimage_jax.planning.work import Work
from zimage_jax.runtime.deviceless import CardPrograms
from zimage_jax.runtime.placement import default_dtype
from zimage_jax.units import MIB
from zimage_jax.weights.formats import uniform

STORAGE = uniform(TURBO, "bfloat16")


def attention(block, x, inputs, *, attend, kv_format):
    return block.attention(x, inputs, attend, kv_format, None)[0]


def row(programs: CardPrograms, card: cards.Card, size: int, dtype: str) -> list[float]:
    """MiB: K and V held, decoded at once, of attention, of a block, and the plan's of a block."""
    config, policy = TURBO.transformer, KVPolicy.parse(dtype)
    work = Work.of(
        TURBO,
        size,
        size,
        Trajectory.of(8, TURBO.scheduler.shift),
        policy,
        programs.dtype,
        bucket=64,
    )
    kv_format = work.phases[0].kv_format
    decoded = kv.heads_at_once(config.n_heads) * 2 * 2 * work.tokens * config.head_dim
    _, of_attention = programs(
        attention, kv_format=kv_format, attend=programs.attend(work)
    ).compiled(
        programs.module("transformer", "layers.0"),
        programs.like(1, work.tokens, config.dim),
        programs.inputs(work, 1).joint,
    )
    units = Sizes(STORAGE, 2).units("transformer", "layers")[:1]
    choice = DenoiseChoice(
        stream_plan(STORAGE, "transformer", (units,), schedule.make("resident", 1))
    )
    counted = (
        work.kv_bytes(config),
        decoded if kv_format.codings else 0,
        of_attention,
        Denoise().compiled(programs, work, choice),
        StoredCosts(STORAGE, card).scratch(Denoise(), work, choice),
    )
    return [n / MIB for n in counted]


@click.command(help=__doc__)
@click.argument("dtypes", nargs=-1)
@click.option("--card", "name", default="rtx-4090", show_default=True)
@click.option("--size", "sizes", multiple=True, type=int, default=[1024], show_default=True)
def main(dtypes: tuple[str, ...], name: str, sizes: list[int]) -> None:
    card = cards.sheet(name)
    programs = CardPrograms(STORAGE, default_dtype(Target("gpu", card.capability)), card)
    click.echo("| pixels | K/V | held | decoded at once | attention | block | the plan's block |")
    click.echo("|---|---|---|---|---|---|---|")
    for size in sizes:
        for dtype in dtypes:
            figures = " | ".join(f"{value:.1f}" for value in row(programs, card, size, dtype))
            click.echo(f"| {size} | {dtype} | {figures} |")


if __name__ == "__main__":
    main()
