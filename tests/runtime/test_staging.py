"""One suite over all memory schedules: the same picture from each, what was promised of memory, and
nothing left over."""

import itertools
import json
import threading

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from zimage_jax import Memory, ZImage, ZImageWarning
from zimage_jax.errors import DamagedError, OutOfMemoryError, UsageError
from zimage_jax.planning import cards, stored
from zimage_jax.runtime.ledger import Ledger
from zimage_jax.runtime.staging import BEYOND, Program, Source, is_exhausted
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.components import nbytes, tree_bytes, units

MODEL = "five_blocks"  # two refiner blocks, five main ones: chunks of 2, 1, 1, 1 by default
JOB = {"seed": 3, "width": 64, "height": 48, "steps": 3}
BLOCK = nbytes(small.CONFIGS[MODEL], "transformer", "layers.0", "float32")
SCHEDULES = {
    "resident": Memory(schedule="resident"),
    "swap": Memory(schedule="swap"),
    "ring": Memory(schedule="ring"),
    "hybrid": Memory(schedule="hybrid", resident_chunks=2),
    "auto": Memory(),
    "low_vram": Memory(low_vram=True),
    "one chunk": Memory(schedule="ring", chunks=1),
    "a chunk per block": Memory(schedule="ring", chunks=5),
    "two chunks, swapped": Memory(schedule="swap", chunks=2),
    "chunks under a size": Memory(schedule="ring", max_chunk_bytes=2 * BLOCK),
    "one chunk pinned": Memory(schedule="ring", pins=((1, "resident"),)),
    "one chunk streamed": Memory(
        schedule="resident", pins=((0, "streamed"), (2, "streamed"), (3, "streamed"))
    ),
    "disk": Memory(schedule="ring", host_bytes=4 * BLOCK),
    "disk, a chunk at a time": Memory(schedule="swap", chunks=5, host_bytes=BLOCK),
    "text on the host": Memory(schedule="ring", text_encoder="host"),
    "text staged": Memory(text_encoder="staged"),
    "a budget": Memory(max_vram_bytes=int(2.6e6)),
}
SCAN = {"scan": Memory(schedule="scan")}


@pytest.fixture(scope="module")
def load(native):
    """(name of a schedule, dtype) -> the model under it, loaded once."""
    loaded = {}

    def get(name: str, dtype: str = "float32") -> ZImage:
        if (name, dtype) not in loaded:
            loaded[name, dtype] = ZImage.load(
                native(MODEL), dtype=dtype, memory=(SCHEDULES | SCAN)[name]
            )
        return loaded[name, dtype]

    return get


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def resident(request, load):
    return load("resident", request.param).generate("a red fox", **JOB)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_same_bits(name, resident, load):
    result = load(name, resident.report["dtype"]).generate("a red fox", **JOB)
    np.testing.assert_array_equal(result.latents, resident.latents)
    difference = np.abs(result.pictures[0].pixels.astype(int) - resident.pictures[0].pixels)
    if result.plan.vae_rows is None:
        assert not difference.any()
    else:  # strips sum a norm's statistics in another order, and in bfloat16 round where the whole program need not
        assert difference.max() <= {"float32": 1, "bfloat16": 12}[resident.report["dtype"]]
        assert difference.mean() <= {"float32": 0.01, "bfloat16": 1.5}[resident.report["dtype"]]


def test_the_scan_is_near(resident, load):
    """Another program, so other fusions: 1e-6 in float32, and a rounding or two in bfloat16."""
    dtype = resident.report["dtype"]
    result = load("scan", dtype).generate("a red fox", **JOB)
    assert relative(result.latents, resident.latents) <= {"float32": 2e-6, "bfloat16": 2e-2}[dtype]


@pytest.mark.parametrize("name", [*SCHEDULES, *SCAN])
def test_the_ledger_agrees_with_the_plan(name, load):
    pipe = load(name)
    pipe.generate(
        "a red fox", **JOB
    )  # what a plan keeps is loaded by the first job, stage by stage
    report = pipe.generate("a red fox", **JOB).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]
    assert report["peak_device_bytes"] == report["predicted_peak_bytes"]


