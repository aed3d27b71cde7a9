"""What the command `plan` prints for people: its result as a table."""

import math
from typing import Any

import click

from .units import GIB, MIB

_LAYOUT = "{:>11}  {:<9} {:>6} {:>8} {:>9} {:>9} {:>9}  {}"


def print_table(result: dict[str, Any]) -> None:
    """A line for each size, then what they have in common."""
    from .planning.plan import each

    budgets = each(result["budget_bytes"])
    budget = " and ".join(f"{of / GIB:.2f}" for of in budgets) + " GiB may be used"
    guided = ", with guidance" if result["guidance"] else ""
    click.echo(f"{result['model']} on {result['card']}: {budget}, {result['nfes']} NFEs{guided}")
    sizes = ("peak GiB", "host GiB", "seconds")
    click.echo(_LAYOUT.format("size", "schedule", "chunks", "resident", *sizes, "bound by"))
    for row in result["sizes"]:
        _print_row(row)
    plain = [
        f"{row['size']} {row['predicted_seconds_in_bfloat16']:.1f} s"
        for row in result["sizes"]
        if row.get("predicted_seconds_in_bfloat16") is not None
    ]
    together = [
        f"{row['size']} {row['in_flight']} in {row['predicted_seconds_in_flight']:.1f} s and "
        f"{_gib(row['predicted_peak_bytes_in_flight'])} GiB, "
        f"{60 * row['in_flight'] / row['predicted_seconds_in_flight']:.1f} a minute"
        for row in result["sizes"]
        if row.get("in_flight", 1) > 1
    ]
    for line in together:
        click.echo(f"in flight together: {line}")
    if plain:
        click.echo(f"stored as {result['format']}; in bfloat16: {', '.join(plain)}")
    none = "none of these sizes; a smaller one, or a larger budget"
    click.echo(f"recommended: {result['recommended_size'] or none}")
    if result["context_bytes"]:
        context = _gib(result["context_bytes"])
        where = f"{context} GiB of the card for CUDA's own context, {result['context']}"
        click.echo(f"beside the peak: {where}")
    click.echo(f"temporaries: {result['temporaries']}")
    source = "in host memory"
    if "host" in result:
        click.echo(f"host memory: {result['host']}")
    if "disk" in result:
        click.echo(f"disk: {result['disk']}")
        source = "read from disk at every visit"
    click.echo(
        f"rates: {result['rates']}; the first picture, parameters {source}, programs compiled"
    )


def _print_row(row: dict[str, Any]) -> None:
    """A line, and one for each device of several."""
    peak = _gib(row["predicted_peak_bytes"])
    if row["schedule"] is None:
        click.echo(_LAYOUT.format(row["size"], "none fits", "", "", peak, "", "", "memory"))
        return
    line = _LAYOUT.format(
        row["size"],
        row["schedule"],
        row["chunks"],
        row["resident_chunks"],
        peak,
        _gib(row["host_bytes"]),
        f"{row['predicted_seconds']:.1f}",
        row["bound_by"],
    )
    click.echo(line)
    for number, of in enumerate(row.get("devices", [])):
        words = f"{of['copied_bytes_per_nfe'] / GIB:.2f} GiB copied per NFE"
        own = (of["chunks"], of["resident_chunks"], _gib(of["predicted_peak_bytes"]), "", "")
        click.echo(_LAYOUT.format("", f"device {number}", *own, f"{of['card']}, {words}"))


def print_arrays(result: dict[str, Any]) -> None:
    """For each size and device, the arrays of every stage when it takes most, the largest first."""
    for row in result["sizes"]:
        for number, of in enumerate(row.get("devices", [row])):
            where = f" on device {number}" if "devices" in row else ""
            for stage, arrays in of.get("predicted_arrays_by_stage", {}).items():
                total = sum(arrays.values())
                most = " (the peak)" if total == of["predicted_peak_bytes"] else ""
                click.echo(f"\n{row['size']} {stage}{where}: {total / MIB:,.1f} MiB{most}")
                for name, nbytes in sorted(arrays.items(), key=lambda item: -item[1]):
                    click.echo(f"{nbytes / MIB:11,.1f}  {name}")


def _gib(size: int) -> str:
    """GiB with two decimals, rounded up."""
    return f"{math.ceil(size / GIB * 100) / 100:.2f}"
