"""What the device says of itself, and how threads share it."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from zimage_jax import ZImage, ZImageWarning
from zimage_jax.runtime import placement as device


def test_the_gate_lets_one_in_alone_and_before_those_who_wait():
    gate, order = device.Gate(), []
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
def test_a_device_of_its_own_memory_says_what_is_free(in_use, free, monkeypatch):
    """Less what its allocator may leave unused. MiB."""
    mib = 2**20
    stats = {
        "bytes_limit": 1000 * mib,
        "bytes_in_use": in_use * mib,
        "peak_bytes_in_use": 950 * mib,
    }
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert device.free_device_bytes() == free * mib
    assert device.allocator_peak() == 950 * mib


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "8.9", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),  # AMD's
        ("gpu", None, "bfloat16"),
    ],
)
def test_a_device_computes_in_what_it_has_products_of(platform, capability, dtype, monkeypatch):
    assert device.dtype_of(platform, capability) == dtype
    found = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [found])
    assert device.default_dtype() == dtype


def test_the_cpu_computes_in_float32():
    assert device.default_dtype() == "float32"


def test_bfloat16_on_turing_is_warned_of(monkeypatch):
    monkeypatch.setattr("zimage_jax.pipeline.pipeline.default_dtype", lambda: "float16")
    with pytest.warns(ZImageWarning, match="this GPU has no bfloat16: .*--dtype float16"):
        assert ZImage.load(dtype="bfloat16").dtype == jnp.bfloat16
    assert ZImage.load().dtype == jnp.float16  # and no warning
