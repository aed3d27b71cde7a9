"""python -m zimage_jax: the commands by name."""

import json
from pathlib import Path

import click

from . import cli, generate, plan
from .pipeline.picture import parameters, read_metadata


@click.group()
def command() -> None:
    """Z-Image-Turbo in JAX, for GPUs far smaller than the model."""


command.add_command(generate.command, "generate")
command.add_command(plan.command, "plan")


@command.command()
@click.argument("picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(picture: Path, as_json: bool) -> None:
    """What PICTURE says of its making."""
    metadata = read_metadata(picture)
    click.echo(json.dumps(metadata, ensure_ascii=False) if as_json else parameters(metadata))


def main() -> None:
    cli.run(command, prog="python -m zimage_jax")


if __name__ == "__main__":
    main()
