"""The options that commands share: numbers, the model, K and V, LoRAs, and the TOML file.

A flag overrides its environment variable (--max-vram: ZIMAGE_MAX_VRAM); both override the TOML file
of --config.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import checks
from .errors import UsageError
from .files import printable, read_toml
from .model.choices import LARGEST_LORA_WEIGHT
from .units import COMPUTE

if TYPE_CHECKING:
    from .model.kv import KVPolicy

FILE = click.Path(path_type=Path, dir_okay=False)


class Number(click.ParamType):
    """A finite number within bounds, from a flag, a variable or the TOML file."""

    def __init__(self, kind: type[int] | type[float], low: float | int, high: float | int):
        self.kind, self._low, self._high = kind, low, high
        self.name = "integer" if kind is int else "number"

    def convert(self, value, param, context):
        place = place_of(param, context)
        return self._check(place, parse_number(place, self.kind, value))

    def _check(self, name, value):
        if self.kind is int:
            return checks.whole(name, value, int(self._low), int(self._high))
        return checks.real(name, value, self._low, self._high)


def parse_number(name: str, kind: type[int] | type[float], value: object) -> object:
    """Parse `value` if it is a string; return other values as they are. Raises UsageError."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:  # also for more digits than Python parses
        checks.refuse(name, "a whole number" if kind is int else "a number", value)


def place_of(param, context) -> str:
    """The flag, variable or TOML key that gave a parameter its value."""
    if param is None:
        return "the number"
    flag = max(param.opts, key=len)
    source = context.get_parameter_source(param.name) if context else None
    if source is ParameterSource.ENVIRONMENT:
        return param.envvar
    return f"{flag[2:]} in --config" if source is ParameterSource.DEFAULT_MAP else flag


def env_option(flag: str, *names: str, **attributes) -> Callable:
    """An option that the environment variable of its name can set too."""
    variable = "ZIMAGE_" + flag.lstrip("-").replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, **attributes)


def with_options(options: list[Callable], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def is_given(name: str) -> bool:
    """Whether a flag or an environment variable set the parameter `name`."""
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return click.get_current_context().get_parameter_source(name) in given


# -- the TOML file ---------------------------------------------------------------------------------


def read_config(context: click.Context, _, file: Path | None) -> None:
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


# -- K and V ---------------------------------------------------------------------------------------

_KV = [
    env_option(
        "--kv-dtype",
        metavar="EARLY[:LATE]",
        help="Dtype of K and V: float32, bf16, fp16, int8, int6; packed in 4 to 6 bits each, as "
        "in k5v6; or fp8 for EARLY.  "
        "[default: bf16:fp16 when computing in bfloat16, else the compute dtype]",
    ),
    env_option(
        "--kv-switch-t",
        type=Number(float, 0, 1000),
        metavar="T",
        help="Scheduler time t, from 1000 to 0: LATE applies at T and below.  [default: 500]",
    ),
    env_option(
        "--kv-group",
        metavar="EARLY[:LATE]",
        help="Side of the squares of image tokens that share one K and V: 1, 2 or 4.  [default: 1]",
    ),
    env_option(
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
ATTENTION = env_option(
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
        return Path(file), checks.real(
            place_of(param, context), number, -LARGEST_LORA_WEIGHT, LARGEST_LORA_WEIGHT
        )


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
