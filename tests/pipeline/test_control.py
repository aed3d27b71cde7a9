"""Pictures that follow a control image: the pipeline against diffusers', and every schedule."""

import json
import warnings
from functools import cache

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from checkpoints_convert.convert import convert
from tests.checkpoints_convert.test_control import saved
from tests.model.test_models import relative
from tests.schedules import KINDS, every
from tests.small import CONTROLLED, CONTROLS
from tests.test_additions import assert_as_predicted
from tests.weights import lora_files
from zimage_jax import KVPolicy, Memory, UsageError, ZImage, ZImageError
from zimage_jax.pipeline.picture import read_metadata
from zimage_jax.planning import schedule
from zimage_jax.planning.plan import Sizes
from zimage_jax.planning.stream_plan import stream_plan
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.sources import open_control_file

SIDE, SCALE = 64, 0.8
JOB = {"seed": 3, "steps": 3, "width": SIDE, "height": 48, "control_scale": SCALE}
BLOCK = uniform(CONTROLLED, "float32").nbytes("transformer", "layers.0")
UNDER = {
    "resident": Memory(schedule="resident"),
    "swap": Memory(schedule="swap"),
    "ring": Memory(schedule="ring"),
    "a chunk per block": Memory(schedule="ring", chunks=6),
    "hybrid": Memory(schedule="hybrid", chunks=6, resident_chunks=2),
    "half a block": Memory(schedule="ring", chunks=12),
    "half a block, swapped": Memory(schedule="swap", chunks=12),
    "two copied ahead": Memory(schedule="ring", chunks=6, prefetch=2),
    "disk": Memory(schedule="ring", chunks=6, host_bytes=4 * BLOCK),
    "low_vram": Memory(low_vram=True),
}


