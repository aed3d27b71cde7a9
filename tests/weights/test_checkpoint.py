import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import small
from zimage_jax.errors import CheckpointError, DamagedError, ForeignError, OutputError
from zimage_jax.model import dit
from zimage_jax.model.layers import named_arrays
from zimage_jax.runtime.reader import load
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


@functools.cache
def arrays(component: str) -> dict[str, np.ndarray]:
    config = small.CONFIGS[NAME]
    return named_arrays(small.our_model(component, config, small.random_tensors(config)[component]))


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("component", components.COMPONENTS)
def test_what_was_saved_comes_back(native, component, memory_kind):
    model = load(Checkpoint(native(NAME)), component, kind=memory_kind)
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


def test_half_a_block_is_read_alone(folder):
    """Without the bytes of the other half, of which one is wrong here."""
    checkpoint = Checkpoint(folder)
    attention, feed_forward = components.halves("transformer", "layers.0")
    whole = checkpoint.read("transformer", "layers.0")
    found = checkpoint.read("transformer", attention)
    assert list(found) == list(checkpoint.storage.leaves("transformer", attention))
    for path, array in found.items():
        np.testing.assert_array_equal(array, whole[path])
    taken = checkpoint.buffer_bytes("transformer", attention)
    assert taken < checkpoint.buffer_bytes("transformer", "layers.0")
    buffer = np.empty(taken, np.uint8)
    again = checkpoint.read("transformer", attention, buffer)
    assert all(np.shares_memory(array, buffer) for array in again.values())
    flip(folder / "transformer" / "layers.0.safetensors", -1)
    spoilt = {name for name in (attention, feed_forward) if is_damaged(checkpoint, name)}
    (last,) = {components.half_of(name) for name in spoilt}
    path = max(checkpoint._records["transformer"]["layers.0"].items(), key=lambda r: r[1].offset)
    assert path[0].split(".")[2] in dit.HALVES[last]


def is_damaged(checkpoint: Checkpoint, name: str) -> bool:
    try:
        checkpoint.read("transformer", name)
    except DamagedError:
        return True
    return False


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
    assert manifest["format"] == checkpoint.MODEL


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
        Checkpoint(folder).tokenizer()


def edit_manifest(folder, change, *, signed=True) -> None:
    file = folder / "manifest" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    if signed:
        manifest["checksum"] = checkpoint.manifest_checksum(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda m: m.update(format="other"), ForeignError, "not the manifest"),
        (lambda m: m.update(version=99), CheckpointError, "version 99"),
        (lambda m: m.update(dtype="int4"), DamagedError, "malformed"),
        (lambda m: m.update(dtype="bfloat16"), DamagedError, "expected ['bfloat16'"),
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
        (lambda m: m.update(provenance=5), DamagedError, "malformed"),
        (lambda m: m.update(version=[2]), CheckpointError, "version [2]"),
        (
            lambda m: m["config"]["text_encoder"].update(x="\x1b[31m" * 999),
            CheckpointError,
            "\\x1b",
        ),
        (
            lambda m: m["arrays"]["transformer"]["stem"]["stem.x_pad_token"].pop(),
            DamagedError,
            "malformed",
        ),
        (
            lambda m: m["arrays"]["transformer"]["stem"].update({"stem.x_pad_token": ["float32"]}),
            DamagedError,
            "stem.x_pad_token",
        ),
    ],
)
def test_a_manifest_that_lies_is_refused(folder, change, kind, words):
    edit_manifest(folder, change)
    with pytest.raises(kind) as fault:
        Checkpoint(folder)
    assert words in str(fault.value)
    assert str(fault.value).isprintable()
    assert len(str(fault.value)) < 1000


def test_numbers_of_another_type_read_as_those_they_equal(folder):
    """An offset of 448.0 for 448 is no fault, and no type error later."""
    edit_manifest(
        folder,
        lambda m: m["arrays"]["vae"]["decoder"]["decoder.conv_in.bias"].__setitem__(
            2, float(m["arrays"]["vae"]["decoder"]["decoder.conv_in.bias"][2])
        ),
    )
    assert Checkpoint(folder).read("vae", "decoder")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"]["scheduler"].update(shift=4.0),
        lambda m: m["config"]["transformer"].update(rope_theta=257.0),
        lambda m: m["config"]["vae"].update(sample_size=1040),
        lambda m: m["config"]["defaults"].update(steps=9),
        lambda m: m.update(provenance={}),
        lambda m: m.pop("checksum"),
    ],
)
def test_an_edited_number_is_noticed(folder, change):
    edit_manifest(folder, change, signed=False)
    with pytest.raises(DamagedError, match=r"manifest\.json: not what was written"):
        Checkpoint(folder)


