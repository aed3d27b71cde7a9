"""The commands: convert PyTorch checkpoints to native ones, fetch the published one, export native
ones, and inspect any."""

import json
import time
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from zimage_jax.errors import ForeignError, UsageError
from zimage_jax.files import kind_of, printable
from zimage_jax.model.config import TURBO_SHIFT
from zimage_jax.units import size
from zimage_jax.weights import formats, sources
from zimage_jax.weights.checkpoint import Checkpoint

from . import checksums
from .convert import convert as convert_source
from .convert import reencode
from .export import LAYOUTS
from .export import export as export_checkpoint
from .inspect import inspect as inspect_path

FILE = click.Path(path_type=Path)


@click.command(
    epilog="Further commands: fetch [REPO] DST downloads the published model, export MODEL DST writes "
    "PyTorch's files again, and inspect PATH shows the contents of a file, a diffusers folder or a "
    "native checkpoint. Each has its own --help."
)
@click.argument("paths", nargs=-1, required=True, type=FILE, metavar="[SRC] DST")
@click.option(
    "--dit",
    "transformer",
    type=FILE,
    help="The DiT as one file (ComfyUI or diffusers names), which may be quantised: safetensors as "
    "ComfyUI has them, or GGUF.",
)
@click.option("--text-encoder", type=FILE, help="The Qwen3 text encoder, likewise.")
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
    "--format",
    "--dtype",
    "form",
    metavar="FORMAT",
    help="How parameters are stored: bfloat16; float32; lossless (matrices of blocks in 12 bits, "
    "the same pictures as bfloat16); int8 or int8-hadamard (8 bits, which changes pictures). "
    "PATTERN=FORMAT gives some another, as in 'lossless,text_encoder=int8' or 'layers.*=int8': the "
    "last pattern that matches a component, block or path counts.  [default: bfloat16, and int8 for "
    "what ComfyUI has in int8]",
)
@click.option("--verify", is_flag=True, help="First compare SRC with the published MD5 sums.")
@click.option("--quiet", is_flag=True, help="Show neither progress nor summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def convert(
    paths, config_folder, tokenizer, variant, form, verify, quiet, as_json, **files
) -> None:
    """Convert a PyTorch Z-Image to a native checkpoint, or a native one to another format.

    SRC is a folder in diffusers layout, one file with all three models, a native checkpoint, or the
    file of a ControlNet Union (for a model that is not the published one, --config names its folder).
    --dit, --text-encoder and --vae give single files (ComfyUI's, for example) instead of SRC, or
    replace parts of SRC.
    After an interruption, run the same command again to resume.
    """
    if len(paths) > 2:
        raise click.UsageError(f"expected [SRC] DST, got {len(paths)} paths")
    src, dst = (paths[0], paths[1]) if len(paths) == 2 else (None, paths[0])
    if verify and src is None:
        raise click.UsageError("--verify compares SRC with the published files: give SRC")
    began = time.monotonic()
    given = {component: file for component, file in files.items() if file}
    if src is not None and kind_of(src / "manifest", ForeignError):
        if given or config_folder or tokenizer or variant or verify:
            raise click.UsageError(
                f"{src} is a native checkpoint: only --format, --quiet and --json apply"
            )
        checkpoint = Checkpoint(src)
        reencode(checkpoint, dst, form or "bfloat16", quiet=quiet or as_json)
    elif src is not None and not given and kind_of(src) == "file" and sources.is_control(src):
        if tokenizer or verify:
            raise click.UsageError(f"{src} is a ControlNet: --tokenizer and --verify do not apply")
        config = sources.controlled_config(config_folder, variant)
        source = sources.open_control_file(src, config)
        convert_source(source, dst, form, quiet=quiet or as_json)
    else:
        if verify and src is not None:
            checksums.verify(src, quiet=quiet)
        source = sources.open_source(src, given, config_folder, tokenizer, variant)
        for remark in source.remarks():
            click.echo(f"warning: {remark}", err=True)
        convert_source(source, dst, form, quiet=quiet or as_json)
    nbytes, seconds = _nbytes(dst), time.monotonic() - began
    made = Checkpoint(dst, kind=None)
    config, form = made.config, form or formats.names(made.storage)
    if as_json:
        click.echo(
            json.dumps(
                {"path": str(dst), "bytes": nbytes, "seconds": round(seconds, 3), "format": form}
            )
        )
    elif not quiet:
        click.echo(f"{dst}: {size(nbytes)} in {form}, {seconds:.1f} s")
        if config.control is None and config.scheduler.shift != TURBO_SHIFT:
            shift, defaults = config.scheduler.shift, config.defaults
            click.echo(
                f"shift is {shift:g}, Turbo's is {TURBO_SHIFT:g}: this looks like the base model; "
                f"its defaults are --steps {defaults.steps} --guidance {defaults.guidance:g}"
            )


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[REPO] DST")
@click.option(
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="HF_ENDPOINT or MODELSCOPE_DOMAIN may name a mirror; HF_TOKEN or MODELSCOPE_API_TOKEN is "
    "sent to the hub and to nobody else.",
)
@click.option("--revision", help="A branch, tag or commit.  [default: main, on ModelScope master]")
@click.option(
    "--convert",
    "converts",
    is_flag=True,
    help="DST becomes a native checkpoint: each shard is converted when it is there, and removed.",
)
@click.option(
    "--format", "form", metavar="FORMAT", help="As of a conversion, with --convert; not lossless."
)
@click.option(
    "--connections", type=click.IntRange(1, 16), default=4, show_default=True, help="At once."
)
@click.option("--quiet", is_flag=True, help="Show neither progress nor summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def fetch(names, hub, revision, converts, form, connections, quiet, as_json) -> None:
    """Download Z-Image-Turbo, or the Z-Image in REPO, into the folder DST in diffusers layout.

    REPO is OWNER/NAME on the hub. Every file is verified: those of Tongyi-MAI/Z-Image-Turbo with
    the published MD5 sums, others (and with --revision) with the hub's checksums.
    After an interruption, run the same command again to resume.
    """
    try:
        from . import fetch as fetching
        from .hub import Limits
    except ModuleNotFoundError as fault:
        raise UsageError(
            f"fetching needs {fault.name}: run scripts/setup fetch, or pip install {fault.name}"
        ) from None
    if len(names) > 2:
        raise click.UsageError(f"expected [REPO] DST, got {len(names)} arguments")
    if form and not converts:
        raise click.UsageError("--format is for --convert")
    repo, dst = (names[0] if len(names) == 2 else fetching.PUBLISHED), Path(names[-1])
    began = time.monotonic()
    given = {
        "hub": hub,
        "revision": revision,
        "limits": Limits(connections=connections),
        "quiet": quiet or as_json,
    }
    if converts:
        found = fetching.fetch_and_convert(repo, dst, form or "bfloat16", **given)
    else:
        found = fetching.fetch(repo, dst, **given)
    found["seconds"] = round(time.monotonic() - began, 3)
    if as_json:
        click.echo(json.dumps(found))
    elif not quiet:
        click.echo(
            f"{dst}: {found['files']} files of {repo}, {size(found['downloaded'])} of "
            f"{size(found['bytes'])} downloaded now, {found['seconds']:.1f} s"
        )


@click.command()
@click.argument("model", type=FILE)
@click.argument("dst", type=FILE)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    required=True,
    help="diffusers: a folder that ZImagePipeline.from_pretrained reads. comfyui: the files of "
    "ComfyUI's models folder.",
)
@click.option("--quiet", is_flag=True, help="Show neither progress nor summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON.")
def export(model: Path, dst: Path, layout: str, quiet: bool, as_json: bool) -> None:
    """Write a native checkpoint MODEL as PyTorch's files, in bfloat16, into the folder DST.

    From bfloat16 and lossless the tensors have the same bits; float32 is rounded. From int8 nothing
    is made: it has lost bits.
    """
    began = time.monotonic()
    export_checkpoint(Checkpoint(model), dst, layout, quiet=quiet or as_json)
    nbytes, seconds = _nbytes(dst), time.monotonic() - began
    if as_json:
        found = {"path": str(dst), "bytes": nbytes, "seconds": round(seconds, 3), "layout": layout}
        click.echo(json.dumps(found))
    elif not quiet:
        click.echo(f"{dst}: {size(nbytes)} in {layout}'s layout, {seconds:.1f} s")


def _nbytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


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
            f"{size(part['bytes']):>10s}  "
            f"{printable(', '.join(part.get('formats', part['dtypes'])))}"
        )
    for key, value in parts.get("notes", {}).items():
        click.echo(f"  {key}: {value}")


NAMED = {"inspect": inspect, "fetch": fetch, "export": export}


class _Completed(click.Group):
    """What a shell completes: the named commands, or the options and paths of `convert`."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]


def completed() -> click.Group:
    """All commands as a group, for shell completion alone."""
    options = [param for param in convert.params if isinstance(param, click.Option)]
    return _Completed("convert", NAMED, params=options)
