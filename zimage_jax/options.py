"""The options that commands share: numbers, memory, K and V, and the TOML file.

A flag overrides its environment variable (--max-vram: ZIMAGE_MAX_VRAM); both override the TOML file
of --config.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import checks, cli, interrupts
from .errors import UsageError
from .files import printable, read_toml
from .planning import schedule as schedules
from .units import COMPUTE, GIB

if TYPE_CHECKING:
    import jax

    from .model.kv import KVPolicy
    from .planning.plan import Memory
    from .pool import ZImagePool
    from .process import ZImageProcess

FILE = click.Path(path_type=Path, dir_okay=False)


class Number(click.ParamType):
    """A finite number within bounds, from a flag, a variable or the TOML file."""

    def __init__(self, kind: type[int] | type[float], low: float | int, high: float | int):
        self.kind, self._low, self._high = kind, low, high
        self.name = "integer" if kind is int else "number"

    def convert(self, value, param, context):
        place = _place(param, context)
        return self._check(place, parse_number(place, self.kind, value))

    def _check(self, name, value):
        if self.kind is int:
            return checks.whole(name, value, int(self._low), int(self._high))
        return checks.real(name, value, self._low, self._high)


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
        place, parts = _place(param, context), str(value).split(",")
        numbers = [parse_number(place, int, part.strip()) for part in parts]
        return tuple(checks.whole(place, number, 0, 255) for number in numbers)


def parse_number(name: str, kind: type[int] | type[float], value: object) -> object:
    """Parse `value` if it is a string; return other values as they are. Raises UsageError."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:  # also for more digits than Python parses
        checks.refuse(name, "a whole number" if kind is int else "a number", value)


def _place(param, context) -> str:
    """The flag, variable or TOML key that gave a parameter its value."""
    if param is None:
        return "the number"
    flag = max(param.opts, key=len)
    source = context.get_parameter_source(param.name) if context else None
    if source is ParameterSource.ENVIRONMENT:
        return param.envvar
    return f"{flag[2:]} in --config" if source is ParameterSource.DEFAULT_MAP else flag


# -- the TOML file ---------------------------------------------------------------------------------


def _read_config(context: click.Context, _, file: Path | None) -> None:
    """Make the TOML file's values defaults; keys are flags' names, with - or _."""
    if file is None:
        return
    try:
        table = read_toml(file)
    except UsageError as fault:
        raise UsageError(f"--config {fault}") from None
    where = f"--config {printable(file)}"
    known = {
        spelling.lstrip("-").replace("-", "_"): option
        for option in context.command.params
        if isinstance(option, click.Option) and option.expose_value
        for spelling in option.opts
    }
    defaults: dict[str, Any] = {}
    for key, value in table.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise UsageError(
                f"{where}: no such key: {printable(key, 40)}; keys are the flags' names"
            )
        if option.name in defaults:
            raise UsageError(f"{where}: {key} is given twice")
        defaults[option.name or ""] = _default(f"{where}: {key}", option, value)
    context.default_map = defaults


def _default(name: str, option: click.Option, value: object):
    """Check that a TOML value has exactly the option's type, or is a list if it repeats."""
    kinds: tuple[type, ...] = (str,)
    expected = "text in quotes"
    if option.is_flag:
        kinds, expected = (bool,), "true or false"
    elif isinstance(option.type, Number) and option.type.kind is int:
        kinds, expected = (int,), "a whole number"
    elif isinstance(option.type, Number):
        kinds, expected = (int, float), "a number"
    values = value if option.multiple and isinstance(value, list) else [value]
    for each in values:
        if type(each) not in kinds:  # a bool is an int to isinstance
            checks.refuse(name, expected, each)
        if isinstance(each, str) and "\0" in each:
            raise UsageError(f"{name}: text must not have a NUL character")
    return values if option.multiple else value


# -- memory ----------------------------------------------------------------------------------------


