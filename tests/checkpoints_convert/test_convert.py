"""The converter: layouts, interruption, checksums."""

import hashlib
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from checkpoints_convert import checksums, commands
from checkpoints_convert.inspect import inspect
from tests import small
from tests.checkpoints_convert.published import (
    CONFIG,
    STEMS,
    TENSORS,
    arrays_of,
    assert_holds,
    comfy_files,
    flux_named,
    published_like,
    run,
)
from tests.model.test_config import PUBLISHED
from zimage_jax import interrupts
from zimage_jax.errors import (
    ConversionError,
    ForeignError,
    OutputError,
    UsageError,
    ZImageError,
)
from zimage_jax.model import dit, text_encoder, vae
from zimage_jax.model.config import BASE, TURBO, DefaultsConfig
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import names as rules
from zimage_jax.weights import sources, writer

# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published reference is not beside this checkout"
)
@pytest.mark.parametrize("component", small.MODELS)
def test_the_tables_name_the_published_tensors(component):
    published = {n: tuple(s) for n, s in json.loads(PUBLISHED.read_text())[component].items()}
    spec = small.MODELS[component].spec(getattr(TURBO, component))
    expected = {n: e.shape for n, e in rules.expected(small.TABLES[component], spec).items()}
    left_out = {n for n in published if n.startswith("layers.35.") or n == "norm.weight"}
    assert expected == {
        n: s for n, s in published.items() if component != "text_encoder" or n not in left_out
    }


@pytest.mark.parametrize(
    ("table", "model", "config"),
    [
        (rules.DIT_DIFFUSERS, dit, CONFIG.transformer),
        (rules.DIT_COMFY, dit, CONFIG.transformer),
        (rules.TEXT_ENCODER, text_encoder, CONFIG.text_encoder),
        (rules.VAE_DIFFUSERS, vae, CONFIG.vae),
        (rules.vae_flux(4), vae, CONFIG.vae),
    ],
)
def test_a_table_covers_every_path_once(table, model, config):
    spec = model.spec(config)
    paths = [p for entry in rules.expected(table, spec).values() for p in entry.paths]
    assert sorted(paths) == sorted(named_arrays(spec))


# -- layouts ---------------------------------------------------------------------------------------


def test_a_diffusers_folder(folder, tmp_path):
    found = run(folder, tmp_path / "out")
    assert_holds(found)
    assert found.config == CONFIG
    assert found.provenance["layouts"] == {
        "transformer": "diffusers",
        "text_encoder": "diffusers",
        "vae": "diffusers",
    }


def test_float32_is_rounded_to_bfloat16(folder, tmp_path):
    found = run(folder, tmp_path / "out", dtype="bfloat16")
    assert_holds(found, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_sixteen_bit_sources(folder, tmp_path, dtype):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(published_like("vae", dtype), file)
    got = arrays_of(run(folder, tmp_path / "out"), "vae")
    expected = named_arrays(small.our_model("vae", CONFIG, published_like("vae", dtype)))
    for path, array in got.items():
        np.testing.assert_array_equal(array, expected[path])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("flux_vae", [True, False])
def test_comfy_files(folder, tmp_path, prefix, flux_vae):
    files = comfy_files(tmp_path / "comfy", prefix=prefix, flux_vae=flux_vae)
    found = run(None, tmp_path / "out", files, config=folder)
    assert_holds(found)
    assert found.provenance["layouts"]["transformer"] == "comfy"
    assert found.provenance["layouts"]["vae"] == ("flux" if flux_vae else "diffusers")


@pytest.mark.live
def test_diffusers_reads_the_comfy_names_the_same(tmp_path):
    """Our idea of ComfyUI's names, read by diffusers' own converter, gives diffusers' names
    back."""
    single = pytest.importorskip("diffusers.loaders.single_file_utils")
    import torch
    from safetensors.torch import load_file

    files = comfy_files(tmp_path / "comfy", prefix="model.diffusion_model.")
    back = single.convert_z_image_transformer_checkpoint_to_diffusers(
        load_file(files["transformer"])
    )
    expected = TENSORS["transformer"]
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[n], torch.from_numpy(a.copy())) for n, a in expected.items())
    vae_names = {n: torch.from_numpy(a.copy()) for n, a in flux_named(TENSORS["vae"]).items()}
    config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    assert single.convert_ldm_vae_checkpoint(vae_names, config).keys() == TENSORS["vae"].keys()


def test_a_file_takes_the_place_of_a_component(folder, tmp_path):
    files = comfy_files(tmp_path / "comfy")
    assert_holds(run(folder, tmp_path / "out", {"vae": files["vae"]}))


@pytest.mark.parametrize(
    ("of_text", "of_vae"),
    [
        ("text_encoders.qwen3_4b.transformer.", "vae."),
        ("text_encoders.qwen3_4b.transformer.", "first_stage_model."),
    ],
)
def test_one_file_with_all_models(folder, tmp_path, of_text, of_vae):
    files = comfy_files(tmp_path / "comfy", prefix="model.diffusion_model.")
    tensors = load_file(files["transformer"])
    tensors |= {of_text + n: a for n, a in load_file(files["text_encoder"]).items()}
    tensors |= {of_vae + n: a for n, a in load_file(files["vae"]).items()}
    single = tmp_path / "all.safetensors"
    save_file(tensors, single)
    assert_holds(run(single, tmp_path / "out", config=folder))
    assert set(inspect(single)["components"]) == set(STEMS)
    # without its VAE, the file says so, and takes another's
    save_file({n: a for n, a in tensors.items() if not n.startswith(of_vae)}, single)
    with pytest.raises(ForeignError, match="not Z-Image's vae"):
        run(single, tmp_path / "more", config=folder)
    assert_holds(run(single, tmp_path / "more", {"vae": files["vae"]}, config=folder))


