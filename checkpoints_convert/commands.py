"""The commands: convert PyTorch checkpoints to native ones, and inspect a checkpoint."""

import json
import time
from pathlib import Path

import click

from zimage_jax.files import printable
from zimage_jax.model.config import TURBO_SHIFT
from zimage_jax.units import size

from . import sources
from .convert import convert as convert_source
from .inspect import inspect as inspect_path

FILE = click.Path(path_type=Path)


@click.command(
    epilog="python -m checkpoints_convert inspect PATH shows the contents of a file, a diffusers "
    "folder or a native checkpoint."
)
@click.argument("paths", nargs=-1, required=True, type=FILE, metavar="[SRC] DST")
@click.option(
    "--dit",
    "transformer",
    type=FILE,
    help="The DiT as one safetensors file (ComfyUI or diffusers names).",
)
@click.option("--text-encoder", type=FILE, help="The Qwen3 text encoder as one file.")
@click.option("--vae", type=FILE, help="The VAE as one file (diffusers or Flux names).")
@click.option(
    "--config",
    "config_folder",
    type=FILE,
    help="Folder in diffusers layout with the configs and tokenizer for single files.",
)
@click.option(
    "--variant",
    type=click.Choice(["turbo", "base"]),
    help="The model, for single files without --config: both have the same tensors.  "
    "[default: turbo]",
)
@click.option("--tokenizer", type=FILE, help="tokenizer.json, if there is no --config.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="The dtype to store.",
)
@click.option("--verify", is_flag=True, help="First compare SRC with the published MD5 sums.")
@click.option("--quiet", is_flag=True, help="Show neither progress nor summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def convert(
    paths, config_folder, tokenizer, variant, dtype, verify, quiet, as_json, **files
) -> None:
    """Convert a PyTorch Z-Image to a native checkpoint.

    SRC is a folder in diffusers layout, or one file with all three models. --dit, --text-encoder
    and --vae give single files (ComfyUI's, for example) instead of SRC, or replace parts of SRC.
    After an interruption, run the same command again to resume.
    """
    if len(paths) > 2:
        raise click.UsageError(f"expected [SRC] DST, got {len(paths)} paths")
    src, dst = (paths[0], paths[1]) if len(paths) == 2 else (None, paths[0])
    if verify:
        if src is None:
            raise click.UsageError("--verify compares SRC with the published files: give SRC")
        sources.verify(src, quiet=quiet)
    began = time.monotonic()
    given = {component: file for component, file in files.items() if file}
    source = sources.open_source(src, given, config_folder, tokenizer, variant)
    convert_source(source, dst, dtype, quiet=quiet or as_json)
    nbytes = sum(f.stat().st_size for f in dst.rglob("*") if f.is_file())
    seconds = time.monotonic() - began
    if as_json:
        click.echo(
            json.dumps(
                {"path": str(dst), "bytes": nbytes, "seconds": round(seconds, 3), "dtype": dtype}
            )
        )
    elif not quiet:
        click.echo(f"{dst}: {size(nbytes)} in {dtype}, {seconds:.1f} s")
        shift, defaults = source.config.scheduler.shift, source.config.defaults
        if shift != TURBO_SHIFT:
            click.echo(
                f"shift is {shift:g}, Turbo's is {TURBO_SHIFT:g}: this looks like the base model; "
                f"its defaults are --steps {defaults.steps} --guidance {defaults.guidance:g}"
            )


@click.command()
@click.argument("path", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """Show the contents of PATH: components, parameters, bytes, dtypes."""
    parts = inspect_path(path)
    if as_json:
        click.echo(json.dumps(parts))
        return
    click.echo(f"{path}: {parts['kind']}")
    for name, part in parts["components"].items():
        click.echo(
            f"  {name:13s} {part['layout']:10s} {part['tensors']:5d} tensors  "
            f"{part['parameters'] / 1e9:8.4f} B parameters  "
            f"{size(part['bytes']):>10s}  {printable(', '.join(part['dtypes']))}"
        )
    for key, value in parts.get("notes", {}).items():
        click.echo(f"  {key}: {value}")
