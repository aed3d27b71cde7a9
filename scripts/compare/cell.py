"""One cell of a sweep, in a process of its own: a list of cells as JSON on standard input, what
came of each as a line on standard output.

scripts/compare/schedules.py starts it, with a single cell but where nothing runs (simulate), and on
a GPU with the cells of one cap of its allocator."""

import json
import sys
import warnings

from scripts.compare.cold import cold
from scripts.compare.measured import measure
from scripts.compare.simulate import simulate


def answer(cell: dict) -> dict:
    from zimage_jax.errors import ZImageError  # alone: a cold start counts the rest

    try:
        return {"measure": measure, "simulate": simulate, "cold": cold}[cell["kind"]](cell)
    except ZImageError as fault:
        return {"error": str(fault)}


def main() -> None:
    warnings.simplefilter("ignore")
    for cell in json.load(sys.stdin):
        print(json.dumps(answer(cell)), flush=True)


if __name__ == "__main__":
    main()