def test_guidance_and_batches_are_planned_for_too(load):
    pipe = load("ring")
    job = JOB | {"seed": [1, 2, 3], "guidance": 2.0, "negative_prompt": "blue"}
    report = pipe.generate(["a", "a red fox", "红色"], **job).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]


@pytest.mark.parametrize("name", ["ring", "hybrid", "swap"])
def test_a_batch_copies_what_one_picture_copies(name, load):
    pipe = load(name)
    one = pipe.generate("a", **JOB).report
    prompts = [f"{'very ' * n}red" for n in range(16)]
    sixteen = pipe.generate(prompts, **JOB | {"seed": list(range(16))}).report
    assert sixteen["copied_bytes_by_stage"]["denoise"] == one["copied_bytes_by_stage"]["denoise"]
    assert sixteen["copied_bytes"] == one["copied_bytes"]


def test_micro_batches_give_what_single_runs_give(native, monkeypatch):
    """Four pictures two at a time, different captions, guidance on: a batch may differ in last bits
    alone."""
    monkeypatch.setattr("zimage_jax.planner.MICRO_TOKENS", 4 * 64)
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring"))
    prompts, seeds = ["a", "a red fox " * 4, "红色", "b"], [1, 2, 3, 4]
    job = JOB | {"guidance": 2.0, "negative_prompt": "blue"}
    together = pipe.generate(prompts, **job | {"seed": seeds})
    for row, prompt, seed in zip(together.latents, prompts, seeds, strict=True):
        assert relative(row, pipe.generate(prompt, **job | {"seed": seed}).latents[0]) <= 1e-5


@pytest.mark.parametrize("name", ["ring", "swap", "hybrid", "disk"])
def test_nothing_is_left_on_the_device(name, load):
    pipe = load(name)
    levels = [sum(pipe.generate("a", **JOB | {"seed": n}).ledger.held.values()) for n in range(5)]
    assert levels == [0] * 5


@pytest.mark.parametrize("name", ["resident", "scan"])
def test_what_stays_is_the_same_after_every_picture(name, load):
    pipe = load(name)
    levels = [pipe.generate("a", **JOB | {"seed": n}).ledger.held for n in range(3)]
    assert levels[0]
    assert levels[1:] == levels[:1] * 2


def test_the_text_encoder_has_left_before_the_first_chunk(load):
    ledger = load("ring").generate("a", **JOB).ledger
    assert ledger.peak_by_stage["text"] < ledger.peak_by_stage["denoise"]
    assert not any("text" in name for name in ledger.held)


def test_the_ring_copies_ahead_across_nfes(load):
    """5 chunks (2 refiner blocks in one) over 3 NFEs: 15 copies, of which the first alone is waited
    for."""
    events = load("ring").generate("a", **JOB).ledger.events
    copies = [e for e in events if e.stage == "denoise" and e.lane == "copy" and "chunk" in e.name]
    runs = [e for e in events if e.stage == "denoise" and e.lane == "compute" and "chunk" in e.name]
    assert len(copies) == len(runs) == 15
    alone = [c for c in copies if not any(r.begin >= c.begin and r.end <= c.end for r in runs)]
    assert [c.name for c in alone] == ["transformer chunk 0"]


