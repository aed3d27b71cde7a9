"""What formats save, by the planner: seconds of a picture on each card, and where they cross.

    python -m scripts.report.format_table [CARD ...]

A cell has the predicted seconds in bfloat16, lossless and int8 under a budget that streams the
blocks. A crossover is the side of the square from which a format is no faster than bfloat16: below
it the link is the limit, above it the decoding costs. Nothing is measured."""

import functools
import io
import json
from contextlib import redirect_stdout

import click

from zimage_jax import plan

CARDS = (
    *("t4", "rtx-3060-laptop", "rtx-3060", "rtx-4060-laptop", "rtx-4060"),
    *("rtx-4070", "rtx-4080", "rtx-4090", "rtx-5090"),
)
FORMATS = "bfloat16", "lossless", "int8"
SIDES = 512, 1024, 2048
BUDGET_GIB, STEP = 2, 64


@functools.cache
def seconds(card: str, form: str, *sides: int) -> tuple[float, ...]:
    """Predicted seconds of a square picture of each side, in pixels."""
    printed = io.StringIO()
    words = ["--model", "turbo", "--format", form, "--card", card, "--json"]
    words += ["--max-vram", f"{BUDGET_GIB}", *(f"{side}x{side}" for side in sides)]
    with redirect_stdout(printed):
        plan.command.main(words, standalone_mode=False)
    return tuple(size["predicted_seconds"] for size in json.loads(printed.getvalue())["sizes"])


def crossover(card: str, form: str) -> str:
    """The side from which a format is no faster than bfloat16, by bisection in steps of 64."""

    def pays(side: int) -> bool:
        (plain,), (other,) = seconds(card, "bfloat16", side), seconds(card, form, side)
        return other < plain

    low, high = 256 // STEP, 2048 // STEP
    if pays(high * STEP):
        return "none"
    if not pays(low * STEP):
        return f"under {low * STEP}"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle * STEP) else (low, middle)
    return f"{high * STEP}"


def row(card: str) -> str:
    columns = zip(*(seconds(card, form, *SIDES) for form in FORMATS), strict=True)
    cells = [", ".join(f"{s:.1f}" for s in column) for column in columns]
    return f"| {card} | {' | '.join([*cells, *(crossover(card, f) for f in FORMATS[1:])])} |"


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    sides = " | ".join(f"{side}x{side}" for side in SIDES)
    click.echo(f"| card | {sides} | lossless crosses at | int8 crosses at |")
    click.echo("|" + "---|" * (len(SIDES) + 3))
    for card in names or CARDS:
        click.echo(row(card))


if __name__ == "__main__":
    main()
