"""What the device says of itself, and how threads share it."""

import threading
from types import SimpleNamespace

import jax
import pytest

from zimage_jax.model.attention import Target
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
    monkeypatch.setattr(device, "_KERNEL", path)
    fault = device.out_of_pinned_memory(3 * 2**29)
    assert str(fault).startswith("the host could not page-lock 1.50 GiB for parameters")
    assert ("WSL2" in str(fault)) == ("--host-memory" in str(fault)) == is_wsl
    assert (".wslconfig" in device.pinned_limit_hint()) == is_wsl
    assert "\n" not in str(fault)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", (7, 0), "float16"),
        ("gpu", (7, 5), "float16"),
        ("gpu", (8, 0), "bfloat16"),
        ("gpu", (12, 0), "bfloat16"),
        ("gpu", None, "bfloat16"),  # another maker's
    ],
)
def test_a_device_computes_in_what_it_has_products_of(platform, capability, dtype):
    assert device.default_dtype(Target(platform, capability)) == dtype
