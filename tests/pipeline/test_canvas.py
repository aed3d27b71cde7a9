"""What a job starts from: fitted to its size, and put back without a change to what is kept."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zimage_jax.errors import UsageError
from zimage_jax.pipeline import canvas as module
from zimage_jax.pipeline.canvas import FITS, Canvas, enlarged_size
from zimage_jax.pipeline.opened import Opened, open_mask, open_picture
from zimage_jax.pipeline.sheet import drawn

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (70, 101, 3), np.uint8)  # not a multiple of 16
sides = st.integers(1, 70)
multiples = st.integers(1, 6).map(lambda n: n * 16)


def spot(height=70, width=101, top=20, bottom=40, left=30, right=60) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def drawing(canvas: Canvas, value: int | None = None) -> np.ndarray:
    if value is None:
        return np.random.default_rng(9).integers(0, 256, canvas.pixels.shape, np.uint8)
    return np.full_like(canvas.pixels, value)


def refused(*args, words, **options):
    with pytest.raises(UsageError) as fault:
        Canvas.of(*args, **options)
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


# -- sizes -----------------------------------------------------------------------------------------


def test_without_a_size_it_is_the_pictures_own_floored():
    canvas = Canvas.of(PIXELS)
    expected = Image.fromarray(PIXELS).resize((96, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(canvas.pixels, np.asarray(expected))
    assert canvas.mask is None
    exact = PIXELS[:64, :96]
    np.testing.assert_array_equal(Canvas.of(exact).pixels, exact)
    assert Canvas.of(PIXELS, multiple=8).pixels.shape == (64, 96, 3)
    assert Canvas.of(PIXELS, multiple=2).pixels.shape == (70, 100, 3)


def test_without_a_size_fit_has_no_effect():
    first = Canvas.of(PIXELS).sha256
    assert all(Canvas.of(PIXELS, fit=fit).sha256 == first for fit in FITS)


def test_one_side_keeps_the_ratio():
    assert Canvas.of(PIXELS, width=208).pixels.shape == (144, 208, 3)
    assert Canvas.of(PIXELS, height=16).pixels.shape == (16, 16, 3)  # 23 is nearest to 16
    assert Canvas.of(PIXELS[:1], width=16).pixels.shape == (16, 16, 3)


@given(high=sides, wide=sides, width=multiples, height=multiples, fit=st.sampled_from(FITS))
def test_every_fit_gives_the_exact_size(high, wide, width, height, fit):
    image = np.full((high, wide, 3), (1, 128, 255), np.uint8)
    mask = np.full((high, wide), 255, np.uint8)
    canvas = Canvas.of(image, mask, width=width, height=height, fit=fit)
    # whatever is cut or padded, one colour remains one colour
    np.testing.assert_array_equal(canvas.pixels, np.tile(image[0, 0], (height, width, 1)))
    np.testing.assert_array_equal(canvas.mask, np.ones((height, width), np.float32))


def test_crop_takes_the_centre():
    canvas = Canvas.of(PIXELS, width=64, height=64)  # 64/70 of the height
    box = (15, 0, 85, 70)
    expected = Image.fromarray(PIXELS).resize((64, 64), Image.Resampling.LANCZOS, box=box)
    np.testing.assert_array_equal(canvas.pixels, np.asarray(expected))
    # without a change of scale every pixel is one of the picture, though the rest is odd
    canvas = Canvas.of(PIXELS[:64], width=64, height=64)
    np.testing.assert_array_equal(canvas.pixels, PIXELS[:64, 18:82])


def test_pad_repeats_the_edge_and_redraws_it():
    canvas = Canvas.of(PIXELS[:64, :32], width=64, height=64, fit="pad")
    np.testing.assert_array_equal(canvas.pixels[:, 16:48], PIXELS[:64, :32])
    np.testing.assert_array_equal(canvas.pixels[:, :16], np.repeat(PIXELS[:64, :1], 16, 1))
    np.testing.assert_array_equal(canvas.pixels[:, 48:], np.repeat(PIXELS[:64, 31:32], 16, 1))
    assert canvas.mask is None
    mask = np.zeros((64, 32), np.uint8)
    canvas = Canvas.of(PIXELS[:64, :32], mask, width=64, height=64, fit="pad")
    np.testing.assert_array_equal(canvas.mask[:, 16:48], 0)
    np.testing.assert_array_equal(canvas.mask[:, :16], 1)
    np.testing.assert_array_equal(canvas.mask[:, 48:], 1)


def test_stretch_uses_the_whole_picture():
    canvas = Canvas.of(PIXELS, width=32, height=96, fit="stretch")
    expected = Image.fromarray(PIXELS).resize((32, 96), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(canvas.pixels, np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 100}, "width must be a multiple of 16, got 100 (the nearest is 96)"),
        ({"height": 8}, "height must be from 16 to 65536, got 8"),
        ({"width": 64.0}, "width must be a whole number, got 64.0"),
        ({"width": 65536, "height": 65536}, "65536x65536 pixels are too many"),
        ({"fit": "cover"}, "fit 'cover': expected one of crop, pad, stretch"),
        ({"mask_blur": math.nan}, "mask_blur must be from 0 to 512, got nan"),
        ({"mask_blur": 513}, "mask_blur must be from 0 to 512, got 513"),
        ({"mask_blur": "soft"}, "mask_blur must be a number, got 'soft'"),
        ({"mask_grow": -1}, "mask_grow must be from 0 to 512, got -1"),
        ({"mask_grow": 1.5}, "mask_grow must be a whole number, got 1.5"),
        ({"mask_grow": 1}, "mask_grow needs a mask"),
        ({"mask_blur": 1}, "mask_blur needs a mask"),
        ({"crop_mask": 8, "model_side": 64}, "crop_mask needs a mask"),
        ({"crop_mask": -1, "mask": spot()}, "crop_mask must be from 0 to 4096, got -1"),
        ({"crop_mask": 1, "mask": spot()}, "crop_mask needs width and height"),
        (
            {"crop_mask": 1, "mask": spot(), "fit": "pad", "model_side": 64},
            "fit pad has no effect with crop_mask",
        ),
        ({"mask": spot(64, 101)}, "mask must have the size of the image, 101x70, got 101x64"),
        ({"mask": np.full((70, 101), np.nan)}, "mask must have floats from 0 to 1, got nan"),
        ({"mask": np.zeros((70, 101), np.uint8)}, "mask is all black: nothing would be redrawn"),
        ({"mask": 5}, "mask must be a path, a PIL image or a numpy array, got 5"),
    ],
)
def test_what_is_refused(options, words):
    refused(PIXELS, words=words, **options)


def test_pictures_that_cannot_start_a_job():
    refused(PIXELS[:15], words="image must have at least 16 pixels per side, got 101x15")
    refused(None, words="image must be a path, a PIL image or a numpy array, got NoneType")
    clear = np.zeros((32, 32, 4), np.uint8)
    refused(clear, words="image is wholly transparent")
    refused(clear, np.full((32, 32), 255, np.uint8), words="image is wholly transparent")


def test_a_mask_that_vanishes_is_refused():
    speck = np.zeros((640, 640), np.uint8)
    speck[5, 5] = 255
    image = np.zeros((640, 640), np.uint8)
    words = "nothing of the mask is left at "
    refused(image, speck, width=16, height=16, words=words + "16x16 pixels")
    refused(image, speck, mask_blur=50, words=words)
    refused(image, speck, mask_blur=50, crop_mask=8, model_side=64, words=words)
    off_centre = np.zeros((64, 640), np.uint8)
    off_centre[:, :9] = 255  # what is cropped away
    refused(image[:64], off_centre, width=64, height=64, words=words)
    # a mask that is black and a fit without padding: the same line
    refused(image, image, width=64, height=64, fit="pad", words=words)


# -- masks -----------------------------------------------------------------------------------------


def test_the_transparent_part_is_redrawn():
    alpha = RNG.integers(0, 256, (32, 48), np.uint8)
    image = np.dstack([PIXELS[:32, :48], alpha])
    canvas = Canvas.of(image)
    np.testing.assert_allclose(canvas.mask, 1 - alpha / 255, atol=1e-6)
    np.testing.assert_array_equal(canvas.pixels, PIXELS[:32, :48])
    # a mask has the last word
    mask = spot(32, 48, 0, 9, 0, 9)
    np.testing.assert_array_equal(Canvas.of(image, mask).mask, mask / 255)


def test_a_white_mask_and_faint_weights():
    white = np.ones((32, 32), np.float32)
    np.testing.assert_array_equal(Canvas.of(PIXELS[:32, :32], white).mask, white)
    soft = np.full((32, 32), 0.25, np.float32)
    soft[0] = 0.0019
    soft[1] = 0.9981
    found = Canvas.of(PIXELS[:32, :32], soft).mask
    np.testing.assert_array_equal(found[:3, 0], np.float32([0, 1, 0.25]))


@given(
    points=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=4),
    grow=st.integers(1, 60),
)
def test_growing_adds_an_octagon(points, grow):
    mask = np.zeros((31, 41), np.float32)
    for number, (y, x) in enumerate(points, 1):
        mask[y, x] = max(mask[y, x], number / 4)
    grown = module._grown(mask, grow)
    ys, xs = np.mgrid[:31, :41]
    smallest, largest = np.zeros_like(mask), np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        away = np.hypot(ys - y, xs - x)
        np.maximum(smallest, mask[y, x] * (away <= grow - 1), out=smallest)
        square = (abs(ys - y) <= grow) & (abs(xs - x) <= grow)
        np.maximum(largest, mask[y, x] * (square & (away <= 1.083 * grow + 1)), out=largest)
    assert (smallest <= grown).all()
    assert (grown <= largest).all()


def test_growing_by_few_pixels_leaves_no_holes():
    for grow in range(1, 20):
        mask = np.zeros((41, 41), np.float32)
        mask[20, 20] = 1
        rows = module._grown(mask, grow)
        for row in np.concatenate([rows, rows.T]):
            found = np.flatnonzero(row)
            assert len(found) == 0 or len(found) == found[-1] - found[0] + 1
        assert rows[20].sum() == rows[:, 20].sum() == 2 * grow + 1
        np.testing.assert_array_equal(rows, rows[::-1])
        np.testing.assert_array_equal(rows, rows.T)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 9.0, 40.0])
def test_blur_is_a_gaussian(sigma):
    mask = RNG.random((37, 300)).astype(np.float32)
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    expected = np.pad(mask.astype(np.float64), reach, "edge")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, weights, "valid")
    found = module._blurred(mask, sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_blurred_mask_ends_in_exact_zeros_and_ones():
    mask = np.zeros((64, 320), np.uint8)
    mask[:, 160:] = 255
    found = Canvas.of(np.zeros_like(mask), mask, mask_blur=8).mask
    assert (found[:, : 160 - 24] == 0).all()
    assert (found[:, 160 + 24 :] == 1).all()
    assert (np.diff(found[0]) >= 0).all()
    assert np.unique(found[0, 140:180]).size == 40
    # weaker than can be seen: nothing changes
    same = Canvas.of(np.zeros_like(mask), mask, mask_blur=1e-300)
    np.testing.assert_array_equal(same.mask, mask / 255)


def test_grow_and_blur_are_in_pixels_of_the_image_as_given():
    image, mask = np.zeros((256, 256), np.uint8), spot(256, 256, 128, 129, 128, 129)
    grown = Canvas.of(image, mask, mask_grow=31, width=128, height=128).mask
    assert (grown > 0.5).any(0).sum() == (grown > 0.5).any(1).sum() == 31  # of 63 pixels
    both = Canvas.of(image, mask, mask_grow=31, mask_blur=6, width=128, height=128).mask
    assert 0 < both[64, 64 - 18] < 0.3 < 0.7 < both[64, 64 - 11] < 1


@pytest.mark.parametrize("size", [(48, 32), (160, 128)])
def test_masks_are_resized_without_overshoot(size):
    mask = (RNG.random((70, 101)) > 0.5) * np.uint8(255)
    found = Canvas.of(PIXELS, mask, width=size[0], height=size[1], fit="stretch").mask
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert abs(found.mean() - 0.5) < 0.05


# -- putting back ----------------------------------------------------------------------------------


def test_without_a_mask_the_drawing_is_the_picture():
    canvas = Canvas.of(PIXELS)
    drawn = drawing(canvas)
    np.testing.assert_array_equal(canvas.finish(drawn), drawn)
    with pytest.raises(UsageError, match="drawn must be 96x64 pixels, got 64x64"):
        canvas.finish(drawn[:, :64])


@given(
    high=st.integers(16, 60),
    wide=st.integers(16, 60),
    seed=st.integers(0, 2**32 - 1),
    density=st.floats(0.01, 1),
    blur=st.sampled_from([0, 0, 0.7, 3]),
    grow=st.sampled_from([0, 0, 2]),
    size=st.sampled_from([(None, None), (32, 64), (48, None)]),
    fit=st.sampled_from(FITS),
)
def test_what_is_masked_out_keeps_its_bytes(high, wide, seed, density, blur, grow, size, fit):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (high, wide, 3), np.uint8)
    mask = (rng.random((high, wide)) < density) * rng.random((high, wide))
    mask[high // 2, wide // 2] = 1
    width, height = size
    canvas = Canvas.of(
        image, mask, width=width, height=height, fit=fit, mask_blur=blur, mask_grow=grow
    )
    drawn = drawing(canvas)
    found = canvas.finish(drawn)
    kept, redrawn = canvas.mask == 0, canvas.mask == 1
    np.testing.assert_array_equal(found[kept], canvas.pixels[kept])
    np.testing.assert_array_equal(found[redrawn], drawn[redrawn])
    between = canvas.mask[..., None] * (drawn - canvas.pixels.astype(float)) + canvas.pixels
    assert np.abs(found - between).max() <= 0.501


@given(
    high=st.integers(1, 90),
    wide=st.integers(1, 90),
    data=st.data(),
    context=st.integers(0, 40),
    width=multiples,
    height=multiples,
    blur=st.sampled_from([0, 0, 2]),
)
def test_a_region_holds_the_mask_and_lies_inside(high, wide, data, context, width, height, blur):
    top, left = data.draw(st.integers(0, high - 1)), data.draw(st.integers(0, wide - 1))
    bottom, right = data.draw(st.integers(top + 1, high)), data.draw(st.integers(left + 1, wide))
    image = np.random.default_rng(high).integers(0, 256, (high, wide, 3), np.uint8)
    mask = spot(high, wide, top, bottom, left, right)
    canvas = Canvas.of(
        image, mask, width=width, height=height, crop_mask=context, mask_blur=blur, mask_grow=3
    )
    l, t, r, b = canvas.cut.region  # noqa: E741
    assert 0 <= l <= max(0, left - context) < min(wide, right + context) <= r <= wide
    assert 0 <= t <= max(0, top - context) < min(high, bottom + context) <= b <= high
    assert canvas.pixels.shape == (height, width, 3)
    # the ratio is that of the size, unless the picture ends
    if r - l < wide and b - t < high:
        assert abs((r - l) * height - (b - t) * width) < max(width, height)
    found = canvas.finish(drawing(canvas))
    weights = np.zeros((high, wide), np.float32)
    weights[t:b, l:r] = canvas.cut.mask
    assert weights[top:bottom, left:right].all()
    np.testing.assert_array_equal(found[weights == 0], image[weights == 0])
    found = canvas.finish(drawing(canvas, 77))
    assert (found[weights == 1] == 77).all()


def test_a_region_of_the_same_size_is_not_resized():
    mask = spot(top=24, bottom=40, left=40, right=56)
    canvas = Canvas.of(PIXELS, mask, crop_mask=8, model_side=32)
    assert canvas.cut.region == (32, 16, 64, 48)
    np.testing.assert_array_equal(canvas.pixels, PIXELS[16:48, 32:64])
    drawn = drawing(canvas)
    found = canvas.finish(drawn)
    np.testing.assert_array_equal(found[24:40, 40:56], drawn[8:24, 8:24])
    assert found.shape == PIXELS.shape


def test_a_region_is_shifted_and_ends_with_the_picture():
    corner = spot(top=0, bottom=10, left=91, right=101)
    assert Canvas.of(PIXELS, corner, crop_mask=0, width=32, height=16).cut.region == (
        81,
        0,
        101,
        10,
    )
    assert Canvas.of(PIXELS, corner, crop_mask=5, width=16, height=32).cut.region == (
        86,
        0,
        101,
        30,
    )
    tall = spot(top=0, bottom=70, left=50, right=51)
    canvas = Canvas.of(PIXELS, tall, crop_mask=0, width=64, height=16)
    assert canvas.cut.region == (0, 0, 101, 70)
    assert canvas.finish(drawing(canvas)).shape == PIXELS.shape


def test_a_finished_picture_is_a_new_one():
    canvas = Canvas.of(PIXELS, spot(), crop_mask=4, model_side=32)
    before = canvas.cut.picture.copy()
    first = canvas.finish(drawing(canvas, 0))
    canvas.finish(drawing(canvas, 255))
    np.testing.assert_array_equal(canvas.cut.picture, before)
    assert (first[20:40, 30:60] == 0).all()


# -- for the model ---------------------------------------------------------------------------------


def test_values_for_the_model():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (16, 256, 3))
    found = Canvas.of(ramp).to_model()
    assert found.dtype == np.float32
    assert found[0, 0, 0] == -1
    assert found[0, 255, 0] == 1
    expected = np.float32(2) * (np.arange(256, dtype=np.float32) / np.float32(255)) - np.float32(1)
    np.testing.assert_array_equal(found[0, :, 0], expected)


@pytest.mark.live
def test_values_for_the_model_are_those_of_diffusers():
    pytest.importorskip("torch", reason="the live comparison needs the reference extra")
    from diffusers.image_processor import VaeImageProcessor

    theirs = VaeImageProcessor(vae_scale_factor=16).preprocess(Image.fromarray(PIXELS))
    ours = Canvas.of(PIXELS).to_model()
    np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0).numpy())


def test_the_latents_mask_is_the_mean():
    mask = RNG.random((64, 96)).astype(np.float32)
    canvas = Canvas.of(PIXELS[:64, :96], mask)
    found = canvas.latent_mask(8)
    assert found.shape == (8, 12)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[2, 3], canvas.mask[16:24, 24:32].mean(), rtol=1e-6)
    white = Canvas.of(PIXELS[:64, :96], np.ones((64, 96), np.float32))
    np.testing.assert_array_equal(white.latent_mask(8), 1)
    assert Canvas.of(PIXELS).latent_mask(8) is None


def test_a_hash_names_pixels_mask_and_size():
    image = PIXELS[:64, :96]
    canvases = [
        Canvas.of(image),
        Canvas.of(image, np.ones((64, 96))),
        Canvas.of(image, spot(64, 96)),
        Canvas.of(image ^ 1),
        Canvas.of(image.reshape(96, 64, 3)),
    ]
    assert len({c.sha256 for c in canvases}) == len(canvases)
    assert canvases[0].sha256 == Canvas.of(image).sha256
    assert len(canvases[0].sha256) == 64


def test_what_is_open_already_is_not_opened_again(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    Image.fromarray(spot()).save(tmp_path / "b.png")
    first = Canvas.of(tmp_path / "a.png", str(tmp_path / "b.png"))
    image, mask = open_picture(tmp_path / "a.png", "--image"), open_mask(spot(), "--mask")
    assert Canvas.of(image, mask).sha256 == first.sha256
    with pytest.raises(FrozenInstanceError):
        first.pixels = PIXELS


# -- enlarging and sheets --------------------------------------------------------------------------


def opened(height: int, width: int) -> Opened:
    return Opened(np.broadcast_to(np.uint8(0), (height, width, 3)), None)


def test_enlarging():
    assert enlarged_size(opened(70, 101), 1.5, 16) == (144, 112)  # 151.5 x 105
    assert enlarged_size(opened(64, 64), 2, 16) == (128, 128)
    assert enlarged_size(opened(2, 2), 2, 16) == (16, 16)
    assert enlarged_size(opened(70, 101), 2, 8) == (200, 144)


@pytest.mark.parametrize("factor", [1, 0, -2, 8.1, math.nan, math.inf, "2", None, True])
def test_factors_that_do_not_enlarge(factor):
    with pytest.raises(UsageError, match="factor must be "):
        enlarged_size(opened(70, 101), factor, 16)


def test_enlarging_to_too_many_pixels():
    with pytest.raises(UsageError, match="32768x16384 pixels are too many"):
        enlarged_size(opened(2048, 4096), 8, 16)


@settings(max_examples=20)  # the font takes 40 ms to load
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 7), st.text("0123456789", max_size=40)
)
def test_a_sheet_holds_every_picture_unscaled(height, width, count, label):
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (count, height, width, 3), np.uint8))
    sheet, places = drawn(pictures, [label] * count)
    for (left, top), picture in zip(places, pictures, strict=True):
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], picture)


def test_labels_stand_under_their_pictures():
    white = np.full((64, 200, 3), 255, np.uint8)
    sheet, places = drawn([white] * 3, ["seed 1", "", "4" * 20])
    dark = [(sheet[top + 64 : top + 96, left : left + 200] < 128).any() for left, top in places]
    assert dark == [True, False, True]
    square, _ = drawn([white] * 9, [""] * 9)
    assert 0.5 < square.shape[0] / square.shape[1] < 2


def test_a_sheet_of_too_many_pixels():
    large = np.broadcast_to(np.uint8(0), (9000, 9000, 3))
    with pytest.raises(UsageError, match="pixels are too many"):
        drawn([large] * 5, ["a"] * 5)
