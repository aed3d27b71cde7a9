"""The README's table of cards: predicted peak and seconds from `python -m zimage_jax.plan`.

    python -m scripts.report.card_table                           print the rows
    python -m scripts.report.card_table README.md README.zh.md    replace the rows in these files

A row is a card; a cell is one plan: GiB and seconds for a size, without a budget and under
`BUDGET_GIB`. Nothing is measured: the figures are the planner's own."""

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import click

from zimage_jax import plan
from zimage_jax.units import GIB

CARDS = {  # name for --card -> how a reader knows it
    "rtx-3060-laptop": "RTX 3060 Laptop, 6 GB",
    "rtx-4060": "RTX 4060, 8 GB",
    "rtx-3060": "RTX 3060, 12 GB",
    "rtx-4070": "RTX 4070, 12 GB",
    "rtx-4080": "RTX 4080, 16 GB",
    "rtx-4090": "RTX 4090, 24 GB",
    "rtx-5090": "RTX 5090, 32 GB",
}
SIZES = ("512x512", "1024x1024")
BUDGET_GIB = 2


def predicted(card: str, *options: str) -> list[dict]:
    """What the plan command says of each size on a card."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        words = ["--model", "turbo", "--card", card, "--json", *options, *SIZES]
        plan.command.main(words, standalone_mode=False)
    return json.loads(printed.getvalue())["sizes"]


def cell(size: dict) -> str:
    """A plan as "3.95 GiB, 8.7 s": the peak rounded up, the seconds to two digits."""
    peak = math.ceil(size["predicted_peak_bytes"] / GIB * 100) / 100
    if size["schedule"] is None:
        return f"does not fit: {peak:.2f} GiB"
    seconds = size["predicted_seconds"]
    return f"{peak:.2f} GiB, {seconds:.{0 if seconds >= 10 else 1}f} s"


def row(card: str) -> str:
    plans = predicted(card) + predicted(card, "--max-vram", str(BUDGET_GIB))
    return f"| {CARDS[card]} | " + " | ".join(map(cell, plans)) + " |"


def replaced(text: str, rows: list[str]) -> str:
    """`text` with its run of table rows that name one of CARDS replaced by `rows`.

    Raises ValueError when there is no such row."""
    lines, firsts = text.split("\n"), tuple(f"| {title} |" for title in CARDS.values())
    old = [index for index, line in enumerate(lines) if line.startswith(firsts)]
    if not old:
        raise ValueError(f"no row begins with {firsts[0]!r}")
    return "\n".join([*lines[: old[0]], *rows, *lines[old[-1] + 1 :]])


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(files: tuple[Path, ...]) -> None:
    rows = [row(card) for card in CARDS]
    if not files:
        click.echo("\n".join(rows))
    for file in files:
        try:
            file.write_text(replaced(file.read_text("utf-8"), rows), "utf-8")
        except ValueError as fault:
            raise click.ClickException(f"{file}: {fault}") from None


if __name__ == "__main__":
    main()
