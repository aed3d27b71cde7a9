"""What the commands share: exit codes, one line per expected fault, the compile cache."""

import os
import sys
from pathlib import Path

import click

from .errors import ZImageError

INTERRUPTED = 130


def run(command: click.Command, args: list[str] | None = None, prog: str | None = None) -> None:
    """Run a command and leave the process: 0 done, 1 the job failed, 2 the words were wrong, 130 interrupted."""
    try:
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
    """Keep compiled programs between runs, unless the user's own JAX settings say where or not at all."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a home that cannot be written is no reason to fail: only slower
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
