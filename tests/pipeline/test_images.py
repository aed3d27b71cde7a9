"""Pictures from pictures: against diffusers' pipelines, under every schedule, in regions, and repeated."""

import functools
import itertools

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import JOB, every
from zimage_jax import ZImage, ZImageWarning
from zimage_jax.errors import OutOfMemoryError, UsageError
from zimage_jax.model.samplers import SAMPLERS

SIZE = {"width": JOB["width"], "height": JOB["height"]}


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that a Lanczos filter and the VAE have something to keep."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 2, (3, 3))]
    return np.round(127.5 * (np.stack(waves, -1) + 1)).astype(np.uint8)


def hole(width: int, height: int) -> np.ndarray:
    """A mask: the middle is redrawn; its edge lies on no latent's."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4, width // 4 + 3 : -width // 4] = 255
    return mask


PHOTO, MASK = photo(**SIZE), hole(**SIZE)
LARGE = photo(96, 64)
JOBS = {
    "image": {"image": PHOTO, "strength": 0.7},
    "mask": {"image": PHOTO, "mask": MASK, "seed": [3, 4]},
    "soft mask": {"image": PHOTO, "mask": MASK, "mask_blur": 3.0, "strength": 0.8},
    "differential": {"image": PHOTO, "mask": MASK, "mask_blur": 3.0, "differential": True},
    "cropped mask": {"image": LARGE, "mask": hole(96, 64), "crop_mask": 4},
    "regions": {"image": LARGE, "width": 96, "height": 64, "region": 32, "strength": 0.6},
    "masked regions": {
        **{"image": LARGE, "width": 96, "height": 64, "region": 32, "mask": hole(96, 64)},
        **{"sampler": "euler_ancestral", "guidance": 1.5},
    },
    "no NFE": {"image": PHOTO, "strength": 0.0},
    **{name: {"sampler": name} for name in SAMPLERS},
    "heun, guided": {"sampler": "heun", "guidance": 2.0, "cfg_normalization": 1.0},
}


@pytest.fixture(scope="module")
def made(under):
    """(job, schedule, dtype) -> the second result: what a plan keeps is loaded by the first job."""

    @functools.cache
    def draw(job: str, schedule: str, dtype: str = "float32"):
        pipe, given = under(schedule, dtype), JOB | JOBS[job]
        pipe.generate("a red fox", **given)
        return pipe.generate("a red fox", **given)

    return draw


# -- against diffusers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    """(pipeline's name) -> diffusers' pipeline of the small model, which takes the posterior's mean."""
    from tests import reference

    @functools.cache
    def get(kind: str):
        return reference.from_pictures(kind, small.CONFIGS["plain"])

    return get


@pytest.mark.live
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("size", "guidance"), [((64, 64), 2.0), ((96, 48), 0.0)])
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_the_latents_are_those_of_diffusers(kind, size, strength, guidance, native, theirs):
    from tests import reference

    picture = photo(*size)
    mask = None
    if kind == "Inpaint":  # on whole latents: theirs are cut at 0.5
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[16:40, 8:40] = 255
    job = {"steps": 8, "guidance": guidance, "negative_prompt": "blurry" if guidance else ""}
    expected = reference.latents_from(theirs(kind), picture, mask, strength, "a red fox", 5, **job)
    pipe = ZImage.load(native("plain"))
    given = {"image": picture, "mask": mask, "strength": strength, "strength_rule": "diffusers"}
    result = pipe.generate("a red fox", seed=5, **given, **job)
    assert relative(result.latents, expected) <= 1e-4


@pytest.mark.live
def test_limits_of_guidance_are_those_of_diffusers(native):
    from tests import reference

    pipe, job = ZImage.load(native("plain")), {"steps": 4, "guidance": 3.0}
    limits = {"cfg_normalization": 0.7, "cfg_truncation": 0.2}
    expected = reference.limited(small.CONFIGS["plain"], "a red fox", 5, 64, **job, **limits)
    result = pipe.generate("a red fox", seed=5, width=64, height=64, **job, **limits)
    assert relative(result.latents, expected) <= 1e-4
    free = pipe.generate("a red fox", seed=5, width=64, height=64, **job)
    assert relative(free.latents, expected) > 1e-2


def test_the_base_models_defaults_are_its_own(native):
    job = ZImage.load(native("base")).submit("a red fox", seed=5, width=64, height=64)
    report = job.result().report
    assert (report["steps"], report["shift"], report["guidance"]) == (28, 6.0, 4.0)


@pytest.mark.live
@pytest.mark.parametrize("limits", [{}, {"cfg_normalization": 1.0, "cfg_truncation": 0.6}])
def test_the_base_model_agrees_with_diffusers(limits, native):
    """diffusers' True is a normalization of 1."""
    from tests import reference

    given = {"cfg_normalization": 0.0, "cfg_truncation": 1.0} | limits
    theirs = given | {"cfg_normalization": bool(given["cfg_normalization"])}
    job = {"steps": 6, "guidance": 4.0}
    expected = reference.limited(small.BASE, "a red fox", 5, 64, **job, **theirs)
    pipe = ZImage.load(native("base"))
    result = pipe.generate("a red fox", seed=5, width=64, height=64, steps=6, **given)
    assert relative(result.latents, expected) <= 1e-4
    turbo = ZImage.load(native("plain"))
    other = turbo.generate("a red fox", seed=5, width=64, height=64, **job, **given)
    assert relative(other.latents, expected) > 1e-2, "the shift is the model's own"