@pytest.mark.parametrize(("shift", "steps", "guidance"), [(3.0, 8, 0.0), (6.0, 28, 4.0)])
def test_version_1_is_still_read(folder, shift, steps, guidance):
    """It has no checksum and no defaults; those follow from the shift."""

    def older(manifest):
        manifest["version"] = 1
        del manifest["checksum"], manifest["config"]["defaults"]
        manifest["config"]["scheduler"]["shift"] = shift

    edit_manifest(folder, older, signed=False)
    found = Checkpoint(folder)
    assert (found.config.defaults.steps, found.config.defaults.guidance) == (steps, guidance)
    assert load(found, "vae") is not None


def test_a_flipped_byte_in_a_header_is_noticed(folder):
    flip(folder / "vae" / "decoder.safetensors", 40)
    with pytest.raises(DamagedError, match=r"decoder\.safetensors: its header"):
        load(Checkpoint(folder), "vae")


@pytest.mark.parametrize(
    "name", ["vae/decoder.safetensors", "tokenizer.json", "manifest/manifest.json"]
)
def test_a_pipe_is_never_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)

    def read():
        found = Checkpoint(folder)
        return found.tokenizer(), found.read("vae", "decoder")

    with pytest.raises(DamagedError, match="a device, a pipe or a socket"):
        read()


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
        (lambda p: p.symlink_to(p), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), "checkpoints_convert"),
    ],
)
def test_what_is_no_checkpoint_is_said_to_be_so(tmp_path, make, words):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(path)


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="File name too long"):
        Checkpoint(tmp_path / ("x" * 300))


# -- writing ---------------------------------------------------------------------------------------


STORAGE = uniform(small.CONFIGS[NAME], "float32")


def pieces(component, unit):
    found = arrays(component)
    return [(path, iter([found[path]])) for path in units(small.CONFIGS[NAME], component)[unit]]


def write_all(writer) -> None:
    for component in components.COMPONENTS:
        for unit in writer.storage.units(component):
            writer.write(component, unit, pieces(component, unit))


def test_the_folder_has_no_name_until_all_is_there(tmp_path):
    with Writer(tmp_path / "m", STORAGE) as writer:
        write_all(writer)
        assert not (tmp_path / "m").exists()
        with pytest.raises(ForeignError, match="unfinished conversion"):
            Checkpoint(tmp_path / "m.partial")
        assert Checkpoint(writer.finish(b"x", {})).parameters("vae") > 0
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert sorted(os.listdir(tmp_path / "m")) == [
        "manifest",
        "text_encoder",
        "tokenizer.json",
        "transformer",
        "vae",
    ]
    assert os.listdir(tmp_path / "m" / "manifest") == ["manifest.json"]


def test_a_unit_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield from pieces("vae", "decoder")[:3]
        raise RuntimeError

    with Writer(tmp_path / "m", STORAGE) as writer, pytest.raises(RuntimeError):
        writer.write("vae", "decoder", broken())
    with Writer(tmp_path / "m", STORAGE) as again:
        assert again.resumed
        assert not again.done("vae", "decoder")


@pytest.fixture
def partial(tmp_path):
    """DST.partial with one finished unit."""
    with Writer(tmp_path / "m", STORAGE) as writer:
        writer.write("vae", "decoder", pieces("vae", "decoder"))
    return tmp_path / "m.partial"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: flip(f, -5),
        lambda f: f.write_bytes(f.read_bytes()[:9000] + bytes(f.stat().st_size - 9000)),
        lambda f: flip(f, 40),
        lambda f: f.unlink(),
        lambda f: (f.unlink(), os.mkfifo(f)),
    ],
    ids=["cut", "a bit", "zeros", "header", "missing", "pipe"],
)
def test_a_finished_unit_that_changed_is_written_again(tmp_path, partial, spoil):
    with Writer(tmp_path / "m", STORAGE) as again:
        assert again.done("vae", "decoder")
    spoil(partial / "vae" / "decoder.safetensors")
    with Writer(tmp_path / "m", STORAGE) as again:
        assert not again.done("vae", "decoder")
        write_all(again)
        found = Checkpoint(again.finish(b"x", {}))
    np.testing.assert_array_equal(
        found.read("vae", "decoder")["decoder.conv_in.bias"], arrays("vae")["decoder.conv_in.bias"]
    )


