import io
import json
import os

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
        "a\nb, c\nNegative prompt: blurry\nSteps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 4.0, Seed: 42, Size: 32x16, "
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "metadata steps must be a whole number, got NoneType"),
        ({"steps": 1001}, "metadata steps must be from 1 to 1000, got 1001"),
        ({"guidance": "much"}, "metadata guidance must be a number, got 'much'"),
        ({"guidance": True}, "metadata guidance must be a number, got True"),
        ({"seed": -1}, "metadata seed must be from 0 to 18446744073709551615, got -1"),
        ({"width": 0}, "metadata width must be from 1 to 65536, got 0"),
        ({"noise": "numpy"}, "metadata noise 'numpy': expected one of torch, jax"),
        ({"versions": []}, "metadata versions must be an object, got list"),
        ({"versions": {}}, "metadata versions lacks zimage_jax"),
        ({"model": 5}, "metadata model must be text, got 5"),
        ({"kv": {"reuse": 0}}, "metadata kv reuse must be from 1 to 1000, got 0"),
        ({"kv": {"magic": 0}}, "metadata kv has an unknown key, 'magic'"),
        ({"kv": []}, "metadata kv must be an object, got list"),
    ],
)
def test_metadata_of_a_stranger_are_checked(tmp_path, changes, words):
    path = write_whole(tmp_path / "x.png", with_text(json.dumps(metadata(**changes))))
    with pytest.raises(UsageError) as fault:
        image.read_metadata(path)
    assert words in str(fault.value)


@pytest.mark.parametrize("key", [key for key in image.FIELDS if not key.endswith("?")])
def test_metadata_that_lack_a_field_are_refused(tmp_path, key):
    found = metadata()
    del found[key]
    path = write_whole(tmp_path / "x.png", with_text(json.dumps(found)))
    with pytest.raises(UsageError, match=f"metadata lacks {key}"):
        image.read_metadata(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(metadata(prompt="\ud800")), "metadata prompt is not Unicode text"),
        ("[]", "expected a JSON object, found list"),
        ('{"guidance": NaN}', "NaN is not JSON"),
    ],
)
def test_metadata_that_are_no_json_of_ours(tmp_path, text, words):
    path = write_whole(tmp_path / "x.png", with_text(text))
    with pytest.raises(UsageError, match=words) as fault:
        image.read_metadata(path)
    assert len(str(fault.value)) < 500


def with_text(text: str) -> bytes:
    """A PNG with this for our metadata."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(image.KEY, text)
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UsageError, match="found a device, a pipe or a socket"):
        image.read_metadata(tmp_path / "x.png")
