"""Chunks on their way over the device: what is copied when, and that nothing waits that need not."""

import itertools
import threading

import numpy as np
import pytest

from tests.schedules import JOB, MODEL, SCHEDULES, every
from zimage_jax import Memory, ZImage
from zimage_jax.runtime.program import Program
from zimage_jax.weights.checkpoint import Checkpoint


def test_the_text_encoder_has_left_before_the_first_chunk(under):
    pipe, held = under("ring"), []
    ledger = pipe.generate("a", **JOB, on_step=lambda _: held.append(pipe.held)).ledger
    assert ledger.peak_by_stage["text"] < ledger.peak_by_stage["denoise"]
    assert len(held) == JOB["steps"]
    assert not any("text" in name for names in held for name in names)


def test_the_ring_copies_ahead_across_nfes(under):
    """5 chunks (2 refiner blocks in one) over 3 NFEs: 15 copies, of which the first alone is waited
    for."""
    events = under("ring").generate("a", **JOB).ledger.events
    copies = [e for e in events if e.stage == "denoise" and e.lane == "copy" and "chunk" in e.name]
    runs = [e for e in events if e.stage == "denoise" and e.lane == "compute" and "chunk" in e.name]
    assert len(copies) == len(runs) == 15
    alone = [c for c in copies if not any(r.begin >= c.begin and r.end <= c.end for r in runs)]
    assert [c.name for c in alone] == ["transformer chunk 0"]


@pytest.mark.parametrize("name", ["resident", "hybrid", "ring"])
def test_the_first_chunk_computes_while_others_are_read(name, native, monkeypatch):
    """The last block is not to be had before a chunk has run."""
    read, call, has_run, waited = Checkpoint.read, Program.__call__, threading.Event(), []

    def reluctantly(self, component, unit, buffer=None):
        if (component, unit) == ("transformer", "layers.4"):
            waited.append(has_run.wait(300))
        return read(self, component, unit, buffer)

    def noted(self, recorder, *args, name="", **words):
        result = call(self, recorder, *args, name=name, **words)
        if recorder._stage == "denoise" and "chunk" in name:
            has_run.set()
        return result

    monkeypatch.setattr(Checkpoint, "read", reluctantly)
    monkeypatch.setattr(Program, "__call__", noted)
    ZImage.load(native(MODEL), memory=SCHEDULES[name]).generate("a", **JOB)
    assert waited == [True]


@pytest.mark.parametrize(
    "name", every(["ring", "hybrid", "one chunk pinned", "disk", "text staged"], ["hybrid", "disk"])
)
def test_a_device_with_memory_of_its_own(name, drawn, native, as_on_a_gpu):
    resident, pipe = drawn("resident"), ZImage.load(native(MODEL), memory=SCHEDULES[name])
    first, again = (pipe.generate("a red fox", **JOB) for _ in range(2))
    for result in (first, again):
        np.testing.assert_array_equal(result.latents, resident.latents)
        assert result.ledger.peak == result.plan.peak_bytes
    computed = [event for event in again.ledger.events if event.lane == "compute"]
    assert len(computed) == sum(event.lane == "compute" for event in first.ledger.events)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(computed)), "one after the other"
    read = sum(event.nbytes for event in again.ledger.events if event.lane == "tier")
    assert (read > 0) == (name == "disk"), "all but a window's blocks stay in host memory"
    assert again.ledger.copied_bytes == first.ledger.copied_bytes


def test_compilations_are_few_and_once(native, own_programs):
    """Ring over chunks of 2, 1, 1, 1 after a refiner chunk of 2: a program per (chunk, next chunk,
    tokens)."""
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring"))
    first = pipe.generate("a", **JOB).report["compilations"]
    assert pipe.generate("another prompt", **JOB | {"seed": 9}).report["compilations"] == first
    even = (
        ZImage.load(native(MODEL), memory=Memory(schedule="ring", chunks=5))
        .generate("a", **JOB)
        .report["compilations"]
    )
    assert even <= first <= 20


def test_no_program_leaves_a_donated_argument_unused(native, recwarn, own_programs):
    ZImage.load(native(MODEL), memory=SCHEDULES["a chunk per block"]).generate(
        "a", **JOB | {"height": 32}
    )
    assert not [w for w in recwarn if "donated" in str(w.message)]
