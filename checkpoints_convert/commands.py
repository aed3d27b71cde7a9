"""The commands: PyTorch checkpoints to native ones, and what a checkpoint holds."""

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
    epilog="python -m checkpoints_convert inspect PATH prints what a file, a folder or a native checkpoint holds."
)
@click.argument("paths", nargs=-1, required=True, type=FILE, metavar="[SRC] DST")
@click.option(
    "--dit",
    "transformer",
    type=FILE,
    help="The DiT as one safetensors file (ComfyUI's or diffusers' names).",
)
@click.option("--text-encoder", type=FILE, help="The Qwen3 text encoder as one file.")
@click.option("--vae", type=FILE, help="The VAE as one file (diffusers' or Flux's names).")
@click.option(
    "--config",
    "config_folder",
    type=FILE,
    help="Folder with configs and tokenizer for single files.",
)
@click.option(
    "--variant",
    type=click.Choice(["turbo", "base"]),
    help="Which Z-Image single files are of, without --config; their tensors are the same.  [default: turbo]",
)
@click.option("--tokenizer", type=FILE, help="tokenizer.json, when there is no --config.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True
)
@click.option("--verify", is_flag=True, help="Compare SRC with the published MD5 sums first.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one line of JSON.")
def convert(
    paths, config_folder, tokenizer, variant, dtype, verify, quiet, as_json, **files
) -> None:
    """Convert a PyTorch Z-Image to a native checkpoint.

    SRC is a folder as diffusers saves it, or one file with all three models. Single files, as
    ComfyUI keeps them, are given with --dit, --text-encoder and --vae instead of SRC, or in the
    place of SRC's. Interrupted, the same command goes on where it was."""
    if len(paths) > 2:
        raise click.UsageError(f"expected [SRC] DST, got {len(paths)} paths")
    src, dst = (paths[0], paths[1]) if len(paths) == 2 else (None, paths[0])
    if verify:
        if src is None:
            raise click.UsageError("--verify compares a published folder: give SRC")
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
                f"shift is {shift:g}, Turbo's is {TURBO_SHIFT:g}: this looks like the base model; pictures "
                f"take --steps {defaults.steps} --guidance {defaults.guidance:g} unless you say otherwise"
            )


@click.command()
@click.argument("path", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """What PATH holds: components, parameters, bytes, dtypes."""
    parts = inspect_path(path)
    if as_json:
        click.echo(json.dumps(parts))
        return
    click.echo(f"{path}: {parts['kind']}")
    for name, part in parts["components"].items():
        click.echo(
            f"  {name:13s} {part['layout']:10s} {part['tensors']:5d} tensors  {part['parameters'] / 1e9:8.4f} B parameters  "
            f"{size(part['bytes']):>10s}  {printable(', '.join(part['dtypes']))}"
        )
    for key, value in parts.get("notes", {}).items():
        click.echo(f"  {key}: {value}")
