"""Export: the tensors of the original come back, in files that the original's programs read."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

from checkpoints_convert import commands, export
from checkpoints_convert.convert import convert, reencode
from checkpoints_convert.inspect import inspect
from tests import small
from tests.checkpoints_convert.published import CONFIG, TENSORS, arrays_of, comfy_files
from zimage_jax.errors import ConversionError, DamagedError, OutputError
from zimage_jax.weights import sources
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.writer import partial_folder

COMFY = {
    "transformer": "diffusion_models/z_image_turbo_bf16.safetensors",
    "text_encoder": "text_encoders/qwen_3_4b.safetensors",
    "vae": "vae/ae.safetensors",
}


@pytest.fixture(scope="module")
def natives(published, tmp_path_factory) -> dict[str, Path]:
    """Format -> a native checkpoint of the published folder."""
    folder = tmp_path_factory.mktemp("native")
    source = sources.open_source(published, {}, None, None)
    made = {f: convert(source, folder / f, f, quiet=True) for f in ("bfloat16", "float32", "int8")}
    made["lossless"] = reencode(
        Checkpoint(made["bfloat16"]), folder / "lossless", "lossless", quiet=True
    )
    return made


def make(native: Path, dst: Path, layout: str = "diffusers", **options) -> Path:
    return export.export(Checkpoint(native), dst, layout, quiet=True, **options)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        n: a for file in sorted(folder.glob("*.safetensors")) for n, a in load_file(file).items()
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, shapes and the bits of every tensor, in bfloat16."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        wanted = expected[name].astype(ml_dtypes.bfloat16)
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape, name
        assert array.tobytes() == wanted.tobytes(), name


def last_layer_and_norm(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take the tensors that stand for the unused ones out of the text encoder's."""
    last = f"model.layers.{CONFIG.text_encoder.n_layers}."
    names = [n for n in found if n.startswith(last) or n == "model.norm.weight"]
    return {n: found.pop(n) for n in names}


@pytest.mark.parametrize("form", ["bfloat16", "float32", "lossless"])
def test_the_diffusers_layout_has_the_originals_tensors(natives, tmp_path, form):
    dst = make(natives[form], tmp_path / "out")
    for component in ("transformer", "vae"):
        assert_same(tensors_of(dst / component), TENSORS[component])
    found = tensors_of(dst / "text_encoder")
    for name, array in last_layer_and_norm(found).items():
        assert (array.astype(np.float32) == (1 if "norm" in name else 0)).all(), name
    assert_same(found, {f"model.{n}": a for n, a in TENSORS["text_encoder"].items()})
    assert os.listdir(tmp_path) == ["out"]


def test_the_unused_tensors_have_the_shapes_of_used_ones(natives, tmp_path):
    found = tensors_of(make(natives["bfloat16"], tmp_path / "out") / "text_encoder")
    unused = last_layer_and_norm(found)
    n = CONFIG.text_encoder.n_layers
    of_first = {k: a.shape for k, a in found.items() if k.startswith("model.layers.0.")}
    assert {
        k.replace(f".{n}.", ".0."): a.shape for k, a in unused.items() if "layers" in k
    } == of_first
    assert unused["model.norm.weight"].shape == (CONFIG.text_encoder.hidden_size,)


@pytest.mark.parametrize("form", ["bfloat16", "lossless"])
def test_the_comfyui_layout_has_its_files(natives, tmp_path, form):
    """Against names made without our tables (published.comfy_files)."""
    dst = make(natives[form], tmp_path / "out", "comfyui")
    assert sorted(p.relative_to(dst).as_posix() for p in dst.rglob("*.*")) == sorted(COMFY.values())
    theirs = comfy_files(tmp_path / "theirs")
    for component in ("transformer", "vae"):
        expected = load_file(theirs[component])
        expected.pop("norm_final.weight", None)
        assert_same(load_file(dst / COMFY[component]), expected)
    found, expected = load_file(dst / COMFY["text_encoder"]), load_file(theirs["text_encoder"])
    last_layer_and_norm(found), last_layer_and_norm(expected)
    del expected["lm_head.weight"]
    assert_same(found, {f"model.{n.removeprefix('model.')}": a for n, a in expected.items()})


@pytest.mark.parametrize("form", ["bfloat16", "lossless"])
@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_there_and_back(natives, tmp_path, form, layout):
    """Convert, export, convert: the same native files."""
    dst = make(natives[form], tmp_path / "out", layout)
    if layout == "diffusers":
        source = sources.open_source(dst, {}, None, None)
        assert source.config == CONFIG
        tokenizer = dst / "tokenizer" / "tokenizer.json"
        assert tokenizer.read_bytes() == Checkpoint(natives[form]).tokenizer().read_bytes()
    else:
        files = {c: dst / name for c, name in COMFY.items()}
        configs = make(natives[form], tmp_path / "configs")
        source = sources.open_source(None, files, configs, None)
    back = Checkpoint(convert(source, tmp_path / "back", form, quiet=True))
    for component in small.MODELS:
        before = arrays_of(Checkpoint(natives[form]), component)
        after = arrays_of(back, component)
        assert before.keys() == after.keys()
        assert all(a.tobytes() == after[path].tobytes() for path, a in before.items())


