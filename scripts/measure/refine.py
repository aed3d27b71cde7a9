"""Whether a second pass makes written glyphs more legible on the tiny model, by program.

    python -m scripts.measure.refine -o runs/refine              400 held-out prompts, 1 to 3 glyphs
    python -m scripts.measure.refine -o runs/refine --glyphs 3   with three alone

Every picture is drawn once in several ways, then drawn again from itself, with its own prompt and
seed: at its own size from a noise level, or enlarged, redrawn (whole, or in regions of its own size,
which take the memory of one pass) and made small again. Writes table.md in the folder."""

from collections import defaultdict
from collections.abc import Iterator
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

LEVELS = (0.2, 0.3, 0.5)
# of one pass: arguments of ZImage.generate
FIRST: dict[str, dict] = {
    "heun": {"sampler": "heun"},
    "res_multistep": {"sampler": "res_multistep"},
    "16 steps": {"steps": 16},
    **{f"text weight {w:g}": {"text_weight": w} for w in (0.9, 1.1, 1.25)},
}
# of a second one: times as large, noise level, whether in regions of the picture's own size; and
# arguments of ZImage.generate
SECOND: dict[str, tuple[tuple, dict]] = {
    **{f"again from {level:g}": ((1, level, False), {}) for level in LEVELS},
    **{f"twice as large from {level:g}": ((2, level, False), {}) for level in LEVELS[1:]},
    **{f"twice as large in regions from {level:g}": ((2, level, True), {}) for level in LEVELS},
    "again from 0.5, text weight 1.25": ((1, 0.5, False), {"text_weight": 1.25}),
}


def again(pipe: ZImage, prompt: str, seed: int, picture, way: tuple, **options) -> np.ndarray:
    """The picture drawn from itself, at its own size in the end."""
    factor, strength, in_regions = way
    h, w = picture.pixels.shape[:2]
    image = picture.pixels if factor == 1 else pipe.enlarged(picture, factor)
    job = {"seed": seed, "strength": strength, "region": w if in_regions else None}
    (found,) = pipe.generate(prompt, image=image, **job, **options).pictures
    small = Image.fromarray(found.pixels).resize((w, h), Image.Resampling.LANCZOS)
    return np.asarray(small)


def drawn(
    pipe: ZImage, prompt: str, seed: int, parts: tuple[str, ...]
) -> Iterator[tuple[str, np.ndarray]]:
    """(way, pixels) of one pass, and of every way whose name contains one of `parts`."""

    def is_asked(name: str) -> bool:
        return not parts or any(part in name for part in parts)

    (once,) = pipe.generate(prompt, seed=seed).pictures
    yield "one pass", once.pixels
    for name, job in FIRST.items():
        if is_asked(name):
            yield name, pipe.generate(prompt, seed=seed, **job).pictures[0].pixels
    for name, (way, options) in SECOND.items():
        if is_asked(name):
            yield name, again(pipe, prompt, seed, once, way, **options)


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--prompts", default=400, show_default=True)
@click.option("--way", "parts", multiple=True, help="Only ways with this in their name.")
@click.option("--glyphs", type=click.IntRange(1, 3), help="[default: one to three]")
def main(output: Path, prompts: int, parts: tuple[str, ...], glyphs: int | None) -> None:
    use_compile_cache()
    output.mkdir(parents=True, exist_ok=True)
    pipe, right = ZImage.load(), defaultdict(lambda: defaultdict(list))
    texts = (
        found
        for found in held_out(100_000)
        if found[0].kind == "text" and glyphs in (None, len(found[0].text))
    )
    for seed, (scene, _, caption) in enumerate(tqdm(islice(texts, prompts), total=prompts)):
        for name, pixels in drawn(pipe, caption, seed, parts):
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
