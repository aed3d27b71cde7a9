"""python -m zimage_jax.plan: predict the schedule, memory and seconds of pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import cli, devices, options
from .errors import OutOfMemoryError, UsageError
from .memory_options import memory_of, memory_options
from .plan_table import print_arrays, print_table

if TYPE_CHECKING:
    from .model.config import ModelConfig
    from .model.kv import KVPolicy
    from .model.samplers import Trajectory
    from .planning.cards import Card, MeasuredCard
    from .planning.plan import Budget, Memory, Plan, Sizes
    from .planning.planner import Planner
    from .planning.work import Work
    from .weights.formats import Storage

BUCKET = 64  # caption tokens: a sentence or two


@click.command()
@click.option(
    "--model",
    help="Folder written by checkpoints_convert, or turbo or turbo-24: published widths, no files "
    "needed.  [default: turbo with --card, else the tiny model in the package]",
)
@click.option(
    "--format",
    "form",
    metavar="FORMAT",
    help="How turbo or turbo-24 is stored, as checkpoints_convert takes it: lossless, int8, "
    "'layers.*=int8'.  [default: bfloat16]",
)
@click.option(
    "--control",
    metavar="FOLDER|NAME",
    help="Follow a control image, by a ControlNet that checkpoints_convert wrote, or by the sizes of "
    "union-1.0, union-2.0, union-2.1 or union-2.1-lite.",
)
@click.option(
    "--card",
    metavar="NAME|FILE",
    help="A card's name, as in rtx-4090, or rtx-4090@x8 in a slot with 8 lanes, or the file of a "
    "measured card, as in mine.json.  "
    "[default: this machine's own device]",
)
@click.option(
    "--cards",
    metavar="NAME,NAME",
    help="Several cards in one machine, as in rtx-3060,rtx-4070, which share the blocks of every "
    "picture out.",
)
@click.option(
    "--split",
    type=click.Choice(["chunks"]),
    help="How --cards share the work: the blocks of every picture (chunks). With whole pictures "
    "each card draws as if it were alone.",
)
@click.option(
    "--host-gbps",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="Rate at which the host's memory serves the links of all --cards.  [default: 60]",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Compile for the card instead of using stored figures: takes minutes, needs jax[cuda12].",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="WxH",
    help="Size in pixels, as in 1280x720, or a ratio such as 16:9; more sizes may follow.",
)
@click.argument("more_sizes", nargs=-1, metavar="[WxH]...")
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    help="Number of evaluations of the DiT (NFEs).  [default: the model's own, 8 for Turbo]",
)
@click.option(
    "--strength",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="S",
    help="Plan pictures that begin from a picture, redrawn by this strength.",
)
@click.option(
    "--disk-gbps",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="Rate of the disk under --host-memory.  [default: from the card's file, else 3]",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Plan up to N such pictures in flight together, which share the weights on their way.",
)
@options.lora_options
@options.kv_options
@memory_options
@click.option("--explain", is_flag=True, help="Print what takes the device memory, array by array.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model,
    form,
    control,
    card,
    cards,
    split,
    host_gbps,
    compiles,
    sizes,
    more_sizes,
    steps,
    strength,
    disk_gbps,
    in_flight,
    explain,
    as_json,
    kv_dtype,
    kv_switch_t,
    kv_group,
    kv_reuse,
    lora,
    lora_merge,
    **memory_flags,
) -> None:
    """Print a plan for each size of picture, without drawing any.

    A plan has the memory schedule, the peak of device memory, the host memory, the seconds and what
    bounds them. The last lines recommend a size and name the sources of the numbers.
    """
    cli.start_jax()
    names = _cards(card, cards, split, host_gbps)
    memory = memory_of(devices=tuple(range(len(names))), **memory_flags)
    kv = options.kv_of(
        {"dtype": kv_dtype, "switch_t": kv_switch_t, "group": kv_group, "reuse": kv_reuse}
    )
    _check_needs(compiles, disk_gbps, names, memory)
    from .model.samplers import Trajectory
    from .planning.cards import find
    from .weights.formats import describe, is_encoded

    wanted = list(map(find, names))
    name, storage = _model(model, form, bool(wanted), control)
    if lora and not lora_merge:  # merged LoRAs change no bytes
        storage = _with_loras(storage, lora)
    steps = steps or storage.config.defaults.steps
    device = devices.of_cards(wanted, storage, compiles) if wanted else devices.own(storage)
    if host_gbps is not None:
        device = devices.with_host(device, host_gbps)
    if memory.host_bytes is not None:
        device = devices.read_from_disk(device, disk_gbps)
    budget = _budget(memory, device, is_card=bool(wanted))
    texts = (*sizes, *more_sizes) or device.sizes
    pixels = list(dict.fromkeys(_pixels(text, storage.config) for text in texts))
    path = Trajectory.of(
        steps,
        storage.config.scheduler.shift,
        guidance=storage.config.defaults.guidance,
        strength=strength,
    )
    asked = _Asked(memory, kv, budget, path, strength is not None, in_flight or 1)
    rows = _rows(storage, device, asked, pixels)
    if wanted and is_encoded(storage) and not compiles:
        plain = _in_bfloat16(wanted, storage.config, device, asked, pixels)
        for row, of_plain in zip(rows, plain, strict=True):
            row["predicted_seconds_in_bfloat16"] = of_plain["predicted_seconds"]
    result = {
        "card": device.name,
        **({"cards": list(device.names)} if device.others else {}),
        "model": name,
        "format": describe(storage),
        "steps": steps,
        "nfes": path.nfes,
        "guidance": storage.config.defaults.guidance,
        "kv": kv.to_json(),
        "budget_bytes": budget,
        "context_bytes": device.context_bytes,
        "recommended_size": _recommended(rows, storage.config),
        "sizes": rows,
        **device.notes,
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_table(result)
        if explain:
            print_arrays(result)


# -- cards ---------------------------------------------------------------------------------------


def _cards(
    card: str | None, cards: str | None, split: str | None, host_gbps: float | None
) -> list[str]:
    """The names of the cards: none for this machine's own device. Raises UsageError."""
    if card and cards:
        raise UsageError("--card and --cards both name cards: give one of them")
    names = [name.strip() for name in (cards or card or "").split(",")] if cards or card else []
    if cards and len(names) > 1 and split is None:
        raise UsageError("--cards needs --split chunks: with whole pictures plan each --card alone")
    if split is not None and len(names) < 2:
        raise UsageError("--split chunks needs --cards, the names of several")
    if host_gbps is not None and len(names) < 2:
        raise UsageError("--host-gbps needs --cards: one card's link is slower than the host")
    return names


