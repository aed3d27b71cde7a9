"""python -m zimage_jax.generate with pictures: flags, files, and what is said of bad ones."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.test_images import hole, photo
from tests.pipeline.test_opened import png_header
from zimage_jax.pipeline.picture import read_metadata

SMALL = ("--size", "48x32", "--steps", 2)


@pytest.fixture
def files(run, tmp_path):
    """A picture and a mask in the folder that the command runs in."""
    Image.fromarray(photo(48, 32)).save(tmp_path / "in.png")
    Image.fromarray(hole(48, 32)).save(tmp_path / "mask.png")
    return run


def test_a_picture_from_a_picture_is_repeated_bit_for_bit(files, tmp_path):
    words = ("a star", "--image", "in.png", "--mask", "mask.png", "--mask-blur", 1, *SMALL)
    more = ("--sampler", "heun", "--sigmas", "beta", "--shift", 4, "-s", 5)
    code, out, err = files(*words, *more, "--strength", 0.7, "-o", "a.png")
    assert code == 0, err
    assert "from a picture, 48x32: strength 0.7 is noise level 0.700, " in err
    told = read_metadata(tmp_path / "a.png")
    assert (told["sampler"], told["sigmas"], told["shift"]) == ("heun", "beta", 4.0)
    assert (told["image"]["image"], told["image"]["mask"]) == ("in.png", "mask.png")
    assert files("--from-image", "a.png", "-o", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    code, out, _ = files("--from-image", "a.png", "--strength", 0.2, "--json", "-o", "c.png")
    assert json.loads(out)["image"]["strength"] == 0.2


def test_a_picture_at_its_own_size_is_repeated(run, tmp_path):
    """49 x 33 pixels become 48 x 32: stretched, and stretched again."""
    Image.fromarray(photo(49, 33)).save(tmp_path / "odd.png")
    assert run("a", "--image", "odd.png", "--steps", 2, "-s", 1, "-o", "a.png")[0] == 0
    assert run("--from-image", "a.png", "-o", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_is_repeated_from_the_same_picture_alone(files, tmp_path):
    assert files("a", "--image", "in.png", *SMALL, "-s", 1, "-o", "a.png")[0] == 0
    Image.fromarray(photo(48, 32, 1)).save(tmp_path / "in.png")
    code, _, err = files("--from-image", "a.png", "-o", "b.png")
    assert code == 2
    assert "in.png is not the picture that --from-image was drawn from" in err
    (tmp_path / "in.png").unlink()
    code, _, err = files("--from-image", "a.png", "-o", "b.png")
    assert code == 2
    assert "drawn from in.png, which is not beside it: give it with --image" in err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.exhaustive
def test_seeds_are_explored_and_one_is_enlarged(run, tmp_path):
    words = ("a red circle", "--explore", 4, "-s", 3, "--steps", 2, "-o", "{seed}.png")
    code, out, _ = run(*words, model=None)
    assert code == 0
    assert out.splitlines()[-1].endswith("3-sheet.png  contact sheet")
    sheet = np.asarray(Image.open(tmp_path / "3-sheet.png"))
    for seed in (3, 4, 5, 6):
        drawn = np.asarray(Image.open(tmp_path / f"{seed}.png"))
        assert drawn.shape == (64, 64, 3)
        places = np.lib.stride_tricks.sliding_window_view(sheet, drawn.shape)[:, :, 0]
        assert (places == drawn).all((2, 3, 4)).any()
    pick = ("--from-image", "3-sheet.png", "--pick", 5)
    assert run(*pick, "-o", "large.png", model=None)[0] == 0
    told = read_metadata(tmp_path / "large.png")
    assert (told["seed"], told["prompt"], told["width"]) == (5, "a red circle", 128)
    assert run("--from-image", "large.png", "-o", "again.png", model=None)[0] == 0
    assert (tmp_path / "large.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    code, _, err = run("--from-image", "3-sheet.png", "--pick", 9, model=None)
    assert (code, "no seed 9; it has 3, 4, 5, 6" in err) == (2, True)
    code, _, err = run("--from-image", "5.png", "--pick", 5, model=None)
    assert (code, "expected a contact sheet" in err) == (2, True)


@pytest.mark.exhaustive
def test_a_picture_is_enlarged_with_its_own_prompt(run, tmp_path):
    assert run("a red circle", "-s", 7, "--steps", 2, "-o", "s.png", model=None)[0] == 0
    assert run("--from-image", "s.png", "--enlarge", 1.5, "-o", "l.png", model=None)[0] == 0
    told = read_metadata(tmp_path / "l.png")
    assert (told["width"], told["prompt"], told["seed"]) == (192, "a red circle", 7)
    assert (told["image"]["strength"], told["image"]["fit"]) == (0.5, "stretch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "--mask", "mask.png"), "--mask needs --image"),
        (("a", "--enlarge", 2), "--enlarge needs --from-image"),
        (("a", "--pick", 2), "--pick needs --from-image"),
        (("a", "--strength", 0.5), "strength needs an image"),
        (("a", "--image", "in.png", "--strength", "nan"), "--strength must be from 0 to 1"),
        (("a", "--image", "in.png", "--mask", "other.png"), "mask must have the size of the image"),
        (("a", "--image", "none.png"), "cannot be read"),
        (("a", "--image", "text.png"), "expected a PNG, JPEG, WEBP, BMP, TIFF or GIF picture"),
        (("a", "--image", "bomb.png"), "60000x60000 pixels are too many"),
        (("a", "--image", "black.png", "--mask", "black.png"), "nothing would be redrawn"),
        (("a", "--explore", 4, "--image", "in.png"), "it cannot begin from a picture"),
        (("--from-image", "own.png", "--enlarge", 2, "--width", 64), "--enlarge sets the size"),
        (("--from-image", "own.png", "--enlarge", 2, "--image", "in.png"), "--image cannot be"),
        (("a", "--explore", 4, "-n", 2), "--explore and --count both set"),
        (("a", "b", "--explore", 4), "--explore takes one prompt"),
    ],
    ids=str,
)
def test_bad_pictures_are_one_line(words, message, files, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(photo(64, 32)).save(tmp_path / "other.png")
    own = files("a", "--size", "32x32", "--steps", 1, "-o", "own.png")
    assert own[0] == 0
    Image.new("L", (48, 32)).save(tmp_path / "black.png")
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    code, out, err = files(*words, "-o", "out.png")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out.png").exists()
