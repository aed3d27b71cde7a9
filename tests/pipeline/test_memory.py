"""One suite over all memory schedules: the same picture from each, what was promised of memory, and nothing left over."""

import itertools

import jax
import numpy as np
import pytest

from tests.model.test_models import relative
from tests.schedules import JOB, MODEL, SCAN, SCHEDULES, STORAGE, every
from zimage_jax import Memory, ZImage, ZImageWarning
from zimage_jax.errors import OutOfMemoryError
from zimage_jax.pipeline import plans
from zimage_jax.planning import cards, stored
from zimage_jax.runtime.recorder import Recorder

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"


FLOAT32 = {
    *("swap", "ring", "low_vram", "half a block", "half a block, swapped"),
}
CASES = every(
    itertools.product(SCHEDULES, ["float32", "bfloat16"]),
    {(name, "float32") for name in FLOAT32},
)


@pytest.mark.parametrize("case", CASES, ids=" in ".join)
def test_every_schedule_gives_the_same_bits(case, drawn):
    name, dtype = case
    result, resident = drawn(name, dtype), drawn("resident", dtype)
    np.testing.assert_array_equal(result.latents, resident.latents)
    difference = np.abs(result.pictures[0].pixels.astype(int) - resident.pictures[0].pixels)
    if result.plan.choices["decode"].rows is None:
        assert not difference.any()
    else:  # strips sum a norm's statistics in another order, and in bfloat16 round where the whole program need not
        assert difference.max() <= {"float32": 1, "bfloat16": 12}[dtype]
        assert difference.mean() <= {"float32": 0.01, "bfloat16": 1.5}[dtype]


@pytest.mark.parametrize("dtype", every(["float32", "bfloat16"], ["float32"]))
def test_the_scan_is_near(dtype, drawn):
    """Another program, so other fusions: 1e-6 in float32, and a rounding or two in bfloat16."""
    error = relative(drawn("scan", dtype).latents, drawn("resident", dtype).latents)
    assert error <= {"float32": 2e-6, "bfloat16": 2e-2}[dtype]


@pytest.mark.parametrize("name", every([*SCHEDULES, *SCAN], {*FLOAT32, "resident", "scan"}))
def test_the_ledger_agrees_with_the_plan(name, drawn):
    report = drawn(name).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]
    assert report["peak_device_bytes"] == report["predicted_peak_bytes"]


def test_guidance_and_batches_are_planned_for_too(under):
    pipe = under("ring")
    job = JOB | {"seed": [1, 2, 3], "guidance": 2.0, "negative_prompt": "blue"}
    report = pipe.generate(["a", "a red fox", "红色"], **job).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]


@pytest.mark.parametrize("name", every(["ring", "hybrid", "swap"], ["ring"]))
def test_a_batch_copies_what_one_picture_copies(name, under):
    pipe = under(name)
    one = pipe.generate("a", **JOB).report
    prompts = [f"{'very ' * n}red" for n in range(16)]
    sixteen = pipe.generate(prompts, **JOB | {"seed": list(range(16))}).report
    assert sixteen["copied_bytes_by_stage"]["denoise"] == one["copied_bytes_by_stage"]["denoise"]
    assert sixteen["copied_bytes"] == one["copied_bytes"]


@pytest.mark.exhaustive
def test_micro_batches_give_what_single_runs_give(native, monkeypatch):
    """Four pictures two at a time, different captions, guidance on: a batch may differ in last bits
    alone."""
    monkeypatch.setattr("zimage_jax.planning.work.MICRO_TOKENS", 4 * 64)
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring"))
    prompts, seeds = ["a", "a red fox " * 4, "红色", "b"], [1, 2, 3, 4]
    job = JOB | {"guidance": 2.0, "negative_prompt": "blue"}
    together = pipe.generate(prompts, **job | {"seed": seeds})
    for row, prompt, seed in zip(together.latents, prompts, seeds, strict=True):
        assert relative(row, pipe.generate(prompt, **job | {"seed": seed}).latents[0]) <= 1e-5


@pytest.mark.parametrize("name", ["ring", "swap", "hybrid", "disk"])
def test_nothing_is_left_on_the_device(name, under):
    pipe = under(name)
    for n in range(3):
        pipe.generate("a", **JOB | {"seed": n})
        assert not pipe.held


@pytest.mark.parametrize("name", ["resident", "scan"])
def test_what_stays_is_the_same_after_every_picture(name, under):
    pipe = under(name)
    levels = [(pipe.generate("a", **JOB | {"seed": n}), pipe.held)[1] for n in range(3)]
    assert levels[0]
    assert levels[1:] == levels[:1] * 2


@pytest.mark.exhaustive
def test_a_budget_nothing_fits(native):
    pipe = ZImage.load(native(MODEL), memory=Memory(max_vram_bytes=10_000))
    with pytest.raises(OutOfMemoryError, match=r"the smallest plan needs .* MiB") as fault:
        pipe.generate("a", **JOB)
    assert "no smaller picture fits" in str(fault.value)
    enough = ZImage.load(native(MODEL), memory=Memory(max_vram_bytes=fault.value.needed)).generate(
        "a", **JOB
    )
    assert enough.report["peak_device_bytes"] <= fault.value.needed