def _check_needs(
    compiles: bool, disk_gbps: float | None, names: list[str], memory: "Memory"
) -> None:
    """Raises click.UsageError for a flag without the one that it needs."""
    if compiles and not names:
        raise click.UsageError(
            "--compile needs --card or --cards: for this machine's own device, programs are always compiled"
        )
    if disk_gbps and memory.host_bytes is None:
        raise click.UsageError(
            "--disk-gbps needs --host-memory, the size of the window on the checkpoint"
        )


def _budget(memory: "Memory", device: devices.Device, *, is_card: bool) -> "Budget":
    """Bytes that a plan may use. --max-vram cannot give a card more memory than it has."""
    from .planning.plan import each

    usable, given = each(device.budget), memory.max_vram_bytes
    if given is None:
        return device.budget
    wanted = each(given) * (1 if isinstance(given, tuple) else len(usable))
    found = tuple(map(min, wanted, usable)) if is_card else wanted
    return found if len(found) > 1 else found[0]


# -- model and sizes -------------------------------------------------------------------------------


def _model(
    model: str | None, form: str | None, has_card: bool, control: str | None
) -> "tuple[str, Storage]":
    """The model's name, and its parameters as stored, with those of the ControlNet."""
    from .model.config import CONTROLS, PRESETS
    from .weights.controlled import Controlled
    from .weights.formats import parse
    from .weights.in_place import open_control, open_model
    from .weights.search import TINY

    if model is None and has_card:
        model = "turbo"
    if model is None and not TINY.joinpath("manifest").exists():
        raise UsageError(
            "--model is needed: a folder written by checkpoints_convert, or one of "
            f"{', '.join(PRESETS)}"
        )
    if control is not None and control not in CONTROLS and not Path(control).exists():
        raise UsageError(f"--control {control}: neither a folder nor one of {', '.join(CONTROLS)}")
    if model in PRESETS:
        storage = parse(PRESETS[model], form or "bfloat16")
        if control is None:
            return model, storage
        if control in CONTROLS:
            config = replace(PRESETS[model], control=CONTROLS[control])
            return f"{model} with {control}", parse(config, form or "bfloat16")
        raise UsageError(f"--control {control}: with {model} expected one of {', '.join(CONTROLS)}")
    if form is not None:
        raise UsageError(
            f"--format is for {', '.join(PRESETS)}; a checkpoint is stored as it was converted"
        )
    if model is not None and "," not in model and not Path(model).exists():
        raise UsageError(f"--model {model}: neither a folder nor one of {', '.join(PRESETS)}")
    files = open_model(model or TINY)
    name = files.path.resolve().name
    if control is None:
        return name, files.storage
    if control in CONTROLS:
        raise UsageError(f"--control {control}: with a folder as --model expected a folder")
    of = open_control(control, files.config)
    return f"{name} with {of.path.resolve().name}", Controlled(files, of).storage


