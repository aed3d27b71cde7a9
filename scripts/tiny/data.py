"""The pictures and captions the embedded tiny model is trained on, and the judge that reads
pictures back.

A scene is drawn with pillow at any size and described in English or Chinese. Kinds: one shape, a
pair of shapes in a relation, and a text of one to three glyphs. Lengths are fractions of the
shorter side. One combination in ten (of shape, colour and background; of both shapes, colours and
the relation; of the glyphs) is held out by a hash and never drawn for training."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (245, 215, 50),
    "orange": (240, 135, 30),
    "purple": (135, 60, 175),
    "pink": (248, 150, 190),
    "cyan": (60, 200, 215),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
}
COLOURS_ZH = dict(
    zip(
        COLOURS,
        ("红", "绿", "蓝", "黄", "橙", "紫", "粉", "青", "棕", "黑", "白", "灰"),
        strict=True,
    )
)
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "diamond": "菱形",
    "cross": "十字形",
    "heart": "心形",
}
# what the tiny model never saw: scripts/tiny/train_lora.py teaches it
TAUGHT = {"arrow": "箭头"}
MIDDLE = "in the middle"  # where a shape lies when the caption does not say
POSITIONS = {  # centre of the shape, as fractions of width and height
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    MIDDLE: (0.5, 0.5),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}
POSITIONS_ZH = dict(
    zip(
        POSITIONS,
        ("左边", "右边", "上方", "下方", "中间", "左上角", "右上角", "左下角", "右下角"),
        strict=True,
    )
)
RELATIONS = {
    "left of": "左边",
    "right of": "右边",
    "above": "上方",
    "below": "下方",
    "inside": "里面",
}
SIZES = {
    "small": ("小", 0.155),
    "big": ("大", 0.285),
}  # radius; 0.215 when the caption does not say
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789山水火木日月人大小中上下口田土王天心手门云雨花鸟"
# pairs that no judge can tell apart at this size; either counts as the other
LOOK_ALIKES = str.maketrans({"0": "O", "1": "I"})
GLYPH_SHEET = Path(__file__).with_name("glyphs.png")
CELL = 48


@dataclass(frozen=True)
class Item:
    shape: str
    colour: str
    x: float  # centre, fraction of the width
    y: float
    radius: float  # fraction of the shorter side


@dataclass(frozen=True)
class Scene:
    kind: str  # "one", "pair" or "text"
    background: str
    items: tuple[Item, ...] = ()
    relation: str | None = None
    position: str | None = None
    size: str | None = None
    text: str = ""
    text_colour: str = "black"
    says_background: bool = True

    @property
    def combination(self) -> str:
        if self.kind == "text":
            return (
                f"text {self.text}"
                if len(self.text) > 1
                else f"text {self.text} {self.text_colour} {self.background}"
            )
        items = [f"{i.shape} {i.colour}" for i in self.items]
        return (
            f" {self.relation} ".join(items) if self.relation else f"{items[0]} {self.background}"
        )

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.combination.encode()) % 10 == 0


# -- scenes ----------------------------------------------------------------------------------------


def random_scene(
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    kind: str | None = None,
    glyphs: int = 0,
    shares: tuple[float, float, float] = (0.3, 0.35, 0.35),
) -> Scene:
    """A scene from the training combinations, or from the held-out ones. `shares` are those of one,
    pair and text."""
    while True:
        chosen = kind or rng.choice(["one", "pair", "text"], p=shares)
        scene = {"one": _one, "pair": _pair, "text": lambda r: _text(r, glyphs)}[chosen](rng)
        if scene.held_out == held_out:
            return scene


def taught_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A scene of one shape that the tiny model never saw; its combinations are held out as all
    are."""
    while True:
        scene = _one(rng)
        (item,) = scene.items
        shape = str(rng.choice(list(TAUGHT)))
        scene = replace(scene, items=(replace(item, shape=shape),))
        if scene.held_out == held_out:
            return scene


def _colours(rng, count: int) -> list[str]:
    return [str(c) for c in rng.choice(list(COLOURS), count, replace=False)]


def _background(rng, used: list[str]) -> tuple[str, bool]:
    """A background apart from the colours in use, and whether the caption names it."""
    if rng.random() < 0.3:  # unnamed backgrounds are white where that shows the picture
        return (
            ("white", False)
            if "white" not in used
            else ("gray" if "gray" not in used else "black", False)
        )
    return str(rng.choice([c for c in COLOURS if c not in used])), True


def _jitter(rng, spread: float) -> float:
    return float(rng.uniform(-spread, spread))


def _one(rng) -> Scene:
    (colour,) = _colours(rng, 1)
    background, says = _background(rng, [colour])
    size = str(rng.choice(list(SIZES))) if rng.random() < 0.3 else None
    radius = (SIZES[size][1] if size else 0.215) * (1 + _jitter(rng, 0.02))
    # one of nine places, the middle where none is told: a model this small learns outlines in few
    # places, and left to choose one it drew between two (64 % of shapes right, 96 % where it was
    # told)
    position = str(rng.choice(list(POSITIONS))) if rng.random() < 0.5 else None
    x, y = (c + _jitter(rng, 0.008) for c in POSITIONS[position or MIDDLE])
    # a big shape in a corner still lies wholly inside
    x, y = (float(np.clip(c, radius + 0.02, 0.98 - radius)) for c in (x, y))
    item = Item(str(rng.choice(list(SHAPES))), colour, x, y, radius)
    return Scene("one", background, (item,), position=position, size=size, says_background=says)