# -- under every schedule --------------------------------------------------------------------------

QUICK = ["masked regions", "no NFE"]
# each kind of schedule once: jobs without a picture run under all of them
KINDS = [
    *("swap", "hybrid", "low_vram", "one chunk", "half a block", "half a block, swapped"),
    *("half a block from disk", "one chunk streamed", "text staged", "text on the host"),
]
PAIRS = every(
    [
        *((job, "ring") for job in JOBS),
        *(("masked regions", name) for name in KINDS),
    ],
    [(job, "ring") for job in QUICK],
)


@pytest.mark.parametrize("case", PAIRS, ids=" in ".join)
def test_every_schedule_gives_the_same_bits(case, made):
    job, schedule = case
    result, resident = made(job, schedule), made(job, "resident")
    encode = result.plan.choices.get("encode")
    if encode is None or encode.rows is None:
        np.testing.assert_array_equal(result.latents, resident.latents)
    else:  # strips sum a norm's statistics in another order
        assert relative(result.latents, resident.latents) <= 1e-4


@pytest.mark.parametrize("job", every(JOBS, [], QUICK))
def test_the_scan_is_near(job, made):
    assert relative(made(job, "scan").latents, made(job, "resident").latents) <= 1e-5


@pytest.mark.parametrize(
    "case",
    every(
        itertools.product(JOBS, ["resident", "ring", "scan"]),
        [(job, "ring") for job in QUICK],
        [(job, "ring") for job in JOBS] + [(job, "scan") for job in QUICK],
    ),
    ids=" in ".join,
)
def test_the_ledger_agrees_with_the_plan(case, made):
    report = made(*case).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]
    assert report["peak_device_bytes"] == report["predicted_peak_bytes"]


@pytest.mark.exhaustive
def test_a_batch_gives_what_single_runs_give(under):
    pipe, seeds = under("ring"), [3, 4, 5]
    for name in ("soft mask", "masked regions", "euler_ancestral"):
        job = JOB | JOBS[name]
        together = pipe.generate("a red fox", **job | {"seed": seeds})
        for row, seed in zip(together.latents, seeds, strict=True):
            alone = pipe.generate("a red fox", **job | {"seed": seed})
            assert relative(row, alone.latents[0]) <= 1e-5


# -- what a picture and a mask do ------------------------------------------------------------------


def test_all_strength_is_text_to_image(under):
    pipe = under("ring")
    expected = pipe.generate("a red fox", **JOB).latents
    for rule in ("noise", "diffusers", "comfyui"):
        found = pipe.generate(
            "a red fox", **JOB, image=PHOTO, strength=1.0, strength_rule=rule
        ).latents
        np.testing.assert_array_equal(found, expected)


def test_no_strength_is_the_picture_through_the_vae(made, under):
    result = made("no NFE", "ring")
    assert (result.report["nfes"], result.report["schedule"]) == (0, "none")
    assert set(result.plan.choices) == {"encode", "decode"}
    other = under("ring").generate("another prompt", **JOB | JOBS["no NFE"] | {"seed": 9})
    np.testing.assert_array_equal(other.pictures[0].pixels, result.pictures[0].pixels)


@pytest.mark.parametrize("job", [job for job in QUICK if "mask" in job])
def test_outside_the_mask_a_picture_keeps_its_bytes(job, made):
    given = JOBS[job]
    for picture in made(job, "ring").pictures:
        assert picture.pixels.shape == given["image"].shape
        far = np.asarray(given["mask"]) == 0
        if "mask_blur" in given:
            far[3:-3] = False  # the blur ends 9 pixels from the mask, in row 3
        np.testing.assert_array_equal(picture.pixels[far], given["image"][far])
        inside = ~(np.asarray(given["mask"]) == 0)
        assert (picture.pixels[inside] != given["image"][inside]).mean() > 0.5


def test_a_canvas_is_drawn_from_again_and_again(under):
    pipe = under("ring")
    canvas = pipe.canvas(PHOTO, mask=MASK)
    again = pipe.generate("a red fox", **JOB | {"image": canvas})
    expected = pipe.generate("a red fox", **JOB, image=PHOTO, mask=MASK)
    np.testing.assert_array_equal(again.latents, expected.latents)
    assert expected.report["image"]["strength"] == 1
    larger = pipe.enlarged(PHOTO, 1.5)
    for region, strength in ((None, 0.5), (32, 0.3)):  # what keeps the composition
        report = pipe.generate("a", seed=1, steps=2, image=larger, region=region).report
        assert (report["image"]["strength"], report["width"]) == (strength, 96)
    assert repr(canvas).startswith("<Canvas 64x48, ")
    with pytest.raises(UsageError, match="width 96: the canvas has 64"):
        pipe.generate("a red fox", **JOB | {"image": canvas, "width": 96})


