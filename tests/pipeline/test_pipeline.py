"""Prompt to picture: against diffusers' pipeline, batches against single runs, and what a user sees
of it."""

import importlib.metadata
import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import every
from tests.small import CASES
from zimage_jax import KVPolicy, Memory, ZImage, ZImageWarning
from zimage_jax.errors import ForeignError, NonFiniteError, UsageError
from zimage_jax.model.config import DefaultsConfig
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.report import versions
from zimage_jax.planning.work import Work
from zimage_jax.runtime.placement import Placement
from zimage_jax.runtime.programs import Programs
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save


@pytest.fixture(scope="module")
def load(native):
    loaded = {}

    def get(name: str) -> ZImage:
        if name not in loaded:
            loaded[name] = ZImage.load(native(name))
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def pipe(load) -> ZImage:
    return load("plain")


def draw(pipe: ZImage, case: small.Case, **changes):
    width, height = case.size(pipe.config)
    job = {
        "seed": list(case.seeds),
        "width": width,
        "height": height,
        "steps": case.steps,
        "guidance": case.guidance,
        "negative_prompt": case.negative_prompt,
    }
    return pipe.generate(list(case.prompts), **(job | changes))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-12))


@pytest.mark.exhaustive
def test_the_checkpoints_own_steps_and_guidance_count_where_none_are_given(tmp_path):
    config = replace(small.CONFIGS["plain"], defaults=DefaultsConfig(2, 1.5))
    tensors = small.random_tensors(config)
    models = {c: small.our_model(c, config, tensors[c]) for c in small.MODELS}
    tokenizer = small.tokenizer().to_str().encode()
    pipe = ZImage.load(save(tmp_path / "m", uniform(config, "float32"), models, tokenizer, {}))
    for given, expected in (({}, (2, 1.5)), ({"steps": 1, "guidance": 0.0}, (1, 0.0))):
        report = pipe.generate("a star", seed=3, width=32, height=32, **given).report
        assert (report["steps"], report["guidance"]) == expected


def test_a_bucket_beyond_the_models_positions_is_planned():
    """What of it is no caption is masked."""
    plain = small.CONFIGS["plain"]
    config = replace(plain, transformer=replace(plain.transformer, axes_lens=(256, 64, 64)))
    work = Work.of(config, 64, 64, Trajectory.of(1, 3.0), KVPolicy(), "float32", bucket=256)
    programs = Programs(uniform(config, "float32"), "float32", Placement.on())
    assert programs.inputs(work, 1).caption.cos.shape[:2] == (1, 256)


@pytest.mark.parametrize(
    "case",
    every(
        itertools.product(CASES, ["ring", "scan"]),
        [("plain", "ring")],
    ),
    ids=str,
)
def test_the_pipeline_agrees_with_diffusers(case, load, reference_outputs):
    name, schedule = case
    expected, result = (
        reference_outputs(name),
        draw(load(name), CASES[name], memory=Memory(schedule=schedule)),
    )
    assert relative(result.latents, expected["latents"]) <= 1e-4
    for picture, reference in zip(result.pictures, expected["pictures"], strict=True):
        assert psnr(picture.pixels, reference) >= 65


@pytest.mark.parametrize("guidance", every([0.0, 2.0], []))
def test_a_batch_gives_what_single_runs_give(pipe, guidance):
    prompts, seeds = ["a", small.LONG * 2, "红色"], [1, 2, 3]
    job = {"width": 48, "height": 32, "steps": 3, "guidance": guidance}
    together = pipe.generate(prompts, seed=seeds, **job)
    for row, prompt, seed in zip(together.latents, prompts, seeds, strict=True):
        alone = pipe.generate(prompt, seed=seed, **job)
        assert relative(row, alone.latents[0]) <= 1e-5


def test_the_same_seed_gives_the_same_bytes_and_another_another(pipe):
    job = {"width": 32, "height": 32, "steps": 2}
    first, again, other = (pipe.generate("a", seed=s, **job) for s in (5, 5, 6))
    assert (
        first.report["latents_sha256"]
        == again.report["latents_sha256"]
        != other.report["latents_sha256"]
    )


def test_the_negative_prompt_counts_with_guidance_alone(pipe):
    job = {"seed": 1, "width": 32, "height": 32, "steps": 2}
    with pytest.warns(ZImageWarning, match="no effect while guidance is 0"):
        ignored = pipe.generate("a", negative_prompt="b", **job)
    assert ignored.report["latents_sha256"] == pipe.generate("a", **job).report["latents_sha256"]
    with_it, without = (
        pipe.generate("a", negative_prompt=n, guidance=2.0, **job) for n in ("b", "")
    )
    assert with_it.report["latents_sha256"] != without.report["latents_sha256"]


