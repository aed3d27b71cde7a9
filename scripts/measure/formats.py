"""What each format costs a picture: the tiny model's pictures, and the output of one block.

    python -m scripts.measure.formats pictures FOLDER --scenes 200     accuracy and PSNR against bfloat16, 128x128
    python -m scripts.measure.formats block                            error against float32, with outlier channels
    python -m scripts.measure.formats seconds                          of encoding and decoding a block of full width

FOLDER gets the tiny model in each format, and a file of results from which a second run goes on."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from checkpoints_convert.convert import reencode
from scripts.tiny.evaluate import held_out
from scripts.tiny.judge import judge
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache
from zimage_jax.model import dit, ops
from zimage_jax.model.attention import Attend
from zimage_jax.model.config import TURBO
from zimage_jax.model.layers import named_arrays, with_arrays
from zimage_jax.weights import components
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.encodings import Lossless
from zimage_jax.weights.formats import FORMATS
from zimage_jax.weights.search import TINY

BATCH = 20
REFERENCE = "bfloat16"
OTHERS = ("lossless", "int8", "int8-hadamard")


@click.group(help=__doc__)
def main() -> None:
    pass


# -- pictures --------------------------------------------------------------------------------------


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", default=200, show_default=True, help="Held-out scenes; two prompts each.")
@click.option("--size", default=128, show_default=True)
def pictures(folder: Path, scenes: int, size: int) -> None:
    """Accuracy and PSNR of the tiny model in every format."""
    use_compile_cache()
    folder.mkdir(parents=True, exist_ok=True)
    pipes = {name: ZImage.load(stored(folder, name)) for name in (REFERENCE, *OTHERS)}
    log, prompts = folder / "results.jsonl", list(held_out(scenes))
    lines = log.read_text().splitlines() if log.exists() else []
    found = [json.loads(line) for line in lines]
    done = {row["first"] for row in found}
    with log.open("a") as out:
        for first in tqdm(range(0, len(prompts), BATCH), unit="batch"):
            if first not in done:
                row = drawn(pipes, prompts[first : first + BATCH], first, size)
                out.write(json.dumps(row) + "\n")
                out.flush()
                found.append(row)
    click.echo("| format | bytes | PSNR dB | accuracy % | prompts |")
    click.echo("|---|---|---|---|---|")
    for name, pipe in pipes.items():
        mse = np.concatenate([row[name]["mse"] for row in found])
        right = np.concatenate([row[name]["right"] for row in found])
        checkpoint = pipe._checkpoint
        nbytes = sum(checkpoint.nbytes(c) for c in ("transformer", "text_encoder", "vae"))
        psnr = "the same pictures" if not mse.any() else f"{-10 * math.log10(mse.mean()):.1f}"
        click.echo(f"| {name} | {nbytes} | {psnr} | {100 * right.mean():.1f} | {len(mse)} |")


def stored(folder: Path, name: str) -> Path:
    """The tiny model in a format."""
    if name == REFERENCE:
        return TINY
    path = folder / name
    return path if path.exists() else reencode(Checkpoint(TINY), path, name, quiet=True)


def drawn(pipes: dict[str, ZImage], group: list, first: int, size: int) -> dict:
    """Format -> squared error of each picture, and the verdicts on its attributes."""
    captions, seeds = [caption for *_, caption in group], list(range(first, first + len(group)))
    row: dict = {"first": first}
    for name, pipe in pipes.items():
        made = pipe.generate(captions, seed=seeds, width=size, height=size).pictures
        pixels = np.stack([picture.pixels for picture in made]).astype(np.float64)
        if name == REFERENCE:
            reference = pixels
        right = [
            bool(r)
            for picture, (scene, *_) in zip(made, group, strict=True)
            for r in judge(picture.pixels, scene).values()
        ]
        mse = np.square((pixels - reference) / 255).mean((1, 2, 3))
        row[name] = {"mse": mse.tolist(), "right": right}
    return row


# -- a block ---------------------------------------------------------------------------------------

HALF = replace(TURBO.transformer, dim=1920, n_heads=15, n_layers=1, n_refiner_layers=1)
TOKENS = 256
SPREAD, OUTLIERS, FACTOR = 0.3, 0.01, 10.0


@main.command()
@click.option("--seed", default=0, show_default=True)
def block(seed: int) -> None:
    """Relative error of a block's output: half the published width, Gaussian weights whose rows and
    columns have log-normal scales (0.3), 1 % of the channels of each norm 10 times as large."""
    made = random_block(seed)
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((1, TOKENS, HALF.dim), np.float32)
    side = math.isqrt(TOKENS)
    rotations = ops.rope_table(
        dit.image_positions(2 * side, 2 * side, np.array([32])), HALF.axes_dims, HALF.rope_theta
    )
    time = jnp.asarray(rng.standard_normal((1, HALF.adaln_dim), np.float32))
    inputs = dit.BlockInputs(*map(jnp.asarray, rotations), None, time)

    @jax.jit
    def output(block: dit.Block, x: jax.Array) -> jax.Array:
        return dit.apply_blocks([block], x, inputs, Attend())

    with jax.default_matmul_precision("float32"):
        # what the block adds: its input passes through unchanged
        exact = np.asarray(output(made, jnp.asarray(x))) - x
    click.echo("| stored as | computed in | relative error % |")
    click.echo("|---|---|---|")
    for name in (REFERENCE, *OTHERS):
        for dtype in ("float32", "bfloat16", "float16"):
            narrow = encoded(made, name)
            y = ops.from_tokens(output(narrow, ops.to_tokens(jnp.asarray(x), dtype)))
            added = np.asarray(y, np.float32) - x
            error = np.linalg.norm(added - exact) / np.linalg.norm(exact)
            click.echo(f"| {name} | {dtype} | {100 * error:.2f} |")


def random_block(seed: int) -> dit.Block:
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith(".kernel"):
            inputs, outputs = (np.exp(SPREAD * rng.standard_normal(n)) for n in leaf.shape)
            values *= inputs[:, None] * outputs / math.sqrt(leaf.shape[0])
        elif path.endswith(".scale"):
            values = 1 + 0.1 * values
            if path in ("attention_norm1.scale", "ffn_norm1.scale"):
                values[rng.random(leaf.size) < OUTLIERS] *= FACTOR
        return jnp.asarray(values, jnp.float32)

    return with_arrays(dit.Block(HALF), draw)


def encoded(block: dit.Block, name: str) -> dit.Block:
    """The block as a format stores it."""
    made = FORMATS[name]
    arrays = named_arrays(block)

    def store(path: str, leaf: jax.Array):
        own = made.encoding_of(f"layers.0.{path}", jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        if own is None:
            return leaf.astype(jnp.bfloat16)
        return jax.tree.map(jnp.asarray, own.encode(np.asarray(arrays[path]).astype(own.takes)))

    return with_arrays(block, store)


# -- seconds ---------------------------------------------------------------------------------------


@main.command()
def seconds() -> None:
    """CPU seconds for all matrices of a main block of the published width, with Gaussian weights."""
    rng = np.random.default_rng(0)
    shapes = {
        path: leaf
        for path, leaf in components.units(TURBO, "transformer")["layers.0"].items()
        if len(leaf.shape) == 2
    }
    drawn = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    click.echo(
        "| format | encoding | decoding in numpy | decoding by XLA | exceptions, one weight in |"
    )
    click.echo("|---|---|---|---|---|")
    decode = jax.jit(lambda tree: tree.decoded(jnp.bfloat16))
    for name in OTHERS:
        spent, exceptions, weights = {"encode": 0.0, "numpy": 0.0, "xla": 0.0}, 0, 0
        for path, values in drawn.items():
            own = FORMATS[name].encoding_of(path, shapes[path])
            if own is None:
                continue
            matrix = values.astype(own.takes)
            tree = timed(spent, "encode", lambda own=own, matrix=matrix: own.encode(matrix))
            timed(spent, "numpy", lambda own=own, tree=tree: own.decode(tree))
            weights += matrix.size
            exceptions += own.exceptions(matrix) if isinstance(own, Lossless) else 0
            if hasattr(tree, "decoded"):  # a rotated matrix is multiplied as it is
                tree = jax.tree.map(jnp.asarray, tree)
                decode(tree).block_until_ready()
                timed(spent, "xla", lambda tree=tree: decode(tree).block_until_ready())
        one_in = f"{weights / exceptions:,.0f}" if exceptions else ""
        figures = " | ".join(f"{of:.2f}" if of else "" for of in spent.values())
        click.echo(f"| {name} | {figures} | {one_in} |")


def timed(spent: dict[str, float], what: str, run: Callable):
    began = time.process_time()
    made = run()
    spent[what] += time.process_time() - began
    return made


if __name__ == "__main__":
    main()
