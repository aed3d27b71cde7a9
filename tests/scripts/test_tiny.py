"""The model inside the package: that its judge can be trusted, and that it draws what it is asked
for."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from scripts.tiny import data as tiny_data
from scripts.tiny.evaluate import held_out, percent, table, verdicts
from scripts.tiny.judge import judge
from scripts.tiny.train_lora import LORA, taught
from tests.schedules import every
from zimage_jax import Memory, ZImage
from zimage_jax.weights.search import TINY


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


def shapes_right(tiny, scenes: int, lora: list) -> float:
    """Per cent of pictures of the taught shape that show it."""
    judged = verdicts(tiny, list(taught(scenes)), quiet=True, lora=lora)
    return percent([found["shape"] for *_, found in judged])


@pytest.mark.long
def test_a_lora_teaches_it_a_shape_that_it_never_saw(tiny):
    assert shapes_right(tiny, 64, [(LORA, 1.0)]) >= 80
    assert shapes_right(tiny, 64, []) <= 20


@pytest.mark.long
def test_with_the_lora_it_draws_all_else_as_before(tiny):
    """A small sample with room for chance; the card has the figures."""
    prompts = list(held_out(48))
    before, after = (
        table(verdicts(tiny, prompts, quiet=True, lora=lora))["all"] for lora in ([], [(LORA, 1.0)])
    )
    for attribute in ("background", "colour", "position", "relation", "shape", "1 glyph"):
        was, now = ([v for of in rows[attribute].values() for v in of] for rows in (before, after))
        assert percent(now) >= percent(was) - 6, attribute


def test_the_lora_is_small_and_described():
    assert LORA.stat().st_size < 300_000
    card = LORA.with_suffix(".md").read_text("utf-8")
    assert all(word in card for word in ("Data", "Training", "Accuracy", "Limits"))


def test_the_judge_is_right_about_the_taught_shape():
    rng = np.random.default_rng(3)
    scenes = [tiny_data.taught_scene(rng, held_out=True) for _ in range(100)]
    right = [judge(tiny_data.draw(s, 128, 128, rng), s)["shape"] for s in scenes]
    others = [tiny_data.random_scene(rng, kind="one") for _ in range(100)]
    wrong = [
        judge(
            tiny_data.draw(
                replace(s, items=(replace(s.items[0], shape=o.items[0].shape),)), 128, 128, rng
            ),
            s,
        )["shape"]
        for s, o in zip(scenes, others, strict=True)
    ]
    assert (percent(right) >= 98, percent(wrong) <= 2) == (True, True)


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