def _with_loras(storage: "Storage", files) -> "Storage":
    """The model with LoRAs beside it. Raises ForeignError and ConversionError."""
    from .weights.adapters import storage_beside
    from .weights.lora import open_lora

    opened = [(open_lora(file, storage.config), weight) for file, weight in files]
    for found, _ in opened:
        if found.remark:
            click.echo(f"warning: {found.remark}", err=True)
    return storage_beside(storage, opened)


def _pixels(text: str, config: "ModelConfig") -> tuple[int, int]:
    from .pipeline.size import check_size, parse_size

    size = parse_size(text, config.vae.sample_size, config.pixel_multiple)
    check_size(config, *size)
    return size


# -- the plans -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What the pictures of every size have in common."""

    memory: "Memory"
    kv: "KVPolicy"
    budget: "Budget"
    path: "Trajectory"
    from_picture: bool
    in_flight: int


def _rows(
    storage: "Storage", device: devices.Device, asked: _Asked, pixels: list[tuple[int, int]]
) -> list[dict]:
    """One row per size."""
    import jax.numpy as jnp

    from .pipeline.stages import STAGES
    from .planning.plan import Sizes
    from .planning.planner import Planner

    sizes = Sizes(storage, jnp.dtype(device.compute).itemsize)
    rates = (device.rates, *device.others) if device.others else None
    planner = Planner(STAGES, storage, sizes.compute_bytes, device.costs, rates)
    return [_row(planner, sizes, device, asked, *size) for size in pixels]


def _in_bfloat16(
    wanted: "Sequence[Card | MeasuredCard]",
    config: "ModelConfig",
    device: devices.Device,
    asked: _Asked,
    pixels: list[tuple[int, int]],
) -> list[dict]:
    """The rows of the model as bfloat16, from stored figures."""
    from .planning.stored import StoredCosts
    from .weights.formats import uniform

    plain = uniform(config, "bfloat16")
    as_plain = replace(device, costs=StoredCosts(plain, *wanted))
    return _rows(plain, as_plain, replace(asked, in_flight=1), pixels)


