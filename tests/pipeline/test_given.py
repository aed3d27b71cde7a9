"""Jobs that bring features or latents, and leave out the stages that they do not need."""

import numpy as np
import pytest

from tests.schedules import JOB, MODEL, SCAN, SCHEDULES, every
from zimage_jax import Memory, ZImage
from zimage_jax.errors import UsageError

SMALL = JOB | {"width": 32, "height": 32, "steps": 2}
SIDE = 4  # latents of 32 pixels


@pytest.fixture(scope="module")
def pipe(under):
    return under("resident")


@pytest.fixture(scope="module")
def latents(pipe) -> np.ndarray:
    return pipe.generate("a star", **SMALL).latents


def test_features_draw_what_their_prompt_draws_under_every_schedule(under):
    """And the text encoder is neither planned nor run."""
    expected = under("resident").generate("a red fox", **JOB).report["latents_sha256"]
    for name in ("resident", "ring"):
        pipe = under(name)
        (features,) = pipe.encode(["a red fox"])
        drawn = pipe.generate(features=features, **JOB, output="latents")
        assert drawn.report["latents_sha256"] == expected
        stages = {"context", "denoise"}
        assert set(drawn.plan.choices) == set(drawn.report["peak_device_bytes_by_stage"]) == stages
        assert drawn.pictures == []
        assert drawn.images is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", every(SCHEDULES | SCAN, ["half a block", "scan"], []))
def test_features_under(name, under):
    pipe = under(name)
    job = JOB | {"prompt": "a red fox", "guidance": 2.0, "negative_prompt": "blue"}
    expected = pipe.generate(**job).report["latents_sha256"]
    own, negative = pipe.encode(["a red fox", "blue"])
    job = JOB | {"features": own, "negative_features": negative, "guidance": 2.0}
    drawn = pipe.generate(**job, output="latents")
    assert drawn.report["latents_sha256"] == expected
    assert drawn.ledger.peak <= drawn.plan.peak_bytes


def test_features_vary_and_go_with_a_negative_prompt(pipe):
    options = SMALL | {"guidance": 2.0, "variance": 0.5}
    expected = pipe.generate("a fox", negative_prompt="a star", **options).latents
    (features,) = pipe.encode(["a fox"])
    drawn = pipe.generate(features=features, negative_prompt="a star", **options)
    assert set(drawn.plan.choices) == {"text", "context", "denoise", "decode"}
    # the texts were not encoded together: last bits
    np.testing.assert_allclose(drawn.latents, expected, atol=1e-4)


def test_weighted_words_are_in_the_features(pipe):
    options = {"prompt_weights": True}
    expected = pipe.generate("a (red:1.5) fox", **SMALL, **options).latents
    features = pipe.encode(["a (red:1.5) fox"], **options)
    np.testing.assert_array_equal(pipe.generate(features=features, **SMALL).latents, expected)


def test_several_pictures_of_features(pipe):
    features = pipe.encode(["a fox", "a star that is red"])
    drawn = pipe.generate(features=features, **SMALL | {"seed": [1, 2]}, output="latents")
    texts = ["a fox", "a star that is red"]
    expected = pipe.generate(texts, **SMALL | {"seed": [1, 2]}).latents
    np.testing.assert_array_equal(drawn.latents, expected)


def test_latents_begin_as_the_picture_that_they_are_of(pipe):
    picture = np.full((32, 32, 3), 90, np.uint8)
    encoded = pipe.generate("a", image=picture, **SMALL, strength=0.0, output="latents")
    assert set(encoded.plan.choices) == {"encode"}
    options = SMALL | {"strength": 0.6, "steps": 4}
    expected = pipe.generate("a fox", image=picture, **options)
    drawn = pipe.generate("a fox", latents=encoded.latents, **options)
    np.testing.assert_array_equal(drawn.latents, expected.latents)
    assert drawn.pictures[0].pixels.tobytes() == expected.pictures[0].pixels.tobytes()
    assert "encode" not in drawn.plan.choices
    assert drawn.report["image"]["strength"] == 0.6


