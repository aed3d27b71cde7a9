import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import small
from zimage_jax.errors import CheckpointError, DamagedError, ForeignError, OutputError
from zimage_jax.model.layers import named_arrays
from zimage_jax.runtime.staging import load
from zimage_jax.weights import checkpoint, components
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.components import units
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import Writer, save

NAME = "plain"


@pytest.fixture
def folder(native, tmp_path):
    """A copy to damage."""
    return shutil.copytree(native(NAME), tmp_path / "model")


def arrays(component: str) -> dict[str, np.ndarray]:
    config = small.CONFIGS[NAME]
    return named_arrays(small.our_model(component, config, small.random_tensors(config)[component]))


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("component", components.COMPONENTS)
def test_what_was_saved_comes_back(native, component, memory_kind):
    model = load(Checkpoint(native(NAME)), component, memory_kind)
    expected = arrays(component)
    found = named_arrays(model)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert array.sharding.memory_kind == memory_kind
        np.testing.assert_array_equal(array, expected[path])


def test_one_run_of_blocks(native):
    found = Checkpoint(native(NAME)).read("transformer", "layers.1")
    assert found
    assert all(path.startswith("layers.1.") for path in found)


def test_any_tool_reads_a_unit(native):
    """The files are plain safetensors."""
    tensors = load_file(native(NAME) / "transformer" / "layers.0.safetensors")
    expected = {p: a for p, a in arrays("transformer").items() if p.startswith("layers.0.")}
    assert tensors.keys() == expected.keys()
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[path])


def test_orbax_reads_the_manifest(native):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename="manifest.json")) as checkpointer:
        manifest = checkpointer.restore(native(NAME) / "manifest", args=ocp.args.JsonRestore())
    assert manifest["format"] == checkpoint.FORMAT


def flip(file, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("position", [-1, -5000, 4000])
def test_a_flipped_byte_is_named(folder, position):
    flip(folder / "transformer" / "layers.1.safetensors", position)
    with pytest.raises(
        DamagedError, match=r"layers\.1\.safetensors: layers\.1\.\S+ is not what was written"
    ):
        load(Checkpoint(folder), "transformer")


def test_a_truncated_file_is_named(folder):
    file = folder / "vae" / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DamagedError, match=r"decoder\.safetensors: expected \d+ bytes, found \d+"):
        load(Checkpoint(folder), "vae")


def test_a_missing_file_is_named(folder):
    (folder / "text_encoder" / "layers.0.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"layers\.0\.safetensors: cannot be read"):
        load(Checkpoint(folder), "text_encoder")


def test_another_tokenizer_is_noticed(folder):
    flip(folder / "tokenizer.json", 100)
    with pytest.raises(DamagedError, match=r"tokenizer\.json: not the file"):
        _ = Checkpoint(folder).tokenizer


def edit_manifest(folder, change) -> None:
    file = folder / "manifest" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda m: m.update(format="other"), ForeignError, "not the manifest"),
        (lambda m: m.update(version=99), CheckpointError, "version 99"),
        (lambda m: m.update(dtype="int4"), DamagedError, "malformed"),
        (lambda m: m.update(dtype="bfloat16"), DamagedError, "expected Record"),
        (
            lambda m: m["config"]["transformer"].update(extra=1),
            CheckpointError,
            "unknown key 'extra'",
        ),
        (lambda m: m["config"]["transformer"].update(n_layers=3), DamagedError, "malformed"),
        (lambda m: m["arrays"]["vae"].pop("decoder"), DamagedError, "malformed"),
        (lambda m: m["arrays"]["vae"].update(decoder=[1, 2]), DamagedError, "malformed"),
        (
            lambda m: m["arrays"]["transformer"]["stem"]["stem.x_pad_token"].__setitem__(2, 10**15),
            DamagedError,
            "stem",
        ),
        (
            lambda m: m["arrays"]["transformer"]["stem"]["stem.x_pad_token"].__setitem__(1, [9, 9]),
            DamagedError,
            "stem",
        ),
        (lambda m: m.pop("config"), DamagedError, "malformed"),
    ],
)
def test_a_manifest_that_lies_is_refused(folder, change, kind, words):
    edit_manifest(folder, change)
    with pytest.raises(kind) as fault:
        Checkpoint(folder)
    assert words in str(fault.value)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / "manifest" / "manifest.json").write_bytes(b"\xff\x00{")
    with pytest.raises(DamagedError, match="not JSON"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.mkdir(), "has no manifest"),
        (lambda p: p.write_text("x"), "a file"),
        (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), "checkpoints_convert"),
    ],
)
def test_what_is_no_checkpoint_is_said_to_be_so(tmp_path, make, words):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(ForeignError, match=words):
        Checkpoint(path)


# -- writing ---------------------------------------------------------------------------------------


def pieces(component, unit):
    found = arrays(component)
    return [(path, iter([found[path]])) for path in units(small.CONFIGS[NAME], component)[unit]]


def test_the_folder_has_no_name_until_all_is_there(tmp_path):
    writer = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))
    for component in components.COMPONENTS:
        for unit in units(small.CONFIGS[NAME], component):
            writer.write(component, unit, pieces(component, unit))
            assert not (tmp_path / "m").exists()
    with pytest.raises(ForeignError, match="unfinished conversion"):
        Checkpoint(tmp_path / "m.partial")
    assert Checkpoint(writer.finish(b"x", {})).parameters("vae") > 0
    assert not (tmp_path / "m.partial").exists()


def test_a_unit_appears_whole_or_not_at_all(tmp_path):
    writer = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))

    def broken():
        yield from pieces("vae", "decoder")[:3]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        writer.write("vae", "decoder", broken())
    again = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))
    assert again.resumed
    assert not again.done("vae", "decoder")


def test_a_unit_that_was_cut_short_is_written_again(tmp_path):
    writer = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))
    writer.write("vae", "decoder", pieces("vae", "decoder"))
    again = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))
    assert again.done("vae", "decoder")
    file = tmp_path / "m.partial" / "vae" / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert not again.done("vae", "decoder")


def test_another_plan_starts_over(tmp_path):
    Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"), {"files": 1}).write(
        "vae", "decoder", pieces("vae", "decoder")
    )
    other = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"), {"files": 2})
    assert not other.resumed
    assert not (tmp_path / "m.partial" / "vae" / "decoder.safetensors").exists()


def test_nothing_is_overwritten(native):
    with pytest.raises(OutputError, match="already exists"):
        Writer(native(NAME), uniform(small.CONFIGS[NAME], "float32"))


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match=r"needs 0\.0 GiB of disk, 0\.0 GiB are free"):
        Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))


def test_a_full_disk_on_the_way_keeps_what_is_finished(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32"))
    writer.write("vae", "encoder", pieces("vae", "encoder"))

    def full():
        yield from pieces("vae", "decoder")[:2]
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"No space left on device.*goes on from there"):
        writer.write("vae", "decoder", full())
    assert Writer(tmp_path / "m", uniform(small.CONFIGS[NAME], "float32")).done("vae", "encoder")


def test_bfloat16_is_stored_as_bfloat16(tmp_path):
    config = small.CONFIGS[NAME]
    models = {
        c: small.our_model(c, config, small.random_tensors(config)[c], "bfloat16")
        for c in small.MODELS
    }
    path = save(tmp_path / "m", uniform(config, "bfloat16"), models, b"x", {})
    loaded = load(Checkpoint(path), "transformer")
    for got, saved in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(models["transformer"]), strict=True
    ):
        assert got.dtype == "bfloat16"
        np.testing.assert_array_equal(got, saved)
