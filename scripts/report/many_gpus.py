"""What several cards predict: the tables of scripts/results/many_gpus.md, from `python -m zimage_jax.plan`.

    python -m scripts.report.many_gpus buy      1, 2 and 4 of each card
    python -m scripts.report.many_gpus host     where the host's memory is the bound

Nothing is measured: the figures are the planner's own simulation."""

import io
import json
from contextlib import redirect_stdout

import click

from scripts.report.card_table import SIZES, cell
from zimage_jax import plan

# as such cards are plugged in: two of a desktop share its 16 lanes, a server gives each its own
MACHINES = [
    *([[card], [card + "@x8"] * 2, [card + "@x8"] * 4] for card in ("rtx-3060", "rtx-4060")),
    *([[card], [card + "@x8"] * 2, [card + "@x8"] * 4] for card in ("rtx-4070", "rtx-4090")),
    [["rtx-5090"], ["rtx-5090@x8"] * 2, ["rtx-5090@x8"] * 4],
    [["l4"], ["l4"] * 2, ["l4"] * 4],
    [["h100"], ["h100"] * 2, ["h100"] * 4, ["h100"] * 8],
]
HOSTS = (20, 40, 60, 120, 240, 480)  # GB/s
STREAMED = [["rtx-4090@x8"] * 2, ["l4"] * 4, ["h100"] * 8]
BUDGET_GIB = 2  # so that nearly all is streamed


def predicted(cards: list[str], *options: str) -> list[dict]:
    """What the plan command says of each size on these cards."""
    which = ["--card", cards[0]]
    if len(cards) > 1:
        which = ["--cards", ",".join(cards), "--split", "chunks"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        words = ["--model", "turbo", *which, "--json", *options, *SIZES]
        plan.command.main(words, standalone_mode=False)
    return json.loads(printed.getvalue())["sizes"]


def name_of(cards: list[str]) -> str:
    return f"{len(cards)} x {cards[0]}" if len(cards) > 1 else cards[0]


def row_of_machine(cards: list[str], alone: list[dict]) -> str:
    """A row: peak of the fullest card and seconds, what bounds them, and seconds per picture with whole
    pictures, by the same card `alone`."""
    found = [name_of(cards)]
    for size, of_one in zip(predicted(cards), alone, strict=True):
        each = of_one["predicted_seconds"] / len(cards)
        found += [cell(size), size["bound_by"] or "", f"{each:.2g} s"]
    return "| " + " | ".join(found) + " |"


def row_of_hosts(cards: list[str], size: int) -> str:
    """A row: seconds of one such card, then seconds and bound by the rate of the host's memory."""
    budget = "--max-vram", str(BUDGET_GIB)
    alone = predicted(cards[:1], *budget)[size]["predicted_seconds"]
    found = [name_of(cards), SIZES[size], f"{alone:.2g} s"]
    for rate in HOSTS:
        of = predicted(cards, *budget, "--host-gbps", str(rate))[size]
        found.append(f"{of['predicted_seconds']:.2g} s, {of['bound_by']}")
    return "| " + " | ".join(found) + " |"


@click.command(help=__doc__)
@click.argument("table", type=click.Choice(["buy", "host"]))
def main(table: str) -> None:
    if table == "buy":
        for machines in MACHINES:
            alone = predicted(machines[0])
            for cards in machines:
                click.echo(row_of_machine(cards, alone))
    else:
        for cards in STREAMED:
            for size in range(len(SIZES)):
                click.echo(row_of_hosts(cards, size))


if __name__ == "__main__":
    main()
