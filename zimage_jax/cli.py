"""What the commands share: exit codes, one line per expected fault, the words about memory, the
compile cache.

A flag wins over its environment variable (--max-vram: ZIMAGE_MAX_VRAM), that over the TOML file
given with --config."""

import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from .errors import UsageError, ZImageError
from .planning import schedule as schedules

if TYPE_CHECKING:
    from .model.kv import KVPolicy
    from .planning.planner import Memory

INTERRUPTED = 130
GIB = 2**30


def run(command: click.Command, args: list[str] | None = None, prog: str | None = None) -> None:
    """Run a command and leave the process: 0 done, 1 the job failed, 2 the words were wrong, 130
    interrupted."""
    try:
        with _remembering_interrupts():
            command.main(args=args, prog_name=prog, standalone_mode=False)
    except ZImageError as fault:
        _leave(str(fault), fault.exit_code)
    except click.UsageError as fault:
        hint = f" (see {fault.ctx.command_path} --help)" if fault.ctx else ""
        _leave(f"{fault.format_message()}{hint}", 2)
    except click.ClickException as fault:
        _leave(fault.format_message(), 1)
    except (KeyboardInterrupt, click.Abort):
        _leave("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


_interrupts: list[int] = []


@contextmanager
def _remembering_interrupts() -> Iterator[None]:
    """Ctrl-C raises as ever and is remembered for `check_interrupt`: Python drops what is raised in
    a destructor."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def remember(number, frame) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupts.clear()


def check_interrupt() -> None:
    """Raises KeyboardInterrupt when there was one."""
    if _interrupts:
        raise KeyboardInterrupt


def _leave(message: str, code: int) -> None:
    click.echo(f"error: {message}" if code != INTERRUPTED else message, err=True)
    sys.exit(code)


def cache_folder() -> Path:
    """Ours in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "zimage_jax"


def use_compile_cache() -> None:
    """Keep compiled programs between runs, unless the user's own JAX settings say where or not at
    all."""
    import jax

    if (
        jax.config.values["jax_compilation_cache_dir"] is None
        and jax.config.values["jax_enable_compilation_cache"]
    ):
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a home that cannot be written is no reason to fail: only slower
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# -- words about memory ----------------------------------------------------------------------------


def _read_config(context: click.Context, _, file: Path | None) -> None:
    """The TOML file's keys become defaults. They are the flags' names, with hyphens or
    underscores."""
    if file is None:
        return
    try:
        with file.open("rb") as f:
            words = {key.replace("-", "_"): value for key, value in tomllib.load(f).items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UsageError(f"--config {file}: cannot be read as TOML ({fault})") from None
    known = {
        opt.lstrip("-").replace("-", "_"): p
        for p in context.command.params
        for opt in p.opts
        if p.name
    }
    if unknown := sorted(words.keys() - known.keys()):
        raise UsageError(
            f"--config {file}: no such key: {', '.join(unknown)}; keys are the flags' names"
        )
    context.default_map = {known[key].name or "": value for key, value in words.items()}


def _word(flag: str, *names: str, **attributes) -> Callable:
    """An option that an environment variable of its name can set too."""
    return click.option(
        flag, *names, envvar="ZIMAGE_" + flag.lstrip("-").replace("-", "_").upper(), **attributes
    )


_GIB = click.FloatRange(min=0, min_open=True)
_MEMORY = [
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with any of these words.",
    ),
    _word(
        "--schedule",
        type=click.Choice(["auto", *schedules.names()]),
        default="auto",
        show_default=True,
        help="Which parameters are on the device when.",
    ),
    _word(
        "--chunks",
        type=click.IntRange(1),
        help="Chunks the blocks are cut into.  [default: 4, more if need be]",
    ),
    _word(
        "--resident-chunks",
        type=click.IntRange(0),
        help="Chunks that hybrid keeps.  [default: what fits]",
    ),
    _word(
        "--prefetch",
        type=click.IntRange(0),
        metavar="N",
        help="Chunks copied ahead of use, 0 for none.  [default: 1]",
    ),
    _word(
        "--max-chunk-memory",
        type=_GIB,
        metavar="GIB",
        help="The largest chunk, in place of --chunks.",
    ),
    _word(
        "--chunk",
        "pins",
        multiple=True,
        metavar="N=HOW",
        help="Keep or move one chunk: 2=resident, 2=streamed; may be repeated.",
    ),
    _word(
        "--max-vram",
        type=_GIB,
        metavar="GIB",
        help="Device memory to use.  [default: what is free]",
    ),
    _word("--low-vram", is_flag=True, help="The plan that needs least, whatever is free."),
    _word(
        "--text-encoder",
        type=click.Choice(["auto", "device", "staged", "host"]),
        default="auto",
        show_default=True,
        help="Where the text encoder computes, and whether its blocks are staged.",
    ),
    _word(
        "--host-memory",
        type=_GIB,
        metavar="GIB",
        help="Read blocks from disk through a window of this size.  [default: keep them in host memory if they fit]",
    ),
    _word(
        "--vae-tile",
        type=click.IntRange(64),
        metavar="PIXELS",
        help="Decode in blended tiles: fast, inexact.",
    ),
]


_KV = [
    _word(
        "--kv-dtype",
        metavar="EARLY[:LATE]",
        help="K and V as float32, bf16, fp16 or (early) fp8.  [default: bf16:fp16 computing in bfloat16, fp16 in float16, else float32]",
    ),
    _word(
        "--kv-switch-t",
        type=click.FloatRange(0, 1000),
        help="Late is from this t down.  [default: 500]",
    ),
    _word(
        "--kv-group",
        metavar="EARLY[:LATE]",
        help="K and V of 1, 2x2 or 4x4 image tokens as one: 1, 2 or 4.",
    ),
    _word("--kv-reuse", type=click.IntRange(1), help="NFEs that K and V serve.  [default: 1]"),
]


ATTENTION = _word(
    "--attention",
    type=click.Choice(["auto", "flash", "cudnn", "chunks"]),
    help="Kernel of the attention; it changes a picture's last bits.  [default: auto]",
)


def memory_options(command: Callable) -> Callable:
    """The options about memory; they arrive as keywords that `memory_of` takes."""
    return _with(_MEMORY, command)


def kv_options(command: Callable) -> Callable:
    """The options about K and V; they arrive as keywords that `kv_of` takes."""
    return _with(_KV, command)


def _with(options: list[Callable], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def kv_of(
    *, kv_dtype=None, kv_switch_t=None, kv_group=None, kv_reuse=None, repeated=None
) -> "KVPolicy":
    """The words as kv.KVPolicy; a picture's own, `repeated`, count where none was given."""
    from .model.kv import KVPolicy

    given = {"dtype": kv_dtype, "switch_t": kv_switch_t, "group": kv_group, "reuse": kv_reuse}
    return KVPolicy.parse(
        **(repeated or {}) | {name: word for name, word in given.items() if word is not None}
    )


def memory_of(
    *,
    schedule,
    chunks,
    resident_chunks,
    prefetch,
    max_chunk_memory,
    pins,
    max_vram,
    low_vram,
    text_encoder,
    host_memory,
    vae_tile,
) -> "Memory":
    """The words as planner.Memory. ZIMAGE_CHUNKED_LOADING and ZIMAGE_CHUNK_COUNT count where no
    schedule was named."""
    from .planning.planner import Memory

    def in_bytes(gib: float | None) -> int | None:
        return None if gib is None else int(gib * GIB)

    source = click.get_current_context().get_parameter_source("schedule")
    if source not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        schedule, resident_chunks = _from_chunk_count(schedule, chunks, resident_chunks)
    return Memory(
        schedule=schedule,
        chunks=chunks,
        resident_chunks=resident_chunks,
        prefetch=prefetch,
        max_chunk_bytes=in_bytes(max_chunk_memory),
        max_vram_bytes=in_bytes(max_vram),
        low_vram=low_vram,
        text_encoder=text_encoder,
        host_bytes=in_bytes(host_memory),
        vae_tile=vae_tile,
        pins=tuple(_pin(pin) for pin in pins),
    )


def _from_chunk_count(
    schedule: str, chunks: int | None, resident: int | None
) -> tuple[str, int | None]:
    """ZIMAGE_CHUNK_COUNT=n: at most n chunks on the device at once. ZIMAGE_CHUNKED_LOADING=0: all of them."""
    if os.environ.get("ZIMAGE_CHUNKED_LOADING") == "0":
        return "resident", None
    count = os.environ.get("ZIMAGE_CHUNK_COUNT")
    if count is None:
        return schedule, resident
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(
            f"ZIMAGE_CHUNK_COUNT={count}: expected how many chunks may be on the device at once, from 1"
        )
    name, stay = schedules.for_chunks_on_device(int(count), chunks or schedules.CHUNKS)
    return name, stay if name == "hybrid" else None


def _pin(text: str) -> tuple[int, str]:
    number, _, how = text.partition("=")
    if not number.isdigit() or how not in ("resident", "streamed"):
        raise UsageError(
            f"--chunk {text}: expected a chunk's number and resident or streamed, as in 2=resident"
        )
    return int(number), how