@pytest.mark.parametrize("largest", [1, 200_000, 10**9])
def test_shards_are_not_larger_than_asked(natives, tmp_path, largest):
    """A unit that is larger alone has a shard of its own."""
    dst = make(natives["bfloat16"], tmp_path / "out", largest_shard=largest)
    native = Checkpoint(natives["bfloat16"])
    for component in small.MODELS:
        shards = sorted((dst / component).glob("*.safetensors"))
        index = list((dst / component).glob("*.index.json"))
        # the unused layer and norm are one unit
        most = max(native.nbytes(component, unit) for unit in native.units(component))
        most += 2 * CONFIG.text_encoder.hidden_size
        assert len(index) == (len(shards) > 1)
        if index:
            found = json.loads(index[0].read_text())
            names = {n: s.name for s in shards for n in safe_open(s, "numpy").keys()}  # noqa: SIM118
            assert found["weight_map"] == names
            total = sum(a.nbytes for a in tensors_of(dst / component).values())
            assert found["metadata"] == {"total_size": total}
        for shard in shards:
            assert sum(a.nbytes for a in load_file(shard).values()) <= max(largest, most)
    sources.open_source(dst, {}, None, None).check()
    assert inspect(dst)["kind"] == "diffusers folder"


def test_the_files_are_aligned_and_marked(natives, tmp_path):
    for file in make(natives["bfloat16"], tmp_path / "out", "comfyui").rglob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        assert safe_open(file, "numpy").metadata() == {"format": "pt"}


def test_the_base_models_file_has_its_name(published, tmp_path):
    shutil.copytree(published, tmp_path / "base")
    (tmp_path / "base" / "scheduler" / "scheduler_config.json").write_text('{"shift": 6.0}')
    source = sources.open_source(tmp_path / "base", {}, None, None)
    native = convert(source, tmp_path / "native", quiet=True)
    dst = make(native, tmp_path / "out", "comfyui")
    assert (dst / "diffusion_models" / "z_image_bf16.safetensors").exists()
    assert sources.read_configs(make(native, tmp_path / "back")) == source.config


def test_int8_has_lost_bits(natives, tmp_path):
    with pytest.raises(ConversionError, match="stored in int8, which has lost bits"):
        make(natives["int8"], tmp_path / "out")
    assert not os.listdir(tmp_path)


# -- whole or not at all ---------------------------------------------------------------------------


def test_a_damaged_checkpoint_leaves_nothing(natives, tmp_path):
    native = shutil.copytree(natives["bfloat16"], tmp_path / "native")
    file = native / "vae" / "decoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum differs"):
        make(native, tmp_path / "out")
    assert os.listdir(tmp_path) == ["native"]


def test_an_interrupted_export_leaves_nothing(natives, tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(export.interrupts, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(natives["bfloat16"], tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_what_a_killed_export_left_is_removed(natives, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(natives["bfloat16"], tmp_path / "out")
    assert partial_folder(tmp_path / "out").exists()
    make(natives["bfloat16"], tmp_path / "out", "comfyui")
    assert os.listdir(tmp_path) == ["out"]
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_strangers_file_is_kept(natives, tmp_path, name, kind):
    place, theirs = tmp_path / name, tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("mine")
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        shutil.copytree(theirs, place)
    else:
        place.symlink_to(theirs)
    with pytest.raises(OutputError, match="exists"):
        make(natives["bfloat16"], tmp_path / "out")
    assert (place if kind == "file" else place / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [name, "theirs"]


def test_a_full_disk(natives, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        with pytest.raises(OutputError, match=r"needs .* of disk, 1.0 MiB are free"):
            make(natives["bfloat16"], tmp_path / "out")
    monkeypatch.setattr(os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="No space left"):
        make(natives["bfloat16"], tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_unit_is_in_memory_and_no_more(natives, tmp_path, monkeypatch):
    """Each unit is read once, in order, and its tensors are written before the next is read."""
    read, done = Checkpoint.read, []

    def noted(self, component, unit, buffer=None):
        done.append((component, unit))
        return read(self, component, unit, buffer)

    monkeypatch.setattr(Checkpoint, "read", noted)
    native = Checkpoint(natives["bfloat16"])
    make(natives["bfloat16"], tmp_path / "out")
    assert done == [(c, unit) for c in small.MODELS for unit in native.units(c)]


# -- the command -----------------------------------------------------------------------------------


def test_the_command(natives, tmp_path):
    run = CliRunner().invoke
    words = [str(natives["bfloat16"]), str(tmp_path / "a"), "--layout", "diffusers", "--json"]
    shown = run(commands.export, words)
    found = json.loads(shown.stdout)
    assert found.pop("seconds") > 0
    nbytes = sum(f.stat().st_size for f in (tmp_path / "a").rglob("*") if f.is_file())
    assert found == {"path": str(tmp_path / "a"), "bytes": nbytes, "layout": "diffusers"}
    assert shown.stderr == ""
    words = [str(natives["bfloat16"]), str(tmp_path / "b"), "--layout", "comfyui", "--quiet"]
    shown = run(commands.export, words)
    assert (shown.exit_code, shown.output) == (0, "")
    assert run(commands.export, words[:2]).exit_code == 2


# -- other programs --------------------------------------------------------------------------------


@pytest.mark.live
def test_diffusers_draws_from_it(tmp_path):
    """All components load, without a missing tensor, and the prompt's tokens are ours."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    from zimage_jax.model.prompt import Prompts

    tiny = Path(export.__file__).parent.parent / "zimage_jax" / "assets" / "tiny"
    dst = make(tiny, tmp_path / "out")
    pipe = diffusers.ZImagePipeline.from_pretrained(str(dst), dtype=torch.bfloat16)
    prompts = Prompts.load(tiny / "tokenizer.json")
    for prompt in ("a red circle", "红色的圆形", ""):
        text = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        assert tuple(pipe.tokenizer(text).input_ids) == prompts.encode(prompt).ids
    drawn = pipe("a red circle", height=64, width=64, num_inference_steps=1, guidance_scale=0.0)
    assert drawn.images[0].size == (64, 64)
    for component in small.MODELS:
        given = tensors_of(dst / component)
        loaded = getattr(pipe, component).state_dict()
        assert {n.removeprefix("model.") for n in given} == loaded.keys()
