"""Models read in place: the same bytes as of the converted checkpoint, checked as strictly."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert.convert import convert
from tests.checkpoints_convert.published import CONFIG, STEMS, comfy_files, published_like
from tests.checkpoints_convert.quantised_files import quantised, write
from tests.schedules import JOB, KINDS, SCHEDULES, every
from zimage_jax import Memory, ZImage, plan
from zimage_jax.errors import (
    ConversionError,
    DamagedError,
    ForeignError,
    UsageError,
    ZImageError,
)
from zimage_jax.model.config import PRESETS
from zimage_jax.pipeline.job import ZImageWarning
from zimage_jax.weights import components, sources
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.in_place import InPlace, open_model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A DiT with a block in bfloat16, and matrices in int8, rotated where they can be."""
    folder = tmp_path_factory.mktemp("mixed")
    stored: dict = {}
    for name, array in load_file(comfy_files(folder / "comfy")["transformer"]).items():
        is_plain = name.startswith("layers.0.")
        part = {name: array} if is_plain else quantised({name: array}, "int8_convrot")[0]
        stored |= part
    return write(folder / "mixed.safetensors", stored)


@pytest.fixture(scope="module")
def pairs(published, mixed, tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """Name -> what `--model` takes in place, and the converted checkpoint."""
    made, folder = {}, tmp_path_factory.mktemp("native")
    for name, files in {"diffusers": {}, "int8": {"transformer": mixed}}.items():
        source = sources.open_source(published, files, None, None)
        native = convert(source, folder / name, quiet=True)
        made[name] = ",".join(map(str, [published, *files.values()])), native
    return made


@pytest.mark.parametrize("name", ["diffusers", "int8"])
def test_every_unit_has_the_bytes_of_the_checkpoint(pairs, name):
    path, native = pairs[name]
    found, expected = open_model(path), open_model(native)
    assert isinstance(found, InPlace)
    assert isinstance(expected, Checkpoint)
    assert found.storage == expected.storage
    buffer = np.empty(1 << 20, np.uint8)
    for component in components.COMPONENTS:
        assert found.units(component) == expected.units(component)
        assert found.nbytes(component) == expected.nbytes(component)
        assert found.parameters(component) == expected.parameters(component)
        for unit in found.units(component):
            for part in (unit, *components.halves(component, unit)):
                assert found.buffer_bytes(component, part) <= buffer.nbytes
                wanted = expected.read(component, part)
                for given in (None, buffer):
                    arrays = found.read(component, part, given)
                    assert list(arrays) == list(wanted)
                    for key, array in arrays.items():
                        assert array.dtype == wanted[key].dtype
                        assert array.ctypes.data % 64 == 0
                        np.testing.assert_array_equal(array, wanted[key])


def latents(path, memory=None) -> str:
    pipe = ZImage.load(path, dtype="float32", memory=memory)
    return pipe.generate("a red fox", **JOB).report["latents_sha256"]


def test_a_picture_has_the_bits_of_the_checkpoint(pairs, run):
    path, native = pairs["diffusers"]
    words = [
        "--dtype",
        "float32",
        "--schedule",
        "ring",
        "--size",
        "64x48",
        "--steps",
        "3",
        "--seed",
        "3",
        "--json",
    ]
    code, out, err = run("a red fox", "--model", path, *words, model="")
    assert code == 0, err
    assert json.loads(out)["latents_sha256"] == latents(native, SCHEDULES["ring"])


@pytest.mark.parametrize("schedule", every(SCHEDULES, [], KINDS))
@pytest.mark.filterwarnings("ignore:.*read in place through a window")
def test_a_mixture_of_formats_has_its_bits_under_every_schedule(pairs, schedule):
    """Blocks of different formats: chunks that take each other's slots, or cannot."""
    path, native = pairs["int8"]
    assert latents(path, SCHEDULES[schedule]) == latents(native, SCHEDULES["resident"])


def test_a_window_says_that_converting_is_faster(pairs):
    path, native = pairs["diffusers"]
    with pytest.warns(ZImageWarning, match=r"made anew at every use, which takes .* convert it"):
        windowed = latents(path, SCHEDULES["disk"])
    assert windowed == latents(native, SCHEDULES["disk"])


# -- which files are meant -------------------------------------------------------------------------


@pytest.fixture
def comfyui(published, tmp_path, monkeypatch) -> Path:
    """ComfyUI's folder, as if the small model were the published one."""
    monkeypatch.setitem(PRESETS, "turbo", CONFIG)
    root = tmp_path / "ComfyUI"
    (root / "models").mkdir(parents=True)
    files = comfy_files(root / "files")
    for component, name in (
        ("transformer", "diffusion_models/z_image/z_image_turbo_bf16.safetensors"),
        ("text_encoder", "text_encoders/qwen_3_4b.safetensors"),
        ("vae", "vae/ae.safetensors"),
    ):
        place = root / "models" / name
        place.parent.mkdir(parents=True)
        files[component].rename(place)
    shutil.copy(published / "tokenizer" / "tokenizer.json", root / "models" / "text_encoders")
    return root


def same_as_published(found, published) -> None:
    expected = open_model(published)
    for component in components.COMPONENTS:
        for unit in found.units(component):
            wanted = expected.read(component, unit)
            for path, array in found.read(component, unit).items():
                np.testing.assert_array_equal(array, wanted[path])


def test_comfyuis_folder(comfyui, published):
    # another model beside it, a LoRA, a damaged file: none of them is Z-Image's
    other = {"double_blocks.0.img_attn.qkv.weight": np.ones((2, 2), np.float32)}
    save_file(other, comfyui / "models" / "diffusion_models" / "flux.safetensors")
    (comfyui / "models" / "vae" / "cut.safetensors").write_bytes(b"\1")
    text = load_file(comfyui / "models" / "text_encoders" / "qwen_3_4b.safetensors")
    wide = {n: np.concatenate([a, a]) for n, a in text.items()}
    save_file(wide, comfyui / "models" / "text_encoders" / "qwen_3_8b.safetensors")
    for place in (comfyui, comfyui / "models"):
        found = open_model(place)
        same_as_published(found, published)
        assert found.path.name == "z_image_turbo_bf16.safetensors"


def test_comfyuis_folder_must_leave_no_doubt(comfyui):
    dits = comfyui / "models" / "diffusion_models" / "z_image"
    shutil.copy(dits / "z_image_turbo_bf16.safetensors", dits / "z_image_bf16.safetensors")
    with pytest.raises(
        UsageError, match=r"one file of Z-Image's transformer .* found z_image_bf16"
    ):
        open_model(comfyui)
    for file in dits.iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"expected one file .* found no file"):
        open_model(comfyui)


