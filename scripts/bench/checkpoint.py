"""How fast a checkpoint comes into host memory: ours, orbax's own format, and plain reading of the
same bytes.

    python -m scripts.bench.checkpoint [--blocks 3] [--cold]

Three blocks of the published size (346 MB each, bfloat16), to `pinned_host`. Prints GB/s, the
median of five; --cold drops the page cache before each reading (needs root)."""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import jax
import numpy as np
import orbax.checkpoint as ocp

from zimage_jax.dtypes import DTYPES
from zimage_jax.model.config import TURBO
from zimage_jax.runtime.placement import HOST, Placement
from zimage_jax.runtime.reader import read_units
from zimage_jax.weights import components
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.components import units
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import Writer

PLACEMENT = Placement.on()


def make(folder: Path, blocks: int) -> tuple[Checkpoint, list[str]]:
    """A native checkpoint with `blocks` real blocks and everything else small."""
    small_text = replace(TURBO.text_encoder, vocab_size=600, num_hidden_layers=2)
    config = replace(
        TURBO, transformer=replace(TURBO.transformer, n_layers=blocks), text_encoder=small_text
    )
    values = (
        np.random.default_rng(0)
        .standard_normal(3840 * 10240, np.float32)
        .astype(DTYPES["bfloat16"])
    )
    with Writer(folder / "native", uniform(config, "bfloat16")) as writer:
        for component in components.COMPONENTS:
            for unit, leaves in units(config, component).items():
                arrays = (
                    (path, iter([values[: leaf.size].reshape(leaf.shape)]))
                    for path, leaf in leaves.items()
                )
                writer.write(component, unit, arrays)
        path = writer.finish(b"", {})
    return Checkpoint(path), [f"layers.{k}" for k in range(blocks)]


def orbax_item(folder: Path, arrays: dict[str, np.ndarray], options: dict) -> Callable[[], None]:
    """Save the arrays in one of orbax's formats; gives the call that restores them."""
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))
    checkpointer.save(folder.absolute(), jax.tree.map(jax.numpy.asarray, arrays))
    wanted = jax.tree.map(
        lambda a: ocp.ArrayRestoreArgs(
            sharding=PLACEMENT.sharding(HOST), global_shape=a.shape, dtype=a.dtype
        ),
        arrays,
    )
    arguments = ocp.args.PyTreeRestore(restore_args=wanted)
    return lambda: jax.block_until_ready(checkpointer.restore(folder.absolute(), args=arguments))


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def speed(call: Callable, size: int, cold: bool) -> float:
    seconds = []
    for _ in range(6):
        if cold:
            drop_caches()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return size / statistics.median(seconds[1:]) / 1e9


@click.command(help=__doc__)
@click.option("--blocks", default=3, show_default=True)
@click.option("--cold", is_flag=True)
def main(blocks: int, cold: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        saved, names = make(folder, blocks)
        files = [saved.path / "transformer" / f"{name}.safetensors" for name in names]
        size = saved.storage.nbytes("transformer", *names)
        arrays = {path: a for name in names for path, a in saved.read("transformer", name).items()}

        def plain() -> list[np.ndarray]:
            return [np.fromfile(file, np.uint8) for file in files]

        calls = {
            "plain": plain,
            "native": lambda: read_units(saved, "transformer", names, PLACEMENT, HOST),
            "orbax_zarr": orbax_item(folder / "zarr", arrays, {"use_ocdbt": False}),
            "orbax_zarr3": orbax_item(
                folder / "zarr3", arrays, {"use_ocdbt": False, "use_zarr3": True}
            ),
            "orbax_ocdbt": orbax_item(
                folder / "ocdbt", arrays, {"use_ocdbt": True, "use_zarr3": True}
            ),
        }
        result = {
            f"{name}_gb_per_sec": round(speed(call, size, cold), 2) for name, call in calls.items()
        }
        click.echo(json.dumps({"bytes": size, "cold": cold, **result}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