def test_the_report_says_what_a_picture_began_from(made):
    report = made("soft mask", "ring").report
    image = report["image"]
    assert (image["strength"], image["noise_level"]) == (0.8, pytest.approx(0.8))
    assert len(image["sha256"]) == 64
    assert (report["steps"], report["nfes"]) == (3, 2)
    assert report["first_preview_seconds"] > 0
    assert made("no NFE", "ring").report["first_preview_seconds"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.5}, "strength needs an image"),
        ({"mask": MASK}, "mask needs an image: there is none"),
        ({"fit": "pad"}, "fit needs an image"),
        ({"image": PHOTO, "strength": 1.5}, "strength must be from 0 to 1, got 1.5"),
        ({"image": PHOTO, "strength": float("nan")}, "strength must be from 0 to 1, got nan"),
        ({"image": PHOTO, "fit": "squeeze"}, "fit 'squeeze': expected one of crop, pad, stretch"),
        ({"image": PHOTO, "mask_blur": 3.0}, "mask_blur needs a mask"),
        ({"sampler": "lcm"}, "sampler 'lcm': expected one of euler"),
        ({"sigmas": "karras"}, "sigmas 'karras': expected one of simple"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"image": PHOTO, "region": 40}, "region must be a multiple of 32, got 40"),
        ({"image": PHOTO, "strength_rule": "a1111"}, "strength_rule 'a1111': expected one of"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(given, message, under):
    with pytest.raises(UsageError, match=message):
        under("ring").generate("a red fox", **JOB | given)


def test_what_has_no_effect_is_said(under):
    with pytest.warns(ZImageWarning, match="differential has no effect without a mask"):
        under("ring").generate("a", **JOB, image=PHOTO, differential=True, strength=0.0)
    with pytest.warns(ZImageWarning, match="limits of guidance have no effect"):
        under("ring").generate("a", **JOB | {"steps": 1}, cfg_normalization=1.0)


# -- regions ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_picture_that_does_not_fit_is_drawn_in_regions(monkeypatch):
    pipe, side = ZImage.load(), 128
    large = {"image": photo(96, 64), "steps": 2, "seed": 3, "width": 2 * side, "height": side}
    plan = pipe._plans.plan

    def only_regions(work, memory, budget, stages):
        if work.regions is None:
            raise OutOfMemoryError("too large", 1)
        return plan(work, memory, budget, stages)

    monkeypatch.setattr(pipe._plans, "plan", only_regions)
    with pytest.warns(ZImageWarning, match=f"too large; drawing in regions of {side} pixels"):
        found = pipe.generate("a", **large)
    assert found.report["region"] == side
    with pytest.raises(OutOfMemoryError, match="too large"):
        pipe.generate("a", **{k: v for k, v in large.items() if k != "image"})
    monkeypatch.undo()
    expected = pipe.generate("a", **large | {"region": side})
    np.testing.assert_array_equal(found.latents, expected.latents)


@pytest.mark.exhaustive
def test_a_picture_beyond_the_models_size_is_drawn_in_regions_without_a_seam():
    pipe, job = ZImage.load(), {"seed": 7, "strength": 0.5}
    small_one = pipe.generate("a red circle", seed=7).pictures[0]
    canvas = pipe.enlarged(small_one, 3)
    result = pipe.generate("a red circle", image=canvas, **job)
    assert result.report["region"] == 128
    large, regions = result.pictures[0].pixels, result.work.regions
    assert seam(large, regions) <= 1.3
    assert composition(large, small_one.pixels) >= 26
    alone = np.zeros_like(large)  # every region a job of its own
    for top, left in (tuple(8 * at for at in corner) for corner in regions.corners):
        square = slice(top, top + 128), slice(left, left + 128)
        drawn = pipe.generate("a red circle", image=canvas.pixels[square], **job)
        alone[square] = drawn.pictures[0].pixels
    assert seam(alone, regions) >= 2


def seam(pixels: np.ndarray, regions) -> float:
    """How much neighbouring rows or columns differ where a region begins or ends, over how much they
    differ at the other edges of tokens (16 pixels) near it: the median over all such lines."""
    side, found = regions.side, []
    for axis, length in enumerate((regions.height, regions.width)):
        lines = np.abs(np.diff(pixels.astype(np.float64), axis=axis)).mean((1 - axis, 2))
        starts = {corner[axis] for corner in regions.corners}
        edges = {at for at in starts if at} | {at + side for at in starts if at + side < length}
        for edge in edges:
            near = [edge + 2 * n for n in range(-3, 4) if 0 < edge + 2 * n < length]
            others = [lines[8 * at - 1] for at in near if at not in edges]
            found.append(lines[8 * edge - 1] / np.mean(others))
    return float(np.median(found))


def composition(large: np.ndarray, small_one: np.ndarray) -> float:
    """PSNR in dB of a large picture, pooled to the small one's size."""
    h, w = small_one.shape[:2]
    n = large.shape[0] // h
    pooled = large.reshape(h, n, w, n, 3).mean((1, 3))
    return 10 * np.log10(255**2 / np.mean((pooled - small_one) ** 2))
