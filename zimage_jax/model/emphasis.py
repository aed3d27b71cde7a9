"""Prompt weights and seed variance: changes to a prompt's text features, on the host.

A prompt may weigh its words, in the syntax of AUTOMATIC1111 (`modules/prompt_parser.py`):

    (text:1.3)    weight 1.3, from 0 to 4
    (text)        1.1
    [text]        1/1.1
    \\( \\) \\[ \\] \\: \\\\    these characters as text

Brackets nest and their weights multiply. A colon that stands directly in round brackets begins a
weight; what is no weight there is written `\\:`. Other programs take unmatched brackets for text:
here they are an error, so that a typing mistake does not change a picture silently.

Axes: T tokens, E feature width, N characters.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float

from .. import checks
from ..errors import UsageError
from .prompt import Encoded, Prompts

LARGEST_WEIGHT = 4.0
_DEFAULTS = {"(": 1.1, "[": 1 / 1.1}
_PAIRS = {")": "(", "]": "["}
_ESCAPED = "()[]:\\"
_QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』"}


class Span(NamedTuple):
    """Characters `start` to `end` (past the last) of a text, and their weight."""

    start: int
    end: int
    weight: float


# -- from a prompt to weights ----------------------------------------------------------------------


@dataclass
class _Group:
    """A pair of brackets while it is read: where it opens in the prompt, its weight, and where its
    last colon is in the prompt and in the plain text."""

    opens: int
    weight: float
    colon: tuple[int, int] | None = None


def parse(prompt: str) -> tuple[str, tuple[Span, ...]]:
    """The plain text of a prompt with weights, and the spans of it whose weight is not 1, in order.

    Raises UsageError, with the character's position (from 1), for a bracket without its partner, a
    weight that is no number, and a weight or a product of weights outside 0 to 4.
    """
    plain: list[str] = []
    open_groups: list[_Group] = []
    edges: list[tuple[int, _Group | None]] = []  # where a group opens in the plain text, or closes
    at = 0
    while at < len(prompt):
        c = prompt[at]
        if c == "\\" and at + 1 < len(prompt) and prompt[at + 1] in _ESCAPED:
            at += 1
            plain.append(prompt[at])
        elif c in _DEFAULTS:
            open_groups.append(_Group(at, _DEFAULTS[c]))
            edges.append((len(plain), open_groups[-1]))
        elif c in _PAIRS:
            if not open_groups or prompt[open_groups[-1].opens] != _PAIRS[c]:
                _refuse(f"{c!r} closes nothing", at)
            group = open_groups.pop()
            if group.colon is not None:
                group.weight = _weight(prompt, group.colon[0] + 1, at)
                del plain[group.colon[1] :]
            edges.append((len(plain), None))
        else:
            if c == ":" and open_groups and prompt[open_groups[-1].opens] == "(":
                open_groups[-1].colon = at, len(plain)
            plain.append(c)
        at += 1
    if open_groups:
        opens = open_groups[-1].opens
        _refuse(f"{prompt[opens]!r} is not closed", opens)
    return "".join(plain), tuple(_spans(edges))


def _weight(prompt: str, start: int, end: int) -> float:
    """The number in characters `start` to `end` of the prompt."""
    text = prompt[start:end].strip()
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", text):
        _refuse(f"{checks.shown(text)} is not a weight", start)
    weight = float(text)
    if not 0 <= weight <= LARGEST_WEIGHT:
        _refuse(f"weight {checks.shown(text)} is not from 0 to {LARGEST_WEIGHT:g}", start)
    return weight


def _spans(edges: list[tuple[int, _Group | None]]) -> list[Span]:
    """Spans between the edges of groups: each has the product of the groups around it."""
    products, found = [1.0], list[Span]()
    inner: _Group | None = None  # the group that opened last
    for (start, group), (end, _) in pairwise(edges):
        if group is None:
            products.pop()
        else:
            inner = group
            products.append(products[-1] * group.weight)
        weight = products[-1]
        if start == end or weight == 1:
            continue
        if not weight <= LARGEST_WEIGHT:  # also of inf * 0
            assert inner is not None
            _refuse(f"the weights multiply to more than {LARGEST_WEIGHT:g}", inner.opens)
        if found and found[-1].end == start and found[-1].weight == weight:
            start = found.pop().start
        found.append(Span(start, end, weight))
    return found


def _refuse(what: str, at: int) -> NoReturn:
    raise UsageError(
        f"prompt weights: {what} (character {at + 1}); a bracket or colon that is text needs a "
        "backslash before it"
    )


def escape(text: str) -> str:
    """The prompt whose plain text is `text`, without weights: `parse(escape(text))[0] == text`."""
    return re.sub(r"[()\[\]:\\]", r"\\\g<0>", text)


def quoted(text: str) -> tuple[tuple[int, int], ...]:
    """Where text in quotes is, without the quotes: (start, end) of each.

    Quotes are "…", “…”, 「…」 and 『…』. Single quotes are not, because apostrophes look like them.
    A quote that does not end is no quote.
    """
    found, at, endless = [], 0, set[str]()
    while at < len(text):
        end = _QUOTES.get(text[at])
        if end is not None and end not in endless:
            closes = text.find(end, at + 1)
            if closes < 0:
                endless.add(end)  # each search that finds nothing is made once: linear time
            else:
                if closes > at + 1:
                    found.append((at + 1, closes))
                at = closes
        at += 1
    return tuple(found)


def by_character(
    text: str, spans: tuple[Span, ...], text_weight: float = 1.0
) -> Float[np.ndarray, "N"]:
    """The weight of each character of a plain text, with `text_weight` times that of quoted text."""
    weights = np.ones(len(text))
    for start, end, weight in spans:
        weights[start:end] = weight
    if text_weight != 1:
        for start, end in quoted(text):
            weights[start:end] *= text_weight
    return weights


def encode(
    prompts: Prompts, text: str, *, has_weights: bool = False, text_weight: float = 1.0
) -> Encoded:
    """The tokens of a prompt, with their weights.

    `has_weights`: brackets weigh words and are no part of the text; without it they are text.
    `text_weight`: of text in quotes, times the weight that brackets give it. Raises UsageError like
    `parse`.
    """
    plain, spans = parse(text) if has_weights else (text, ())
    if not spans and text_weight == 1:
        return prompts.encode(plain)
    return prompts.encode(plain, weights=by_character(plain, spans, text_weight))


def check(prompt: str) -> None:
    """Raises UsageError for a prompt that `parse` refuses, or of which it leaves nothing."""
    if not parse(prompt)[0].strip():
        raise UsageError("the prompt is empty: say what to draw")


# -- from weights to features ----------------------------------------------------------------------


def emphasise(
    features: Float[np.ndarray, "T E"],
    neutral: Float[np.ndarray, "T E"],
    weights: Sequence[float],
) -> Float[np.ndarray, "T E"]:
    """Features moved by weights from `neutral` features (0) to their own (1) and beyond them:
    neutral + w (features - neutral).

    `neutral`: of the same prompt with a comma in place of each token whose weight is not 1. Later
    tokens hold a word too, because the text encoder is causal. They move by the mean of the weights
    before them, of which those above 1 count as 1: to move them beyond their own features harms
    what they say. A token that need not move keeps its features to the bit.

    ComfyUI's rule has features of an empty prompt as neutral ones. To scale features, as
    AUTOMATIC1111 does, has no effect: the caption embedding begins with an RMS norm of each token.
    Figures of all of them: scripts/results/emphasis.md.
    """
    w = np.asarray(weights, np.float64)
    weighted = w != 1
    count = np.cumsum(weighted)
    of_later = np.cumsum(np.where(weighted, np.minimum(w, 1), 0)) / np.maximum(count, 1)
    moved = np.where(weighted, w, np.where(count > 0, of_later, 1))[:, None].astype(np.float32)
    own, start = features.astype(np.float32), neutral.astype(np.float32)
    return np.where(moved == 1, own, start + moved * (own - start))


def to_run(encoded: Iterable[Encoded]) -> list[Encoded]:
    """What the text encoder runs for these texts: each, then the neutral one of each that has
    weights."""
    texts = list(encoded)
    return texts + [Encoded(e.neutral, "") for e in texts if e.weights]


def of_texts(
    encoded: Iterable[Encoded], features: Sequence[Float[np.ndarray, "_ E"]]
) -> list[Float[np.ndarray, "_ E"]]:
    """The features of each text by its weights, from those of `to_run`. A text without weights has
    its own array."""
    texts = list(encoded)
    neutral = iter(features[len(texts) :])
    return [
        emphasise(own, next(neutral), e.weights) if e.weights else own
        for e, own in zip(texts, features, strict=False)
    ]


def vary(features: Float[np.ndarray, "T E"], strength: float, seed: int) -> np.ndarray:
    """Features with noise of a picture's seed, so that pictures of one prompt differ more.

    The rule is InvokeAI's ("Seed Variance Enhancer"): half of the values, chosen by chance, change
    by strength * std * u, where std is that of all the features and u is uniform in [-1, 1). Each
    value takes one 64-bit number of NumPy's PCG64 of the seed, whose stream NumPy keeps: bit 0
    chooses, the highest 24 bits are u. Strength 0 returns the features themselves.
    """
    if not strength:
        return features
    raw = np.random.PCG64(seed).random_raw(features.size).reshape(features.shape)
    u = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    chosen = (raw & np.uint64(1)).astype(np.float32)
    values = features.astype(np.float32)
    scale = np.float32(strength * float(np.std(values, dtype=np.float64)))
    return values + chosen * scale * u
