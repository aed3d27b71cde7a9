"""The model inside the package: that its judge can be trusted, and that it draws what it is asked
for."""

import json
import re

import numpy as np
import pytest

from scripts.tiny import data as tiny_data
from scripts.tiny.evaluate import held_out, percent, table, verdicts
from scripts.tiny.judge import judge
from tests.schedules import every
from zimage_jax import Memory, ZImage
from zimage_jax.pipeline.pipeline import TINY


@pytest.fixture(scope="module")
def tiny() -> ZImage:
    return ZImage.load()


@pytest.mark.parametrize(
    "size",
    every([(128, 128), (96, 96), (192, 128), (256, 256)], [(128, 128), (96, 96)]),
)
def test_the_judge_is_right_about_true_drawings(size):
    rng, verdict = np.random.default_rng(0), []
    for _ in range(150):
        scene = tiny_data.random_scene(rng, held_out=True)
        verdict += judge(tiny_data.draw(scene, *size, rng), scene).values()
    assert percent(verdict) >= 99


def test_the_judge_sees_what_is_wrong():
    """Each attribute of a drawing judged against another scene's caption."""
    rng, verdict = np.random.default_rng(1), []
    for _ in range(100):
        asked = tiny_data.random_scene(rng, kind="one")
        drawn = tiny_data.random_scene(rng, kind="one")
        if (
            asked.items[0].colour != drawn.items[0].colour
            and asked.items[0].colour != drawn.background
        ):
            verdict.append(judge(tiny_data.draw(drawn, 128, 128, rng), asked)["colour"])
    assert percent(verdict) <= 2


def test_no_held_out_combination_is_drawn_for_training():
    rng = np.random.default_rng(2)
    assert not any(tiny_data.random_scene(rng).held_out for _ in range(300))
    assert all(scene.held_out for scene, *_ in held_out(50))


def test_it_is_small_enough_to_ship():
    files = [f for f in TINY.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    card = (TINY / "README.md").read_text("utf-8")
    assert all(word in card for word in ("Data", "Training", "Accuracy", "Limits"))


@pytest.mark.exhaustive
def test_it_draws_what_held_out_prompts_say(tiny):
    """A small sample with room for chance; scripts/tiny/evaluate.py has the figures."""
    rows = table(verdicts(tiny, list(held_out(48)), quiet=True))["all"]
    floors = {
        "background": 98,
        "colour": 97,
        "position": 95,
        "relation": 95,
        "shape": 90,
        "1 glyph": 90,
        "2 glyph": 85,
    }
    for attribute, least in floors.items():
        assert percent(rows[attribute]["en"] + rows[attribute]["zh"]) >= least, attribute


@pytest.mark.parametrize("size", every([(96, 96), (256, 256), (160, 96), (128, 192)], [(96, 96)]))
def test_it_draws_at_other_sizes(tiny, size):
    width, height = size
    pixels = (
        tiny.generate("a blue square on a yellow background", seed=1, width=width, height=height)
        .pictures[0]
        .pixels
    )
    assert pixels.shape == (height, width, 3)
    edge = pixels[:4].reshape(-1, 3).mean(0)
    assert np.abs(edge - tiny_data.COLOURS["yellow"]).max() < 40


@pytest.mark.exhaustive
def test_seeds(tiny):
    first, again, other = (tiny.generate("红色的圆形", seed=s) for s in (1, 1, 2))
    assert first.report["latents_sha256"] == again.report["latents_sha256"]
    np.testing.assert_array_equal(first.pictures[0].pixels, again.pictures[0].pixels)
    assert np.abs(first.pictures[0].pixels.astype(int) - other.pictures[0].pixels).mean() > 1


@pytest.mark.parametrize("schedule", every(["swap", "ring", "hybrid"], []))
def test_schedules_change_no_bit_of_trained_weights(tiny, schedule):
    job = {"seed": 4, "width": 128, "height": 128}
    expected = tiny.generate("a green star", **job)
    result = tiny.generate("a green star", **job, memory=Memory(schedule=schedule))
    np.testing.assert_array_equal(result.latents, expected.latents)
    assert result.report["peak_device_bytes"] < expected.report["peak_device_bytes"]


def test_the_command_says_which_model_draws(tmp_path, monkeypatch, capsys):
    from zimage_jax import cli, generate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)
    with pytest.raises(SystemExit) as leaving:
        cli.run(
            generate.command,
            ["a red circle", "-s", "1", "-o", "x.png", "--report", "r.json"],
            "generate",
        )
    out = capsys.readouterr()
    assert leaving.value.code == 0
    assert out.err == "tiny model (shapes, colours, short texts); the full model: see README\n"
    assert re.fullmatch(r"x.png  seed 1, [\d.]+ s, peak [\d.]+ MiB\n", out.out)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["width"], report["height"], report["model"]) == (128, 128, "tiny")