def test_each_picture_has_its_latents(pipe, latents):
    two = np.concatenate([latents, -latents])
    drawn = pipe.generate("a fox", latents=two, **SMALL, strength=0.5).latents
    assert len(drawn) == 2
    assert not np.array_equal(*drawn)


def test_a_noise_mask_keeps_what_is_black(pipe, latents):
    mask = np.zeros((1, SIDE, SIDE), np.float32)
    mask[:, :, :2] = 1
    drawn = pipe.generate("a fox", latents=latents, noise_mask=mask, **SMALL | {"seed": 8}).latents
    np.testing.assert_allclose(drawn[:, :, 2:], latents[:, :, 2:], atol=1e-6)
    assert not np.allclose(drawn[:, :, :2], latents[:, :, :2], atol=0.1)


def test_decode_gives_what_a_picture_is_rounded_from(pipe, latents):
    drawn = pipe.generate("a star", **SMALL)
    pixels = drawn.pictures[0].pixels
    image = pipe.decode(drawn.latents)
    assert image.shape == (1, 32, 32, 3)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(np.round(image[0] * 255), pixels)
    alone = pipe.generate("a star", **SMALL, output="image")
    np.testing.assert_array_equal(alone.images, image)
    wide = np.random.default_rng(0).normal(size=(1, 12, 8, 16)).astype(np.float32)
    tiled = pipe.decode(wide, memory=Memory(vae_tile=64))
    assert np.abs(tiled - pipe.decode(wide)).max() > 1e-3, "tiles change the picture"


def test_an_image_with_a_mask_is_pasted(pipe):
    picture = np.full((32, 32, 3), 90, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :8] = 255
    options = SMALL | {"image": picture, "mask": mask}
    drawn = pipe.generate("a fox", **options, output="image").images
    expected = pipe.generate("a fox", **options).pictures[0].pixels
    np.testing.assert_array_equal(drawn[0], expected / np.float32(255))


def test_parts_of_a_job_leave_the_parameters_of_the_others_on_the_device(native):
    pipe = ZImage.load(native(MODEL))
    whole = pipe.generate("a fox", **SMALL).plan
    for _ in range(2):
        features = pipe.encode(["a star"])
        drawn = pipe.generate(features=features, **SMALL, output="latents")
        assert drawn.plan.kept == whole.kept
        assert drawn.report["copied_bytes"] == 0
        assert drawn.ledger.peak == drawn.plan.peak_bytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": np.zeros((3, 5), np.float32)}, r"features must be \[tokens, 32\], got"),
        ({"features": np.zeros((513, 32), np.float32)}, "513 tokens, the model reads at most 512"),
        ({"features": np.full((2, 32), np.nan, np.float32)}, "features must be finite"),
        ({"features": np.zeros((2, 32), np.int32)}, "features must be an array of floats"),
        ({"prompt": "a", "features": np.zeros((2, 32), np.float32)}, "give one of them"),
        ({}, "expected a prompt, or its features"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 4, 3), np.float32)}, "latents must be"),
        (
            {"prompt": "a", "latents": np.zeros((2, 4, 4, 16), np.float32), "seed": [1, 2, 3]},
            "of 2",
        ),
        ({"prompt": "a", "noise_mask": np.ones((1, 4, 4), np.float32)}, "noise_mask needs latents"),
        ({"prompt": "a", "output": "video"}, "expected one of picture, image, latents"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, message, pipe):
    with pytest.raises(UsageError, match=message):
        pipe.submit(**wrong)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((1, 4, 5), np.float32), "noise_mask must have the latents' size"),
        (np.zeros((1, 4, 4), np.float32), "noise_mask is all 0"),
        (np.full((1, 4, 4), 2, np.float32), "weights from 0"),
    ],
)
def test_masks_that_are_refused(mask, message, pipe, latents):
    with pytest.raises(UsageError, match=message):
        pipe.submit("a", latents=latents, noise_mask=mask)


def test_there_must_be_something_to_do(pipe, latents):
    with pytest.raises(UsageError, match="nothing to do"):
        pipe.generate("a", latents=latents, strength=0.0, output="latents")
    with pytest.raises(UsageError, match="give one of them"):
        pipe.generate("a", latents=latents, image=np.zeros((32, 32, 3), np.uint8))