def test_the_bare_prefix_of_a_transformer(folder, tmp_path):
    files = comfy_files(tmp_path / "comfy", prefix="diffusion_model.")
    assert_holds(run(folder, tmp_path / "out", files))


def test_the_base_model_brings_its_steps_and_guidance(folder, tmp_path):
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 6.0}')
    found = run(folder, tmp_path / "out")
    assert found.config.scheduler.shift == 6
    assert found.config.defaults == DefaultsConfig(28, 4.0)
    assert "28 steps, guidance 4" in inspect(found.path)["notes"]["defaults"]
    shown = CliRunner().invoke(commands.convert, [str(folder), str(tmp_path / "again"), "--quiet"])
    assert (shown.exit_code, shown.output) == (0, "")
    shown = CliRunner().invoke(commands.convert, [str(folder), str(tmp_path / "third")])
    assert "--steps 28 --guidance 4" in shown.stdout


@pytest.mark.parametrize(("variant", "config"), [(None, TURBO), ("turbo", TURBO), ("base", BASE)])
def test_single_files_are_of_a_variant(folder, tmp_path, variant, config):
    files, tokenizer = comfy_files(tmp_path / "comfy"), folder / "tokenizer" / "tokenizer.json"
    assert sources.open_source(None, files, None, tokenizer, variant).config == config
    if variant:
        with pytest.raises(UsageError, match="--variant is for single files"):
            sources.open_source(None, files, folder, None, variant)


def test_single_files_need_a_tokenizer_and_all_components(folder, tmp_path):
    files = comfy_files(tmp_path / "comfy")
    with pytest.raises(UsageError, match="--tokenizer FILE"):
        sources.open_source(None, files, None, None)
    with pytest.raises(UsageError, match="--text-encoder missing"):
        sources.open_source(
            None, {k: v for k, v in files.items() if k != "text_encoder"}, None, None
        )
    # without --config the published model is meant, which these small shapes are not
    source = sources.open_source(None, files, None, folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(ConversionError, match="misshapen"):
        source.check()


# -- interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 2, 7, 11])
def test_an_interrupted_conversion_goes_on(folder, tmp_path, monkeypatch, stop_at):
    original, written = writer.Writer.write, []

    def write(self, component, unit, pieces):
        if 0 <= stop_at <= len(written):  # two workers may pass the mark together
            raise KeyboardInterrupt
        original(self, component, unit, pieces)
        written.append((component, unit))

    monkeypatch.setattr(writer.Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first, stop_at = set(written), -1
    written.clear()
    assert_holds(run(folder, tmp_path / "out"))
    assert not first & set(written), "finished units are not written again"


@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_source_in_the_folder_that_is_written_stays(folder, tmp_path, inner):
    place = tmp_path / "m.partial"
    shutil.copytree(folder, place / inner)
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match=r"the source is inside .*m\.partial"):
        run(place / inner, tmp_path / "m")
    with pytest.raises(UsageError, match=r"the source is inside .*m\.partial"):
        run(
            folder,
            tmp_path / "m",
            {"vae": place / inner / "vae" / "diffusion_pytorch_model.safetensors"},
        )
    assert sorted(place.rglob("*")) == before


def test_damage_to_a_finished_unit_is_mended(folder, tmp_path, monkeypatch):
    def stop(self, tokenizer, provenance):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out")
    file = tmp_path / "out.partial" / "transformer" / "layers.3.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    assert_holds(run(folder, tmp_path / "out"))


def test_two_conversions_give_the_same_bytes(folder, tmp_path):
    a, b = (run(folder, tmp_path / name).path for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_an_interrupt_that_python_dropped_stops_the_conversion(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "_remembered", [2])
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["click", "numpy", "jaxlib", "orbax.checkpoint"])
def test_an_interrupt_while_modules_load_is_one_line(module, tmp_path):
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["convert", "nothing", "out"]
from checkpoints_convert.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_existing_result_is_kept(folder, tmp_path):
    run(folder, tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        run(folder, tmp_path / "out")


# -- checksums and inspection ----------------------------------------------------------------------


def test_verify_compares_with_the_published_sums(folder, monkeypatch):
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.json")]
    sums = {
        n: hashlib.md5((folder / n).read_bytes(), usedforsecurity=False).hexdigest() for n in names
    }
    monkeypatch.setattr(checksums, "published_md5", lambda: sums)
    checksums.verify(folder, quiet=True)
    sums[names[0]] = "0" * 32
    sums["gone.json"] = "1" * 32
    with pytest.raises(ConversionError) as fault:
        checksums.verify(folder, quiet=True)
    assert "gone.json is missing" in str(fault.value)
    assert f"{names[0]} has MD5" in str(fault.value)


def test_the_published_sums_name_sixteen_files():
    assert len(checksums.published_md5()) == 16
    assert all(len(digest) == 32 for digest in checksums.published_md5().values())


def test_inspect_says_what_is_there(folder, tmp_path):
    native = run(folder, tmp_path / "out").path
    counts = {c: len(t) for c, t in ((c, published_like(c)) for c in STEMS)}
    found = inspect(folder)
    assert {c: p["tensors"] for c, p in found["components"].items()} == counts
    assert inspect(native)["kind"] == "native checkpoint"
    assert (
        inspect(native)["components"]["vae"]["parameters"]
        == found["components"]["vae"]["parameters"]
    )
    file = comfy_files(tmp_path / "comfy")["transformer"]
    assert inspect(file)["components"]["transformer"]["layout"] == "comfy"
    with pytest.raises(ZImageError):
        inspect(tmp_path)
