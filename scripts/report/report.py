"""The rows of scripts/compare/schedules.py as one HTML page, with its figures beside it as PNG and
SVG.

    python -m scripts.report.report RESULTS.jsonl -o FOLDER

The page needs no other file and no network, and prints. What nobody measured is marked as
predicted."""

import statistics
from collections.abc import Callable
from pathlib import Path

import click
from matplotlib import pyplot

from scripts.compare import rows as data
from scripts.compare import sweep
from scripts.compare.rows import GIB, MIB, STAGES
from scripts.report import page
from scripts.report import plots as report_plots
from zimage_jax import cli


def _mib(nbytes: int | None) -> str | None:
    return None if nbytes is None else f"{nbytes / MIB:.2f}"


def _number(value: float | None, digits: int = 2) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _psnr(row: dict) -> str | None:
    value = row.get("psnr_db")
    return "infinite" if value == "inf" else _number(value, 1)


# -- sections --------------------------------------------------------------------------------------

Drawn = Callable[
    [str, str], str
]  # a figure's name and caption -> its HTML, empty when there is none


def machine(rows: list[dict]) -> str:
    last = rows[-1]
    told = last["machine"]
    versions = next(
        (
            row["versions"]
            for row in reversed(rows)
            if "versions" in row and row["kind"] != "program"
        ),
        {},
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    loads = [row["load_average"] for row in rows]
    device = told.get("gpu") or "no GPU"
    return page.text(
        f"{told['cpu']}, {told['cores']} cores, {told['memory_bytes'] / GIB:.0f} GiB, {device};",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ";",
        f"commit {commits}; {len(rows)} rows, {rows[0]['date'][:10]} to {last['date'][:10]}.",
        f"Processes that wanted to run when a cell began: {min(loads)} to {max(loads)}, median {statistics.median(loads)}.",
    )


def schedules(rows: list[dict], drawn: Drawn) -> str:
    measured = data.of_kind(rows, "measure")
    failed = [row for row in rows if row["kind"] == "measure" and "error" in row]
    columns = (
        "schedule",
        "size",
        "batch",
        "budget MiB",
        "peak MiB",
        "predicted",
        "seconds",
        "predicted",
        "resident in turn",
        "CPU s",
        "predicted",
        "resident in turn",
        "first preview s",
        "copied MiB",
        "success",
        "PSNR dB",
    )
    lines = [
        (
            data.label(r),
            f"{r['width']}x{r['height']}",
            r.get("batch", 1),
            r.get("max_vram_mib"),
            _mib(r["peak_device_bytes"]),
            _mib(r["predicted_peak_bytes"]),
            *(_number(r[key]) for key in ("seconds", "predicted_seconds", "resident_seconds")),
            *(
                _number(r.get(key), 3)
                for key in ("cpu_seconds", "predicted_cpu_seconds", "resident_cpu_seconds")
            ),
            _number(r["first_preview_seconds"]),
            _mib(r["copied_bytes"]),
            "yes",
            _psnr(r),
        )
        for r in measured
    ]
    lines += [
        (
            r.get("schedule", "auto"),
            f"{r['width']}x{r['height']}",
            r.get("batch", 1),
            r.get("max_vram_mib"),
            *[None] * 10,
            "no",
            r["error"],
        )
        for r in failed
    ]
    if not lines:
        return ""
    usual = data.usual(measured)
    front, name = ", ".join(data.label(row) for row in data.front(usual)), data.cost_name(usual)
    return page.section(
        "Every schedule on the same work",
        page.text(
            "Medians of repeats after a warm-up. Seconds over resident's: each repeat is followed by the same job",
            "resident in the same process, so what else the machine does falls on both. PSNR is against that picture.",
            f"On the front of peak and {name}: {front}.",
        ),
        drawn("pareto", f"Peak of device memory against {name}; the grey line is the front"),
        page.table(columns, lines),
        drawn("costs", "Cost against picture size, batch and chunks"),
    )


def on_and_off(rows: list[dict]) -> str:
    """Chunked loading off is resident, on is the ring of four chunks, at every size and batch that
    has both."""
    tried = [
        row for row in rows if row["kind"] == "measure" and not row.keys() & {"max_vram_mib", "kv"}
    ]
    ways = {
        "off": {data.work(row): row for row in tried if row["schedule"] == "resident"},
        "on": {
            data.work(row): row for row in tried if row["schedule"] == "ring" and row["chunks"] == 4
        },
    }
    lines = []
    for key in sorted(ways["off"].keys() & ways["on"].keys(), key=str):
        for way, row in ((way, found[key]) for way, found in ways.items()):
            name = f"{way}, {row['width']}x{row['height']}, batch {row.get('batch', 1)}"
            seconds = (
                _number(row.get(f"{what}seconds"))
                for what in ("first_preview_", "", "first_picture_")
            )
            words = ("yes", _psnr(row)) if row["success"] else ("no", row["error"])
            lines.append((name, _mib(row.get("peak_device_bytes")), *seconds, *words))
    columns = (
        "chunked",
        "peak MiB",
        "first preview s",
        "total s",
        "first picture s",
        "success",
        "PSNR dB",
    )
    return page.section("Chunked loading on and off", page.table(columns, lines) if lines else "")


def predictions(rows: list[dict], drawn: Drawn) -> str:
    measured = data.of_kind(rows, "measure")
    if not measured:
        return ""
    lines = []
    for name, values in data.errors(measured).items():
        if values:
            sizes = sorted(abs(value) for value in values)
            within = sum(size <= (0.03 if name == "peak" else 0.1) for size in sizes)
            lines.append(
                (name, len(sizes), f"{statistics.median(sizes):.1%}", f"{sizes[-1]:.1%}", within)
            )
    return page.section(
        "Predicted against measured",
        page.text(
            "Seconds are the planner's, with this machine as the card: each stage computes as fast as it did in the",
            "resident runs in turn, chunks go at the speed of the driver's own copies, measured alone, what is read from",
            "the checkpoint for each picture at the speed of such reading, and on a CPU, whose cores do both, nothing",
            "overlaps and each program takes as long to start as one that copies as many arrays of one element. CPU",
            "seconds, which other work on the machine changes least, are the resident run's and the copies'.",
        ),
        page.table(("what", "cells", "median error", "largest", "within 3 % (peak), 10 %"), lines),
        drawn("predicted_against_measured", "Predicted against measured; a dot is a cell"),
    )


def over_time(drawn: Drawn) -> str:
    return page.section(
        "Over time",
        drawn(
            "timeline",
            "Compute, copies to the device and reading from disk (tier), one picture per schedule",
        ),
        drawn("memory", "Device memory over time, by stage"),
    )


def cards(rows: list[dict], drawn: Drawn) -> str:
    simulated = data.of_kind(rows, "simulate")
    if not simulated:
        return ""
    crossing = [
        (card, *((None, None) if found is None else (f"{found[0]}x{found[0]}", f"{found[1]:.1f}")))
        for card, found in data.crossovers(simulated).items()
    ]
    smallest = min(row["width"] for row in simulated)
    choices = [
        (
            f"{r['card']}, {r['width']}x{r['height']}",
            f"{r['max_vram_gib'] / data.ALLOWED:g}",
            r["max_vram_gib"],
            data.label(r),
            f"{r['predicted_peak_bytes'] / GIB:.2f}",
            _number(r["predicted_seconds"], 1),
            r["bound_by"],
        )
        for r in data.choices(simulated)
    ]
    return page.section(
        "Cards that are not here (predicted, nothing measured)",
        page.text(
            f"{simulated[0]['rates'].capitalize()}. Temporaries: {simulated[0]['temporaries']}.",
            "The published widths, bf16, 8 NFEs, a caption of 64 tokens, the first picture with parameters in host memory.",
        ),
        page.text(
            "From which size on a ring of single blocks denoises within 2 % of computing alone:"
        )
        if crossing
        else "",
        page.table(("card", "free from", f"times slower at {smallest}x{smallest}"), crossing)
        if crossing
        else "",
        drawn(
            "crossover", "Predicted: the ring against computing alone, by card; a batch on one card"
        ),
        drawn("pareto_predicted", "Predicted: peak against seconds of schedules on one card"),
        page.text(
            "What auto chooses, by the memory of the card, of which JAX gives a process three quarters:"
        )
        if choices
        else "",
        page.table(
            (
                "card and size",
                "card GiB",
                "used GiB",
                "schedule",
                "peak GiB",
                "seconds",
                "bound by",
            ),
            choices,
        )
        if choices
        else "",
        predicted=True,
    )


def rivals(rows: list[dict]) -> str:
    found = [row for row in rows if row["kind"] == "rival" and "error" not in row]
    alone, both = [], []
    for row in found:
        size = f"{row['width']}x{row['height']}"
        if row["system"] == "in turn":
            for name in ("zimage_jax", "diffusers"):
                stages = row[name]["seconds_by_stage"]
                both.append(
                    (
                        f"{name}, {size}",
                        row[name]["seconds"],
                        row[name]["cpu_seconds"],
                        *map(stages.get, STAGES),
                    )
                )
            ratios = row["ratio_of_seconds"], row["ratio_of_cpu_seconds"]
            both.append((f"ours over theirs, {size}", *ratios, *[None] * len(STAGES)))
        else:
            words = row.get("not_measured") and f"not measured: {row['not_measured']}"
            name = f"{row['system']}, {row.get('mode', 'resident')}, {size}"
            alone.append(
                (
                    name,
                    row.get("seconds"),
                    row.get("cpu_seconds"),
                    _mib(row.get("peak_device_bytes")),
                    words or _mib(row["process_peak_bytes"]),
                )
            )
    return (
        page.section(
            "Beside diffusers",
            page.text(
                "The same small random model in float32, 8 steps, the same prompt, seed and threads."
            ),
            page.text(
                "In turn in one process, medians; stages are means of the seconds inside each model."
            )
            if both
            else "",
            page.table(("", "seconds", "CPU s", *STAGES), both) if both else "",
            page.text("Each in a process of its own:") if alone else "",
            page.table(("", "seconds", "CPU s", "device peak MiB", "process peak MiB"), alone)
            if alone
            else "",
        )
        if found
        else ""
    )


def programs(rows: list[dict]) -> str:
    found = [row for row in rows if row["kind"] == "program"]

    def line(row: dict) -> tuple:
        name = f"{row['system']}, {row['mode']}, {row['width']}x{row['height']}"
        if "budget_bytes" in row:
            name += f", budget {_number(row['budget_bytes'] / GIB)} GiB"
        if not row["success"]:
            return name, row.get("not_measured") or row["error"], *[None] * (len(STAGES) + 1)
        stages = row["seconds_by_stage"]
        return (
            name,
            row["seconds"],
            *map(stages.get, STAGES),
            _number(row["process_peak_bytes"] / GIB),
        )

    told = {
        f"{name} {version}": None
        for row in found
        for name, version in row.get("versions", {}).items()
    }
    return (
        page.section(
            "The full-size model, as each program starts it",
            page.text(
                "From process start to PNG: the same random weights, the same words to draw, 8 steps, all in bfloat16."
            ),
            page.table(("", "seconds", *STAGES, "process peak GiB"), [line(row) for row in found]),
            page.text(", ".join(told) + "."),
        )
        if found
        else ""
    )


def starts(rows: list[dict]) -> str:
    loading, cold = data.of_kind(rows, "loading"), data.of_kind(rows, "cold")
    speeds = [
        (key.removesuffix("_gb_per_sec"), value, _number(row["bytes"] / 1e9 / value))
        for row in loading
        for key, value in row.items()
        if key.endswith("_gb_per_sec")
    ]
    parts = dict.fromkeys(part for row in cold for part in row["seconds_by_part"])
    columns = [f"{kind}, cache {row['cache']}" for row in cold for kind in ("seconds", "CPU s")]
    lines = [
        (
            part,
            *(
                value
                for row in cold
                for value in (row["seconds_by_part"][part], row["cpu_seconds_by_part"].get(part))
            ),
        )
        for part in parts
    ]
    together = "compile and run"
    busy = (
        together,
        *(value for row in cold for value in (None, row["cpu_seconds_by_part"][together])),
    )
    total = (
        "total",
        *(
            v
            for row in cold
            for v in (row["seconds"], _number(sum(row["cpu_seconds_by_part"].values()), 3))
        ),
    )
    return page.section(
        "Loading and starting",
        page.text(
            "Disk to pinned host memory, against plain reading of the same bytes (page cache warm):"
        )
        if speeds
        else "",
        page.table(("reader", "GB/s", "seconds"), speeds) if speeds else "",
        page.text(
            "A process from its start to a PNG of the tiny model, medians; CPU seconds of all threads:"
        )
        if cold
        else "",
        page.table(("part", *columns), [*lines, busy, total]) if cold else "",
    )


# -- the report ------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path) -> Path:
    """report.html in `folder`, and each figure as NAME.svg and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)

    def drawn(name: str, caption: str) -> str:
        made = report_plots.FIGURES[name](rows)
        if made is None:
            return ""
        files = [folder / f"{name}.svg", folder / f"{name}.png"]
        for file in files:
            made.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(made)
        return page.figure(
            min(files, key=lambda file: file.stat().st_size), caption
        )  # of many bars the PNG is smaller

    file = folder / "report.html"
    content = page.page(
        "zimage_jax: memory schedules compared",
        machine(rows),
        schedules(rows, drawn),
        on_and_off(rows),
        predictions(rows, drawn),
        over_time(drawn),
        cards(rows, drawn),
        rivals(rows),
        programs(rows),
        starts(rows),
    )
    file.write_text(content, "utf-8")
    return file


@click.command(help=__doc__)
@click.argument("results", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder.",
)
def main(results: Path, output: Path) -> None:
    rows = sweep.rows(results)
    if not rows:
        raise click.ClickException(f"{results}: no rows; scripts/compare/schedules.py writes them")
    click.echo(write(rows, output))


if __name__ == "__main__":
    cli.run(main, prog="scripts/report/report.py")
