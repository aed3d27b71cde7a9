"""What is said to need one addition needs no other: a schedule, a stage, a format."""

import functools
import itertools
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.model.test_models import relative
from tests.schedules import BLOCK, JOB, MODEL, every
from zimage_jax import Memory, ZImage, cli, generate, plan
from zimage_jax.errors import UsageError
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.planning import cards, schedule
from zimage_jax.planning.plan import Choice, Option, Sizes
from zimage_jax.planning.schedule import Row
from zimage_jax.planning.stream_plan import StreamPlan, stream_plan
from zimage_jax.weights.formats import FORMATS, Storage
from zimage_jax.weights.writer import save


def run(capsys, command, *words) -> str:
    """Standard output of a command that succeeds."""
    with pytest.raises(SystemExit) as leaving:
        cli.run(command, [*map(str, words)], "test")
    out = capsys.readouterr()
    assert leaving.value.code == 0, out.err
    return out.out + out.err


def assert_as_predicted(result) -> None:
    assert result.report["peak_device_bytes_by_stage"] == dict(result.plan.peak_bytes_by_stage)


# -- a schedule -----------------------------------------------------------------------------------


@pytest.fixture
def triple(monkeypatch) -> str:
    """A ring of three slots."""
    row = Row("triple", lambda n: (0,), 2, "{ahead} copied ahead")
    monkeypatch.setattr(schedule, "ROWS", [*schedule.ROWS, row])
    return row.name


def test_a_schedule_is_a_row(triple, native, under):
    pipe = ZImage.load(native(MODEL), memory=Memory(schedule=triple, chunks=5))
    result = pipe.generate("a red fox", **JOB)
    stream = result.plan.denoise.blocks
    assert (stream.schedule.name, len(stream.slots), stream.schedule.resident) == (triple, 3, set())
    assert str(result.plan.denoise) == "triple, 5 chunks of 1 block, 2 copied ahead"
    assert result.report["schedule"] == triple
    np.testing.assert_array_equal(
        result.latents, under("ring").generate("a red fox", **JOB).latents
    )
    assert_as_predicted(result)


def test_commands_take_a_schedule_that_is_a_row(triple, native, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)
    words = ("--model", native(MODEL), "--size", "64x48", "--schedule", triple, "--chunks", 5)
    told = run(capsys, generate.command, "a", *words, "--steps", 2, "--report", "r.json")
    assert "schedule triple, 5 chunks" in told
    assert json.loads((tmp_path / "r.json").read_text())["schedule"] == triple
    table = run(capsys, plan.command, *words)
    assert ["64x48", triple] in [line.split()[:2] for line in table.splitlines()]


def test_a_schedule_that_is_no_row_is_one_line(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.run(generate.command, ["a", "--schedule", "triple"], "test")
    assert leaving.value.code == 2
    line = "schedule 'triple': expected one of auto, resident, ring, hybrid, swap, scan"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_prefetch_is_as_many_slots_and_one_more(prefetch, native, under):
    memory = Memory(schedule="ring", chunks=5, prefetch=prefetch)
    result = ZImage.load(native(MODEL), memory=memory).generate("a red fox", **JOB)
    assert len(result.plan.denoise.blocks.slots) == prefetch + 1
    np.testing.assert_array_equal(
        result.latents, under("ring").generate("a red fox", **JOB).latents
    )
    assert_as_predicted(result)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"chunks": 31}, "--chunks 31: expected 1 to 10, two to a block"),
        ({"chunks": 4, "resident_chunks": 9}, "--resident-chunks 9: expected 0 to 3"),
        (
            {"chunks": 4, "resident_chunks": 9, "schedule": "hybrid"},
            "--resident-chunks 9: expected 0 to 3",
        ),
        ({"pins": (("layers.9", "resident"),)}, "layers.9: no such block; expected layers.0 to"),
        ({"pins": ((7, "resident"),)}, "chunk 7 does not exist: expected 0 to 3"),
        ({"schedule": "ring", "resident_chunks": 1}, "schedule ring leaves no choice"),
    ],
)
def test_numbers_and_names_that_the_blocks_do_not_have(words, said, under):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        under("auto").generate("a", **JOB, memory=Memory(**words))


# -- a stage --------------------------------------------------------------------------------------


def twice(pixels):
    return jnp.repeat(jnp.repeat(pixels, 2, 0), 2, 1)


@dataclass(frozen=True)
class Doubled:
    """Each pixel of a picture becomes four."""

    name: str = "doubled"

    def options(self, sizes, work, memory):
        scale = sizes.config.vae.scale
        yield Option(Choice(), {}, {"pixels": work.h * work.w * scale**2 * 3}, frozenset())

    def compiled(self, programs, work, choice, device=0) -> int:
        scale = programs.config.vae.scale
        pixels = jax.ShapeDtypeStruct((work.h * scale, work.w * scale, 3), np.uint8)
        return programs(twice).compiled(pixels)[1]

    def stored(self, figures, work, choice, device=0) -> int:
        return 0

    def seconds(self, timing, choice) -> float:
        return 60.0

    def run(self, attempt):
        made = []
        for pixels in attempt.results["decode"]:
            attempt.hold(pixels)
            made.append(np.asarray(attempt.programs(twice)(attempt.recorder, pixels)))
        return made