def _pair(rng) -> Scene:
    first, second = _colours(rng, 2)
    background, says = _background(rng, [first, second])
    relation = str(rng.choice(list(RELATIONS)))
    shapes = [str(s) for s in rng.choice(list(SHAPES), 2)]
    if relation == "inside":
        x, y = 0.5 + _jitter(rng, 0.008), 0.5 + _jitter(rng, 0.008)
        outer = 0.37 + _jitter(rng, 0.008)
        # the pointed shapes have less room around their centre
        inner = {"star": 0.125, "triangle": 0.13, "cross": 0.12, "diamond": 0.145}.get(
            shapes[1], 0.155
        )
        inner *= 1 + _jitter(rng, 0.02)
        dy = {"triangle": 0.07, "heart": -0.02}.get(shapes[1], 0.0)
        items = (Item(shapes[0], first, x, y + dy, inner), Item(shapes[1], second, x, y, outer))
    else:
        a, b = (0.2 * (1 + _jitter(rng, 0.02)) for _ in range(2))
        near, far = 0.26 + _jitter(rng, 0.008), 0.74 + _jitter(rng, 0.008)
        across = [0.5 + _jitter(rng, 0.008) for _ in range(2)]
        if relation in ("right of", "below"):
            near, far = far, near
        places = [(near, across[0]), (far, across[1])]
        if relation in ("above", "below"):
            places = [(y, x) for x, y in places]
        items = (Item(shapes[0], first, *places[0], a), Item(shapes[1], second, *places[1], b))
    return Scene("pair", background, items, relation=relation, says_background=says)


def _text(rng, glyphs: int) -> Scene:
    (colour,) = _colours(rng, 1) if rng.random() < 0.7 else ["black"]
    background, says = _background(rng, [colour])
    count = glyphs or int(rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2]))
    text = "".join(rng.choice(list(GLYPHS), count))
    return Scene("text", background, text=text, text_colour=colour, says_background=says)


# -- captions --------------------------------------------------------------------------------------


def caption(scene: Scene, language: str, rng: np.random.Generator) -> str:
    """One of several wordings. `language` is "en" or "zh"."""
    return (_english if language == "en" else _chinese)(
        scene, lambda *options: str(rng.choice(options))
    )


def _english(scene: Scene, pick) -> str:
    if scene.kind == "text":
        body = f'text: "{scene.text}"'
        if scene.text_colour != "black" or pick("say", "leave") == "say":
            body += pick(f" in {scene.text_colour}", f", {scene.text_colour}")
    else:
        names = [f"a {i.colour} {i.shape}" for i in scene.items]
        if scene.size:
            names[0] = f"a {scene.size} {names[0][2:]}"
        if names[0].startswith("a orange"):
            names[0] = "an" + names[0][1:]
        if scene.relation:
            names[1] = "an" + names[1][1:] if names[1].startswith("a orange") else names[1]
            body = f"{names[0]} {scene.relation} {names[1]}"
            if scene.relation in ("left of", "right of"):
                body = f"{names[0]} {pick('', 'to the ')}{scene.relation} {names[1]}"
        else:
            body = names[0] + (f" {scene.position}" if scene.position else "")
    if scene.says_background:
        ground = f"{scene.background} background"
        article = "an" if ground.startswith("orange") else "a"
        body = pick(
            f"{body} on {article} {ground}",
            f"{body}, {ground}",
            f"{ground}, {body}",
            f"on {article} {ground}, {body}",
        )
    elif scene.kind != "text":
        body = pick(body, body, f"a picture of {body}", f"draw {body}")
    return body


def _chinese(scene: Scene, pick) -> str:
    if scene.kind == "text":
        body = (
            pick("文字", "写着")
            if scene.text_colour == "black"
            else COLOURS_ZH[scene.text_colour] + "色文字"
        )
        body += f'："{scene.text}"'
    else:
        names = []
        for item in scene.items:
            size = SIZES[scene.size][0] if scene.size else ""
            names.append(
                f"{size}{COLOURS_ZH[item.colour]}色{pick('的', '')}{(SHAPES | TAUGHT)[item.shape]}"
            )
        if scene.relation:
            names = [pick("一个", "") + n for n in names]
            body = (
                f"{names[1]}{pick('的', '')}{RELATIONS[scene.relation]}{pick('有', '是')}{names[0]}"
            )
            if pick("plain", "turned") == "turned":
                body = f"{names[0]}在{names[1]}的{RELATIONS[scene.relation]}"
        elif scene.position:
            place = POSITIONS_ZH[scene.position]
            body = pick(
                f"一个{names[0]}在{place}", f"{names[0]}在{place}", f"{place}有一个{names[0]}"
            )
        else:
            body = pick("一个", "") + names[0]
    if scene.says_background:
        ground = COLOURS_ZH[scene.background] + "色背景"
        body = pick(f"{ground}上的{body}", f"{ground}，{body}", f"{body}，{ground}")
    elif scene.kind != "text":
        body = pick(body, body, f"画{body}")
    return body