def picture(seed: int = 5, size: tuple[int, int] = (48, SIDE)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def control(native, tmp_path_factory):
    """Name of a ControlNet -> its native form, in float32."""
    folder = tmp_path_factory.mktemp("native controls")

    @cache
    def make(name: str):
        file = saved(name, folder)
        source = open_control_file(file, Checkpoint(native("controlled")).config)
        return convert(source, folder / name, "float32", quiet=True)

    return make


@pytest.fixture(scope="module")
def loaded(native, control):
    """The model with a ControlNet."""
    return cache(lambda: ZImage.load(native("controlled"), control=control("union 2.1")))


@pytest.fixture(scope="module")
def drawn(native, control):
    """(ControlNet, schedule, dtype) -> the second picture under it."""

    @cache
    def draw(name: str, under: str, dtype: str = "float32"):
        memory = Memory(schedule="scan") if under == "scan" else UNDER[under]
        # 2.0 and lite have other numbers of blocks
        pipe = ZImage.load(native("controlled"), control=control(name), memory=memory, dtype=dtype)
        pipe.generate("a red fox", control_image=picture(), **JOB)
        return pipe.generate("a red fox", control_image=picture(), **JOB)

    return draw


QUICK = [("union 2.0", "half a block")]
CASES = [("union 2.1", under) for under in [*UNDER, "scan"] if under != "resident"]
MORE = [(n, u) for n in ("union 1.0", "union 2.0") for u in ("half a block", "hybrid", "scan")]
MORE += [("union 2.1 lite", "swap")]  # five blocks with the main ones
ALL = list(dict.fromkeys([*QUICK, *CASES, *MORE]))
OFTEN = [("union 2.1", under) for under in KINDS]


@pytest.mark.parametrize("case", every(ALL, [], QUICK + OFTEN), ids=", ".join)
def test_every_schedule_gives_the_same_bits_and_the_predicted_peaks(case, drawn):
    name, under = case
    result, resident = drawn(name, under), drawn(name, "resident")
    assert_as_predicted(result)
    assert_as_predicted(resident)
    strips = [drawing.plan.choices["control"].rows for drawing in (result, resident)]
    if under == "scan" or strips[0] != strips[1]:
        assert relative(result.latents, resident.latents) <= 2e-6
    else:
        np.testing.assert_array_equal(result.latents, resident.latents)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("under", ["ring", "half a block"])
def test_bits_are_the_same_in_16_bits(under, dtype, drawn):
    result, resident = (drawn("union 2.1", name, dtype) for name in (under, "resident"))
    np.testing.assert_array_equal(result.latents, resident.latents)
    assert_as_predicted(result)


@pytest.mark.exhaustive
def test_a_file_in_place_draws_what_the_converted_one_does(native, tmp_path):
    file, model = saved("union 2.0", tmp_path), native("controlled")
    source = open_control_file(file, Checkpoint(model).config)
    stored = convert(source, tmp_path / "native", quiet=True)
    expected, got = (
        ZImage.load(model, control=path, memory=UNDER["ring"]).generate(
            "a red fox", control_image=picture(), **JOB
        )
        for path in (stored, file)
    )
    np.testing.assert_array_equal(got.latents, expected.latents)
    assert_as_predicted(got)


@pytest.mark.live
@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_agrees_with_diffusers_pipeline(name, guidance, native, control):
    pytest.importorskip("torch", reason="the live comparison needs the reference extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests import reference

        expected = reference.controlled_latents(
            CONTROLS[name], picture(), "a red fox", 3, SCALE, steps=3, guidance=guidance
        )
    pipe = ZImage.load(native("controlled"), control=control(name), memory=UNDER["ring"])
    got = pipe.generate("a red fox", control_image=picture(), guidance=guidance, **JOB).latents
    assert relative(got, expected) <= 1e-4
    plain = pipe.generate("a red fox", guidance=guidance, **without_control(JOB)).latents
    assert relative(plain, expected) > 0.01


def without_control(job: dict) -> dict:
    return {key: value for key, value in job.items() if key != "control_scale"}


def test_without_a_control_image_every_bit_is_the_plain_models(native, control):
    memory = UNDER["ring"]
    plain = ZImage.load(native("controlled"), memory=memory)
    with_control = ZImage.load(native("controlled"), control=control("union 2.1"), memory=memory)
    a, b = (p.generate("a red fox", **without_control(JOB)) for p in (plain, with_control))
    np.testing.assert_array_equal(a.latents, b.latents)
    assert a.plan == b.plan
    assert "control" not in b.report["predicted_peak_bytes_by_stage"]


@pytest.mark.exhaustive
def test_control_and_main_blocks_share_slots_and_requests_share_flights(native, control):
    """Two slots for blocks of both kinds; those with and without a control image take turns."""
    pipe = ZImage.load(
        native("controlled"), control=control("union 2.1"), memory=UNDER["a chunk per block"]
    )
    jobs = [
        {"prompt": "a", "control_image": picture(), **JOB},
        {"prompt": "b", "control_image": picture(6), **JOB | {"control_scale": 0.1}},
        {"prompt": "a", **without_control(JOB)},
    ]
    first, second, plain = (request.result() for request in pipe.submit_all(jobs))
    stream = first.plan.denoise.blocks
    assert len(stream.slots) == 2
    storage = pipe._checkpoint.storage
    largest = storage.nbytes("transformer", "control_layers.0")
    assert stream.device_bytes <= 2 * largest
    assert {"control_layers.0", "layers.0"} <= {u for c in stream.chunks for u in c}
    assert (first.ledger.most_jobs, plain.ledger.most_jobs) == (2, 1)
    for job, result in zip(jobs, (first, second, plain), strict=True):
        alone = pipe.generate(**job)
        np.testing.assert_array_equal(alone.latents, result.latents)
    assert relative(first.latents, plain.latents) > 0.01


def test_a_block_that_is_the_beginning_of_another_takes_a_part_of_its_slot():
    from dataclasses import replace

    storage = uniform(replace(CONTROLLED, control=CONTROLS["union 2.1"]), "float32")
    units = [("layers.0",), ("control_layers.0",), ("layers.1", "layers.2"), ("layers.3",)]
    ring = stream_plan(storage, "transformer", tuple(units), schedule.make("ring", 4))
    assert ring.kinds == (0, 0, 0, 0)
    assert ring.shapes == (0, 1, 0, 0)
    assert ring.slots == (("control_layers.0", "layers.2"),) * 2
    assert ring.device_bytes == 2 * storage.nbytes("transformer", "control_layers.0", "layers.2")
    base = Sizes(storage, 4).units("transformer", "layers")
    plain = stream_plan(storage, "transformer", (base[:2], base[2:]), schedule.make("ring", 2))
    assert plain.kinds == plain.shapes == (0, 0)


@pytest.mark.exhaustive
def test_a_reused_k_and_v_is_the_control_blocks_too(native, control):
    """Every schedule gives the same bits with K and V of earlier NFEs."""
    job = {"prompt": "a red fox", "control_image": picture(), "kv": KVPolicy.parse(reuse=2), **JOB}
    pipes = [
        ZImage.load(native("controlled"), control=control("union 2.1"), memory=UNDER[name])
        for name in ("resident", "a chunk per block")
    ]
    pipes[0].generate(**job)  # what the plan keeps is loaded by the first job
    found = [pipe.generate(**job) for pipe in pipes]
    np.testing.assert_array_equal(found[0].latents, found[1].latents)
    for result in found:
        assert_as_predicted(result)
    assert found[1].report["copied_bytes_saved_by_reuse"] > 0


@pytest.mark.exhaustive
def test_a_control_image_in_regions_and_from_a_picture(native, control):
    pipe = ZImage.load(native("controlled"), control=control("union 2.1"), memory=UNDER["ring"])
    size = {"width": 96, "height": 48, "steps": 2, "seed": 1}
    job = {"image": picture(1, (48, 96)), "control_image": picture(2, (48, 96)), **size}
    result = pipe.generate("a red fox", region=SIDE, **job)
    assert_as_predicted(result)
    assert result.work.views > 1
    assert result.report["control"]["scale"] == 0.75
    # the drawing has the control image's size, without another
    assert pipe.generate("a", control_image=picture(2, (50, 97)), steps=1).pictures[
        0
    ].pixels.shape == (48, 96, 3)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"control_scale": 0.5}, "needs a control_image"),
        ({"control_image": picture(), "control_scale": -1}, "control_scale must be"),
        ({"control_image": "nowhere.png"}, "control_image nowhere.png"),
        ({"control_image": np.zeros((48, 64, 4), np.uint8)}, "transparent"),
        ({"control_image": np.full((2, 9, 3), 0.5)}, "at least"),
        ({"control_image": np.full((48, 64, 3), np.nan)}, "floats from 0 to 1"),
        ({"control_image": picture(), "width": 41}, "multiple of"),
        ({"control": "x"}, "no such argument: control"),
    ],
)
def test_jobs_that_cannot_be_drawn_are_refused(job, message, loaded):
    pipe = loaded()
    with pytest.raises(UsageError, match=message):
        pipe.submit("a red fox", **job)