def _option(flag: str, *names: str, **attributes) -> Callable:
    """An option that the environment variable of its name can set too."""
    variable = "ZIMAGE_" + flag.lstrip("-").replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, **attributes)


_MEMORY = [
    click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with values for any of these options, as in max-vram = 6.",
    ),
    _option(
        "--schedule",
        metavar="|".join(["auto", *schedules.names()]),  # plan.Memory checks it
        default="auto",
        show_default=True,
        help="How the DiT's blocks reach the device: all resident (resident), chunks streamed "
        "through one slot (swap) or two (ring), some chunks resident (hybrid), or one program for "
        "all steps (scan). auto takes the fastest that fits.",
    ),
    _option(
        "--chunks",
        type=Number(int, 1, 10_000),
        help="Number of chunks of the DiT's main blocks.  [default: 4, more if memory is short]",
    ),
    _option(
        "--resident-chunks",
        type=Number(int, 0, 10_000),
        help="Number of chunks that are resident under hybrid.  [default: as many as fit]",
    ),
    _option(
        "--prefetch",
        type=Number(int, 0, 10_000),
        metavar="N",
        help="Number of chunks copied ahead of use; 0 copies each when it is needed.  [default: 1]",
    ),
    _option(
        "--max-chunk-memory",
        type=Gib(),
        metavar="GIB",
        help="Largest size of a chunk in GiB, instead of --chunks.",
    ),
    _option(
        "--chunk",
        "pins",
        multiple=True,
        metavar="N=HOW",
        help="Make chunk N, from 0, resident or streamed, as in 2=resident. May be repeated.",
    ),
    _option(
        "--max-vram",
        type=Gibs(),
        metavar="GIB",
        help="Device memory to use, in GiB; with --devices also one for each, as in 6,10.  "
        "[default: all that is free]",
    ),
    _option("--low-vram", is_flag=True, help="Use as little device memory as possible."),
    _option(
        "--text-encoder",
        type=click.Choice(["auto", "device", "staged", "host"]),
        default="auto",
        show_default=True,
        help="Where the text encoder runs: on the device, whole and kept there between pictures "
        "(device) or chunk by chunk (staged), or on the CPU (host).",
    ),
    _option(
        "--enable-cpu-offload",
        is_flag=True,
        help="Keep parameters in host memory: the same as --text-encoder staged --schedule ring; "
        "either option overrides its part.",
    ),
    _option(
        "--offload-layers",
        multiple=True,
        metavar="NAME",
        help="Stream the chunk that has this block, as in layers.3. transformer: stream all chunks "
        "(schedule ring); text_encoder: --text-encoder staged. May be repeated.",
    ),
    _option(
        "--host-memory",
        type=Gib(),
        metavar="GIB",
        help="Read blocks from disk through a window of this many GiB of host memory.  "
        "[default: all blocks stay in host memory]",
    ),
    _option(
        "--vae-tile",
        type=Number(int, 64, 16384),
        metavar="PIXELS",
        help="Decode in tiles with sides of PIXELS: less memory, but seams change the picture.",
    ),
]


def memory_options(command: Callable) -> Callable:
    """Add the memory options to a command; it passes them to `memory_of` as keywords."""
    return with_options(_MEMORY, command)


