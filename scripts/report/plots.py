"""The figures of a report, from the rows of scripts/compare/schedules.py. Each gives None where
there is nothing to draw."""

from collections.abc import Callable

import matplotlib

from scripts.compare import rows as data
from scripts.compare.rows import GIB, MIB, STAGES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

plt.rcParams |= {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "sans-serif",
    "svg.hashsalt": "zimage_jax",
}
SCHEDULES = {"resident": "C0", "hybrid": "C2", "ring": "C1", "swap": "C3", "scan": "C4"}
LANES = {"compute": "C0", "copy": "C1", "tier": "C7"}
STAGE_COLOURS = dict(zip(STAGES, ("C5", "C6", "C0", "C2"), strict=True))


def _front(ax, rows: list[dict], unit: int, unit_name: str, ylabel: str) -> None:
    best = data.front(rows)
    ax.plot(
        [data.peak(r) / unit for r in best],
        [data.cost(r) for r in best],
        color="0.6",
        lw=1,
        zorder=1,
    )
    for row in rows:
        x, y = data.peak(row) / unit, data.cost(row)
        ax.scatter(
            x,
            y,
            s=28,
            color=SCHEDULES[row["schedule"]],
            edgecolor="k" if row in best else "none",
            zorder=2,
        )
        ax.annotate(
            data.label(row),
            (x, y),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=7,
            rotation=30,
        )
    ax.set(xlabel=f"peak of device memory, {unit_name}", ylabel=ylabel, xlim=(0, None))
    ax.margins(0.12)


def pareto(rows: list[dict]) -> Figure | None:
    measured = data.usual(data.of_kind(rows, "measure"))
    if not measured:
        return None
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _front(ax, measured, MIB, "MiB", data.cost_name(measured))
    return figure


def pareto_predicted(rows: list[dict]) -> Figure | None:
    simulated = [r for r in data.of_kind(rows, "simulate") if "max_vram_gib" not in r]
    simulated = data.usual([r for r in simulated if r.get("batch", 1) == 1])
    if not simulated:
        return None
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _front(ax, simulated, GIB, "GiB (predicted)", "seconds of the first picture (predicted)")
    row = simulated[0]
    ax.set_title(f"{row['card']}, {row['width']}x{row['height']}, predicted", fontsize=9)
    return figure


def predicted_against_measured(rows: list[dict]) -> Figure | None:
    measured = data.of_kind(rows, "measure")
    timed = [row for row in measured if row["predicted_seconds"]]
    if not timed:
        return None
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    peaks = [(r["peak_device_bytes"] / MIB, r["predicted_peak_bytes"] / MIB, r) for r in measured]
    seconds = [(r["seconds"], r["predicted_seconds"], r) for r in timed]
    cpu = [
        (r["cpu_seconds"], r["predicted_cpu_seconds"], r)
        for r in timed
        if r["predicted_cpu_seconds"]
    ]
    for ax, points, band, name in (
        (left, peaks, 0.03, "peak, MiB"),
        (middle, seconds, 0.1, "seconds"),
        (right, cpu, 0.1, "CPU seconds"),
    ):
        if not points:
            ax.set_axis_off()
            continue
        ends = [
            min(min(x, y) for x, y, _ in points) * 0.9,
            max(max(x, y) for x, y, _ in points) * 1.1,
        ]
        ax.plot(ends, ends, color="0.6", lw=1)
        ax.fill_between(
            ends, [e * (1 - band) for e in ends], [e * (1 + band) for e in ends], color="0.85", lw=0
        )
        for x, y, row in points:
            ax.scatter(x, y, s=18, color=SCHEDULES[row["schedule"]])
        ax.set(xscale="log", yscale="log", xlabel=f"measured {name}", ylabel="predicted")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        ax.set_title(f"band: {band:.0%}", fontsize=8)
    return figure


def _shown(rows: list[dict]) -> list[dict]:
    """One row per schedule of the usual work, that of most chunks: what the timelines are drawn
    of."""
    return list(
        {row["schedule"]: row for row in data.usual(data.of_kind(rows, "measure"))}.values()
    )


def timeline(rows: list[dict]) -> Figure | None:
    """A picture from left to right: what computes and what is copied when."""
    shown = _shown(rows)
    if not shown:
        return None
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 1.1 * len(shown) + 0.5), layout="constrained", squeeze=False
    )
    for row, ax in zip(shown, axes[:, 0], strict=True):
        for y, (lane, colour) in enumerate(LANES.items()):
            bars = [(b / 1e6, (e - b) / 1e6) for name, _, b, e, _ in row["events"] if name == lane]
            ax.broken_barh(bars, (-y - 0.4, 0.8), color=colour, lw=0)
        ax.set(yticks=[0, -1, -2], yticklabels=list(LANES), ylabel=data.label(row))
        ax.grid(axis="y", alpha=0)
    axes[-1, 0].set_xlabel("seconds since the job began")
    return figure


