"""Draws with several devices, which a CPU has only in a process that is started so:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.fake_devices MODEL CASES

CASES is JSON: [name of a schedule, number of devices, arguments of `generate`, and a "control" of ZImage.load] each.
Every case is compared with one device: bits, peaks, what is on each device and what is left there.
"""

import collections
import gc
import json
import sys
from dataclasses import replace

import jax
import numpy as np

import tests.conftest  # noqa: F401
from tests.schedules import JOB, SCHEDULES
from zimage_jax import Memory, ZImage
from zimage_jax.model.kv import KVPolicy
from zimage_jax.runtime.ledger import Ledger


def on_devices(before: set[int]) -> collections.Counter:
    """Bytes of arrays on each device, but for those there `before`."""
    found: collections.Counter = collections.Counter()
    for array in jax.live_arrays():
        if id(array) not in before and array.sharding.memory_kind == "device":
            for device in array.devices():
                found[device] += array.nbytes
    return found


def check(model: str, name: str, count: int, options: dict, one: dict) -> None:
    options = JOB | {"prompt": "a red fox"} | options
    reuse, control = options.pop("reuse", 1), options.pop("control", None)
    options["kv"] = KVPolicy(reuse=reuse)
    options["lora"] = [tuple(pair) for pair in options.get("lora", [])]
    key = json.dumps([*sorted(options.items()), reuse, control], default=str)
    if key not in one:
        one[key] = ZImage.load(model, control=control).generate(**options).latents
    devices, before = jax.local_devices()[-count:], set(map(id, jax.live_arrays()))
    memory = SCHEDULES[name]  # whose window is of one device: several share it
    memory = replace(memory, host_bytes=memory.host_bytes and memory.host_bytes * count)
    pipe = ZImage.load(model, control=control, memory=memory, device=devices)
    most: collections.Counter = collections.Counter()

    def look(step) -> None:
        for device, nbytes in on_devices(before).items():
            most[device] = max(most[device], nbytes)

    for result in (pipe.generate(**options), pipe.generate(**options, on_step=look)):
        np.testing.assert_array_equal(result.latents, one[key])
    rows = result.report["devices"]
    assert [row["ledger_peak_bytes"] for row in rows] == [*result.plan.peaks_by_device], rows
    host = jax.local_devices()[:1] if memory.text_encoder == "host" else []  # it is the CPU's
    assert set(most) <= {*devices, *host}, "nothing is on another device"
    for device, row in zip(devices, rows, strict=True):
        assert most[device] <= row["predicted_peak_bytes"], (device, row)
    assert sum(row["chunks"] for row in rows) == result.report["chunks"]
    assert sum(row["copied_bytes"] for row in rows) == result.report["copied_bytes"]
    held = sum(pipe.held.values())
    gc.collect()  # an attempt and its callback know each other
    left = on_devices(before)
    assert sum(left.values()) == held, f"each load has left its device, once: {left}, held {held}"
    assert bool(held) == bool(result.plan.kept)


def unequal(model: str) -> None:
    """Each device keeps to its own budget, and has as many resident chunks as that takes."""
    alone = ZImage.load(model).generate("a red fox", **JOB).latents
    devices = jax.local_devices()[:2]
    whole = (
        ZImage.load(model, device=devices, memory=Memory(chunks=5)).plan("a red fox", **JOB).plan
    )
    ring = Memory(schedule="ring", chunks=5)
    least = ZImage.load(model, device=devices, memory=ring).plan("a red fox", **JOB).plan
    budgets = least.peaks_by_device[0], whole.peaks_by_device[1]
    memory = Memory(max_vram_bytes=budgets, chunks=5)
    result = ZImage.load(model, device=devices, memory=memory).generate("a red fox", **JOB)
    np.testing.assert_array_equal(result.latents, alone)
    first, second = result.report["devices"]
    assert first["ledger_peak_bytes"] == first["predicted_peak_bytes"] <= budgets[0]
    assert second["ledger_peak_bytes"] == second["predicted_peak_bytes"] <= budgets[1]
    assert second["resident_chunks"] == second["chunks"] > 0
    assert first["resident_chunks"] < first["chunks"]


def overlapping(model: str) -> None:
    """As GPUs would: programs run ahead, and a device copies while another computes."""
    from zimage_jax.runtime.placement import Placement

    Placement.shares_memory = property(lambda self: False)  # type: ignore[assignment]
    memory = Memory(schedule="ring", chunks=5)
    pipe = ZImage.load(model, device=jax.local_devices()[:3], memory=memory)
    jobs = [JOB | {"prompt": "a red fox"}, JOB | {"prompt": "a star", "steps": 2, "height": 48}]
    alone = [ZImage.load(model).generate(**job) for job in jobs]
    for _ in range(2):  # the second time nothing is compiled
        requests = pipe.submit_all(jobs)
        for request, own in zip(requests, alone, strict=True):
            np.testing.assert_array_equal(request.result().latents, own.latents)
    ledger: Ledger = requests[0].result().ledger
    computed = [e for e in ledger.events if e.stage == "denoise" and e.lane == "compute"]
    copies = [e for e in ledger.events if e.stage == "denoise" and e.lane == "copy"]
    assert {e.device for e in copies} == {0, 1, 2}
    assert any(
        c.device != r.device and c.begin < r.end and r.begin < c.end
        for c in copies
        for r in computed
    )
    rows = json.loads(ledger.trace())["traceEvents"]
    assert {row["pid"] for row in rows if row["ph"] == "X"} == {1, 2, 3}


def main() -> None:
    model, cases, *others = sys.argv[1:]
    one: dict = {}
    for case in json.loads(cases):
        check(model, *case, one)
    for name in others:
        globals()[name](model)
    print("done")


if __name__ == "__main__":
    main()