def _row(
    planner: "Planner",
    sizes: "Sizes",
    device: devices.Device,
    asked: _Asked,
    width: int,
    height: int,
) -> dict:
    """The row of one size. If no plan fits, it has no schedule, and the peak of the smallest plan."""
    from .pipeline.size import region_of
    from .planning.work import Work

    config = sizes.config
    work = Work.of(
        config,
        width,
        height,
        asked.path,
        asked.kv,
        device.compute,
        bucket=BUCKET,
        prompts=2 if config.defaults.guidance else 1,
        encodes=asked.from_picture,
        controls=config.control is not None,
        region=region_of(config, width, height) if asked.from_picture else None,
    )
    row: dict = {"size": f"{width}x{height}", "width": width, "height": height}
    try:
        plan = planner.plan(work, asked.memory, asked.budget)
    except OutOfMemoryError as fault:
        return row | {
            "schedule": None,
            "chunks": None,
            "resident_chunks": None,
            "predicted_peak_bytes": fault.needed,
            "predicted_seconds": None,
            "bound_by": None,
            "host_bytes": None,
        }
    plans = planner.most_together(work, plan, asked.memory, asked.budget, asked.in_flight)
    return row | _of_plan(plan, plans, work, sizes, device)


def _of_plan(
    plan: "Plan", together: "Sequence[Plan]", work: "Work", sizes: "Sizes", device: devices.Device
) -> dict:
    """The row of a plan. `together`: those of the pictures in flight."""
    from .pipeline.stages import STAGES
    from .planning.plan import host_bytes
    from .planning.seconds import Rates, bound_by, seconds

    others = device.others
    by_stage = seconds(STAGES, plan, work, sizes, device.rates, others=others)
    of_all = seconds(STAGES, together[0], work, sizes, device.rates, len(together), others)
    free = Rates(math.inf, 1.0)
    return {
        "schedule": plan.schedule,
        "chunks": len(plan.denoise.main_chunks),
        "resident_chunks": plan.denoise.resident_chunks,
        "vae_rows": plan.choices["decode"].rows,
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
        "predicted_arrays_by_stage": {s: dict(of) for s, of in plan.arrays_by_stage.items()},
        "predicted_seconds": round(sum(by_stage.values()), 3),
        "predicted_seconds_by_stage": {stage: round(value, 3) for stage, value in by_stage.items()},
        "in_flight": len(together),
        "predicted_peak_bytes_in_flight": together[0].peak_bytes,
        "predicted_seconds_in_flight": round(sum(of_all.values()), 3),
        "bound_by": bound_by(STAGES, plan, work, sizes, device.rates, others),
        **(
            {"devices": _of_each(plan, device)}
            if others
            else {"link_bytes": round(sum(seconds(STAGES, plan, work, sizes, free).values()))}
        ),
        "kv_bytes": work.kv_bytes(sizes.config.transformer),
        "host_bytes": host_bytes(plan, sizes.storage, shares_memory=device.shares_memory),
    }


def _of_each(plan: "Plan", device: devices.Device) -> list[dict]:
    """What a plan gives each card."""
    found = []
    for number, (name, lane) in enumerate(
        zip(device.names, plan.denoise.blocks.lanes, strict=True)
    ):
        main = [chunk for chunk in range(len(lane.chunks)) if lane.is_main(chunk)]
        found.append(
            {
                "card": name,
                "chunks": len(main),
                "resident_chunks": sum(chunk in lane.schedule.resident for chunk in main),
                "copied_bytes_per_nfe": lane.copied_bytes,
                "predicted_peak_bytes": plan.peaks_by_device[number],
                "predicted_peak_bytes_by_stage": plan.peaks_on(number),
                "predicted_arrays_by_stage": {
                    stage: dict(of) for stage, of in plan.arrays_by_device[number].items()
                },
            }
        )
    return found


def _recommended(rows: list[dict], config: "ModelConfig") -> str | None:
    """The largest size that fits, up to the model's own; if all are larger, the smallest."""

    def pixels(row: dict) -> int:
        return row["width"] * row["height"]

    fitting = [row for row in rows if row["schedule"]]
    within = [row for row in fitting if pixels(row) <= config.vae.sample_size**2]
    if within:
        return max(within, key=pixels)["size"]
    return min(fitting, key=pixels)["size"] if fitting else None


def main() -> None:
    cli.run(command, prog="python -m zimage_jax.plan")


if __name__ == "__main__":
    main()