def test_models_without_a_controlnet_say_so(native, tmp_path):
    pipe = ZImage.load(native("controlled"))
    with pytest.raises(UsageError, match="needs a ControlNet"):
        pipe.generate("a red fox", control_image=picture())
    with pytest.raises(ZImageError, match="no such folder; give --control"):
        ZImage.load(native("controlled"), control=tmp_path / "none")


def test_commands_take_a_control(run, native, control, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "edges.png")
    net = control("union 2.1")
    words = ("--control", net, "--control-image", "edges.png", "--steps", 1, "--seed", 4)
    code, _, err = run("a red fox", *words, "-o", "x.png", model="controlled")
    assert code == 0, err
    found = read_metadata(tmp_path / "x.png")["control"]
    assert (found["image"], found["model"], found["scale"]) == ("edges.png", "union 2.1", 0.75)
    code, out, err = run("--from-image", "x.png", "--control", net, "--json", model="controlled")
    assert code == 0, err
    report = json.loads(out)
    assert report["control"] == found
    assert report["latents_sha256"] == read_metadata(tmp_path / "x.png")["latents_sha256"]
    for wrong, message in (
        (("--from-image", "x.png"), "needs --control, a ControlNet, union 2.1"),
        (("a", "--control", net), "--control needs --control-image"),
        (("a", "--control-scale", 1), "--control-scale needs --control-image"),
        (("a", "--control-image", "edges.png"), "needs --control"),
        (("a", *words[:3], "x"), "x"),
    ):
        code, _, err = run(*wrong, model="controlled")
        assert code == 2
        assert message in err
        assert err.count("error: ") == 1
        assert "Traceback" not in err
    Image.fromarray(picture(9)).save(tmp_path / "edges.png")
    code, _, err = run("--from-image", "x.png", "--control", net, model="controlled")
    assert code == 2
    assert "its checksum differs" in err