def with_options(options: list[Callable], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


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
    if not _is_given("schedule"):
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


def only(devices: tuple[int, ...] | None) -> "tuple[jax.Device, ...]":
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
    if not devices and _is_given("split"):
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
    if cluster is not None and _is_given("split"):
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


def _is_given(name: str) -> bool:
    """Whether a flag or an environment variable set the parameter `name`."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return click.get_current_context().get_parameter_source(name) in given


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


# -- K and V ---------------------------------------------------------------------------------------

_KV = [
    _option(
        "--kv-dtype",
        metavar="EARLY[:LATE]",
        help="Dtype of K and V: float32, bf16, fp16, int8, int6; packed in 4 to 6 bits each, as "
        "in k5v6; or fp8 for EARLY.  "
        "[default: bf16:fp16 when computing in bfloat16, else the compute dtype]",
    ),
    _option(
        "--kv-switch-t",
        type=Number(float, 0, 1000),
        metavar="T",
        help="Scheduler time t, from 1000 to 0: LATE applies at T and below.  [default: 500]",
    ),
    _option(
        "--kv-group",
        metavar="EARLY[:LATE]",
        help="Side of the squares of image tokens that share one K and V: 1, 2 or 4.  [default: 1]",
    ),
    _option(
        "--kv-reuse",
        type=Number(int, 1, 1000),
        help="Number of steps (NFEs) that use the same K and V.  [default: 1, off]",
    ),
]


MODEL = click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder written by checkpoints_convert; or, read in place, a folder in diffusers layout, "
    "ComfyUI's folder, or files separated by commas: DIT,TEXT_ENCODER,VAE,tokenizer.json.  "
    "[default: the tiny model in the package]",
)
CONTROL = click.option(
    "--control",
    type=click.Path(path_type=Path),
    help="ControlNet Union for --control-image: its file, or the folder that checkpoints_convert made "
    "of it.",
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(COMPUTE),
    help="Dtype of the computation; float16 is for GPUs before the RTX 30 series.  "
    "[default: bfloat16 on a GPU, float16 on a GPU without bfloat16, float32 on a CPU]",
)
DEVICES = _option(
    "--devices",
    type=Devices(),
    metavar="N,N",
    help="Draw with these GPUs, numbered as by nvidia-smi.",
)


def split(default: str) -> Callable:
    """The option --split of a command."""
    return _option(
        "--split",
        type=click.Choice(["pictures", "chunks"]),
        default=default,
        show_default=True,
        help="What the GPUs of --devices share out: whole jobs, to a process for each (pictures), or "
        "the blocks of every picture, in one process (chunks).",
    )


CLUSTER = _option(
    "--cluster",
    metavar="ADDRESS|local",
    help="Draw with the GPUs of a Ray cluster, by its head's address as in 10.0.0.2:6379; local: "
    "with all of this machine. Needs the extra ray.",
)
ATTENTION = _option(
    "--attention",
    type=click.Choice(["auto", "flash", "cudnn", "chunks"]),
    help="Attention kernel; it changes a picture's last bits.  [default: auto]",
)


class LoraFile(click.ParamType):
    """FILE or FILE:WEIGHT, as a pair of a path and a weight."""

    name = "lora"

    def convert(self, value, param, context):
        if not isinstance(value, str):
            return value
        file, colon, weight = value.rpartition(":")
        try:
            number = float(weight) if colon and not os.path.exists(value) else None
        except ValueError:  # a colon of the name
            number = None
        if number is None:
            return Path(value), 1.0
        return Path(file), checks.real(_place(param, context), number, -100, 100)


_LORA = [
    click.option(
        "--lora",
        type=LoraFile(),
        multiple=True,
        metavar="FILE[:WEIGHT]",
        help="LoRA to draw with, in any spelling; WEIGHT is 1 by default. May be repeated.",
    ),
    click.option(
        "--lora-merge",
        is_flag=True,
        default=None,
        help="Add LoRAs to the parameters when these are read, instead of computing them beside.",
    ),
]


def lora_options(command: Callable) -> Callable:
    """Add the options about LoRAs to a command."""
    return with_options(_LORA, command)


def kv_options(command: Callable) -> Callable:
    """Add the options about K and V to a command; `kv_of` takes their values."""
    return with_options(_KV, command)


def kv_of(given: dict, repeated: dict | None = None) -> "KVPolicy":
    """The given options as a kv.KVPolicy; `repeated` has a picture's own, for options not given."""
    from .model.kv import KVPolicy

    own = {name: value for name, value in given.items() if value is not None}
    return KVPolicy.parse(**(repeated or {}) | own)
