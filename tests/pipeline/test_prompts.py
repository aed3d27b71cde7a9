"""Prompt weights and seed variance from the job to the picture."""

import json

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import every
from zimage_jax import Memory, ZImage
from zimage_jax.errors import UsageError
from zimage_jax.pipeline.job import Job
from zimage_jax.pipeline.picture import read_metadata

JOB = {"width": 48, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def pipe(native) -> ZImage:
    return ZImage.load(native("plain"))


@pytest.fixture(scope="module")
def heavy(pipe):
    return pipe.generate("a (red:1.8) circle", seed=1, prompt_weights=True, **JOB)


def test_weights_of_1_change_no_bit(pipe):
    plain = pipe.generate("a red circle", seed=1, **JOB)
    for prompt in ("a (red:1) circle", "a [(red)] circle"):
        same = pipe.generate(prompt, seed=1, prompt_weights=True, **JOB)
        assert same.report["latents_sha256"] == plain.report["latents_sha256"]
        assert same.report["prompt"] == prompt
    assert (plain.report["prompt_weights"], plain.report["text_weight"]) == (False, 1.0)
    assert plain.report["variance"] == 0.0


def test_brackets_are_text_without_prompt_weights(pipe, heavy):
    literal = pipe.generate("a (red:1.8) circle", seed=1, **JOB)
    escaped = pipe.generate(r"a \(red\:1.8\) circle", seed=1, prompt_weights=True, **JOB)
    assert literal.report["latents_sha256"] == escaped.report["latents_sha256"]
    assert literal.report["latents_sha256"] != heavy.report["latents_sha256"]


def test_a_weight_counts(pipe, heavy):
    plain = pipe.generate("a red circle", seed=1, **JOB)
    assert relative(heavy.latents, plain.latents) > 1e-3
    text = pipe.generate('a "red" circle', seed=1, text_weight=1.8, **JOB)
    brackets = pipe.generate('a "(red:1.8)" circle', seed=1, prompt_weights=True, **JOB)
    assert text.report["latents_sha256"] == brackets.report["latents_sha256"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("guidance", every([0.0, 2.0], [2.0]))
def test_a_batch_gives_what_single_runs_give(pipe, guidance):
    prompts = ["a (red:1.8) circle", "a [star]", small.LONG, "a"]
    job = JOB | {
        "guidance": guidance,
        "negative_prompt": "(blurry:1.5)" if guidance else "",
        "prompt_weights": True,
        "variance": 0.3,
    }
    together = pipe.generate(prompts, seed=[1, 2, 3, 4], **job)
    for row, prompt, seed in zip(together.latents, prompts, (1, 2, 3, 4), strict=True):
        alone = pipe.generate(prompt, seed=seed, **job)
        assert relative(row, alone.latents[0]) <= 1e-5


def test_the_plan_counts_the_neutral_texts(native):
    memory = Memory(schedule="swap", text_encoder="staged")
    pipe = ZImage.load(native("plain"), memory=memory)
    report = pipe.generate("a (red:1.8) circle", seed=1, prompt_weights=True, **JOB).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]


def test_variance_is_of_the_prompts_and_of_each_seed(pipe, monkeypatch):
    seen, features = [], Job.features_of_contexts
    monkeypatch.setattr(
        Job, "features_of_contexts", lambda *of: seen.append(features(*of)) or seen[-1]
    )
    job = JOB | {"seed": [1, 2], "guidance": 2.0, "negative_prompt": "b"}
    drawn = [pipe.generate("a", variance=v, **job) for v in (0.0, 0.5)]
    (plain_1, plain_2, no_1, no_2), (varied_1, varied_2, still_1, still_2) = seen
    np.testing.assert_array_equal(plain_1, plain_2)
    for negative in (no_2, still_1, still_2):
        np.testing.assert_array_equal(no_1, negative)
    assert (varied_1 != varied_2).any()
    assert (varied_1 != plain_1).any()
    assert relative(drawn[1].latents, drawn[0].latents) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_weights": 1}, "prompt_weights must be a bool, got 1"),
        ({"text_weight": 4.1}, "text_weight must be from 0 to 4"),
        ({"text_weight": float("nan")}, "text_weight must be from 0 to 4"),
        ({"variance": -0.1}, "variance must be from 0 to 1"),
        ({"variance": True}, "variance must be a number"),
        ({"prompt_weights": True, "prompt": "a (b"}, "'(' is not closed (character 3)"),
        ({"prompt_weights": True, "prompt": "()"}, "the prompt is empty"),
    ],
)
def test_bad_values_are_one_line(changes, words):
    with pytest.raises(UsageError) as fault:
        Job.of(small.CONFIGS["plain"], **({"prompt": "a"} | JOB | changes))
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_negative_prompt_has_weights_too(pipe):
    job = JOB | {"seed": 1, "guidance": 1.0, "prompt_weights": True}
    with pytest.raises(UsageError, match=r"'\)' closes nothing \(character 2\)"):
        pipe.generate("a", negative_prompt="b)", **job)


def test_flags_count_and_from_image_repeats_them(run, tmp_path):
    small_job = ("--size", "32x16", "--steps", "2", "-s", 1)
    flags = ("--prompt-weights", "--text-weight", 1.5, "--variance", 0.2)
    assert run('(a:1.4) "b"', *small_job, *flags, "-o", "x.png")[0] == 0
    told = read_metadata(tmp_path / "x.png")
    assert told["prompt"] == '(a:1.4) "b"'
    assert (told["prompt_weights"], told["text_weight"], told["variance"]) == (True, 1.5, 0.2)
    assert run("--from-image", "x.png", "-o", "y.png")[0] == 0
    assert read_metadata(tmp_path / "y.png") == told
    code, out, _ = run("--from-image", "x.png", "--no-prompt-weights", "-o", "z.png", "--json")
    changed = json.loads(out)
    assert code == 0
    assert changed["prompt_weights"] is False
    assert changed["latents_sha256"] != told["latents_sha256"]


def test_a_bad_bracket_is_told_before_anything_is_loaded(run):
    code, _, err = run("a", "b (c", "--prompt-weights", "--model", "nowhere", model=None)
    assert code == 2
    assert "'(' is not closed (character 3)" in err
