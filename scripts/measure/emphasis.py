"""What prompt weights do on the tiny model, judged by program.

python -m scripts.measure.emphasis ways     every way to apply a weight, on prompts that ask for
                                            two colours of one shape
python -m scripts.measure.emphasis words    the package's way, on one word of held-out prompts
python -m scripts.measure.emphasis quoted   --text-weight, on held-out texts of three glyphs"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import NamedTuple
from unittest import mock

import click
import numpy as np
from tqdm import tqdm

from scripts.tiny import data
from scripts.tiny.evaluate import BATCH, percent
from scripts.tiny.judge import best_shape, judge, largest, nearest
from zimage_jax import ZImage
from zimage_jax.cli import use_compile_cache
from zimage_jax.model import emphasis
from zimage_jax.model.prompt import Encoded, Prompts

COLOURS = list(data.COLOURS)


def draw(pipe: ZImage, prompts: list[str], **job) -> Iterator[np.ndarray]:
    """Pixels of every prompt, its place in the list as seed."""
    for first in tqdm(range(0, len(prompts), BATCH), unit="batch", leave=False):
        group = prompts[first : first + BATCH]
        seeds = list(range(first, first + len(group)))
        result = pipe.generate(group, seed=seeds, width=128, height=128, **job)
        yield from (picture.pixels for picture in result.pictures)


# -- ways to apply a weight ------------------------------------------------------------------------


def scaled(f, neutral, w):
    return f * w


def scaled_to_mean(f, neutral, w):
    """AUTOMATIC1111's: the mean of all features is restored."""
    return f * w * (f.mean() / (f * w).mean())


def from_mean(f, neutral, w):
    """From the mean over the prompt's tokens."""
    mean = f.mean(0)
    return np.where(w == 1, f, mean + w * (f - mean))


def lerp(f, neutral, w):
    return neutral + w * (f - neutral)


def lerp_later(f, neutral, w):
    """`lerp`, and each token after a weighted one by the mean of the weights before it: the text
    encoder is causal, so later tokens hold the word too."""
    count = np.cumsum(w != 1, 0)
    mean = np.cumsum(np.where(w != 1, w, 0), 0) / np.maximum(count, 1)
    return lerp(f, neutral, np.where((w == 1) & (count > 0), mean, w).astype(np.float32))


class Way(NamedTuple):
    move: Callable[..., np.ndarray]
    neutral: Callable[[Encoded, Prompts], tuple[int, ...]] | None = None  # None: the package's


def pad(prompts: Prompts) -> int:
    return prompts._special("<|endoftext|>", "tokenizer.json")


def padded(e: Encoded, prompts: Prompts) -> tuple[int, ...]:
    """A pad token in place of each weighted token."""
    return tuple(i if w == 1 else pad(prompts) for i, w in zip(e.ids, e.weights, strict=True))


def empty(e: Encoded, prompts: Prompts) -> tuple[int, ...]:
    """Pad tokens in place of the whole prompt, in its template."""
    tail = len(prompts._tail)
    head = len(prompts.encode("").ids) - tail
    return (*e.ids[:head], *[pad(prompts)] * (len(e.ids) - head - tail), *e.ids[-tail:])


WAYS = {
    "scaled (no effect: RMS norm)": Way(scaled),
    "scaled, mean restored (AUTOMATIC1111)": Way(scaled_to_mean),
    "from the empty prompt (ComfyUI)": Way(lerp, empty),
    "from a pad token": Way(lerp, padded),
    "from the mean of the tokens": Way(from_mean),
    "**from a comma** (ours)": Way(lerp),
    "from a comma, later tokens too": Way(lerp_later),
}


@contextmanager
def applied(way: Way) -> Iterator[None]:
    """The package applies weights in this way."""
    encode = emphasis.encode

    def with_neutral(prompts: Prompts, *args, **named) -> Encoded:
        e = encode(prompts, *args, **named)
        return replace(e, neutral=way.neutral(e, prompts)) if way.neutral and e.weights else e

    def move(f, neutral, weights):
        w = np.asarray(weights, np.float32)[:, None]
        return way.move(f.astype(np.float32), neutral.astype(np.float32), w)

    with (
        mock.patch.object(emphasis, "encode", with_neutral),
        mock.patch.object(emphasis, "emphasise", move),
    ):
        yield


class Conflict(NamedTuple):
    """A prompt that asks for two colours of one shape: the `weighted` one and the `other`."""

    words: tuple[str, str]  # in the prompt's order
    weighted: str
    other: str
    shape: str
    background: str

    def prompt(self, weight: float) -> str:
        named = (f"({w}:{weight})" if w == self.weighted else w for w in self.words)
        return f"a {' '.join(named)} {self.shape}, {self.background} background"


def conflicts(count: int) -> Iterator[Conflict]:
    rng = np.random.default_rng(5)
    for i in range(count):
        first, second, ground = (str(c) for c in rng.choice(COLOURS, 3, replace=False))
        weighted, other = (first, second) if i % 2 == 0 else (second, first)
        yield Conflict((first, second), weighted, other, str(rng.choice(list(data.SHAPES))), ground)


