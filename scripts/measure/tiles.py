"""What tiles cost a picture: PSNR in uint8 of --vae-tile's decode against the whole decode, by the
tiny model's VAE.

    python -m scripts.measure.tiles [--pictures 16] [--side 256]

Pictures are held-out drawings, encoded by the same VAE. The first row is the whole decode against
the drawings themselves: what the VAE loses without tiles. One JSON line per row, decibels as the
mean and the least of all pictures."""

import json

import click
import jax
import numpy as np

from scripts.tiny import data as tiny_data
from zimage_jax.model import vae
from zimage_jax.model.vae_strips import decode_tiles
from zimage_jax.pipeline.picture import to_uint8
from zimage_jax.runtime.reader import load
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.search import TINY


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Decibels of each of the pictures, uint8."""
    error = np.square(pictures.astype(np.float64) - others).mean((1, 2, 3))
    with np.errstate(divide="ignore"):  # infinite where the two are equal
        return 10 * np.log10(255**2 / error)


@click.command(help=__doc__)
@click.option("--pictures", type=click.IntRange(1), default=16, show_default=True)
@click.option("--side", default=256, show_default=True, help="Pixels.")
@click.option(
    "--tile",
    "tiles",
    multiple=True,
    type=int,
    default=(64, 96, 128, 160, 192, 224),
    show_default=True,
)
def main(pictures: int, side: int, tiles: tuple[int, ...]) -> None:
    model = jax.tree.map(lambda leaf: leaf.astype(np.float32), load(Checkpoint(TINY), "vae"))
    run = jax.jit(
        lambda function, *args, **static: function(*args, **static),
        static_argnums=0,
        static_argnames=("dtype", "attend"),
    )
    rng = np.random.default_rng(1)
    drawn = np.stack(
        [
            tiny_data.draw(tiny_data.random_scene(rng, held_out=True), side, side)
            for _ in range(pictures)
        ]
    )
    latents = np.asarray(run(vae.encode, model, drawn.astype(np.float32) / 127.5 - 1))
    whole = to_uint8(np.asarray(run(vae.decode, model, latents)))

    def tell(what: str | int, decibels: np.ndarray) -> None:
        click.echo(
            json.dumps(
                {
                    "tile": what,
                    "mean_db": round(decibels.mean(), 1),
                    "least_db": round(decibels.min(), 1),
                }
            )
        )

    tell("whole, against the drawing", psnr(whole, drawn))
    for tile in tiles:
        tell(tile, psnr(to_uint8(decode_tiles(model, latents, np.float32, tile, run)), whole))


if __name__ == "__main__":
    main()
