"""How often the tiny model draws what its prompt says, judged by program on combinations it was
never trained on.

python -m scripts.tiny.evaluate                     512 held-out scenes, each in English and in
Chinese python -m scripts.tiny.evaluate --size 192x192 --json accuracy.json python -m
scripts.tiny.evaluate --sheet sheet.png   the 24 pictures of scripts/results/tiny_contact_sheet.png instead"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from scripts.tiny import data as tiny_data
from scripts.tiny.judge import judge
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache
from zimage_jax.pipeline.report import versions
from zimage_jax.pipeline.size import parse_size

LANGUAGES = {"en": "English", "zh": "Chinese"}
BATCH = 32
SHEET = [
    "a red circle above a blue square",
    "白色背景上的一个绿色三角形",
    "a yellow star inside a purple circle",
    '黑色背景上的黄色文字："山"',
    "a small pink heart at the top",
    "a green diamond to the left of an orange cross",
    'text: "A7"',
    '橙色背景，写着："火"',
    "a big cyan cross on a black background",
    "蓝色的圆形里面有一个黄色的星形",
    "a brown triangle in the bottom right corner",
    'text: "K" in red, yellow background',
    "左上角有一个大紫色的心形",
    "pink background, a white square",
    "a red heart below a black star",
    "灰色背景上的一个红色菱形在中间",
    'text: "大小" in blue',
    "on a cyan background, a purple diamond on the right",
    "一个青色的正方形在棕色的圆形的上方",
    "a white circle inside a red diamond, blue background",
    'text: "R2D"',
    '绿色文字："花鸟"，黄色背景',
    "a small orange triangle on a gray background",
    "draw a blue star",
]


def held_out(count: int, seed: int = 1) -> Iterator[tuple[tiny_data.Scene, str, str]]:
    """`count` scenes the training never drew, each with a caption per language: (scene, language,
    caption)."""
    rng = np.random.default_rng([seed, 97])
    for _ in range(count):
        scene = tiny_data.random_scene(rng, held_out=True)
        for language in LANGUAGES:
            yield scene, language, tiny_data.caption(scene, language, rng)


def verdicts(
    pipe: ZImage, prompts: list, *, quiet: bool = False, **job
) -> Iterator[tuple[tiny_data.Scene, str, dict]]:
    """Draw every prompt of `held_out`, its place in the list as seed: (scene, language, attribute
    -> right or not)."""
    for first in tqdm(range(0, len(prompts), BATCH), desc="draw", unit="batch", disable=quiet):
        group = prompts[first : first + BATCH]
        seeds = list(range(first, first + len(group)))
        result = pipe.generate([caption for *_, caption in group], seed=seeds, **job)
        for (scene, language, _), picture in zip(group, result.pictures, strict=True):
            yield scene, language, judge(picture.pixels, scene)


def table(
    judged: Iterator[tuple[tiny_data.Scene, str, dict]],
) -> dict[str, dict[str, dict[str, list[bool]]]]:
    """Kind of scene ("all" first) -> attribute -> language -> verdicts."""
    rows: dict = {
        kind: defaultdict(lambda: defaultdict(list)) for kind in ("all", "one", "pair", "text")
    }
    for scene, language, found in judged:
        for attribute, right in found.items():
            for kind in ("all", scene.kind):
                rows[kind][attribute][language].append(bool(right))
    return rows


def percent(values: list[bool]) -> float:
    return round(100 * float(np.mean(values)), 1)


def lines(rows: dict) -> Iterator[str]:
    """The table as Markdown."""
    yield "| kind | what | English | Chinese | both | pictures |"
    yield "|---|---|---|---|---|---|"
    for kind, attributes in rows.items():
        for attribute, by_language in sorted(attributes.items()):
            if kind != "all" and "glyph" in attribute:
                continue  # only one kind has glyphs
            every = list(chain(*by_language.values()))
            each = " | ".join(f"{percent(by_language[language]):.1f}" for language in LANGUAGES)
            yield f"| {kind} | {attribute} | {each} | {percent(every):.1f} | {len(every)} |"


def contact_sheet(pipe: ZImage, file: Path) -> None:
    """24 pictures, six to a row, seeds 0 to 23."""
    pictures = pipe.generate(SHEET, seed=list(range(len(SHEET)))).pictures
    height, width, _ = pictures[0].pixels.shape
    sheet = Image.new("RGB", (6 * (width + 4) - 4, 4 * (height + 4) - 4), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture.pixels), (i % 6 * (width + 4), i // 6 * (height + 4)))
    sheet.save(file, optimize=True)
    for i, prompt in enumerate(SHEET, 1):
        click.echo(f"{i}. {prompt}")


@click.command(help=__doc__)
@click.option(
    "--model", type=click.Path(path_type=Path), help="[default: the model inside the package]"
)
@click.option("--scenes", default=512, show_default=True, help="Held-out scenes; two prompts each.")
@click.option("--size", default="128x128", show_default=True)
@click.option("--steps", default=8, show_default=True)
@click.option("--guidance", default=0.0, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw the contact sheet and stop.")
def main(model, scenes, size, steps, guidance, file, sheet) -> None:
    use_compile_cache()
    pipe = ZImage.load(model)
    if sheet:
        return contact_sheet(pipe, sheet)
    width, height = parse_size(size, 128, 16)
    began = time.perf_counter()
    job = {"width": width, "height": height, "steps": steps, "guidance": guidance}
    rows = table(verdicts(pipe, list(held_out(scenes)), **job))
    click.echo("\n".join(lines(rows)))
    click.echo(
        f"{2 * scenes} prompts of {scenes} held-out scenes in {time.perf_counter() - began:.0f} s"
    )
    if file:
        figures = {
            kind: {
                name: {lang: percent(v) for lang, v in langs.items()}
                for name, langs in attributes.items()
            }
            for kind, attributes in rows.items()
        }
        file.write_text(
            json.dumps({"accuracy_percent": figures, **job, "versions": versions()}, indent=2)
            + "\n"
        )
    return None


if __name__ == "__main__":
    main()
