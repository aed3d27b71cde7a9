"""The options about memory and devices, and what they open: a plan.Memory, and an engine."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import checks, cli, interrupts
from .errors import UsageError
from .files import printable
from .options import (
    FILE,
    Number,
    env_option,
    is_given,
    parse_number,
    place_of,
    read_config,
    with_options,
)
from .planning import schedule as schedules
from .units import GIB

if TYPE_CHECKING:
    import jax

    from .planning.plan import Memory
    from .pool import ZImagePool
    from .process import ZImageProcess


class Gib(Number):
    """A size: GiB on the command line, bytes in Python."""

    def __init__(self):
        super().__init__(float, 0, 2**20)

    def _check(self, name, value):
        gib = checks.real(name, value, self._low, self._high, above=True, unit=" GiB")
        return max(1, int(gib * GIB))


class Gibs(Gib):
    """One size, or one for each of --devices, as in 6,10: a tuple then."""

    def convert(self, value, param, context):
        if not isinstance(value, str) or "," not in value:
            return super().convert(value, param, context)
        found = [Gib.convert(self, part, param, context) for part in value.split(",")]
        return tuple(found)


class Devices(click.ParamType):
    """Numbers of devices, as in 0,1."""

    name = "devices"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        place, parts = place_of(param, context), str(value).split(",")
        numbers = [parse_number(place, int, part.strip()) for part in parts]
        return tuple(checks.whole(place, number, 0, 255) for number in numbers)


_MEMORY = [
    click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help="TOML file with values for any of these options, as in max-vram = 6.",
    ),
    env_option(
        "--schedule",
        metavar="|".join(["auto", *schedules.names()]),  # plan.Memory checks it
        default="auto",
        show_default=True,
        help="How the DiT's blocks reach the device: all resident (resident), chunks streamed "
        "through one slot (swap) or two (ring), some chunks resident (hybrid), or one program for "
        "all steps (scan). auto takes the fastest that fits.",
    ),
    env_option(
        "--chunks",
        type=Number(int, 1, 10_000),
        help="Number of chunks of the DiT's main blocks.  [default: 4, more if memory is short]",
    ),
    env_option(
        "--resident-chunks",
        type=Number(int, 0, 10_000),
        help="Number of chunks that are resident under hybrid.  [default: as many as fit]",
    ),
    env_option(
        "--prefetch",
        type=Number(int, 0, 10_000),
        metavar="N",
        help="Number of chunks copied ahead of use; 0 copies each when it is needed.  [default: 1]",
    ),
    env_option(
        "--max-chunk-memory",
        type=Gib(),
        metavar="GIB",
        help="Largest size of a chunk in GiB, instead of --chunks.",
    ),
    env_option(
        "--chunk",
        "pins",
        multiple=True,
        metavar="N=HOW",
        help="Make chunk N, from 0, resident or streamed, as in 2=resident. May be repeated.",
    ),
    env_option(
        "--max-vram",
        type=Gibs(),
        metavar="GIB",
        help="Device memory to use, in GiB; with --devices also one for each, as in 6,10.  "
        "[default: all that is free]",
    ),
    env_option("--low-vram", is_flag=True, help="Use as little device memory as possible."),
    env_option(
        "--text-encoder",
        type=click.Choice(["auto", "device", "staged", "host"]),
        default="auto",
        show_default=True,
        help="Where the text encoder runs: on the device, whole and kept there between pictures "
        "(device) or chunk by chunk (staged), or on the CPU (host).",
    ),
    env_option(
        "--enable-cpu-offload",
        is_flag=True,
        help="Keep parameters in host memory: the same as --text-encoder staged --schedule ring; "
        "either option overrides its part.",
    ),
    env_option(
        "--offload-layers",
        multiple=True,
        metavar="NAME",
        help="Stream the chunk that has this block, as in layers.3. transformer: stream all chunks "
        "(schedule ring); text_encoder: --text-encoder staged. May be repeated.",
    ),
    env_option(
        "--host-memory",
        type=Gib(),
        metavar="GIB",
        help="Read blocks from disk through a window of this many GiB of host memory.  "
        "[default: all blocks stay in host memory]",
    ),
    env_option(
        "--vae-tile",
        type=Number(int, 64, 16384),
        metavar="PIXELS",
        help="Decode in tiles with sides of PIXELS: less memory, but seams change the picture.",
    ),
]
DEVICES = env_option(
    "--devices",
    type=Devices(),
    metavar="N,N",
    help="Draw with these GPUs, numbered as by nvidia-smi.",
)


def split_option(default: str) -> Callable:
    """The option --split of a command."""
    return env_option(
        "--split",
        type=click.Choice(["pictures", "chunks"]),
        default=default,
        show_default=True,
        help="What the GPUs of --devices share out: whole jobs, to a process for each (pictures), or "
        "the blocks of every picture, in one process (chunks).",
    )


CLUSTER = env_option(
    "--cluster",
    metavar="ADDRESS|local",
    help="Draw with the GPUs of a Ray cluster, by its head's address as in 10.0.0.2:6379; local: "
    "with all of this machine. Needs the extra ray.",
)


def memory_options(command: Callable) -> Callable:
    """Add the memory options to a command; it passes them to `memory_of` as keywords."""
    return with_options(_MEMORY, command)


def memory_of(
    *,
    devices: tuple[int, ...] = (),
    schedule,
    chunks,
    resident_chunks,
    prefetch,
    max_chunk_memory,
    pins,
    max_vram,
    low_vram,
    text_encoder,
    enable_cpu_offload,
    offload_layers,
    host_memory,
    vae_tile,
) -> "Memory":
    """The memory options as a plan.Memory, for one process with these `devices`.

    Without --schedule, ZIMAGE_CHUNKED_LOADING and ZIMAGE_CHUNK_COUNT choose the schedule.
    """
    with interrupts.at_once():  # it imports JAX
        from .planning.plan import Memory

    if isinstance(max_vram, tuple) and len(max_vram) != len(devices):
        raise UsageError(f"--max-vram: {len(max_vram)} sizes need --devices with as many")
    if not is_given("schedule"):
        schedule, resident_chunks = _from_chunk_count(schedule, chunks, resident_chunks)
    streams_all = enable_cpu_offload or "transformer" in offload_layers
    if streams_all and schedule == "auto" and not low_vram:
        schedule = "ring"
    if text_encoder == "auto" and (enable_cpu_offload or "text_encoder" in offload_layers):
        text_encoder = "staged"
    return Memory(
        schedule=schedule,
        chunks=chunks,
        resident_chunks=resident_chunks,
        prefetch=prefetch,
        max_chunk_bytes=max_chunk_memory,
        max_vram_bytes=max_vram,
        low_vram=low_vram,
        text_encoder=text_encoder,
        host_bytes=host_memory,
        vae_tile=vae_tile,
        pins=(*_blocks(offload_layers), *map(_pin, pins)),
    )


def start_on(devices: tuple[int, ...] | None) -> "tuple[jax.Device, ...]":
    """Start JAX in this process, with these GPUs alone if any are named.

    Raises UsageError for a number that is named twice, and if there are fewer devices.
    """
    _check_split(devices)
    if devices:
        from .link import visible

        os.environ["CUDA_VISIBLE_DEVICES"] = visible(devices)
    cli.start_jax()
    from .runtime.placement import Placement

    return Placement.first(len(devices or (0,))).devices


def _check_split(devices: tuple[int, ...] | None) -> None:
    """Raises UsageError for --split chunks of no devices, or of one that is named twice."""
    if not devices and is_given("split"):
        raise UsageError("--split needs --devices, the numbers of several")
    if devices and len(set(devices)) < len(devices):
        raise UsageError("--devices: --split chunks takes each device once")


def memories_of(devices: tuple[int, ...], *, max_vram, **flags) -> "list[Memory]":
    """The memory options for each of --devices."""
    sizes = max_vram if isinstance(max_vram, tuple) else (max_vram,) * len(devices)
    if len(sizes) != len(devices):
        raise UsageError(f"--max-vram: {len(sizes)} sizes for {len(devices)} devices")
    return [memory_of(max_vram=size, **flags) for size in sizes]


def engine_of(
    model: Path | None,
    *,
    devices: tuple[int, ...] | None,
    split: str,
    cluster: str | None,
    say: Callable[[str], object],
    memory_flags: dict[str, Any],
    **given: Any,
) -> "Callable[[], ZImageProcess | ZImagePool]":
    """What opens the engine that --devices, --split and --cluster ask for: a process, or several.
    `say`: called with news of a cluster's machines. `given`: control, dtype and in_flight."""
    from .pool import ZImagePool
    from .process import ZImageProcess

    if cluster is not None and devices is not None:
        raise UsageError("--cluster draws with all devices of its machines: leave out --devices")
    if cluster is not None and is_given("split"):
        raise UsageError("--cluster gives each device whole pictures: leave out --split")
    if devices is not None and split == "pictures":
        memories = memories_of(devices, **memory_flags)
        return partial(ZImagePool, model, devices=devices, memory=memories, **given)
    memory = memory_of(devices=devices or (), **memory_flags)
    if cluster is None:
        _check_split(devices)
        return partial(ZImageProcess, model, memory=memory, device=devices, **given)
    try:
        from .cluster import ZImageCluster
    except ImportError as fault:
        raise UsageError(
            f'{fault}: --cluster needs more packages; pip install "zimage_jax[ray]"'
        ) from None
    return partial(ZImageCluster, cluster, model, memory=memory, say=say, **given)


