"""Names of what is written: templates, and no two alike."""

import os
from pathlib import Path

import pytest

from zimage_jax import naming
from zimage_jax.errors import UsageError


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("x.jpg", "the name must end in .png"),
        ("{prompt}.png", "only {date}, {seed}, {index} are filled in"),
        ("{}.png", "are filled in"),
        ("{seed.__class__}.png", "are filled in"),
        ("{seed[0]}.png", "are filled in"),
        ("{seed!z}.png", "are filled in"),
        ("{date!s:>{seed}}.png", "are filled in"),
        ("{date:%Y}.png", "{date:%Y} is not known"),
        ("{seed:{foo}}.png", "{seed:{foo}} is not known"),
        ("{seed:.99999999f}.png", "is not known"),
        ("{seed:>2000000000}.png", "is not known"),
        ("{index:c}.png", "{index:c} is not known"),
        ("{seed.png", "-o {seed.png: "),
        ("x" * 252 + ".png", "a name of more than 255 bytes"),
        ("山" * 84 + ".png", "a name of more than 255 bytes"),
        ("{seed:99}" * 3 + ".png", "a name of more than 255 bytes"),
    ],
)
def test_a_template_that_cannot_be_filled_in(template, message):
    with pytest.raises(UsageError) as fault:
        naming.check_template(template, [7], 1)
    assert message in str(fault.value)


@pytest.mark.parametrize(
    "template", ["x.png", "{index:04}-{seed:>20}.png", "{date}/{seed:x}.PNG", "{{}}.png"]
)
def test_a_template_that_can(template):
    naming.check_template(template, [-1], 10**6)
    assert template.format(date="20260101-000000", seed=2**64 - 1, index=0)


@pytest.mark.parametrize(
    ("template", "prompts", "seeds", "distinct"),
    [
        ("x.png", 1, [1], True),
        ("x.png", 2, [1], False),
        ("{date}.png", 1, [1, 2], False),
        ("{seed}.png", 1, range(5, 8), True),
        ("{seed}.png", 1, [5, 5], False),
        ("{seed}.png", 2, [5], False),
        ("{seed}.png", 2, [-1], True),
        ("{index}.png", 9, [5], True),
    ],
)
def test_whether_each_picture_has_a_name_of_its_own(template, prompts, seeds, distinct):
    assert naming.are_distinct(template, prompts, seeds) == distinct


def clash(template="x.png", preview=None, inputs=(), **outputs):
    named = {f"--{name}": Path(path) for name, path in outputs.items()}
    naming.check_outputs(template, preview and Path(preview), named, [*map(Path, inputs)])


@pytest.mark.parametrize(
    "given",
    [
        {"report": "x.png"},
        {"report": "./sub/../x.png"},
        {"report": "r.json", "trace": "r.json"},
        {"report": "link.json", "trace": "r.json"},
        {"template": "{index}.png", "report": "3.png"},
        {"preview": "steps", "trace": "steps/0-step01.png"},
        {"preview": "steps", "template": "steps/{index}-step{seed}.png"},
        {"preview": "r", "report": "r"},
        {"report": "sub"},
        {"report": "p.txt", "inputs": ["p.txt"]},
    ],
)
def test_two_flags_that_name_one_file(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.json").symlink_to("r.json")
    with pytest.raises(UsageError, match=r"name the same file|this is a folder"):
        clash(**given)


def test_flags_that_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    clash(report="r.json", trace="t.json", preview="steps")
    clash("{index}.png", preview="{index}", report="r.png")
    clash(report="pipe", trace="pipe")
    clash(report="/dev/null", trace="/dev/null")
    clash("x.png", inputs=["x.png"])  # --from-image x.png -o x.png
