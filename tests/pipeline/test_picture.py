import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from zimage_jax.errors import UsageError
from zimage_jax.files import write_whole
from zimage_jax.pipeline import picture as image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)


def metadata(**changes) -> dict:
    return {
        "prompt": "a red circle",
        "negative_prompt": "",
        "seed": 42,
        "steps": 8,
        "width": 32,
        "height": 16,
        "guidance": 0.0,
        "noise": "torch",
        "model": "tiny",
        "versions": {"zimage_jax": "0"},
    } | changes


# text chunks of a PNG hold no NUL, and no half of a surrogate pair is text
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@given(prompt=text, negative=text, seed=st.integers(0, 2**64 - 1))
def test_metadata_comes_back(tmp_path_factory, prompt, negative, seed):
    data = metadata(prompt=prompt, negative_prompt=negative, seed=seed)
    path = write_whole(tmp_path_factory.mktemp("m") / "x.png", image.encode_png(PIXELS, data))
    assert image.read_metadata(path) == data
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), PIXELS)


def test_other_tools_find_their_lines():
    line = image.parameters(
        metadata(prompt="a\nb, c", negative_prompt="blurry", guidance=3.0, model="a, b: c")
    )
    assert line.startswith(
        "a\nb, c\nNegative prompt: blurry\nSteps: 8, Sampler: Euler, CFG scale: 4.0, Seed: 42, Size: 32x16, "
    )
    assert 'Model: "a, b: c"' in line


def test_the_mark_of_a_made_picture(tmp_path):
    path = write_whole(tmp_path / "x.png", image.encode_png(PIXELS, metadata()))
    with Image.open(path) as opened:
        opened.load()
        assert "trainedAlgorithmicMedia" in opened.text["XML:com.adobe.xmp"]
        assert opened.text["parameters"].startswith("a red circle\nSteps: 8")
        assert "prompt" not in opened.text  # ComfyUI takes that key for a graph


def test_no_metadata_means_none(tmp_path):
    path = write_whole(tmp_path / "x.png", image.encode_png(PIXELS))
    with Image.open(path) as opened:
        opened.load()
        assert not opened.text


def test_pixels_are_rounded_and_clipped():
    values = np.array([[[-2, -1, 0]], [[0.5, 1, 3]]], np.float32)
    np.testing.assert_array_equal(image.to_uint8(values), [[[0, 0, 128]], [[191, 255, 255]]])


def bomb(path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(image.KEY, "x" * (80 << 20), zip=True)
    Image.fromarray(PIXELS).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b"hello"), "not a PNG"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40), "a? ?(damaged|not a) ?PNG"),
        (lambda p: p.write_bytes(image.encode_png(PIXELS, metadata())[:-60]), "PNG"),
        (lambda p: Image.fromarray(PIXELS).save(p), "no zimage_jax metadata"),
        (lambda p: Image.fromarray(PIXELS).save(p, "JPEG"), "not a PNG"),
        (bomb, "damaged PNG"),
    ],
)
def test_a_picture_that_is_not_ours_is_one_line(tmp_path, make, words):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(UsageError, match=words) as fault:
        image.read_metadata(path)
    assert "\n" not in str(fault.value)