def test_comfyuis_folder_has_no_tokenizer(comfyui):
    (comfyui / "models" / "text_encoders" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json, which ComfyUI's files lack"):
        open_model(comfyui)


def test_files_separated_by_commas(comfyui, published):
    files = [str(f) for f in (comfyui / "models").rglob("*") if f.is_file()]
    assert len(files) == 4
    same_as_published(open_model(", ".join(files)), published)
    same_as_published(open_model(Path(",".join(reversed(files)))), published)


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        (("vae/ae",), (), "no file for vae; expected the three models and tokenizer.json"),
        (("tokenizer",), (), "no file for tokenizer.json"),
        ((), ("vae/ae.safetensors",), "two files of the vae"),
        ((), ("vae/nothing.safetensors",), "no such file or folder"),
        ((), ("vae", "text_encoders"), "two folders"),
    ],
)
def test_files_that_are_not_clear_are_one_line(comfyui, drop, add, words):
    models = comfyui / "models"
    files = [f for f in models.rglob("*") if f.is_file() and not any(d in str(f) for d in drop)]
    with pytest.raises(UsageError, match=words) as fault:
        open_model(",".join(map(str, [*files, *(models / name for name in add)])))
    assert "\n" not in str(fault.value)


def test_another_models_file_is_named(comfyui, published):
    other = comfyui / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": np.ones((2, 2), np.float32)}, other)
    with pytest.raises(ForeignError, match=r"none of Z-Image's models; these are tensors of Flux"):
        open_model(f"{published},{other}")


def test_what_is_no_model_says_so_as_before(tmp_path):
    for path, words in ((tmp_path / "no", "no such folder"), (tmp_path, "it has no manifest")):
        with pytest.raises(ForeignError, match=words):
            open_model(path)


# -- checked as strictly ---------------------------------------------------------------------------


def test_wrong_tensors_are_refused_when_it_is_opened(folder):
    file = folder / "vae" / f"{STEMS['vae']}.safetensors"
    tensors = published_like("vae")
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(ConversionError, match=r"vae: missing encoder\.conv_in\.bias"):
        ZImage.load(folder)


def test_a_tokenizer_of_another_model_is_refused(folder, monkeypatch):
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": 20'))
    with pytest.raises(ZImageError, match=r"it belongs to another model|misshapen"):
        ZImage.load(folder)


def test_nan_is_named_when_it_is_read(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = published_like("text_encoder")
    tensors["layers.1.self_attn.q_proj.weight"][3, 2] = np.nan
    save_file(tensors, file)
    model = open_model(folder)
    model.read("text_encoder", "layers.0")
    with pytest.raises(ConversionError, match=r"layers\.1\.self_attn\.q_proj\.weight has NaN"):
        model.read("text_encoder", "layers.1")


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.unlink(),
        lambda f: f.write_bytes(f.read_bytes()[:-4]),
        lambda f: os.utime(f, ns=(1, 1)),
        lambda f: (f.unlink(), os.mkfifo(f)),
    ],
)
def test_a_file_that_changed_since_is_refused(folder, change):
    model = open_model(folder)
    file = folder / "text_encoder" / "model.safetensors"
    change(file)
    with pytest.raises(DamagedError, match=r"model\.safetensors: not the file that was opened"):
        model.read("text_encoder", "layers.0")


@pytest.mark.parametrize("name", ["diffusers", "int8"])
def test_plan_takes_it(pairs, name):
    path, native = pairs[name]
    assert plan._model(path, None, False, None)[1] == open_model(native).storage


def test_another_text_encoder_is_warned_of_when_it_is_opened(folder):
    file = folder / "text_encoder" / "model.safetensors"
    write(file, published_like("text_encoder"), {"modelspec.title": "Qwen3 4B Instruct 2507"})
    with pytest.warns(ZImageWarning, match="calls itself 'Qwen3 4B Instruct 2507'"):
        ZImage.load(folder, memory=Memory(schedule="ring"))
