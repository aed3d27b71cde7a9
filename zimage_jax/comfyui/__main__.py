"""python -m zimage_jax.comfyui: put the nodes into a ComfyUI, or take them out again."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

from .. import cli, interrupts
from ..errors import UsageError
from ..files import printable

NAME = "zimage_jax"  # of the folder in custom_nodes
MARK = "installed.json"  # in it: where this installation is; the nodes read it
NODES = Path(__file__).parent / "nodes"
_FOLDER = click.argument("comfyui_folder", type=click.Path(path_type=Path))


@click.group()
def command() -> None:
    """Nodes for ComfyUI. Its Python needs nothing of ours: the engine runs in this one."""


@command.command()
@_FOLDER
def install(comfyui_folder: Path) -> None:
    """Put the nodes into COMFYUI_FOLDER, in place of those of an earlier install."""
    target = _target(comfyui_folder)
    if _exists(target):
        _check_ours(target)
    mark = {"python": sys.executable, "path": str(Path(__file__).resolve().parents[2])}
    # ComfyUI skips names that end so, should it start just now
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=".disabled") as name:
        made = Path(name) / NAME
        shutil.copytree(NODES, made, ignore=shutil.ignore_patterns("__pycache__"))
        (made / MARK).write_text(json.dumps(mark, indent=1) + "\n", "utf-8")
        if _exists(target):
            os.replace(target, Path(name) / "old")
        os.replace(made, target)
    click.echo(f"the nodes are in {target}; start ComfyUI again, and look under Z-Image-Turbo")


@command.command()
@_FOLDER
def uninstall(comfyui_folder: Path) -> None:
    """Take the nodes out of COMFYUI_FOLDER."""
    target = _target(comfyui_folder)
    if not _exists(target):
        raise UsageError(f"{printable(target)}: there are no nodes of ours")
    _check_ours(target)
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=".disabled") as name:
        os.replace(target, Path(name) / NAME)
    click.echo(f"removed {target}")


def _target(folder: Path) -> Path:
    """The nodes' folder in a ComfyUI's folder, or in one that has ComfyUI in it, as Windows portable.

    Raises UsageError if there is no custom_nodes.
    """
    for place in (folder, folder / "ComfyUI"):
        if (place / "custom_nodes").is_dir():
            return place / "custom_nodes" / NAME
    raise UsageError(
        f"{printable(folder)}: no ComfyUI is here; expected the folder that has custom_nodes in it"
    )


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _check_ours(target: Path) -> None:
    """Raises UsageError for what `install` did not write: it is neither replaced nor removed."""
    if target.is_symlink() or not (target / MARK).is_file():
        raise UsageError(
            f"{printable(target)}: not written by install; move it away, or remove the link by hand"
        )


def main() -> None:
    interrupts.install()
    cli.run(command, prog="python -m zimage_jax.comfyui")


if __name__ == "__main__":
    main()