@pytest.mark.parametrize("name", ["resident", "hybrid", "ring"])
def test_the_first_chunk_computes_while_others_are_read(name, native, monkeypatch):
    """The last block is not to be had before a chunk has run."""
    read, call, has_run, waited = Checkpoint.read, Program.__call__, threading.Event(), []

    def reluctantly(self, component, unit):
        if (component, unit) == ("transformer", "layers.4"):
            waited.append(has_run.wait(300))
        return read(self, component, unit)

    def noted(self, ledger, *args, name="", **words):
        result = call(self, ledger, *args, name=name, **words)
        if ledger._stage == "denoise" and "chunk" in name:
            has_run.set()
        return result

    monkeypatch.setattr(Checkpoint, "read", reluctantly)
    monkeypatch.setattr(Program, "__call__", noted)
    ZImage.load(native(MODEL), memory=SCHEDULES[name]).generate("a", **JOB)
    assert waited == [True]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The driver's ways with a device that has memory of its own: programs run ahead, what was
    pinned stays on the host."""
    monkeypatch.setattr("zimage_jax.device.shares_memory", lambda: False)
    monkeypatch.setattr("zimage_jax.staging.shares_memory", lambda: False)


@pytest.mark.parametrize("name", ["ring", "hybrid", "one chunk pinned", "disk", "text staged"])
def test_a_device_with_memory_of_its_own(name, resident, native, as_on_a_gpu):
    pipe = ZImage.load(native(MODEL), dtype=resident.report["dtype"], memory=SCHEDULES[name])
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


def test_a_program_is_not_waited_for_while_it_runs_ahead():
    program, ledger = Program(lambda x: x + np.float32(1), donate=(0,)), Ledger(ahead=1)
    x = np.zeros(4, np.float32)
    for count in range(4):
        x = program(ledger, x)
        # the first run is waited for, and every other when the one after it is given
        assert len(ledger.events) == max(1, count)
    ledger.settle()
    assert len(ledger.events) == 4
    np.testing.assert_array_equal(x, np.full(4, 4, np.float32))


def test_compilations_are_few_and_once(native):
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


def test_a_window_smaller_than_a_chunk(native):
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring", host_bytes=BLOCK // 2))
    with pytest.raises(UsageError, match=r"--host-memory .* is smaller than a chunk"):
        pipe.generate("a", **JOB)


def test_a_window_larger_than_all_that_is_asked_for(native):
    source = Source(Checkpoint(native(MODEL)), "transformer", kept=False, window_bytes=2**50)
    source.open([], Ledger())  # a stage whose chunks are all pinned streams none
    source.open([("layers.0",)], Ledger())
    assert [tree_bytes(block) for block in source.take()] == [BLOCK]
    source.close()


def test_a_damaged_block_is_named_from_the_reading_thread(native, tmp_path):
    import shutil

    copy = shutil.copytree(native(MODEL), tmp_path / "damaged")
    file = copy / "transformer" / "layers.3.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"layers\.3"):
        ZImage.load(copy, memory=SCHEDULES["disk"]).generate("a", **JOB)


def test_a_budget_nothing_fits(native):
    pipe = ZImage.load(native(MODEL), memory=Memory(max_vram_bytes=10_000))
    with pytest.raises(OutOfMemoryError, match=r"the smallest plan needs .* GiB") as fault:
        pipe.generate("a", **JOB)
    assert "no smaller picture fits" in str(fault.value)
    enough = ZImage.load(native(MODEL), memory=Memory(max_vram_bytes=fault.value.needed)).generate(
        "a", **JOB
    )
    assert enough.report["peak_device_bytes"] <= fault.value.needed


def test_the_error_names_the_largest_size_that_fits(load):
    pipe = load("low_vram")
    small_job = pipe.generate(
        "a", **JOB | {"width": 64, "height": 64}, memory=Memory(low_vram=True)
    ).report
    with pytest.raises(OutOfMemoryError, match="the largest square picture that fits is 64 x 64"):
        pipe.generate(
            "a",
            **JOB | {"width": 256, "height": 256},
            memory=Memory(max_vram_bytes=small_job["predicted_peak_bytes"] + 1000),
        )


def test_a_known_card_advises_without_its_compiler(load, monkeypatch):
    pipe, asked = load("low_vram"), []
    budget = pipe.generate("a", **JOB).report["predicted_peak_bytes"] + 1000
    monkeypatch.setattr(cards, "of_device", lambda kind: cards.CARDS["rtx-4090"])
    monkeypatch.setattr(
        stored, "has_published_widths", lambda config: True
    )  # and figures of the full model's size
    monkeypatch.setattr(
        stored.StoredCosts, "context", lambda self, work, *_: asked.append(work.h) or 2**40
    )
    with pytest.raises(OutOfMemoryError, match="no smaller picture fits"):
        pipe.generate(
            "a", **JOB | {"width": 256, "height": 256}, memory=Memory(max_vram_bytes=budget)
        )
    assert asked, "the stored figures were asked"


def test_a_compiler_without_memory_is_a_plan_that_does_not_fit(native, monkeypatch):
    """As a GPU's under a cap, which tries what it chooses between: the whole decode is then done in
    strips."""
    import jax

    expected = ZImage.load(native(MODEL)).generate("a", **JOB)
    compiled, refused = jax.stages.Lowered.compile, []

    def strict(self):
        if not refused and "convolution" in self.as_text():
            refused.append(self)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return compiled(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", strict)
    result = ZImage.load(native(MODEL)).generate("a", **JOB)
    assert refused
    assert (expected.plan.vae_rows, result.plan.vae_rows) == (None, JOB["height"] // 2)
    np.testing.assert_array_equal(result.latents, expected.latents)


def test_out_of_memory_at_run_time_takes_the_next_smaller_plan(native, monkeypatch):
    """The device refuses everything above a level that only the program knows; the picture is the
    same."""
    import jax

    expected = ZImage.load(native(MODEL)).generate("a", **JOB)
    level, mark = expected.report["predicted_peak_bytes"] // 2, Ledger.mark

    def strict(self, more=0):
        mark(self, more)
        if sum(self.held.values()) + more > level:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(Ledger, "mark", strict)
    plans = []
    with pytest.warns(
        ZImageWarning, match="out of device memory with a plan of .*; trying a smaller one"
    ):
        result = ZImage.load(native(MODEL)).generate(
            "a", **JOB, on_plan=lambda plan, budget: plans.append(plan)
        )
    assert len(plans) > 1
    assert plans[-1].peak_bytes <= level
    np.testing.assert_array_equal(result.latents, expected.latents)


def test_out_of_memory_while_programs_run_ahead_is_no_smaller_plan(
    native, monkeypatch, as_on_a_gpu
):
    import jax

    expected, launched = (
        ZImage.load(native(MODEL), memory=SCHEDULES["ring"]).generate("a", **JOB),
        Ledger.launched,
    )

    def strict(self, *of):
        launched(self, *of)
        if self.ahead:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(Ledger, "launched", strict)
    plans, pipe = [], ZImage.load(native(MODEL), memory=SCHEDULES["ring"])
    with pytest.warns(
        ZImageWarning, match="out of device memory with a plan of .*; trying a program at a time"
    ):
        result = pipe.generate("a", **JOB, on_plan=lambda plan, budget: plans.append(plan))
    assert plans == [expected.plan, expected.plan]
    np.testing.assert_array_equal(result.latents, expected.latents)


def test_no_program_leaves_a_donated_argument_unused(native, recwarn):
    ZImage.load(native(MODEL), memory=SCHEDULES["a chunk per block"]).generate(
        "a", **JOB | {"height": 32}
    )
    assert not [w for w in recwarn if "donated" in str(w.message)]


def test_the_trace_has_its_lanes(load):
    trace = json.loads(load("disk").generate("a", **JOB).ledger.trace())
    rows = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {row["tid"] for row in rows} == {1, 2, 3}
    assert all(row["dur"] >= 0 and row["ts"] >= 0 for row in rows)
    assert sum(row["args"]["bytes"] for row in rows if row["tid"] == 2) > len(
        units(small.CONFIGS[MODEL], "transformer")
    )


@pytest.mark.parametrize(("precision", "is_exact"), [("float32", True), (None, False)])
def test_products_of_float32_are_asked_for_in_full(precision, is_exact, monkeypatch):
    """A CPU's are so in any case; what a GPU is told is read from the program."""
    import jax

    compiled, texts = jax.stages.Lowered.compile, []
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: texts.append(self.as_text()) or compiled(self)
    )
    a = np.ones((4, 4), np.float32)
    Program(lambda x: x @ x, precision=precision)(Ledger(), a)
    assert ("HIGHEST" in texts[0]) == is_exact


def test_a_program_that_could_not_be_compiled_is_out_of_memory(monkeypatch):
    import jax

    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    program, a = Program(lambda x: x), np.ones(4, np.float32)
    assert program.compiled(a) == (None, BEYOND)
    with pytest.raises(jax.errors.JaxRuntimeError) as fault:
        program(Ledger(), a)
    assert is_exhausted(fault.value)


def test_a_program_is_compiled_once_per_shape():
    program, ledger = Program(lambda x: x + np.float32(1)), Ledger()
    for size in (3, 3, 4):
        np.testing.assert_array_equal(
            program(ledger, np.zeros(size, np.float32)), np.ones(size, np.float32)
        )
    assert program.compilations == 2