def _from_chunk_count(
    schedule: str, chunks: int | None, resident: int | None
) -> tuple[str, int | None]:
    """The schedule and resident chunks by ZIMAGE_CHUNKED_LOADING and ZIMAGE_CHUNK_COUNT.

    ZIMAGE_CHUNKED_LOADING=0: all chunks are resident. ZIMAGE_CHUNK_COUNT=n: at most n chunks are on
    the device at once.
    """
    loading = os.environ.get("ZIMAGE_CHUNKED_LOADING", "")
    if loading == "0":
        return "resident", None
    if loading not in ("", "1"):
        raise UsageError(f"ZIMAGE_CHUNKED_LOADING={printable(loading, 40)}: expected 0 or 1")
    name = "ZIMAGE_CHUNK_COUNT"
    count = os.environ.get(name)
    if not count:
        return schedule, resident
    number = checks.whole(name, parse_number(name, int, count), 1, 10_000)
    found, stay = schedules.for_chunks_on_device(number, chunks or schedules.CHUNKS)
    return found, stay if found == "hybrid" else None


def _blocks(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pins of --offload-layers: each named block is streamed."""
    for name in names:
        block = name.removeprefix("transformer.")
        if re.fullmatch(r"layers\.[0-9]{1,4}", block):
            yield block, "streamed"
        elif name not in ("transformer", "text_encoder"):
            raise UsageError(
                f"--offload-layers {printable(name, 40)}: "
                "expected layers.N, transformer or text_encoder"
            )


def _pin(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([0-9]{1,4})=(resident|streamed)", text)
    if not match:
        raise UsageError(
            f"--chunk {printable(text, 40)}: expected a chunk's number and resident or streamed, "
            "as in 2=resident"
        )
    return int(match[1]), match[2]
