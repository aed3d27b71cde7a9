"""What our programs take of a card beside their arguments, by its compiler:
zimage_jax/assets/temporaries.json.

    pip install jax-cuda12-plugin==VERSION_OF_JAX jax-cuda12-pjrt==VERSION_OF_JAX      # no driver, no CUDA library
    python -m scripts.measure.temporaries [CARD ...]

Compiles the published widths in bf16 for one card of each capability (a quarter of an hour on two
cores for all) and replaces the figures of those. Captions are in a bucket of 64 tokens; points are
tokens of all contexts, or pixels."""

import json
import re
import time
from datetime import date

import click
import jax

from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.planning import cards
from zimage_jax.planning.planner import Visit, Work
from zimage_jax.planning.stored import TEMPORARIES
from zimage_jax.runtime.compiled import CompiledCosts
from zimage_jax.runtime.deviceless import CardPrograms, order
from zimage_jax.runtime.staging import ring_step
from zimage_jax.weights.formats import uniform

SIDES, BUCKETS = (512, 1024, 2048), (64, 512)
BLOCKS = (1, 2, 4, 8)
ALONE = (1, 8)  # chunks that run with nothing copied meanwhile
NOTE = "beside their arguments, bytes; published widths, bf16; attention as the card computes it"


def work(side: int, bucket: int = 64) -> Work:
    return Work.of(TURBO, side, side, 8, KVPolicy(), "bfloat16", bucket=bucket)


def main_block(work: Work, blocks: int, copied: int) -> frozenset[Visit]:
    """Such a run of main blocks in every phase."""
    return frozenset(Visit(blocks, copied, nfe=nfe) for nfe in work.nfes)


def measure(costs: CompiledCosts) -> dict:
    """Stage -> kind of program -> points."""
    none: frozenset = frozenset()
    visits = [Visit(n, n) for n in BLOCKS] + [Visit(n, 0) for n in ALONE]

    def series(ask, points) -> list[list[int]]:
        return [[x, say(ask(argument))] for x, argument in points]

    def say(value: int) -> int:
        click.echo(f"  {time.strftime('%X')} {value / 2**20:8.1f} MiB", err=True)
        return value

    tokens = [(work(side).tokens, work(side)) for side in SIDES]
    captions = [(bucket, work(512, bucket)) for bucket in BUCKETS]
    pixels = [(side * side, work(side)) for side in SIDES]
    return {
        "text": {
            f"{v.blocks},{v.copied}": series(
                lambda w: costs.text(w, frozenset([v]), v.copied),  # noqa: B023
                captions,
            )
            for v in visits
        },
        "context": {
            f"{n},0": series(lambda w: costs.context(w, frozenset([Visit(n, 0)]), n), captions)  # noqa: B023
            for n in (1, 2)
        },
        "denoise": {"0,0": series(lambda w: costs.denoise(w, none, none, 0), tokens)}
        | {
            f"{v.blocks},{v.copied}": series(
                lambda w: costs.denoise(w, none, main_block(w, *v[:2]), v.copied),  # noqa: B023
                tokens,
            )
            for v in visits
        },
        "decode": series(lambda w: costs.decode(w, None, None), pixels),
        "strips": [
            [
                side * side,
                series(
                    lambda r: costs.decode(work(side), r, None),  # noqa: B023
                    [(r * side, r) for r in rows(side)],
                ),
            ]
            for side in SIDES
        ],
        "scan": series(costs.scan, tokens),
    }


def ring_order(programs: CardPrograms) -> list[tuple[str, int]]:
    """Copies and kernels of a ring step over one block of the transformer, in the order they
    run."""
    costs = CompiledCosts(programs)
    of_512 = work(512)
    costs.denoise(of_512, frozenset(), frozenset([Visit(1, 1, nfe=of_512.nfes[0])]), 1)
    (step,) = programs.executables(ring_step)
    return order(step)


def rows(side: int) -> tuple[int, ...]:
    """Of strips: the fewest that the planner takes, the most, and one between."""
    return TURBO.vae.scale, side // 16, side // 2


def text_of(table: dict) -> str:
    """JSON with a point on a line."""
    return (
        re.sub(r"\[\s+([^][]*?),\s+([^][]*?)\s+\]", r"[\1, \2]", json.dumps(table, indent=1)) + "\n"
    )


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    table = json.loads(TEMPORARIES.read_text()) if TEMPORARIES.exists() else {"capabilities": {}}
    for name in names or ("rtx-4090", "rtx-3060", "h100", "rtx-5090", "t4", "a100-40gb"):
        card = cards.sheet(name)
        click.echo(name, err=True)
        programs = CardPrograms(uniform(TURBO, "bfloat16"), "bfloat16", card)
        made = {
            "card": name,
            "jax": jax.__version__,
            "date": f"{date.today()}",
            "ring_order": ring_order(programs),
        }
        table["note"] = NOTE
        table["capabilities"]["{}.{}".format(*card.capability)] = made | measure(
            CompiledCosts(programs)
        )
        TEMPORARIES.write_text(text_of(table))


if __name__ == "__main__":
    main()
