"""What `--variance S` brings and costs on the tiny model: how far apart pictures of one prompt are,
seed against seed, and how often they still show what the prompt says.

    python -m scripts.measure.variance                     24 held-out prompts, 8 seeds each
    python -m scripts.measure.variance --open              prompts that leave the colour open
    python -m scripts.measure.variance -o variance.md      the table into a file too

The distance of two pictures is the root of the mean squared difference of their pixels, 0 to 255;
a row has its mean over all pairs of seeds of a prompt, then over prompts."""

from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from scripts.tiny.data import COLOURS, POSITIONS, SHAPES, Item, Scene
from scripts.tiny.evaluate import held_out, percent
from scripts.tiny.judge import best_shape, judge, largest, nearest
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)


def open_prompts(count: int) -> Iterator[tuple[Scene, str, str]]:
    """A shape without a colour: a kind of caption the model was never trained on."""
    rng = np.random.default_rng([7, 97])
    for _ in range(count):
        shape, ground, position = (
            str(rng.choice(list(names))) for names in (SHAPES, COLOURS, POSITIONS)
        )
        scene = Scene("one", ground, (Item(shape, "any", *POSITIONS[position], 0.2),))
        yield scene, "en", f"a {shape} {position}, {ground} background"


def judge_open(pixels: np.ndarray, scene: Scene) -> dict[str, bool]:
    """`judge` for a shape of any colour."""
    labels = nearest(pixels)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    ground = int(np.bincount(edge).argmax())
    piece = largest(labels != ground)
    return {
        "background": list(COLOURS)[ground] == scene.background,
        "shape": piece is not None and best_shape(piece) == scene.items[0].shape,
    }


def distance(pictures: list[np.ndarray]) -> float:
    """Mean over all pairs of pictures (H W 3) of the root mean squared difference."""
    pairs = combinations([p.astype(np.float64) for p in pictures], 2)
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in pairs]))


def row(pipe: ZImage, prompts: list[tuple[Scene, str, str]], seeds: int, **job) -> dict:
    """Distance and verdicts of every prompt with every seed from 0, one batch per prompt."""
    distances, verdicts, whole = [], dict[str, list[bool]](), list[bool]()
    for scene, _, caption in tqdm(prompts, unit="prompt", desc=f"{job}"):
        result = pipe.generate(caption, seed=list(range(seeds)), width=128, height=128, **job)
        pixels = [picture.pixels for picture in result.pictures]
        distances.append(distance(pixels))
        for picture in pixels:
            is_open = scene.items and scene.items[0].colour == "any"
            found = judge_open(picture, scene) if is_open else judge(picture, scene)
            whole.append(all(found.values()))
            for attribute, right in found.items():
                verdicts.setdefault(attribute, []).append(bool(right))
    every = list(chain(*verdicts.values()))
    return {
        "distance": float(np.mean(distances)),
        "accuracy": percent(every),
        "whole": percent(whole),
        "shape": percent(verdicts["shape"]),
        "pictures": len(whole),
    }


def lines(rows: dict[float, dict]) -> Iterator[str]:
    """The table as Markdown."""
    yield "| S | distance | of S = 0 | attributes right, % | shape, % | pictures all right, % |"
    yield "|---|---|---|---|---|---|"
    base = rows[min(rows)]["distance"]
    for strength, r in rows.items():
        yield (
            f"| {strength:g} | {r['distance']:.1f} | {r['distance'] / base:.2f} "
            f"| {r['accuracy']:.1f} | {r['shape']:.1f} | {r['whole']:.1f} |"
        )


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the table here too.")
@click.option("--prompts", default=24, show_default=True, help="Number of prompts.")
@click.option("--open", "is_open", is_flag=True, help="Prompts that leave the colour open.")
@click.option("--seeds", default=8, show_default=True, help="Seeds of each prompt.")
def main(output: Path | None, prompts: int, is_open: bool, seeds: int) -> None:
    use_compile_cache()
    pipe = ZImage.load()
    asked = list(open_prompts(prompts) if is_open else held_out(prompts // 2, seed=7))
    rows = {s: row(pipe, asked, seeds, variance=s) for s in STRENGTHS}
    text = "\n".join(lines(rows)) + "\n"
    click.echo(text)
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
