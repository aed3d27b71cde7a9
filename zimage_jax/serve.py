"""python -m zimage_jax.serve: a page for people; for programs OpenAI's API, A1111's and our own."""

from . import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the imports below, which take a third of a second

import importlib.util
import ipaddress
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from . import cli, options
from .errors import UsageError
from .memory_options import CLUSTER, DEVICES, engine_of, memory_options, split_option
from .options import Number


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=Number(int, 0, 65535),
    default=7860,
    show_default=True,
    help="0: any that is free.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("zimage_data"),
    show_default=True,
    help="Folder for jobs and pictures. The next server goes on with what is in it.",
)
@click.option(
    "--api-key",
    envvar="ZIMAGE_API_KEY",
    metavar="KEY",
    help="Key that clients must send; needed for other addresses than this machine's own. Better in "
    "ZIMAGE_API_KEY: other users see the arguments of commands.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Name by which clients call this machine, beside localhost. May be repeated.",
)
@click.option(
    "--queue",
    "most",
    type=Number(int, 1, 100_000),
    default=100,
    show_default=True,
    help="Most jobs that may wait.",
)
@click.option(
    "--page/--no-page", "has_page", default=True, help="Show the page at /, or only APIs."
)
@click.option(
    "--loras",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="FOLDER",
    help="Folder of LoRAs (.safetensors), also in folders below it, that clients may choose by name. "
    "May be repeated.",
)
@click.option(
    "--tensors",
    "has_tensors",
    is_flag=True,
    help="Add routes that take and give text features, latents and pictures as tensors, for ComfyUI.",
)
@click.option(
    "--parent",
    type=Number(int, 1, 2**31 - 1),
    metavar="PID",
    help="End when this process has ended.",
)
@options.MODEL
@options.CONTROL
@options.DTYPE
@memory_options
@DEVICES
@split_option("pictures")
@CLUSTER
def command(
    *,
    host,
    port,
    data,
    api_key,
    hosts,
    most,
    has_page,
    loras,
    has_tensors,
    parent,
    model,
    control,
    dtype,
    devices,
    split,
    cluster,
    **memory_flags,
) -> None:
    """Serve pictures until Ctrl-C or SIGTERM.

    A job that was accepted is drawn, even if the server is killed: the next one with the same --data
    goes on.
    """
    if api_key is not None and not (
        len(api_key) >= 8 and api_key.isascii() and api_key.isprintable()
    ):
        raise UsageError("--api-key: expected 8 or more ASCII characters")
    if api_key is None and not _is_loopback(host):
        raise UsageError(
            f"--host {host}: other machines could use this server; give it an --api-key, or listen "
            "at 127.0.0.1"
        )
    if parent is not None:
        interrupts.end_with(parent)
    places: Any = {"devices": devices, "split": split, "cluster": cluster}
    places["say"] = partial(click.echo, err=True)
    given: Any = {"control": control, "dtype": dtype}
    open_engine = engine_of(model, **places, memory_flags=memory_flags, **given)
    with interrupts.at_once():
        try:
            from .server import app

            if has_page and importlib.util.find_spec("gradio") is None:
                raise ImportError("No module named 'gradio'")
            if has_page:  # its import takes 5 seconds, in which the engine can start
                threading.Thread(target=app.page).start()
        except ImportError as fault:
            raise UsageError(
                f'{fault}: the server needs more packages; pip install "zimage_jax[serve]"'
            ) from None

    with (
        closing(app.listen(host, port)) as listener,
        closing(app.Store(data)) as store,
        open_engine() as engine,
    ):
        app.serve(
            *(engine, store, listener),
            most=most,
            key=api_key,
            hosts=hosts,
            has_page=has_page,
            loras=loras,
            has_tensors=has_tensors,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    interrupts.install()
    cli.run(command, prog="python -m zimage_jax.serve")


if __name__ == "__main__":
    main()