@pytest.mark.parametrize("schedule", ["ring", "scan"])
def test_the_callback_sees_every_step(native, schedule):
    seen, previews = [], []

    def on_step(step):  # of a model that has made no preview yet
        seen.append(step)
        previews.append(step.previews())

    job = {"seed": 1, "width": 48, "height": 32, "steps": 4, "on_step": on_step}
    result = ZImage.load(native("plain")).generate("a", memory=Memory(schedule=schedule), **job)
    assert [s.index for s in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose([s.t for s in seen], [1000, 900, 750, 500], atol=0.1)
    assert {(p.shape, p.dtype) for p in previews} == {
        ((1, 32 // 8, 48 // 8, 3), np.dtype(np.uint8))
    }
    np.testing.assert_array_equal(seen[-1].latents, result.latents)


@pytest.mark.parametrize("schedule", ["ring", "scan"])
def test_a_callback_may_stop_the_job(pipe, schedule, capfd):
    seen = []

    def stop(step):
        seen.append(step.index)
        if step.index == 1:
            raise KeyboardInterrupt

    job = {"seed": 1, "width": 32, "height": 32, "steps": 4, "memory": Memory(schedule=schedule)}
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a", **job, on_step=stop)
    assert seen == [0, 1]
    assert capfd.readouterr().err == ""
    pipe.generate(
        "a", **job, on_step=lambda step: seen.append(step.index)
    )  # and the next job is none the worse
    assert seen == [0, 1, 0, 1, 2, 3]


def test_the_report(pipe, native):
    report = pipe.generate(["a", "b"], seed=[1, 2], width=32, height=48, steps=2).report
    assert report["prompt"] == ["a", "b"]
    assert report["seed"] == [1, 2]
    assert (report["width"], report["height"], report["steps"]) == (32, 48, 2)
    assert len(set(report["latents_sha256"])) == 2
    assert report["seconds"].keys() >= {"load", "text", "denoise", "decode", "total", "compile"}
    assert (
        report["seconds"]["total"]
        >= sum(report["seconds"][s] for s in ("text", "denoise", "decode")) * 0.99
    )
    assert report["versions"].keys() >= {"jax", "flax", "zimage_jax"}
    assert report["peak_device_bytes"] >= Checkpoint(native("plain")).nbytes("transformer")
    assert pipe.generate("a", seed=1, width=32, height=32, steps=1).report["prompt"] == "a"


def test_one_prompt_serves_many_seeds_and_random_seeds_differ(pipe):
    result = pipe.generate("a", seed=[-1, -1, 7], width=16, height=16, steps=1)
    seeds = result.report["seed"]
    assert len(set(seeds)) == 3
    assert seeds[2] == 7
    assert all(0 <= s < 2**32 for s in seeds)
    assert len(pipe.generate(["a", "b"], seed=-1, width=16, height=16, steps=1).pictures) == 2


def test_large_seeds(pipe):
    job = {"width": 16, "height": 16, "steps": 1}
    with pytest.warns(ZImageWarning, match="same noise as 5"):
        large = pipe.generate("a", seed=2**32 + 5, **job)
    assert (
        large.report["latents_sha256"] == pipe.generate("a", seed=5, **job).report["latents_sha256"]
    )
    assert pipe.generate("a", seed=2**64 - 1, noise="jax", **job).report["seed"] == 2**64 - 1


def test_a_long_prompt_warns_with_what_was_cut(pipe):
    prompt = "x" * 600 + " the end"
    with pytest.warns(ZImageWarning, match="longer than 512 tokens; cut off: '.*the end'"):
        result = pipe.generate(prompt, seed=1, width=16, height=16, steps=1)
    assert "cut off" in result.report["warnings"][0]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"width": 40}, "width must be a multiple of 16, got 40 (the nearest is 32)"),
        ({"height": 8}, "height must be a multiple of 16"),
        ({"height": -16}, "height must be a multiple of 16"),
        ({"width": 16 * 65}, "at most 1024 x 1024"),
        ({"steps": 0}, "steps must be from 1"),
        ({"seed": -2}, "seed -2 is out of range"),
        ({"seed": 2**64}, "out of range"),
        ({"guidance": -1.0}, "guidance must be from 0"),
        ({"guidance": float("nan")}, "guidance must be from 0"),
        ({"noise": "numpy"}, "noise 'numpy': expected one of torch, jax"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
        ({"prompt": []}, "0 prompts"),
    ],
)
def test_a_job_that_cannot_be_drawn_is_one_line(pipe, job, words):
    with pytest.raises(UsageError) as fault:
        pipe.generate(**({"prompt": "a", "seed": 1, "width": 32, "height": 32} | job))
    assert words in str(fault.value)


def test_latents_that_leave_the_finite_numbers_are_named(tmp_path):
    config, tensors = small.CONFIGS["plain"], small.random_tensors(small.CONFIGS["plain"])
    models = {c: small.our_model(c, config, tensors[c]) for c in small.MODELS}
    bias = models["transformer"].stem.final.bias
    bias[...] = bias[...] * np.float32("inf")
    path = save(
        tmp_path / "inf",
        uniform(config, "float32"),
        models,
        small.tokenizer().to_str().encode(),
        {},
    )
    for schedule in ("ring", "scan"):
        with pytest.raises(NonFiniteError, match="after NFE 1 of 3"):
            ZImage.load(path, memory=Memory(schedule=schedule)).generate(
                "a", seed=1, width=16, height=16, steps=3
            )


@pytest.mark.exhaustive
def test_bfloat16_compute_is_near_float32(native, pipe):
    half = ZImage.load(native("plain"), dtype="bfloat16")
    job = {"seed": 1, "width": 64, "height": 64}
    assert (
        1e-4 < relative(half.generate("a", **job).latents, pipe.generate("a", **job).latents) < 0.1
    )


def test_loading_something_else_is_said(tmp_path):
    with pytest.raises(ForeignError, match="no such folder"):
        ZImage.load(tmp_path / "nowhere")


def test_pictures_are_saved_with_their_making(pipe, tmp_path):
    from zimage_jax.pipeline.picture import read_metadata

    picture = pipe.generate("a", seed=3, width=16, height=16, steps=1).pictures[0]
    path = picture.save(tmp_path / "x.png")
    assert read_metadata(path) == picture.metadata
    assert picture.save(tmp_path / "x.png") == tmp_path / "x-2.png"


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions()["zimage_jax"] == "not installed"