@pytest.mark.exhaustive
def test_the_error_names_the_largest_size_that_fits(under):
    pipe = under("low_vram")
    small_job = pipe.generate(
        "a", **JOB | {"width": 64, "height": 64}, memory=Memory(low_vram=True)
    ).report
    with pytest.raises(OutOfMemoryError, match="the largest square picture that fits is 64 x 64"):
        pipe.generate(
            "a",
            **JOB | {"width": 128, "height": 128},
            memory=Memory(max_vram_bytes=small_job["predicted_peak_bytes"] + 1000),
        )


@pytest.mark.exhaustive
def test_a_known_card_advises_without_its_compiler(under, native, monkeypatch):
    budget = under("low_vram").generate("a", **JOB).report["predicted_peak_bytes"] + 1000
    monkeypatch.setattr(cards, "of_device", lambda kind: cards.CARDS["rtx-4090"])
    for module in (stored, plans):  # and figures of the full model's size
        monkeypatch.setattr(module, "has_published_widths", lambda config: True)
    asked = []
    monkeypatch.setattr(
        stored.StoredCosts, "scratch", lambda self, _, work, *others: asked.append(work.h) or 2**40
    )
    pipe = ZImage.load(native(MODEL), memory=Memory(low_vram=True))  # it looks up its card now
    with pytest.raises(OutOfMemoryError, match="no smaller picture fits"):
        pipe.generate(
            "a", **JOB | {"width": 256, "height": 256}, memory=Memory(max_vram_bytes=budget)
        )
    assert asked, "the stored figures were asked"


@pytest.mark.exhaustive
def test_a_compiler_without_memory_is_a_plan_that_does_not_fit(native, monkeypatch, own_programs):
    """As a GPU's under a cap, which tries what it chooses between: the whole decode is then done in
    strips."""
    expected = ZImage.load(native(MODEL)).generate("a", **JOB)
    compiled, refused = jax.stages.Lowered.compile, []

    def strict(self):
        if not refused and "convolution" in self.as_text():
            refused.append(self)
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return compiled(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", strict)
    result = ZImage.load(native(MODEL)).generate("a", **JOB)
    assert refused
    assert (expected.plan.choices["decode"].rows, result.plan.choices["decode"].rows) == (
        None,
        JOB["height"] // 2,
    )
    np.testing.assert_array_equal(result.latents, expected.latents)


def test_out_of_memory_at_run_time_takes_the_next_smaller_plan(native, monkeypatch):
    """The device refuses everything above a level that only the program knows; the picture is the
    same."""
    expected = ZImage.load(native(MODEL)).generate("a", **JOB)
    level, mark = expected.report["predicted_peak_bytes"] // 2, Recorder.mark

    def strict(self, more=0):
        mark(self, more)
        if sum(self.held.values()) + more > level:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr(Recorder, "mark", strict)
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


@pytest.mark.exhaustive
def test_out_of_memory_while_programs_run_ahead_is_no_smaller_plan(
    native, monkeypatch, as_on_a_gpu
):
    expected, launched = (
        ZImage.load(native(MODEL), memory=SCHEDULES["ring"]).generate("a", **JOB),
        Recorder.launched,
    )

    def strict(self, *of):
        launched(self, *of)
        if self.ahead:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr(Recorder, "launched", strict)
    plans, pipe = [], ZImage.load(native(MODEL), memory=SCHEDULES["ring"])
    with pytest.warns(
        ZImageWarning, match="out of device memory with a plan of .*; trying a program at a time"
    ):
        result = pipe.generate("a", **JOB, on_plan=lambda plan, budget: plans.append(plan))
    assert plans == [expected.plan, expected.plan]
    np.testing.assert_array_equal(result.latents, expected.latents)


@pytest.mark.parametrize("schedule", ["ring", "swap"])
def test_the_text_encoder_stays_on_the_device_if_that_is_asked_for(schedule, native):
    memory = Memory(schedule=schedule, text_encoder="device")
    pipe = ZImage.load(native(MODEL), memory=memory)
    first, second = (pipe.generate(prompt, **JOB).report for prompt in ("a red fox", "a star"))
    blocks = [unit for unit in STORAGE.units("text_encoder") if unit.startswith("layers.")]
    text = STORAGE.nbytes("text_encoder", *blocks)
    assert first["copied_bytes_by_stage"]["text"] == text
    assert "text" not in second["copied_bytes_by_stage"]
    for report in (first, second):
        assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]
    for stage, arrays in second["predicted_arrays_by_stage"].items():
        assert stage == "text" or arrays["text, always resident"] == text
    staged = Memory(schedule=schedule, text_encoder="staged")
    expected = pipe.generate("a star", **JOB, memory=staged)
    assert expected.report["latents_sha256"] == second["latents_sha256"]
    assert expected.report["peak_device_bytes"] < second["peak_device_bytes"]