def test_a_stage_is_planned_accounted_timed_run_and_told_of(native, under, monkeypatch):
    plain = under("swap", "bfloat16").generate("a red fox", **JOB).pictures[0].pixels
    monkeypatch.setattr(cards, "of_device", lambda kind: cards.find("rtx-4090"))
    STAGES.append(Doubled())
    try:
        pipe = ZImage.load(native(MODEL), dtype="bfloat16", memory=Memory(schedule="swap"))
        result = pipe.generate("a red fox", **JOB)
    finally:
        STAGES.pop()
    np.testing.assert_array_equal(result.pictures[0].pixels, twice(plain))
    assert result.plan.peak_bytes_by_stage["doubled"] >= 5 * plain.nbytes
    assert_as_predicted(result)
    assert result.plan.seconds_by_stage["doubled"] == 60
    assert result.report["predicted_seconds"] > 60
    assert result.report["seconds"]["doubled"] > 0
    assert "doubled" in result.report["predicted_peak_bytes_by_stage"]
    assert any(event.stage == "doubled" for event in result.ledger.events)


# -- a format -------------------------------------------------------------------------------------

BFLOAT16 = FORMATS["bfloat16"]
MIXED = (("text_encoder.*", BFLOAT16), ("transformer.layers.1", BFLOAT16))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A model most of whose parameters are in float32, and some in bfloat16."""
    config = small.CONFIGS[MODEL]
    tensors = small.random_tensors(config)
    models = {c: small.our_model(c, config, tensors[c]) for c in small.MODELS}
    storage = Storage(config, FORMATS["float32"], MIXED)
    tokenizer = small.tokenizer().to_str().encode()
    path = save(tmp_path_factory.mktemp("mixed") / "m", storage, models, tokenizer, {})
    return path, storage


def test_units_of_two_formats_are_planned_by_their_own_bytes(mixed):
    _, storage = mixed
    wide, narrow = (storage.nbytes("transformer", f"layers.{n}") for n in (0, 1))
    assert wide == 2 * narrow
    whole = Storage(storage.config, FORMATS["float32"])
    assert 2 * storage.nbytes("text_encoder", "embed_tokens") == whole.nbytes(
        "text_encoder", "embed_tokens"
    )
    blocks = Sizes(storage, 4).units("transformer", "layers")
    ring = schedule.make("ring", 5)
    single = stream_plan(storage, "transformer", tuple((b,) for b in blocks), ring)
    assert single.kinds == (0, 1, 0, 0, 0)
    assert single.slots == (("layers.0",), ("layers.0",), ("layers.1",)), "of unequal size"
    assert single.device_bytes == 2 * wide + narrow
    pairs: StreamPlan = stream_plan(
        storage, "transformer", (blocks[:2], blocks[2:4], blocks[4:]), schedule.make("ring", 3)
    )
    assert pairs.kinds == (0, 1, 1), "one that differs within itself is a kind of its own"


MIXED_UNDER = {
    "ring": Memory(schedule="ring"),
    "a chunk per block": Memory(schedule="ring", chunks=5),
    "two copied ahead": Memory(schedule="ring", chunks=5, prefetch=2),
    "two chunks, swapped": Memory(schedule="swap", chunks=2),
    "hybrid": Memory(schedule="hybrid", chunks=5, resident_chunks=2),
    "disk": Memory(schedule="ring", chunks=5, host_bytes=3 * BLOCK),
    "text on the host": Memory(schedule="ring", text_encoder="host"),
    "scan": Memory(schedule="scan"),
}
QUICK = [(name, "float32") for name in ("two copied ahead", "disk")]
OFTEN = [(name, "float32") for name in MIXED_UNDER] + [("ring", "bfloat16")]


@pytest.fixture(scope="module")
def mixed_under(mixed):
    """(memory, dtype) -> the second picture: what a plan keeps is loaded by the first job."""

    @functools.cache
    def draw(memory: Memory, dtype: str):
        path, storage = mixed
        pipe = ZImage.load(path, dtype=dtype, memory=memory)
        assert pipe._checkpoint.storage == storage
        pipe.generate("a red fox", **JOB)
        return pipe.generate("a red fox", **JOB)

    return draw


@pytest.mark.parametrize(
    "case",
    every(itertools.product(MIXED_UNDER, ["float32", "bfloat16"]), QUICK, OFTEN),
    ids=" in ".join,
)
def test_a_model_of_two_formats_is_saved_read_and_drawn(case, mixed_under):
    """A chunk whose blocks differ, slots of unequal size, and every way to stream them: the same bits."""
    name, dtype = case
    result = mixed_under(MIXED_UNDER[name], dtype)
    resident = mixed_under(Memory(schedule="resident"), dtype)
    assert_as_predicted(result)
    assert_as_predicted(resident)
    if name == "scan":
        assert relative(result.latents, resident.latents) <= {"float32": 2e-6}.get(dtype, 2e-2)
    else:
        np.testing.assert_array_equal(result.latents, resident.latents)


def test_a_narrower_format_changes_the_picture_and_keeps_it_near(mixed, under):
    path, _ = mixed
    narrow, wide = (
        pipe.generate("a red fox", **JOB).latents for pipe in (ZImage.load(path), under("auto"))
    )
    error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 1e-5 < error < 0.1