@pytest.mark.parametrize(
    "line", [b'{"unit": "vae/enc', b"[]", b"5", b"\xff", b"[" * 9999, b'{"unit": 5}']
)
def test_a_journal_that_was_cut_off_is_read_up_to_there(tmp_path, partial, line):
    with (partial / "finished.jsonl").open("ab") as f:
        f.write(line)
    with Writer(tmp_path / "m", STORAGE) as again:
        assert again.done("vae", "decoder")
        assert not again.done("vae", "encoder")
        again.write("vae", "encoder", pieces("vae", "encoder"))
    with Writer(tmp_path / "m", STORAGE) as again:
        assert again.done("vae", "encoder")


def test_another_plan_starts_over(tmp_path):
    with Writer(tmp_path / "m", STORAGE, {"files": 1}) as writer:
        writer.write("vae", "decoder", pieces("vae", "decoder"))
    with Writer(tmp_path / "m", STORAGE, {"files": 2}) as other:
        assert not other.resumed
        assert not other.done("vae", "decoder")
        assert not list((tmp_path / "m.partial").glob("*/*"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x")),
        lambda p: (p.mkdir(), (p / "plan.json").write_text('{"version": 1}')),
        lambda p: (p.mkdir(), (p / "plan.json").write_bytes(b"\xff\xfe\0")),
        lambda p: (p.mkdir(), (p / "plan.json").mkdir()),
        lambda p: (p.mkdir(), os.mkfifo(p / "plan.json")),
        lambda p: p.write_text("x"),
    ],
    ids=["a stranger's", "an older one's", "binary", "a folder as mark", "a pipe", "a file"],
)
def test_a_folder_without_our_mark_is_not_touched(tmp_path, make):
    place = tmp_path / "m.partial"
    make(place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"m\.partial: exists and is not an unfinished"):
        Writer(tmp_path / "m", STORAGE)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "plan.tmp").write_text('{"form')  # killed before the mark was there
    with Writer(tmp_path / "m", STORAGE) as writer:
        assert not writer.resumed


def test_one_writer_at_a_time(tmp_path):
    with Writer(tmp_path / "m", STORAGE):
        with pytest.raises(OutputError, match="another process is writing it"):
            Writer(tmp_path / "m", STORAGE)
        with Writer(tmp_path / "other", STORAGE):
            pass
    with Writer(tmp_path / "m", STORAGE) as again:
        assert again.resumed
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_that_is_none_of_ours_stays(tmp_path):
    (tmp_path / "m.partial.lock").write_text("x")
    with pytest.raises(OutputError, match="is in the way"):
        Writer(tmp_path / "m", STORAGE)
    assert (tmp_path / "m.partial.lock").read_text() == "x"


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    """In whatever order the units were written."""
    for name in ("a", "b"):
        with Writer(tmp_path / name, STORAGE) as writer:
            every = [(c, u) for c in components.COMPONENTS for u in STORAGE.units(c)]
            for component, unit in every if name == "a" else every[::-1]:
                writer.write(component, unit, pieces(component, unit))
            writer.finish(b"x", {"of": "tests"})
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_nothing_is_overwritten(native):
    with pytest.raises(OutputError, match="already exists"):
        Writer(native(NAME), STORAGE)


def test_a_name_that_no_folder_can_have_is_one_line(tmp_path):
    with pytest.raises(OutputError, match="File name too long"):
        Writer(tmp_path / ("x" * 250), STORAGE)


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match=r"needs \d\.\d MiB of disk, 0\.0 MiB are free"):
        Writer(tmp_path / "m", STORAGE)


def test_a_full_disk_on_the_way_keeps_what_is_finished(tmp_path):
    def full():
        yield from pieces("vae", "decoder")[:2]
        raise OSError(28, "No space left on device")

    with Writer(tmp_path / "m", STORAGE) as writer:
        writer.write("vae", "encoder", pieces("vae", "encoder"))
        with pytest.raises(OutputError, match=r"No space left on device.*again to resume"):
            writer.write("vae", "decoder", full())
    with Writer(tmp_path / "m", STORAGE) as writer:
        assert writer.done("vae", "encoder")


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
