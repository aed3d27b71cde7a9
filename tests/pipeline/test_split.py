"""The blocks of every picture shared out among several devices: fake ones, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

from tests.schedules import MODEL, SCHEDULES
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
    in_a_process(native(MODEL), QUICK, "unequal", "overlapping")


@pytest.mark.exhaustive
@pytest.mark.parametrize("cases", ALL.values(), ids=ALL)
def test_several_devices_draw_the_picture_of_one_under_every_schedule(cases, native):
    in_a_process(native(MODEL), cases)


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
