"""The blocks of every picture shared out among several devices: fake ones, in a process of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.checkpoints_convert.test_control import saved
from tests.schedules import MODEL, SCHEDULES, every
from tests.small import CONFIGS
from tests.weights import lora_files
from zimage_jax import ZImage
from zimage_jax.errors import UsageError

QUICK = [
    ("ring", 2, {}),
    ("half a block, some pinned", 3, {"guidance": 2.0}),
    ("auto", 2, {"reuse": 2}),
]
# a process each, for compiling takes most of the time
ALL = {f"{count} devices": [(name, count, {}) for name in SCHEDULES] for count in (2, 3, 4)} | {
    "jobs": [
        (name, 3, options)
        for name in ("ring", "a chunk per block", "half a block", "auto", "disk")
        for options in (
            {"reuse": 2},
            {"prompt": ["a fox", "a star"], "seed": [1, 2], "guidance": 2.0},
            {"sampler": "euler_ancestral", "width": 64},
        )
    ]
}


def in_a_process(model, cases, *others) -> None:
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    words = [sys.executable, "-m", "tests.fake_devices", str(model), json.dumps(cases), *others]
    environment = os.environ | {"XLA_FLAGS": flags}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr[-4000:]


def test_several_devices_draw_the_picture_of_one(native):
    in_a_process(native(MODEL), QUICK[:1])


@pytest.mark.exhaustive
def test_unequal_devices_draw_the_picture_of_one(native):
    in_a_process(native(MODEL), QUICK[1:], "unequal", "overlapping")


@pytest.mark.long
@pytest.mark.parametrize("cases", ALL.values(), ids=ALL)
def test_several_devices_draw_the_picture_of_one_under_every_schedule(cases, native):
    in_a_process(native(MODEL), cases)


WITH_LORAS = ["ring", "hybrid", "half a block", "resident", "auto", "disk"]


@pytest.mark.parametrize("names", every([["hybrid"], WITH_LORAS], [], [["hybrid"]]))
def test_several_devices_draw_with_loras(names, native, tmp_path):
    style, both = (tmp_path / f"{name}.safetensors" for name in ("style", "both"))
    of_text = lora_files.text(CONFIGS[MODEL], lambda n: f"text_encoder.{n}", lora_files.AB).tensors
    of_dit = lora_files.lora(CONFIGS[MODEL], lambda n: f"transformer.{n}").tensors
    save_file(of_dit, style)
    save_file(of_text | of_dit, both)
    lora = [[str(style), 0.8], [str(both), -0.5]]
    cases = [[name, 3, {"lora": lora}] for name in names]
    in_a_process(native(MODEL), [*cases, ["ring", 2, {"lora": lora, "lora_merge": True}]])


CONTROL_CASES = ["ring", "hybrid", "half a block", "resident", "auto", "disk"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["union 2.0", "union 2.1"])
def test_several_devices_follow_a_control_image(name, native, tmp_path):
    """Union 2.0's blocks are in two runs, and both are on one device."""
    image = np.random.default_rng(5).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "edges.png")
    given = {"control": str(saved(name, tmp_path)), "control_image": str(tmp_path / "edges.png")}
    cases = [[of, count, given] for of in CONTROL_CASES for count in (2, 3)]
    in_a_process(native("controlled"), [*cases, ["half a block", 2, given | {"reuse": 2}]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0,0"], "--split chunks takes each device once"),
        (["--split", "chunks"], "--split needs --devices"),
        (["--devices", "0,1", "--split", "pictures"], "batch has more"),
        (["--devices", "0,1", "--max-vram", "1,2,3"], "3 sizes need --devices with as many"),
        (["--devices", "0,1"], "expected 2, JAX finds 1 of platform cpu"),
    ],
)
def test_devices_that_cannot_be_had(words, message, run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = run("a fox", *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_device_is_given_once(native):
    import jax

    (device,) = jax.local_devices()
    with pytest.raises(UsageError, match="each is given once"):
        ZImage.load(native(MODEL), device=[device, device])
