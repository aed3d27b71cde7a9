"""Pictures that we did not make: every kind is read, and none does harm."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from zimage_jax.errors import UsageError
from zimage_jax.pipeline import opened
from zimage_jax.pipeline.opened import open_mask, open_picture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (12, 20), np.uint8)
GREY = RNG.integers(0, 256, (12, 20), np.uint8)
RGBA = np.dstack([PIXELS, ALPHA])


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any pixels."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(bytes(100)))


def refused(source, *words, name="--image", call=open_picture) -> str:
    with pytest.raises(UsageError) as fault:
        call(source, name)
    message = str(fault.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith(name)
    for word in words:
        assert word in message
    return message


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("webp", {"lossless": True}),
    ],
)
def test_colours_of_a_lossless_file_are_exact(tmp_path, kind, options):
    path = saved(tmp_path / f"x.{kind}", Image.fromarray(PIXELS), **options)
    for source in (path, str(path)):
        found = open_picture(source, "image")
        np.testing.assert_array_equal(found.pixels, PIXELS)
        assert found.alpha is None


def test_a_file_is_known_by_its_bytes_not_its_name(tmp_path):
    path = saved(tmp_path / "x.jpg", Image.fromarray(PIXELS), format="PNG")
    np.testing.assert_array_equal(open_picture(path, "image").pixels, PIXELS)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_alpha_and_the_colours_behind_it(tmp_path, kind):
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    found = open_picture(saved(tmp_path / f"x.{kind}", Image.fromarray(RGBA), **options), "image")
    np.testing.assert_array_equal(found.pixels, PIXELS)
    np.testing.assert_array_equal(found.alpha, ALPHA)


def test_an_opaque_alpha_is_none():
    opaque = np.dstack([PIXELS, np.full((12, 20), 255, np.uint8)])
    assert open_picture(opaque, "image").alpha is None
    assert open_picture(Image.fromarray(opaque), "image").alpha is None


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_modes_become_the_colours_that_pillow_shows(mode):
    image = Image.fromarray(RGBA).convert("RGB" if mode in ("HSV", "YCbCr", "P", "1") else "RGBA")
    image = image.convert(mode)
    found = open_picture(image, "image")
    np.testing.assert_array_equal(found.pixels, np.asarray(image.convert("RGB")))
    assert (found.alpha is not None) == (mode in ("LA", "RGBA"))


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpegs(tmp_path, mode):
    smooth = Image.linear_gradient("L").resize((32, 32)).convert(mode)
    path = saved(tmp_path / "x.jpg", smooth, quality=95)
    found = open_picture(path, "image").pixels.astype(int)
    assert np.abs(found - np.asarray(smooth.convert("RGB"))).max() < 12


def test_a_phones_jpeg_with_two_pictures_is_its_first(tmp_path):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    path = saved(tmp_path / "x.jpg", first, format="MPO", save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.format == "MPO"
        for source in (path, image):
            found = open_picture(source, "image").pixels
            assert found[8, 8, 0] > 250
            assert found[8, 8, 2] < 5


@pytest.mark.parametrize("transparency", [3, bytes([255, 0, 128])])
def test_a_palette_with_transparent_colours(tmp_path, transparency):
    image = Image.fromarray(RNG.integers(0, 8, (12, 20), np.uint8)).convert("P")
    image.putpalette(list(range(0, 240, 10)))
    found = open_picture(saved(tmp_path / "x.png", image, transparency=transparency), "image")
    index = np.asarray(image)
    expected = np.full((12, 20), 255, np.uint8)
    for i, a in enumerate(transparency) if isinstance(transparency, bytes) else [(3, 0)]:
        expected[index == i] = a
    np.testing.assert_array_equal(found.alpha, expected)
    np.testing.assert_array_equal(found.pixels[..., 1], index * 30 + 10)


def test_a_gif_of_one_frame(tmp_path):
    image = Image.fromarray(RNG.integers(0, 8, (12, 20), np.uint8)).convert("P")
    found = open_picture(saved(tmp_path / "x.gif", image, transparency=2), "image")
    np.testing.assert_array_equal(found.alpha == 0, np.asarray(image) == 2)


WIDE = RNG.integers(0, 65536, (12, 20), np.uint16)
WIDE[0, :3] = 0, 65535, 257 * 7


@pytest.mark.parametrize("kind", ["png", "tiff", "I", "I;16", "I;16B"])
def test_16_bits_are_scaled_not_clipped(tmp_path, kind):
    image = Image.fromarray(WIDE)
    if kind in ("png", "tiff"):
        source = saved(tmp_path / f"x.{kind}", image)
    elif kind == "I;16B":
        source = Image.frombytes("I;16B", (20, 12), WIDE.astype(">u2").tobytes())
    else:
        source = Image.fromarray(WIDE.astype(np.int32)) if kind == "I" else image
    found = open_picture(source, "image").pixels
    expected = np.rint(WIDE / 257).astype(np.uint8)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))


def test_16_bits_with_a_transparent_grey(tmp_path):
    path = saved(tmp_path / "x.png", Image.fromarray(WIDE), transparency=257 * 7)
    np.testing.assert_array_equal(open_picture(path, "image").alpha == 0, WIDE == 257 * 7)


def test_32_bits():
    refused(Image.fromarray(np.full((4, 4), 65536, np.int32)), "at most 16 bits")
    refused(Image.fromarray(np.full((4, 4), -1, np.int32)), "at most 16 bits")
    floats = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    found = open_picture(Image.fromarray(floats), "image")
    np.testing.assert_array_equal(found.pixels[..., 0], np.rint(floats * 255))
    refused(Image.fromarray(floats * 255), "floats from 0 to 1, got 0 to 255")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp", "image"])
def test_orientations(tmp_path, orientation, kind):
    corners = np.zeros((16, 32, 3), np.uint8)
    corners[:8, :16], corners[:8, 16:], corners[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    upright = Image.fromarray(corners)
    # what is stored is the picture, turned back
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{'png' if kind == 'image' else kind}"
    saved(path, stored, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    if kind == "image":
        with Image.open(path) as image:
            found = open_picture(image, "image").pixels
    else:
        found = open_picture(path, "image").pixels
    assert found.shape == corners.shape
    if kind != "jpg":
        np.testing.assert_array_equal(found, corners)
    for y, x in ((2, 2), (2, 29), (13, 2), (13, 29)):
        assert np.abs(found[y, x].astype(int) - corners[y, x]).max() < 60


# -- arrays ----------------------------------------------------------------------------------------


def test_arrays_of_every_kind():
    np.testing.assert_array_equal(open_picture(PIXELS, "image").pixels, PIXELS)
    np.testing.assert_array_equal(open_picture(RGBA, "image").alpha, ALPHA)
    np.testing.assert_array_equal(open_picture(GREY, "image").pixels, np.dstack([GREY] * 3))
    np.testing.assert_array_equal(
        open_picture(GREY > 99, "image").pixels[..., 0], (GREY > 99) * 255
    )
    for dtype in (np.float16, np.float32, np.float64):
        floats = (RGBA / 255).astype(dtype)
        found = open_picture(floats, "image")
        np.testing.assert_array_equal(found.pixels, PIXELS)
        np.testing.assert_array_equal(found.alpha, ALPHA)


def test_an_array_may_change_later():
    array = PIXELS.copy()
    found = open_picture(array, "image")
    array[:] = 0
    np.testing.assert_array_equal(found.pixels, PIXELS)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PIXELS.astype(np.int32), "got int32 [12, 20, 3]"),
        (PIXELS.astype(np.uint16), "got uint16 [12, 20, 3]"),
        (PIXELS[None], "got uint8 [1, 12, 20, 3]"),
        (PIXELS[..., :2], "got uint8 [12, 20, 2]"),
        (PIXELS[0, 0], "got uint8 [3]"),
        (np.array(["x"]), "got <U1 [1]"),
        (np.array(None), "got object []"),
        (PIXELS / 1.0, "floats from 0 to 1, got 0 to 255"),
        (np.full((4, 4), np.nan), "floats from 0 to 1, got nan"),
        (np.full((4, 4), -0.1), "floats from 0 to 1, got -0.1"),
        (np.full((4, 4), np.inf), "floats from 0 to 1, got inf"),
        (PIXELS[:0], "without pixels (20x0)"),
        (np.broadcast_to(np.uint8(0), (20000, 20000)), "20000x20000 pixels are too many"),
        (np.broadcast_to(np.uint8(0), (1, 65537)), "65537x1 pixels are too many"),
    ],
)
def test_arrays_that_are_no_picture(array, words):
    refused(array, words, name="image")
    refused(array, words, name="mask", call=open_mask)


@pytest.mark.parametrize("source", [None, 5, b"x.png", [PIXELS], {"path": "x.png"}])
def test_values_that_are_no_source(source):
    refused(source, "must be a path, a PIL image or a numpy array, got ")


# -- files that do harm ----------------------------------------------------------------------------


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "found a device, a pipe or a socket")
    refused(tmp_path, "found a folder")
    refused("", "found a folder")
    refused(tmp_path / "none.png", "none.png: cannot be read (No such file or directory)")
    refused("a\0b", "NUL")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF",
        b"<svg/>",
        b"%PDF-1.7",
        b"%!PS-Adobe",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"P6 1 1 255\n\0\0\0",
    ],
)
def test_other_files(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    refused(tmp_path / "x.png", "x.png: expected a PNG, JPEG, WEBP, BMP, TIFF or GIF picture")


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as f:
        f.truncate((256 << 20) + 1)
    refused(tmp_path / "x.png", "larger than the 268435456 bytes")


@pytest.mark.parametrize(
    ("width", "height"), [(60000, 60000), (16385, 16384), (65537, 1), (2**31 - 1, 2**31 - 1)]
)
def test_a_bomb_is_known_by_its_header(tmp_path, width, height):
    (tmp_path / "x.png").write_bytes(png_header(width, height))
    refused(tmp_path / "x.png", f"x.png: {width}x{height} pixels are too many")


def test_other_bombs(tmp_path):
    vp8x = b"VP8X" + struct.pack("<II", 10, 0x10) + b"\xff\xff\xff" * 2
    webp = b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x
    bmp = b"BM" + struct.pack(
        "<IIIIiiHHIIiiII", 100, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    gif = b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
    gif += b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"
    for name, data in (("x.webp", webp), ("x.bmp", bmp), ("x.gif", gif)):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "pixels are too many")


def test_pillows_own_limit_is_neither_used_nor_changed(tmp_path, monkeypatch):
    # with warnings as errors: one of Pillow's would be refused as damage
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for kind in ("png", "bmp", "tiff"):
        path = saved(tmp_path / f"x.{kind}", Image.fromarray(PIXELS))  # 240 pixels
        np.testing.assert_array_equal(open_picture(path, "image").pixels, PIXELS)
    assert Image.MAX_IMAGE_PIXELS == 200


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_truncated_files(tmp_path, kind, kept):
    path = saved(
        tmp_path / f"x.{kind}", Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, f"x.{kind}: a ", "that is damaged or not supported (")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    """Any byte may be wrong: what comes is a picture, or one line."""
    path = saved(tmp_path / f"x.{kind}", Image.fromarray(PIXELS))
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            found = open_picture(path, "image").pixels
        except UsageError:
            continue
        assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", ["png", "gif", "tiff", "webp"])
def test_several_frames_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path / f"x.{kind}", frames[0], save_all=True, append_images=frames[1:])
    refused(path, f"x.{kind}: expected one picture, found 3 frames or pages")
    with Image.open(path) as image:
        refused(image, "found 3 frames or pages", name="image")


def test_an_image_without_pixels():
    refused(Image.new("RGB", (0, 5)), "without pixels (0x5)")


def test_a_line_names_a_strange_path_safely(tmp_path):
    path = tmp_path / "a\nb\x1b[31m.png"
    path.write_bytes(b"no picture")
    assert "\x1b" not in refused(path, "a\\nb")


# -- masks -----------------------------------------------------------------------------------------


def test_masks_are_grey_from_0_to_1(tmp_path):
    for source in (GREY, Image.fromarray(GREY), np.dstack([GREY] * 3)):
        found = open_mask(source, "mask")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, GREY / np.float32(255))
    path = saved(tmp_path / "x.png", Image.fromarray(GREY > 99))
    np.testing.assert_array_equal(open_mask(path, "mask"), GREY > 99)


def test_soft_masks_stay_exact():
    floats = RNG.random((5, 7))
    np.testing.assert_array_equal(open_mask(floats, "mask"), floats.astype(np.float32))
    assert open_mask(floats.astype(np.float16), "mask").dtype == np.float32


def test_a_transparent_mask_is_over_black():
    white = np.full((12, 20, 3), 255, np.uint8)
    found = open_mask(np.dstack([white, ALPHA]), "mask")
    np.testing.assert_allclose(found, ALPHA / 255, atol=1e-6)
    over = Image.new("RGBA", (20, 12), "black")
    over.alpha_composite(Image.fromarray(RGBA))
    found = open_mask(RGBA, "mask") * 255
    assert np.abs(found - np.asarray(over.convert("L"))).max() <= 1.5


def test_a_mask_of_a_photo_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "x.png", Image.fromarray(GREY), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))))
    np.testing.assert_array_equal(open_mask(path, "mask"), expected / np.float32(255))


def test_every_reader_names_its_kind():
    for kind, _, reader in opened._READERS:
        assert reader.format == kind
