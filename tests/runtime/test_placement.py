"""What the device says of itself, and how threads share it."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from tests.schedules import every
from zimage_jax import ZImage, ZImageWarning
from zimage_jax.runtime import placement
from zimage_jax.runtime.placement import Gate, Placement


def test_the_gate_lets_one_in_alone_and_before_those_who_wait():
    gate, order = Gate(), []
    entered, leave = threading.Event(), threading.Event()

    def together(name: str, wait: bool) -> None:
        with gate.together():
            order.append(name)
            entered.set()
            assert not wait or leave.wait(5)

    def alone() -> None:
        with gate.alone():
            order.append("alone")

    first = threading.Thread(target=together, args=("first", True))
    first.start()
    assert entered.wait(5)
    single = threading.Thread(target=alone)
    single.start()
    while not gate.is_wanted:
        threading.Event().wait(0.001)
    later = threading.Thread(target=together, args=("later", False))
    later.start()
    leave.set()
    for thread in (first, single, later):
        thread.join(5)
    assert order == ["first", "alone", "later"]


@pytest.mark.parametrize(("in_use", "free"), [(0, 872), (500, 372), (900, 0)])
def test_a_device_of_its_own_memory_says_what_is_free(in_use, free):
    """Less what its allocator may leave unused. MiB."""
    mib = 2**20
    used = {"bytes_in_use": in_use * mib, "peak_bytes_in_use": 950 * mib}
    card = Mock(spec=jax.Device)
    card.memory_stats.return_value = {"bytes_limit": 1000 * mib} | used
    there = Placement(card, Gate())
    assert there.free_bytes() == free * mib
    assert there.allocator_peak() == 950 * mib


@pytest.mark.parametrize(
    ("kernel", "is_wsl"),
    [
        ("Linux version 6.6.87.2-microsoft-standard-WSL2 (root@x) #1 SMP", True),
        ("Linux version 6.8.0-45-generic (buildd@x) #45-Ubuntu SMP", False),
        (None, False),
    ],
)
def test_pinned_memory_that_runs_out_names_the_limit_of_wsl(kernel, is_wsl, tmp_path, monkeypatch):
    path = tmp_path / "version"
    if kernel is not None:
        path.write_text(kernel)
    monkeypatch.setattr(placement, "_KERNEL", path)
    fault = placement.out_of_pinned_memory(3 * 2**29)
    assert str(fault).startswith("the host could not page-lock 1.50 GiB for parameters")
    assert ("WSL2" in str(fault)) == ("--host-memory" in str(fault)) == is_wsl
    assert (".wslconfig" in placement.pinned_limit_hint()) == is_wsl
    assert "\n" not in str(fault)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),  # AMD's
        ("gpu", None, "bfloat16"),
    ],
)
def test_a_device_computes_in_what_it_has_products_of(platform, capability, dtype):
    card = Mock(spec=jax.Device, platform=platform)
    card.compute_capability = capability or ""
    assert placement.default_dtype(Placement(card, Gate()).target) == dtype


def test_bfloat16_on_turing_is_warned_of(monkeypatch):
    monkeypatch.setattr("zimage_jax.pipeline.pipeline.default_dtype", lambda target: "float16")
    with pytest.warns(ZImageWarning, match="this GPU has no bfloat16: .*--dtype float16"):
        assert ZImage.load(dtype="bfloat16").dtype == jnp.bfloat16
    assert ZImage.load().dtype == jnp.float16  # and no warning


ANOTHER = """
import jax
import jax.numpy as jnp
from zimage_jax import Memory, ZImage

first, second = jax.local_devices()
job = {"seed": 3, "width": 32, "height": 32, "steps": 2}
for schedule in SCHEDULES:
    memory = Memory(schedule=schedule)
    here, there = (ZImage.load(PATH, memory=memory, device=d) for d in (first, second))
    expected = here.generate("a", **job).report["latents_sha256"]
    before, found = set(map(id, jax.live_arrays())), set()

    def look(step=None):
        found.update(d for a in jax.live_arrays() if id(a) not in before for d in a.devices())

    # JAX itself brings what a scan's callback sees to the first CPU
    result = there.generate("a", **job, on_step=None if schedule == "scan" else look)
    look()
    assert found == {second}, (schedule, found)
    assert result.report["latents_sha256"] == expected, schedule
print("done")
"""


@pytest.mark.parametrize("schedules", every([("ring",), ("resident", "scan")], []))
def test_a_model_lies_on_the_device_it_was_given(schedules, native, cache_of_processes):
    """Of two, which only another process can have. Bits are the first one's."""
    program = ANOTHER.replace("PATH", repr(str(native("plain")))).replace(
        "SCHEDULES", repr(schedules)
    )
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": cache_of_processes,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = [sys.executable, "-c", program]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


def test_nothing_else_asks_what_devices_there_are():
    package = Path(placement.__file__).parent.parent
    asking = re.compile(r"jax\.(local_)?devices\(|jax\.default_backend\(|device_count\(")
    found = {p for p in package.rglob("*.py") if asking.search(p.read_text("utf-8"))}
    # cli starts JAX, to catch a platform that this machine lacks, and asks nothing of the devices
    assert found == {Path(placement.__file__), package / "cli.py"}
