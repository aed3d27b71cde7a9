"""The measuring of prompt weights and variance: what they ask for and how they count."""

import numpy as np
import pytest

from scripts.measure import emphasis as weights
from scripts.measure import variance
from scripts.tiny import data
from zimage_jax.model import emphasis
from zimage_jax.model.emphasis import parse


def test_a_weighted_word_changes_no_caption():
    rng, seen = np.random.default_rng(3), 0
    while seen < 40:
        scene = data.random_scene(rng, kind="pair" if seen % 2 else "one")
        if not scene.says_background:
            continue
        caption = data.caption(scene, "en", rng)
        for attribute in ("background", "colour", "shape"):
            plain, ((start, end, weight),) = parse(weights.weighted(caption, scene, attribute, 1.3))
            assert (plain, weight) == (caption, 1.3)
            item = scene.items[0]
            named = {"background": scene.background, "colour": item.colour, "shape": item.shape}
            assert plain[start:end] == named[attribute]
        seen += 1


def test_a_conflict_weighs_one_of_two_colours():
    for c in weights.conflicts(20):
        plain, ((start, end, _),) = parse(c.prompt(2))
        assert plain[start:end] == c.weighted != c.other
        assert c.weighted in c.words
        assert c.other in c.words
        scene = data.Scene("one", c.background, (data.Item(c.shape, c.weighted, 0.5, 0.5, 0.215),))
        assert weights.won(data.draw(scene, 128, 128), c) == (True, True, True)
        lost = c._replace(weighted=c.other, other=c.weighted)
        assert weights.won(data.draw(scene, 128, 128), lost) == (False, True, True)


def test_a_way_is_taken_back():
    own = emphasis.encode, emphasis.emphasise
    for way in weights.WAYS.values():
        with weights.applied(way):
            f = np.ones((2, 3), np.float32)
            assert emphasis.emphasise(f, f, [1.0, 2.0]).dtype == np.float32
    assert own == (emphasis.encode, emphasis.emphasise)


def test_distance_is_of_pairs():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert variance.distance([black, black]) == 0
    assert variance.distance([black, white]) == 255
    assert variance.distance([black, black, white]) == pytest.approx(170)


def test_a_drawing_is_right_whatever_its_colour():
    for scene, _, caption in variance.open_prompts(20):
        assert scene.items[0].shape in caption
        item = scene.items[0]
        colour = "red" if scene.background != "red" else "blue"
        drawn = data.Scene(
            "one", scene.background, (data.Item(item.shape, colour, item.x, item.y, 0.2),)
        )
        found = variance.judge_open(data.draw(drawn, 128, 128), scene)
        assert found == {"background": True, "shape": True}