@pytest.mark.exhaustive
def test_batch_lines_take_control_images(run, native, control, tmp_path):
    from zimage_jax import batch

    Image.fromarray(picture()).save(tmp_path / "edges.png")
    lines = [
        {"prompt": "a", "seed": 1, "steps": 1, "control_image": "edges.png", "control_scale": 0.5},
        {"prompt": "b", "seed": 1, "steps": 1, "width": 64, "height": 48},
        {"prompt": "c", "control_image": "none.png"},
        {"prompt": "d", "control": "x"},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--model", native("controlled"), "--control", control("union 1.0")]
    code, _, err = run("jobs.jsonl", "-o", "out", *words, command=batch.command)
    assert code == 1
    assert "line 3" in err
    assert "line 4: no such key: control" in err
    assert read_metadata(tmp_path / "out" / "000001.png")["control"]["scale"] == 0.5
    assert "control" not in read_metadata(tmp_path / "out" / "000002.png")


@pytest.mark.parametrize("name", every(["union-2.1", "union-2.1-lite"], []))
def test_plan_knows_the_published_controlnets(name, run):
    from zimage_jax import plan

    words = ("--card", "rtx-4060", "--json", "--max-vram", 4, "1024x1024")
    found = []
    for more in ((), ("--control", name)):
        code, out, err = run(*words, *more, command=plan.command, model=None)
        assert code == 0, err
        found.append(json.loads(out)["sizes"][0])
    plain, controlled = found
    assert "control" in controlled["predicted_seconds_by_stage"]
    assert controlled["predicted_peak_bytes"] <= 4 << 30
    assert controlled["host_bytes"] > plain["host_bytes"] + 1.9e9
    assert controlled["predicted_seconds"] > plain["predicted_seconds"]


@pytest.mark.parametrize(
    "under", every(["ring", "swap", "half a block", "hybrid"], [], ["ring", "half a block"])
)
def test_beside_a_lora(under, native, control, tmp_path):
    """A LoRA is beside the main blocks alone: control blocks have slots of their own then."""
    made = lora_files.lora(CONTROLLED, lambda name: f"transformer.{name}")
    save_file(made.tensors, tmp_path / "style.safetensors")
    lora, image = [(tmp_path / "style.safetensors", 0.7)], picture()

    def drawn(memory: Memory):
        pipe = ZImage.load(native("controlled"), control=control("union 2.1"), memory=memory)
        return pipe.generate("a red fox", control_image=image, lora=lora, **JOB)

    result, resident = drawn(UNDER[under]), drawn(UNDER["resident"])
    np.testing.assert_array_equal(result.latents, resident.latents)
    assert_as_predicted(result)
    plain = ZImage.load(native("controlled"), control=control("union 2.1"))
    without = plain.generate("a red fox", control_image=image, **JOB)
    assert relative(result.latents, without.latents) > 1e-3
