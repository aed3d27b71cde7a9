"""Sizes of pictures: parsed from text, and checked against the model's limits."""

import math
import re

from ..errors import UsageError
from ..model.config import ModelConfig

LARGEST = 8192  # pixels of a picture's side, in regions
WHOLE = 2  # times the model's own side, up to which a picture is drawn whole: Z-Image's 2048


def parse_size(text: str, side: int, multiple: int) -> tuple[int, int]:
    """Width and height from "1280x720", or from a ratio such as "16:9".

    A ratio gives the largest size of exactly that ratio with at most `side` x `side` pixels, in
    multiples of `multiple`; if there is none, the nearest size. Raises UsageError for other text.
    """
    if match := re.fullmatch(r"([0-9]{1,5})[xX×]([0-9]{1,5})", text):
        return int(match[1]), int(match[2])
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise UsageError(f"--size {text}: expected WIDTHxHEIGHT in pixels or a ratio such as 16:9")
    a, b = int(match[1]), int(match[2])
    a, b = a // math.gcd(a, b), b // math.gcd(a, b)
    k = math.isqrt(side * side // (a * b * multiple * multiple))
    if k:
        return a * k * multiple, b * k * multiple
    width = side * math.sqrt(a / b)
    nearest = [max(multiple, round(v / multiple) * multiple) for v in (width, side * side / width)]
    return nearest[0], nearest[1]


def check_size(config: ModelConfig, width: int, height: int, region: int | None = None) -> None:
    """Raises UsageError for a size in pixels that the model cannot draw, in regions of that side
    if it is given."""
    multiple = config.pixel_multiple
    for name, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UsageError(
                f"{name} must be a multiple of {multiple}, got {value} (the nearest is {near})"
            )
    most_high, most_wide = (n * multiple for n in config.transformer.axes_lens[1:])
    wide, high = (min(n, region or n) for n in (width, height))
    if high > most_high or wide > most_wide:
        what = "regions of " if region else ""
        raise UsageError(
            f"this model draws {what}at most {most_wide} x {most_high} pixels, got {wide} x {high}"
        )
    if max(width, height) > LARGEST:
        raise UsageError(f"a picture has at most {LARGEST} pixels a side, got {width} x {height}")


def region_of(config: ModelConfig, width: int, height: int) -> int | None:
    """The side in pixels of the regions that a picture of this size is drawn in, if it begins from
    a picture: the model's own. None if it is drawn whole."""
    side = config.vae.sample_size
    return side if max(width, height) > WHOLE * side else None
