"""The K/V policy under every schedule: bits, peaks, bytes."""

import itertools

import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import JOB, MODEL, SCHEDULES, every
from zimage_jax import KVPolicy, Memory, ZImage

CONFIG = small.CONFIGS[MODEL]
FP8 = "fp8 early, groups of 2"
POLICIES = {
    "precision": KVPolicy.parse("bf16:fp16", switch_t=700.0),
    FP8: KVPolicy.parse("fp8:bf16", switch_t=700.0, group="2:1"),
    "reuse": KVPolicy.parse(reuse=2),
    "all": KVPolicy.parse("bf16:fp16", switch_t=600.0, group="2:4", reuse=3),
    "packed": KVPolicy.parse("k5v6"),
    "packed, grouped, reused": KVPolicy.parse("int6:k6v4", switch_t=600.0, group="1:2", reuse=2),
}
STEPS = {"steps": 6}
UNDER = ["swap", "ring", "hybrid", "a chunk per block", "half a block", "disk", "one chunk"]


@pytest.fixture(scope="module")
def results(native):
    """(policy, schedule) -> the result, drawn once."""
    pipes, drawn = {}, {}

    def get(policy: str, name: str):
        if (policy, name) not in drawn:
            memory = Memory(schedule="scan") if name == "scan" else SCHEDULES[name]
            pipe = pipes.setdefault(name, ZImage.load(native(MODEL), memory=memory))
            for _ in range(2):  # what a plan keeps on the device is loaded by the first job
                drawn[policy, name] = pipe.generate(
                    "a red fox", **JOB | STEPS, kv=POLICIES.get(policy)
                )
        return drawn[policy, name]

    return get


OFTEN = ["reuse", "packed"]
QUICK = [("reuse", "ring")]
COMBINED = "all", "packed, grouped, reused"  # have all that the others have, but for fp8
WAYS = "resident", "ring", "swap", "scan"
SAME_BITS = [
    *itertools.product(COMBINED, UNDER),
    *((policy, "half a block") for policy in POLICIES),
]


@pytest.mark.parametrize(
    "case", every(itertools.product(POLICIES, UNDER), QUICK, SAME_BITS), ids=str
)
def test_every_schedule_gives_the_same_bits(case, results):
    policy, name = case
    np.testing.assert_array_equal(
        results(policy, name).latents, results(policy, "resident").latents
    )


@pytest.mark.parametrize("policy", every(POLICIES, [], [*COMBINED, FP8]))
def test_the_scan_is_near(policy, results):
    """float32 but for K and V: a last bit may fall on the other side of their rounding (half a step
    of fp8 is 1/32)."""
    coarse = dict.fromkeys((FP8, "packed", "packed, grouped, reused"), 2e-2)
    tolerance = ({"reuse": 2e-6} | coarse).get(policy, 2e-3)
    assert (
        relative(results(policy, "scan").latents, results(policy, "resident").latents) <= tolerance
    )


@pytest.mark.parametrize("policy", every(POLICIES, OFTEN))
def test_a_policy_changes_the_latents_and_keeps_the_picture_near(policy, results):
    error = relative(results(policy, "resident").latents, results("none", "resident").latents)
    assert 1e-5 < error < 0.5


LEDGER = [("reuse", "ring"), ("all", "resident")]


@pytest.mark.parametrize(
    "case",
    every(itertools.product(POLICIES, WAYS), LEDGER, [*itertools.product([*COMBINED, FP8], WAYS)]),
    ids=str,
)
def test_the_ledger_agrees_with_the_plan(case, results):
    policy, name = case
    report = results(policy, name).report
    assert report["peak_device_bytes_by_stage"] == report["predicted_peak_bytes_by_stage"]


def test_nfes_that_reuse_copy_neither_to_k_nor_to_v(results):
    plain, reused = results("none", "ring").report, results("reuse", "ring").report
    dim, blocks, nfes = (
        CONFIG.transformer.dim,
        CONFIG.transformer.n_layers,
        3,
    )  # of six every other one reuses
    saved = 4 * nfes * blocks * (2 * dim * dim + CONFIG.transformer.head_dim)
    assert (
        plain["copied_bytes"] - reused["copied_bytes"]
        == reused["copied_bytes_saved_by_reuse"]
        == saved
    )
    assert plain["copied_bytes_saved_by_reuse"] == 0


@pytest.mark.exhaustive
def test_the_report_counts_k_and_v(results):
    config, tokens = CONFIG.transformer, 32 + 32  # 12 image tokens and 20 pads, a bucket of 32
    whole = 2 * tokens * config.dim * 4
    assert results("none", "ring").report["kv_bytes"] == whole
    assert results("precision", "ring").report["kv_bytes"] == whole // 2
    assert results("precision", "ring").report["kv_bytes_without_policy"] == whole
    assert results("reuse", "ring").report["kv_bytes"] == config.n_layers * whole
    codes = tokens * config.dim * 11 // 8  # 5 and 6 bits a value
    scales = 2 * 2 * 2 * config.dim  # low and step of one run of 64 keys, of K and of V
    assert results("packed", "ring").report["kv_bytes"] == codes + scales
    grouped = (
        2 * (tokens - 12 + 4) * config.dim
    )  # 3 x 4 tokens in four groups, a byte each, and scales
    scales = 2 * 4 * config.n_heads
    assert results(FP8, "ring").report["kv_bytes_of_a_block_by_nfe"] == (
        [grouped + scales] * 4 + [whole // 2] * 2
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", ["reuse", "packed, grouped, reused"])
def test_cached_k_and_v_lie_on_the_host_when_the_device_is_short(policy, native):
    """The same bits, and never more than the plan said."""
    pipe, job = ZImage.load(native(MODEL)), JOB | STEPS | {"width": 256, "height": 256}
    memory = Memory(schedule="ring", chunks=5)
    device = pipe.generate("a red fox", **job, kv=POLICIES[policy], memory=memory)
    short = Memory(
        schedule="ring", chunks=5, max_vram_bytes=device.plan.peak_bytes_by_stage["denoise"] - 1
    )
    host = pipe.generate("a red fox", **job, kv=POLICIES[policy], memory=short)
    assert host.plan.denoise.kv_on_host
    assert not device.plan.denoise.kv_on_host
    assert host.report["peak_device_bytes"] <= host.plan.peak_bytes <= short.max_vram_bytes
    assert any(event.name.startswith("kv cache") for event in host.ledger.events)
    np.testing.assert_array_equal(host.latents, device.latents)


@pytest.mark.exhaustive
def test_a_batch_gives_what_single_runs_give(native, monkeypatch):
    monkeypatch.setattr("zimage_jax.planning.work.MICRO_TOKENS", 4 * 64)
    pipe = ZImage.load(native(MODEL), memory=SCHEDULES["ring"])
    prompts, seeds = ["a", "a red fox " * 4, "红色", "b"], [1, 2, 3, 4]
    job = JOB | STEPS | {"guidance": 2.0, "kv": KVPolicy.parse("float32", group="2", reuse=2)}
    together = pipe.generate(prompts, **job | {"seed": seeds})
    for row, prompt, seed in zip(together.latents, prompts, seeds, strict=True):
        assert relative(row, pipe.generate(prompt, **job | {"seed": seed}).latents[0]) <= 1e-5
