"""python -m zimage_jax: the commands by name."""

from . import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the imports below, which take a third of a second

from pathlib import Path

import click

from . import batch, cli, generate, plan, serve
from .options import FILE


@click.group()
def command() -> None:
    """Z-Image-Turbo in JAX, for GPUs far smaller than the model."""


command.add_command(generate.command, "generate")
command.add_command(plan.command, "plan")
command.add_command(batch.command, "batch")
command.add_command(serve.command, "serve")


@command.command()
@click.argument("picture", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(picture: Path, as_json: bool) -> None:
    """Print the prompt and the settings of PICTURE, a PNG drawn by zimage_jax."""
    with interrupts.at_once():
        from .pipeline.picture import parameters, read_metadata

    metadata = read_metadata(picture)
    click.echo(cli.to_json(metadata) if as_json else cli.plain(parameters(metadata)))


def main() -> None:
    interrupts.install()
    cli.run(command, prog=cli.program("zimage", "zimage_jax"))


if __name__ == "__main__":
    main()