# pieces the tokenizer's merges are learned from: whole words, so that none spans two attributes
WORDS_ZH = (
    [c + "色" for c in COLOURS_ZH.values()]
    + list(SHAPES.values())
    + list(POSITIONS_ZH.values())
    + [
        *RELATIONS.values(),
        "背景",
        "上的",
        "一个",
        "文字",
        "写着",
        "的",
        "在",
        "有",
        "是",
        "画",
        "小",
        "大",
        "，",
        "：",
    ]
)


# -- drawing ---------------------------------------------------------------------------------------


def _outline(shape: str) -> list[tuple[float, float]]:
    """A polygon in a unit circle, y downwards."""

    def ring(corners: int, start: float, radii=(1.0,)) -> list[tuple[float, float]]:
        angles = start + 2 * np.pi * np.arange(corners) / corners
        return [
            (r * np.cos(a), r * np.sin(a))
            for a, r in zip(angles, np.resize(radii, corners), strict=True)
        ]

    if shape == "circle":
        return ring(48, 0, (0.95,))
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)]
    if shape == "diamond":
        return [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)]
    if shape == "star":
        return ring(10, -np.pi / 2, (1.05, 0.42))
    if shape == "cross":
        a, b = 0.95, 0.32
        return [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    if shape == "arrow":
        a, b, neck = 1.0, 0.36, 0.1
        return [(-a, -b), (neck, -b), (neck, -0.85), (a, 0), (neck, 0.85), (neck, b), (-a, b)]
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)  # the classic heart curve
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(x / 17, (y + 2.5) / 15.5, strict=True))


OUTLINES = {shape: np.array(_outline(shape)) for shape in (*SHAPES, *TAUGHT)}


def draw(
    scene: Scene, width: int, height: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """uint8 RGB. With `rng`, colours vary by a few levels and glyphs by a pixel, as in training."""

    def colour(name: str) -> tuple[int, ...]:
        shift = rng.integers(-5, 6, 3) if rng is not None else 0
        return tuple(int(v) for v in np.clip(np.array(COLOURS[name]) + shift, 0, 255))

    over = 3  # drawn larger, then averaged down: smooth edges
    side = min(width, height)
    image = Image.new("RGB", (width * over, height * over), colour(scene.background))
    pen = ImageDraw.Draw(image)
    for item in reversed(scene.items):
        centre = np.array([item.x * width, item.y * height])
        points = (centre + item.radius * side * OUTLINES[item.shape]) * over
        pen.polygon([tuple(p) for p in points], fill=colour(item.colour))
    image = image.reduce(over)
    ink = colour(scene.text_colour) if scene.text else None
    for glyph, (left, top, size) in zip(
        scene.text, text_boxes(len(scene.text), width, height), strict=True
    ):
        if rng is not None:
            left, top = left + int(rng.integers(-1, 2)), top + int(rng.integers(-1, 2))
        mask = glyph_masks()[glyph].resize((size, size), Image.Resampling.BILINEAR)
        image.paste(ink, (left, top), mask)
    return np.asarray(image)


def text_boxes(count: int, width: int, height: int) -> list[tuple[int, int, int]]:
    """Left, top and size in pixels of each glyph's square: fixed places, as the tiny model learns
    them."""
    if not count:
        return []
    side = min(width, height)
    size = round(side * {1: 0.56, 2: 0.42, 3: 0.3}[count])
    pitch = size + round(side * 0.025)
    left = width / 2 - (pitch * (count - 1) + size) / 2
    return [(round(left + i * pitch), round(height / 2 - size / 2), size) for i in range(count)]


def make_glyph_sheet(font_path: str, index: int = 0) -> None:
    """Write the sheet of glyph masks, each scaled to fill its cell, from a font file."""
    font = ImageFont.truetype(font_path, 96, index=index)
    sheet = Image.new("L", (CELL * len(GLYPHS), CELL))
    for i, glyph in enumerate(GLYPHS):
        big = Image.new("L", (192, 192))
        ImageDraw.Draw(big).text((96, 96), glyph, 255, font=font, anchor="mm")
        cut = big.crop(big.getbbox())
        scale = (CELL - 2) / max(cut.size)
        cut = cut.resize([max(1, round(s * scale)) for s in cut.size], Image.Resampling.LANCZOS)
        sheet.paste(cut, (i * CELL + (CELL - cut.width) // 2, (CELL - cut.height) // 2))
    sheet.save(GLYPH_SHEET, optimize=True)


_masks: dict[str, Image.Image] = {}


def glyph_masks() -> dict[str, Image.Image]:
    if not _masks:
        sheet = Image.open(GLYPH_SHEET)
        _masks.update(
            {g: sheet.crop((i * CELL, 0, (i + 1) * CELL, CELL)) for i, g in enumerate(GLYPHS)}
        )
    return _masks