def won(pixels: np.ndarray, c: Conflict) -> tuple[bool, bool, bool]:
    """Whether the weighted colour has more pixels than the other, and whether shape and background
    are as asked."""
    labels = nearest(pixels)
    mine, its = (labels == COLOURS.index(name) for name in (c.weighted, c.other))
    piece = largest(mine | its)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return (
        bool(mine.sum() > its.sum()),
        piece is not None and best_shape(piece) == c.shape,
        COLOURS[int(np.bincount(edge).argmax())] == c.background,
    )


def ways(pipe: ZImage, count: int, only: str = "") -> Iterator[str]:
    """A row per way whose name contains `only`, and weight."""
    asked = list(conflicts(count))
    yield "| way | weight | weighted colour wins, % | shape, % | background, % |"
    yield "|---|---|---|---|---|"

    def line(name: str, weight: float) -> str:
        pictures = draw(pipe, [c.prompt(weight) for c in asked], prompt_weights=True)
        found = zip(*(won(p, c) for p, c in zip(pictures, asked, strict=True)), strict=True)
        return f"| {name} | {weight:g} | " + " | ".join(f"{percent(v):.1f}" for v in found) + " |"

    yield line("", 1)
    for name, way in WAYS.items():
        with applied(way):
            for weight in (0.5, 0.8, 1.3, 2) if "comma" in name else (0.5, 2):
                if only in name:
                    yield line(name, weight)


# -- a word of a held-out prompt -------------------------------------------------------------------


def words(pipe: ZImage, count: int) -> Iterator[str]:
    """Accuracy of what a weighted word says, and of everything else."""
    rng, scenes = np.random.default_rng([11, 97]), list[tuple[data.Scene, str]]()
    while len(scenes) < count:
        scene = data.random_scene(rng, held_out=True, kind="pair" if len(scenes) % 2 else "one")
        if scene.says_background:
            scenes.append((scene, data.caption(scene, "en", rng)))
    yield "| weighted word | weight | what it says, % | everything else, % |"
    yield "|---|---|---|---|"
    for attribute in ("background", "colour", "shape"):
        for weight in (0, 0.5, 0.8, 1, 1.3, 2):
            prompts = [weighted(caption, scene, attribute, weight) for scene, caption in scenes]
            pictures = draw(pipe, prompts, prompt_weights=True)
            found = [judge(p, scene) for p, (scene, _) in zip(pictures, scenes, strict=True)]
            right = [bool(f.pop(attribute)) for f in found]
            rest = [bool(v) for v in chain(*(f.values() for f in found))]
            yield f"| {attribute} | {weight:g} | {percent(right):.1f} | {percent(rest):.1f} |"


def weighted(caption: str, scene: data.Scene, attribute: str, weight: float) -> str:
    """The caption with a weight on its background's colour, or on its first shape or colour."""
    item = scene.items[0]
    word = {
        "background": f"{scene.background} background",
        "colour": f"{item.colour} {item.shape}",
        "shape": item.shape,
    }[attribute]
    first, rest = word.split(" ", 1) if attribute != "shape" else (word, "")
    before, after = caption.split(word, 1)
    return (
        f"{before}({first}:{weight}) {rest}{after}" if rest else f"{before}({word}:{weight}){after}"
    )


# -- text in quotes --------------------------------------------------------------------------------


def quoted(pipe: ZImage, count: int) -> Iterator[str]:
    """Held-out texts of three glyphs, in each language in turn."""
    rng, asked = np.random.default_rng([13, 97]), list[tuple[data.Scene, str]]()
    for i in range(count):
        scene = data.random_scene(rng, held_out=True, kind="text", glyphs=3)
        asked.append((scene, data.caption(scene, "zh" if i % 2 else "en", rng)))
    yield "| W | three glyphs, % | English | Chinese | colour and background, % |"
    yield "|---|---|---|---|---|"
    for weight in (0.8, 1, 1.1, 1.3, 1.6):
        pictures = draw(pipe, [caption for _, caption in asked], text_weight=weight)
        found = [judge(p, scene) for p, (scene, _) in zip(pictures, asked, strict=True)]
        read = [bool(f.pop("3 glyph")) for f in found]
        rest = [bool(v) for v in chain(*(f.values() for f in found))]
        figures = " | ".join(f"{percent(v):.1f}" for v in (read, read[::2], read[1::2], rest))
        yield f"| {weight:g} | {figures} |"


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["ways", "words", "quoted"]))
@click.option("--prompts", default=128, show_default=True, help="Number of prompts per row.")
@click.option("--way", default="", help="With `ways`: only those whose name contains this.")
def main(what: str, prompts: int, way: str) -> None:
    use_compile_cache()
    pipe = ZImage.load()
    rows = {
        "ways": lambda: ways(pipe, prompts, way),
        "words": lambda: words(pipe, prompts),
        "quoted": lambda: quoted(pipe, prompts),
    }
    for line in rows[what]():
        click.echo(line)


if __name__ == "__main__":
    main()
