"""What a report says of the rows of scripts/compare/schedules.py, apart from how it is drawn.
Pure."""

import statistics
from collections.abc import Iterable

MIB, GIB = 2**20, 2**30
STAGES = ("text", "context", "denoise", "decode")
ALLOWED = 0.75  # of a card's memory that JAX gives a process


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    """Rows that ended well; several of one cell count once, the last."""
    return list(
        {row["cell"]: row for row in rows if row["kind"] == kind and row["success"]}.values()
    )


def label(row: dict) -> str:
    """A schedule with its numbers, and how K and V were held if not as usual: "hybrid 8, 2
    stay"."""
    name = row["schedule"]
    if name in ("swap", "ring", "hybrid"):
        name += f" {row['chunks']}"
    if name.startswith("hybrid"):
        name += f", {row['resident_chunks']} stay"
    return name + "".join(f", K/V {key} {value}" for key, value in row.get("kv", {}).items())


def work(row: dict) -> tuple:
    """What must be the same for two rows to be compared."""
    return (
        row.get("model"),
        row.get("card"),
        row["width"],
        row["height"],
        row.get("batch", 1),
        row.get("steps", 8),
        row.get("guidance", 0),
    )


def usual(rows: list[dict]) -> list[dict]:
    """The rows of the work that most rows have, each schedule once."""
    if not rows:
        return []
    most = statistics.mode(work(row) for row in rows)
    return list({label(row): row for row in rows if work(row) == most and "kv" not in row}.values())


def peak(row: dict) -> int:
    return row["peak_device_bytes"] if "peak_device_bytes" in row else row["predicted_peak_bytes"]


def cost(row: dict) -> float:
    """Measured: over the resident run in turn, which had the same share of the machine; of a CPU
    its seconds of work, which other processes change least, of a GPU seconds. Without such a run,
    and for a card that is not there: seconds."""
    if row["kind"] == "simulate":
        return row["predicted_seconds"]
    if not row["resident_seconds"]:
        return row["seconds"]
    if row["device"] == "cpu":
        return row["cpu_seconds"] / row["resident_cpu_seconds"]
    return row["seconds"] / row["resident_seconds"]


def cost_name(rows: list[dict]) -> str:
    """What `cost` is of these measured rows, for a reader."""
    if not all(row["resident_seconds"] for row in rows):
        return "seconds"
    return (
        "CPU seconds" if rows[0]["device"] == "cpu" else "seconds"
    ) + " over resident's, in turn"


def front(rows: Iterable[dict]) -> list[dict]:
    """Rows that no other beats in peak and cost both, by rising peak."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda r: (peak(r), cost(r))):
        if not best or cost(row) < cost(best[-1]):
            best.append(row)
    return best


def errors(rows: list[dict]) -> dict[str, list[float]]:
    """Predicted over measured, less one, of peaks, of seconds and of seconds in the processors."""
    found: dict[str, list[float]] = {}
    for name, predicted, measured in (
        ("peak", "predicted_peak_bytes", "peak_device_bytes"),
        ("seconds", "predicted_seconds", "seconds"),
        ("CPU seconds", "predicted_cpu_seconds", "cpu_seconds"),
    ):
        found[name] = [row[predicted] / row[measured] - 1 for row in rows if row[predicted]]
    return found


def crossovers(rows: list[dict], within: float = 0.02) -> dict[str, tuple[int, float] | None]:
    """Card -> the smallest square from which on the ring's denoising takes at most `within` longer
    than its computing alone, and how many times longer it takes at the smallest size of all; None
    where no size is enough."""
    by_card: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if (
            row["schedule"] == "ring"
            and row["chunks"] == 30
            and row.get("batch", 1) == 1
            and row["width"] == row["height"]
        ):
            by_card.setdefault(row["card"], []).append((row["width"], slowdown(row)))
    found: dict[str, tuple[int, float] | None] = {}
    for card, points in by_card.items():
        free = [side for side, times in points if times <= 1 + within]
        found[card] = (min(free), min(points)[1]) if free else None
    return found


def slowdown(row: dict) -> float:
    """Denoising over its computing alone."""
    return (
        row["predicted_seconds_by_stage"]["denoise"]
        / row["predicted_compute_seconds_by_stage"]["denoise"]
    )


def choices(rows: list[dict]) -> list[dict]:
    """Rows of `auto` under a budget that the card has, by card, size and budget."""
    budgeted = [
        r for r in rows if "max_vram_gib" in r and r["budget_bytes"] == int(r["max_vram_gib"] * GIB)
    ]
    return sorted(budgeted, key=lambda r: (r["card"], r["width"], r["max_vram_gib"]))
