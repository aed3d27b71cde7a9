"""LoRAs beside a model and merged into it: the same bits under every schedule, exact unloading."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.inspect import inspect
from tests import small
from tests.model.test_models import relative
from tests.schedules import JOB, KINDS, MODEL, SCAN, SCHEDULES, every
from tests.weights import lora_files
from zimage_jax import Memory, UsageError, ZImage, batch, plan
from zimage_jax.pipeline import loras as loras_of_model
from zimage_jax.weights.checkpoint import Checkpoint

CONFIG = small.CONFIGS[MODEL]
PROMPT = "a red fox"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A LoRA of the transformer, another of both models, whole matrices, and DoRAs. Of all the rank
    is 15: padded to 32 it would be no smaller than a matrix."""
    folder = tmp_path_factory.mktemp("loras")
    both = lora_files.text(CONFIG, lambda n: f"text_encoder.{n}", lora_files.AB)
    both.tensors |= lora_files.lora(CONFIG, lambda n: f"transformer.{n}", rank=3, seed=2).tensors
    made = {
        "style": lora_files.lora(CONFIG, lambda n: f"transformer.{n}"),
        "both": both,
        "whole": lora_files.diff(CONFIG, "diff"),
        "outputs": lora_files.dora(CONFIG, "out"),
        "inputs": lora_files.dora(CONFIG, "in"),
    }
    for name, of in made.items():
        save_file(of.tensors, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in made}


@pytest.fixture(scope="module")
def loras(files):
    return [
        (files["style"], 0.8),
        (files["both"], -0.5),
        (files["whole"], 1.0),
        (files["outputs"], 0.3),
        (files["inputs"], 0.2),
    ]


@pytest.fixture(scope="module")
def expected(under, loras):
    return under("resident").generate(PROMPT, **JOB, lora=loras).latents


QUICK = ("hybrid",)
# whose limits in bytes are below a block with the LoRAs beside it
TOO_SMALL = "half a block under a size", "a budget"
UNDER = [name for name in (*SCHEDULES, *SCAN) if name not in TOO_SMALL]
SOME = (*KINDS, "low_vram", "one chunk pinned")


@pytest.mark.parametrize("name", every(UNDER, QUICK, SOME))
def test_every_schedule_gives_the_same_bits(name, under, loras, expected):
    pipe = under(name)
    pipe.generate(PROMPT, **JOB, lora=loras)
    result = pipe.generate(PROMPT, **JOB, lora=loras)
    if name == "scan":  # one program, in which XLA fuses across NFEs
        assert relative(result.latents, expected) <= 2e-6
    else:
        np.testing.assert_array_equal(result.latents, expected)
    assert result.report["peak_device_bytes_by_stage"] == dict(result.plan.peak_bytes_by_stage)


@pytest.mark.exhaustive
def test_unloading_restores_the_bits_and_reads_nothing(native, loras, drawn):
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="resident"))
    before = pipe.generate(PROMPT, **JOB)
    np.testing.assert_array_equal(before.latents, drawn("resident").latents)
    changed = pipe.generate(PROMPT, **JOB, lora=loras)
    other = pipe.generate(PROMPT, **JOB, lora=[(loras[0][0], 0.1)])
    after = pipe.generate(PROMPT, **JOB)
    np.testing.assert_array_equal(after.latents, before.latents)
    assert relative(changed.latents, before.latents) > 0.01
    assert relative(changed.latents, other.latents) > 0.01
    for result in (changed, other, after):
        assert not [e for e in result.ledger.events if e.lane == "tier"]
        copied = [e for e in result.ledger.events if e.lane == "copy"]
        assert all("LoRA" in event.name for event in copied)
    weightless = pipe.generate(PROMPT, **JOB, lora=[(loras[0][0], 0)])
    np.testing.assert_array_equal(weightless.latents, before.latents)


@pytest.mark.exhaustive
def test_another_weight_compiles_nothing(native, files, own_programs):
    pipe = ZImage.load(native(MODEL))
    first = pipe.generate(PROMPT, **JOB, lora=[(files["style"], 0.8)])
    second = pipe.generate(PROMPT, **JOB, lora=[(files["style"], 0.2)])
    assert first.report["compilations"] == second.report["compilations"]
    assert relative(first.latents, second.latents) > 1e-3


@pytest.mark.parametrize("name", every(["resident", "ring", "disk"], []))
def test_merged_is_as_beside(name, under, loras, expected, drawn):
    pipe = under(name)
    merged = pipe.generate(PROMPT, **JOB, lora=loras, lora_merge=True)
    assert relative(merged.latents, expected) <= 1e-4
    assert not np.array_equal(merged.latents, expected)
    plain = pipe.generate(PROMPT, **JOB)
    np.testing.assert_array_equal(plain.latents, drawn("resident").latents)
    assert plain.plan.peak_bytes == merged.plan.peak_bytes


@pytest.mark.exhaustive
def test_requests_with_different_loras_draw_as_alone(native, files):
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule="ring"))
    sets = [[], [(files["style"], 1.0)], [], [(files["style"], 0.5)]]
    jobs = [{"prompt": PROMPT, **JOB, "lora": of} for of in sets]
    together = [request.result() for request in pipe.submit_all(jobs)]
    for of, result in zip(sets, together, strict=True):
        alone = pipe.generate(PROMPT, **JOB, lora=of)
        np.testing.assert_array_equal(result.latents, alone.latents)


