"""What pictures from pictures keep and change, on the tiny model, by program: scripts/results/pictures.md.

    python -m scripts.measure.pictures -o runs/pictures

Enlarging: PSNR of the large picture, pooled to the small one's size, against the small one. Masks:
whether a shape's colour is the new one, and whether every byte outside the mask is the old one.
Writes table.md and sheet.png in the folder."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from scripts.tiny import data as tiny_data
from scripts.tiny.evaluate import SHEET
from scripts.tiny.judge import judge
from zimage_jax import Picture, ZImage
from zimage_jax.cli import use_compile_cache

LEVELS = (0.3, 0.45, 0.5, 0.6, 0.75, 0.9)
SIDE = 128


def pooled_psnr(large: np.ndarray, small: np.ndarray) -> float:
    h, w = small.shape[:2]
    n = large.shape[0] // h
    pooled = large.reshape(h, n, w, n, 3).mean((1, 3))
    return float(10 * np.log10(255**2 / max(np.mean((pooled - small) ** 2), 1e-9)))


def enlarging(pipe: ZImage, prompts: int) -> Iterator[tuple[str, int, float]]:
    """(way, factor, PSNR) of each picture."""
    for prompt in tqdm(SHEET[:prompts], desc="enlarge", unit="prompt"):
        for seed in (1, 2):
            (small,) = pipe.generate(prompt, seed=seed).pictures
            for factor in (2, 4):
                canvas = pipe.enlarged(small, factor)
                for level in LEVELS:
                    (large,) = pipe.generate(
                        prompt, seed=seed, image=canvas, strength=level
                    ).pictures
                    way = f"from noise level {level:g}"
                    yield way, factor, pooled_psnr(large.pixels, small.pixels)
            for way, other in (("the same seed, from noise", seed), ("another seed", seed + 9)):
                side = 2 * SIDE
                (large,) = pipe.generate(prompt, seed=other, width=side, height=side).pictures
                yield way, 2, pooled_psnr(large.pixels, small.pixels)


def recoloured(pipe: ZImage, count: int) -> Iterator[tuple[Picture, np.ndarray, Picture, dict]]:
    """(picture, mask, picture with another colour, verdicts) of each scene with one shape."""
    rng = np.random.default_rng(5)
    for seed in tqdm(range(count), desc="recolour", unit="picture"):
        scene = tiny_data.random_scene(rng, kind="one", held_out=True)
        (item,) = scene.items
        others = set(tiny_data.COLOURS) - {item.colour, scene.background}
        colour = sorted(others)[int(rng.integers(len(others)))]
        changed = replace(scene, items=(replace(item, colour=colour),))
        (picture,) = pipe.generate(tiny_data.caption(scene, "en", rng), seed=seed).pictures
        mask = shape_of(picture.pixels)
        (found,) = pipe.generate(
            tiny_data.caption(changed, "en", rng),
            seed=seed,
            image=picture.pixels,
            mask=mask,
            mask_grow=6,
        ).pictures
        yield picture, mask, found, judge(found.pixels, changed)


def shape_of(pixels: np.ndarray) -> np.ndarray:
    """White where a picture differs from its corner's colour."""
    distance = np.abs(pixels.astype(int) - pixels[2, 2]).max(-1)
    return np.where(distance > 40, 255, 0).astype(np.uint8)


def sheet(rows: list[list[np.ndarray]], side: int = 256) -> Image.Image:
    """Rows of pictures, each shown with sides of `side` pixels."""
    wide = max(map(len, rows))
    page = Image.new("RGB", (wide * (side + 8) + 8, len(rows) * (side + 8) + 8), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            shown = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            page.paste(shown, (8 + x * (side + 8), 8 + y * (side + 8)))
    return page


def lines(of_sizes: list, verdicts: list[dict], kept: list[bool]) -> Iterator[str]:
    yield "| large picture | twice: mean, worst | four times, in regions: mean, worst |"
    yield "|---|---|---|"
    for way in dict.fromkeys(way for way, *_ in of_sizes):
        found = {n: [v for w, f, v in of_sizes if (w, f) == (way, n)] for n in (2, 4)}
        cells = [f"{np.mean(v):.1f}, {min(v):.1f} dB" if v else "" for v in found.values()]
        yield f"| {way} | {' | '.join(cells)} |"
    yield ""
    each = ", ".join(
        f"{what} {100 * np.mean([v[what] for v in verdicts if what in v]):.1f} %"
        for what in sorted({what for v in verdicts for what in v})
    )
    yield f"{len(verdicts)} shapes given another colour: {each}."
    yield f"Bytes outside the mask the same in {100 * np.mean(kept):.1f} % of pictures."


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--prompts", default=8, show_default=True, help="To enlarge, with two seeds each.")
@click.option("--shapes", default=100, show_default=True, help="To give another colour.")
def main(output: Path, prompts: int, shapes: int) -> None:
    use_compile_cache()
    output.mkdir(parents=True, exist_ok=True)
    pipe = ZImage.load()
    of_sizes = list(enlarging(pipe, prompts))
    verdicts, kept, rows = [], [], []
    for picture, mask, found, verdict in recoloured(pipe, shapes):
        verdicts.append(verdict)
        outside = pipe.canvas(picture.pixels, mask=mask, mask_grow=6).mask == 0
        kept.append(bool((found.pixels[outside] == picture.pixels[outside]).all()))
        if len(rows) < 2:
            rows.append([picture.pixels, np.repeat(mask[..., None], 3, 2), found.pixels])
    (small,) = pipe.generate(SHEET[4], seed=4).pictures
    canvas = pipe.enlarged(small, 4)
    (large,) = pipe.generate(SHEET[4], seed=4, image=canvas, strength=0.3).pictures
    rows.append([small.pixels, canvas.pixels, large.pixels])
    sheet(rows).save(output / "sheet.png", optimize=True)
    text = "\n".join(lines(of_sizes, verdicts, kept)) + "\n"
    (output / "table.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