def memory(rows: list[dict]) -> Figure | None:
    """Bytes on the device over time, coloured by stage."""
    shown = _shown(rows)
    if not shown:
        return None
    figure, axes = plt.subplots(
        len(shown),
        1,
        figsize=(9, 1.2 * len(shown) + 0.5),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for row, ax in zip(shown, axes[:, 0], strict=True):
        levels = row["levels"]
        ends = [at for at, _, _ in levels[1:]] + [max(end for _, _, _, end, _ in row["events"])]
        for stage, colour in STAGE_COLOURS.items():
            bars = [
                (a / 1e6, (e - a) / 1e6, n / MIB)
                for (a, s, n), e in zip(levels, ends, strict=True)
                if s == stage
            ]
            ax.bar(
                [b[0] for b in bars],
                [b[2] for b in bars],
                [b[1] for b in bars],
                align="edge",
                color=colour,
                lw=0,
            )
        ax.axhline(row["predicted_peak_bytes"] / MIB, color="k", lw=0.8, ls=":")
        ax.set_ylabel(f"{data.label(row)}\nMiB")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in STAGE_COLOURS.values()]
    figure.legend(handles, STAGE_COLOURS, loc="outside upper center", ncols=4, frameon=False)
    axes[-1, 0].set_xlabel("seconds since the job began; dotted: the predicted peak")
    return figure


def costs(rows: list[dict]) -> Figure | None:
    """What size, batch and chunks change, on this machine."""
    measured = [
        row
        for row in data.of_kind(rows, "measure")
        if "max_vram_mib" not in row and row["resident_seconds"]
    ]
    if not measured:
        return None
    base = data.work(data.usual(measured)[0])
    side, batch = base[2], base[4]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    kept = {"resident": 4, "swap": 4, "ring": 4}
    same = [row for row in measured if kept.get(row["schedule"]) == row["chunks"]]
    by_size = [row for row in same if row.get("batch", 1) == batch]
    by_batch = [row for row in same if row["width"] == side]
    by_chunks = [
        row for row in measured if data.work(row) == base and row["schedule"] in ("swap", "ring")
    ]
    _lines(left, by_size, lambda r: r["width"], lambda r: r["cpu_seconds"])
    left.set(xlabel="side of the picture, pixels", ylabel="CPU seconds")
    _lines(
        middle,
        by_batch,
        lambda r: r.get("batch", 1),
        lambda r: r["cpu_seconds"] / r.get("batch", 1),
    )
    middle.set(xlabel="pictures in a batch", ylabel="CPU seconds per picture")
    _lines(right, by_chunks, lambda r: r["chunks"], data.cost)
    right.set(xlabel="chunks of 8 blocks", ylabel=data.cost_name(measured))
    _legend(left)
    return figure


def _legend(ax) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7)


def _lines(ax, rows: list[dict], x: Callable[[dict], float], y: Callable[[dict], float]) -> None:
    for name, colour in SCHEDULES.items():
        points = sorted((x(row), y(row)) for row in rows if row["schedule"] == name)
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=name)
    ax.set_ylim(0, None)


def crossover(rows: list[dict]) -> Figure | None:
    """Where the ring stops being free, card by card, and what a batch does to it."""
    simulated = [
        r for r in data.of_kind(rows, "simulate") if r["schedule"] == "ring" and r["chunks"] == 30
    ]
    if not simulated:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    single = [row for row in simulated if row.get("batch", 1) == 1]
    for card in dict.fromkeys(row["card"] for row in single):
        points = sorted((row["width"], data.slowdown(row)) for row in single if row["card"] == card)
        left.plot(*zip(*points, strict=True), marker=".", label=card)
    left.set(
        xlabel="side of the picture, pixels",
        ylabel="denoising over computing alone (predicted)",
        yscale="log",
    )
    _legend(left)
    many = [row for row in simulated if row.get("batch", 1) > 1]
    for card, side in dict.fromkeys((row["card"], row["width"]) for row in many):
        points = sorted(
            (row.get("batch", 1), row["predicted_seconds"] / row.get("batch", 1))
            for row in simulated
            if (row["card"], row["width"]) == (card, side)
        )
        right.plot(*zip(*points, strict=True), marker="o", ms=4, label=f"{card}, {side}x{side}")
    right.set(
        xlabel="pictures in a batch", ylabel="seconds per picture (predicted)", ylim=(0, None)
    )
    _legend(right)
    return figure


FIGURES = {
    "pareto": pareto,
    "predicted_against_measured": predicted_against_measured,
    "timeline": timeline,
    "memory": memory,
    "costs": costs,
    "pareto_predicted": pareto_predicted,
    "crossover": crossover,
}