@pytest.mark.exhaustive
def test_report_and_metadata_name_them(under, files):
    result = under("ring").generate(PROMPT, **JOB, lora=[(files["style"], 0.8)])
    with open(files["style"], "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    row = {"name": "style.safetensors", "weight": 0.8, "sha256": digest}
    assert result.report["lora"] == [row]
    assert result.pictures[0].metadata["lora"] == [row]
    assert "lora" not in under("ring").generate(PROMPT, **JOB).report


@pytest.mark.parametrize(
    "lora",
    ["x.safetensors", [("x",)], [("x", "y")], [("x", float("nan"))], [(3, 1.0)], [("x", 1.0)] * 17],
)
def test_what_is_no_list_of_loras_is_refused(lora, under):
    with pytest.raises(UsageError):
        under("ring").submit(PROMPT, **JOB, lora=lora)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype, under, loras):
    job = {**JOB, "lora": loras[:2]}
    found, again = (under(n, dtype).generate(PROMPT, **job).latents for n in ("resident", "ring"))
    np.testing.assert_array_equal(found, again)
    exact = under("resident").generate(PROMPT, **job).latents
    assert relative(found, exact) < 0.1


@pytest.mark.exhaustive
def test_the_checkpoint_is_not_written(native, under, loras):
    before = Checkpoint(native(MODEL)).read("transformer", "layers.0")
    under("ring").generate(PROMPT, **JOB, lora=loras, lora_merge=True)
    after = Checkpoint(native(MODEL)).read("transformer", "layers.0")
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array)


# -- the commands ----------------------------------------------------------------------------------


def test_generate_takes_loras_and_draws_them_again(run, tmp_path):
    config = small.CONFIGS["plain"]
    made = lora_files.lora(config, lambda n: f"transformer.{n}")
    made.tensors["note"] = np.ones(1, np.float32)
    save_file(made.tensors, tmp_path / "style.safetensors")
    size = ("--size", "64x48", "--steps", 2, "-s", 3)
    code, _, err = run(
        "a fox", *size, "--lora", "style.safetensors:0.5", "-o", "a.png", "--report", "a.json"
    )
    assert code == 0
    assert "warning: style.safetensors: 1 keys are not used: note (no LoRA's key)" in err
    first = json.loads((tmp_path / "a.json").read_text())
    assert first["lora"][0]["weight"] == 0.5
    code, _, _ = run("--from-image", "a.png", "-o", "b.png", "--report", "b.json")
    again = json.loads((tmp_path / "b.json").read_text())
    assert (code, again["latents_sha256"]) == (0, first["latents_sha256"])
    (tmp_path / "style.safetensors").rename(tmp_path / "other.safetensors")
    code, _, err = run("--from-image", "a.png", "-o", "c.png")
    assert code == 2
    assert "give it with --lora" in err
    assert not (tmp_path / "c.png").exists()


def test_batch_lines_have_loras(native, run, tmp_path):
    made = lora_files.lora(small.CONFIGS["plain"], lambda n: f"transformer.{n}")
    save_file(made.tensors, tmp_path / "s.safetensors")
    job = {"prompt": "a fox", "seed": 1, "width": 64, "height": 48, "steps": 2}
    lines = [job, job | {"lora": [["s.safetensors", 0.7]]}, job | {"lora": "s.safetensors"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run(
        "jobs.jsonl", "-o", "out", "--model", native("plain"), model=None, command=batch.command
    )
    assert code == 1
    assert "line 3: lora must be a list of pairs" in err
    rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    plain, with_lora = sorted(rows, key=lambda row: row["line"])
    assert plain["latents_sha256"] != with_lora["latents_sha256"]
    assert with_lora["lora"][0]["name"] == "s.safetensors"


@pytest.mark.exhaustive
def test_plan_counts_them(run, tmp_path):
    tensors = {
        "lora_unet_layers_0_attention_to_q.lora_down.weight": np.ones((20, 3840), np.float32),
        "lora_unet_layers_0_attention_to_q.lora_up.weight": np.ones((3840, 20), np.float32),
    }
    save_file(tensors, tmp_path / "s.safetensors")

    def bytes_of(*words) -> int:
        given = ("512x512", "--card", "rtx-4090", "--json", "--schedule", "swap", *words)
        code, out, _ = run(*given, model=None, command=plan.command)
        assert code == 0
        return json.loads(out)["sizes"][0]["link_bytes"]

    of_block = 2 * 3840 * 32 * 2  # rank 20 is padded to 32
    blocks = 30 + 2  # with the noise refiner's, which share the slots
    assert bytes_of("--lora", "s.safetensors") - bytes_of() == 8 * blocks * of_block
    assert bytes_of("--lora", "s.safetensors", "--lora-merge") == bytes_of()


def test_inspect_describes_a_lora(tmp_path):
    rng = np.random.default_rng(0)
    key = "lora_unet_layers_0_attention_to_out_0"
    tensors = {
        f"{key}.lora_down.weight": rng.standard_normal((8, 3840)).astype(np.float32),
        f"{key}.lora_up.weight": rng.standard_normal((3840, 8)).astype(np.float32),
        f"{key}.alpha": np.array(1, np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"modelspec.trigger_phrase": "zorn"})
    found = inspect(tmp_path / "x.safetensors")
    assert found["kind"] == "LoRA"
    assert found["notes"] == {
        "spelling": "kohya (split)",
        "kinds": "1 LoRA",
        "ranks": "8",
        "targets": "transformer attention.to_out x 1",
        "trigger words": "zorn",
    }


@pytest.mark.exhaustive
def test_sets_of_loras_are_let_go_by_their_bytes(native, files, monkeypatch):
    monkeypatch.setattr(loras_of_model, "_KEPT_BYTES", 1)
    pipe = ZImage.load(native(MODEL))
    for weight in (0.1, 0.2, 0.1):
        pipe.plan(PROMPT, **JOB, lora=[(files["style"], weight)])
        assert len(pipe._fittings._made) == 1
