"""Whether a second pass makes written glyphs more legible on the tiny model, by program.

    python -m scripts.measure.refine -o runs/refine              400 held-out prompts with one to three glyphs
    python -m scripts.measure.refine -o runs/refine --glyphs 3   with three alone

Every picture is drawn once, then drawn again from itself in each way, with its own prompt and seed:
at its own size from a noise level, or enlarged, redrawn (whole, or in regions of its own size, which
take the memory of one pass) and made small again. Writes table.md in the folder."""

from collections import defaultdict
from itertools import islice
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from scripts.tiny.evaluate import held_out
from scripts.tiny.judge import judge
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache

# name -> times as large, noise level, whether in regions of the picture's own size
WAYS: dict[str, tuple[int, float, bool] | None] = {
    "one pass": None,
    **{f"again from {level:g}": (1, level, False) for level in (0.2, 0.3, 0.5)},
    **{f"twice as large from {level:g}": (2, level, False) for level in (0.3, 0.5)},
    **{
        f"twice as large in regions from {level:g}": (2, level, True)
        for level in (0.2, 0.3, 0.4, 0.5)
    },
}


def again(pipe: ZImage, prompt: str, seed: int, picture, way: tuple) -> np.ndarray:
    """The picture drawn from itself, at its own size in the end."""
    factor, strength, in_regions = way
    h, w = picture.pixels.shape[:2]
    image = picture.pixels if factor == 1 else pipe.enlarged(picture, factor)
    job = {"seed": seed, "strength": strength, "region": w if in_regions else None}
    (found,) = pipe.generate(prompt, image=image, **job).pictures
    small = Image.fromarray(found.pixels).resize((w, h), Image.Resampling.LANCZOS)
    return np.asarray(small)


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--prompts", default=400, show_default=True)
@click.option("--glyphs", type=click.IntRange(1, 3), help="[default: one to three]")
def main(output: Path, prompts: int, glyphs: int | None) -> None:
    use_compile_cache()
    output.mkdir(parents=True, exist_ok=True)
    pipe, right = ZImage.load(), defaultdict(lambda: defaultdict(list))
    texts = (
        found
        for found in held_out(100_000)
        if found[0].kind == "text" and glyphs in (None, len(found[0].text))
    )
    for seed, (scene, _, caption) in enumerate(tqdm(islice(texts, prompts), total=prompts)):
        (picture,) = pipe.generate(caption, seed=seed).pictures
        for name, way in WAYS.items():
            pixels = picture.pixels if way is None else again(pipe, caption, seed, picture, way)
            for what, verdict in judge(pixels, scene).items():
                right[name][what].append(bool(verdict))
    columns = sorted({what for of in right.values() for what in of})
    lines = ["| way | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, of in right.items():
        cells = (f"{100 * np.mean(of[what]):.1f}" for what in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{what} {len(right['one pass'][what])}" for what in columns)
    text = "\n".join([*lines, "", f"Pictures: {counts}."]) + "\n"
    (output / "table.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
