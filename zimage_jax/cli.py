"""Shared by the commands: exit codes, one line per expected fault, JAX and its compile cache."""

import json
import os
import re
import sys
import warnings
from pathlib import Path

import click

from . import interrupts
from .errors import UsageError, ZImageError

# bytes of address space: with 1,500,000 KiB XLA aborts, with 2,000,000 the tiny model draws
LEAST_ADDRESSES = 2_000_000 << 10
_LONGEST_LINE = 1000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def program(script: str, module: str) -> str:
    """The name under which the user called a command: of the installed script, or `python -m`.

    Click's shell completion goes by it.
    """
    return script if Path(sys.argv[0]).stem == script else f"python -m {module}"


def run(command: click.Command, args: list[str] | None = None, prog: str | None = None) -> None:
    """Run a command and exit: 0 done, 1 the job failed, 2 bad arguments, 130 interrupted."""
    try:
        with interrupts.remembered():
            command.main(args=args, prog_name=prog, standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
    except ZImageError as fault:
        _leave(f"error: {fault}", fault.exit_code)
    except click.UsageError as fault:
        hint = f" (see {fault.ctx.command_path} --help)" if fault.ctx else ""
        _leave(f"error: {fault.format_message()}{hint}", 2)
    except click.ClickException as fault:
        _leave(f"error: {fault.format_message()}", 1)
    except (KeyboardInterrupt, click.Abort):
        _leave("interrupted", interrupts.EXIT_CODE)
    except BrokenPipeError:  # the program that read our output has ended
        _drop_output()
        sys.exit(1)
    except OSError as fault:
        if fault.filename is None:  # standard output failed: Python would flush it again at exit
            _drop_output()
        _leave(f"error: {fault.filename or 'output'}: {fault.strerror or fault}", 1)
    except MemoryError:
        _leave("error: not enough host memory", 1)
    sys.exit(0)


def _leave(message: str, code: int) -> None:
    lines = (plain(line)[:_LONGEST_LINE] for line in message.splitlines())
    click.echo("\n".join(lines), err=True)
    sys.exit(code)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(text: str) -> str:
    """`text` made safe for a terminal: control characters are escaped, except tabs and newlines."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def to_json(value: object, **options) -> str:
    """JSON that is safe for a terminal."""
    # `plain` writes the same escapes as JSON
    return plain(json.dumps(value, ensure_ascii=False, **options))


# -- JAX -------------------------------------------------------------------------------------------


def start_jax() -> None:
    """Import JAX and the pipeline, find JAX's devices, and turn on the compile cache.

    Raises UsageError if JAX_PLATFORMS names no device of this machine, or if the address space is
    too small.
    """
    _check_address_space()
    with interrupts.at_once():
        import jax

        try:
            jax.local_devices()
        except (RuntimeError, AssertionError) as fault:
            wanted = jax.config.values["jax_platforms"]
            if not wanted:
                raise
            reason = str(fault).splitlines()[0] if str(fault) else "no such device"
            raise UsageError(
                f"JAX_PLATFORMS={wanted}: not on this machine ({reason}); unset it, or name cpu"
            ) from None
        from .pipeline import pipeline  # noqa: F401
    use_compile_cache()


def _check_address_space() -> None:
    """XLA aborts if it cannot map memory, and Python cannot catch that: raise UsageError before."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESSES:
        raise UsageError(
            f"ulimit -v {limit >> 10}: JAX needs an address space of at least "
            f"{LEAST_ADDRESSES >> 10} KiB; raise the limit"
        )


def cache_folder() -> Path | None:
    """zimage_jax's folder in the user's cache folder; None for a user without a home folder."""
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = str(Path.home() / "Library" / "Caches")
        else:
            base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:
        return None
    return Path(base) / "zimage_jax"


def use_compile_cache() -> None:
    """Keep compiled programs between runs, unless the user's JAX settings say otherwise."""
    import jax

    # a damaged or unwritable entry costs one compilation
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    folder = cache_folder()
    if (
        folder is None
        or jax.config.values["jax_compilation_cache_dir"] is not None
        or not jax.config.values["jax_enable_compilation_cache"]
    ):
        return
    try:
        (folder / "xla").mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a cache folder, programs are compiled on every run
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
