"""ControlNets: from their authors' files to native ones, and what is refused."""

import random
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert import commands
from checkpoints_convert.convert import convert
from tests import small
from tests.schedules import every
from tests.small import CONTROLLED, CONTROLS
from zimage_jax import cli
from zimage_jax.errors import CheckpointError, ForeignError, ZImageError
from zimage_jax.model import control
from zimage_jax.model.config import TURBO, ControlConfig
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import names as rules
from zimage_jax.weights import sources
from zimage_jax.weights.checkpoint import CONTROL, Checkpoint, stored_units
from zimage_jax.weights.controlled import Controlled
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.in_place import open_control


def published(name: str) -> dict[str, np.ndarray]:
    """The tensors of a file of this kind: 2.0's has a refiner whose maps are 0."""
    of = CONTROLS[name]
    found = small.control_tensors(CONTROLLED, of)
    if of.refiner == "control_layers":
        own = ControlConfig(of.layers, of.in_channels, "control_noise_refiner")
        more = small.control_tensors(CONTROLLED, own)
        unused = {n: a for n, a in more.items() if n.startswith("control_noise_refiner")}
        found |= {n: 0 * a if "_proj" in n else a for n, a in unused.items()}
    return found


def saved(name: str, folder: Path) -> Path:
    """The file of a ControlNet."""
    path = folder / f"{name}.safetensors"
    save_file(published(name), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, native_controlled):
    """Name of a ControlNet -> its file."""
    folder, found = tmp_path_factory.mktemp("controls"), {}

    def make(name: str):
        if name not in found:
            found[name] = saved(name, folder)
        return found[name]

    return make


@pytest.fixture(scope="module")
def native_controlled(native):
    return native("controlled")


@pytest.mark.parametrize("name", CONTROLS)
def test_a_file_is_recognised_and_converted_to_the_same_values(
    name, made, native_controlled, tmp_path
):
    source = sources.open_control_file(made(name), Checkpoint(native_controlled).config)
    assert source.config.control == CONTROLS[name]
    found = Checkpoint(convert(source, tmp_path / "c", "float32", quiet=True), CONTROL)
    expected = named_arrays(small.our_controlled(CONTROLLED, CONTROLS[name]))
    seen = set()
    for unit in found.units("transformer"):
        for path, array in found.read("transformer", unit).items():
            np.testing.assert_array_equal(array, np.asarray(expected[path]))
            seen.add(path)
    assert seen == {path for path in expected if control.is_of_branch(path)}
    assert not (tmp_path / "c" / "tokenizer.json").exists()
    whole = Controlled(Checkpoint(native_controlled), found)
    assert whole.config.control == CONTROLS[name]
    assert set(whole.units("transformer")) == set(whole.storage.units("transformer"))
    base = Checkpoint(native_controlled).read("transformer", "layers.0")
    for path, array in whole.read("transformer", "layers.0").items():
        np.testing.assert_array_equal(array, base[path])


@pytest.mark.parametrize("name", CONTROLS)
def test_a_file_in_place_has_the_arrays_of_the_converted_one(
    name, made, native_controlled, tmp_path
):
    config = Checkpoint(native_controlled).config
    source = sources.open_control_file(made(name), config)
    stored = open_control(convert(source, tmp_path / "c", quiet=True), config)
    in_place = open_control(made(name), config)
    assert in_place.units("transformer") == stored.units("transformer")
    assert in_place.parameters("transformer") == stored.parameters("transformer")
    assert in_place.nbytes("transformer") == stored.nbytes("transformer")
    for unit in stored.units("transformer"):
        expected = stored.read("transformer", unit)
        for path, array in in_place.read("transformer", unit).items():
            np.testing.assert_array_equal(array, expected[path])


def test_the_command_converts_and_inspects(made, native_controlled, tmp_path, capsys):
    def run(command, *words):
        with pytest.raises(SystemExit) as leaving:
            cli.run(command, list(map(str, words)), "checkpoints_convert")
        return leaving.value.code, capsys.readouterr()

    dst = tmp_path / "control"
    file, model = made("union 2.1"), native_controlled
    code, out = run(commands.convert, file, dst, "--config", model, "--format", "int8")
    assert code == 0, out.err
    assert "in int8" in out.out
    code, out = run(commands.inspect, dst)
    assert "native ControlNet" in out.out
    assert "2 blocks, 33 channels, refiner control_noise_refiner" in out.out
    storage = Controlled(Checkpoint(model), Checkpoint(dst, CONTROL)).storage
    of_ours, of_theirs = (
        storage.of("transformer", f"{unit}.attention.to_q.kernel").name
        for unit in ("layers.0", "control_layers.0")
    )
    assert (of_ours, of_theirs) == ("float32", "int8")
    code, out = run(commands.convert, file, tmp_path / "other")
    assert code == 1
    assert "misshapen" in out.err
    assert not (tmp_path / "other").exists()
    code, out = run(commands.inspect, file)
    assert "a Z-Image ControlNet" in out.out


def test_a_control_of_another_model_is_refused(made, native, native_controlled, tmp_path):
    source = sources.open_control_file(made("union 1.0"), Checkpoint(native_controlled).config)
    found = Checkpoint(convert(source, tmp_path / "c", quiet=True), CONTROL)
    with pytest.raises(CheckpointError, match="made for a transformer of n_layers 4"):
        Controlled(Checkpoint(native("plain")), found)
    with pytest.raises(ForeignError, match="it is a zimage_jax checkpoint"):
        Checkpoint(native("plain"), CONTROL)
    with pytest.raises(ForeignError, match="it is a zimage_jax control"):
        Checkpoint(tmp_path / "c")
    with pytest.raises(ForeignError, match="convert it first"):
        Checkpoint(made("union 1.0"), CONTROL)


def test_rows_of_formats_are_of_the_control_alone(made, native_controlled, tmp_path):
    source = sources.open_control_file(made("union 2.1"), Checkpoint(native_controlled).config)
    dst = convert(source, tmp_path / "c", "*layers.0=float32", quiet=True)
    storage = Controlled(Checkpoint(native_controlled), Checkpoint(dst, CONTROL)).storage
    for unit, name in (("layers.0", "float32"), ("control_layers.0", "float32")):
        assert storage.of("transformer", f"{unit}.modulation.bias").name == name
    assert storage.of("transformer", "control_layers.1.modulation.bias").name == "bfloat16"
    assert storage.of("transformer", "layers.1.modulation.bias").name == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("control_layers.1.after_proj.weight"), "1 missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "1 unknown"),
        (
            lambda t: t.update({"control_layers.0.ffn_norm1.weight": np.zeros(3, np.float32)}),
            "1 misshapen",
        ),
        (
            lambda t: t.update({"control_layers.0.ffn_norm1.weight": np.zeros(48, np.int32)}),
            "I32, not",
        ),
        (
            lambda t: t.update(
                {"control_layers.0.ffn_norm1.weight": np.full(48, np.nan, np.float32)}
            ),
            "NaN",
        ),
        (lambda t: t.pop("control_all_x_embedder.2-1.weight"), "expected a ControlNet Union"),
        (
            lambda t: t.update({"control_layers.9999.x": np.zeros(1, np.float32)}),
            "3 control blocks for 4",
        ),
        (
            lambda t: t.update(
                {"control_all_x_embedder.2-1.weight": np.zeros((48, 8), np.float32)}
            ),
            "takes 2 channels",
        ),
    ],
)
def test_files_that_are_no_controlnet_are_refused(change, message, native_controlled, tmp_path):
    tensors = published("union 2.1")
    change(tensors)
    save_file(tensors, tmp_path / "f.safetensors")

    def converted():
        source = sources.open_control_file(
            tmp_path / "f.safetensors", Checkpoint(native_controlled).config
        )
        convert(source, tmp_path / "c", quiet=True)

    with pytest.raises(ZImageError, match=message):
        converted()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("count", every([100, 2000], [100], []))
def test_hostile_files_are_refused_in_one_line(count, made, native_controlled, tmp_path):
    """Mutations of the header, the lengths and the manifest: a clear error, or the same values."""
    data, rng = made("union 2.1").read_bytes(), random.Random(7)
    source = sources.open_control_file(made("union 2.1"), Checkpoint(native_controlled).config)
    dst = convert(source, tmp_path / "c", quiet=True)
    manifest = (dst / "manifest" / "manifest.json").read_bytes()
    length = int.from_bytes(data[:8], "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(count):
        is_manifest = number % 2
        body = bytearray(manifest if is_manifest else data[: 8 + length])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            kind = rng.randrange(3)
            if kind == 0:
                body[at] = rng.randrange(256)
            elif kind == 1:
                del body[at : at + rng.randint(1, 40)]
            else:
                body[at:at] = rng.choice([b"9" * 12, b'"', b"{", b"[[[[", b"\xff", b"-1"])
        try:
            if is_manifest:
                (dst / "manifest" / "manifest.json").write_bytes(body)
                Checkpoint(dst, CONTROL)
            else:
                file = tmp_path / "f.safetensors"
                file.write_bytes(bytes(body) + data[8 + length :])
                sources.open_control_file(file, Checkpoint(native_controlled).config).check()
        except ZImageError:  # any other exception is a traceback
            refused += 1
    assert refused > 0.9 * count
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown << 10 < 200 << 20


@pytest.mark.parametrize("name", CONTROLS)
def test_counts_and_bytes_at_full_size(name):
    """Of what is stored of the published files."""
    layers = {"union 1.0": 6, "union 2.0": 15, "union 2.1": 15, "union 2.1 lite": 3}[name]
    config = replace(TURBO, control=replace(CONTROLS[name], layers=layers))
    storage = uniform(config, "bfloat16")
    units = stored_units(storage, CONTROL)
    nbytes = sum(storage.nbytes(*unit) for unit in units)
    expected = {
        "union 1.0": 3.10e9,
        "union 2.0": 5.92e9,  # without the refiner that is not used
        "union 2.1": 6.71e9,
        "union 2.1 lite": 2.02e9,
    }
    assert nbytes == pytest.approx(expected[name], rel=0.005)
    spec = control.Branch(config.transformer, config.control)
    assert (
        len(rules.expected(rules.CONTROL, spec))
        == {
            "union 1.0": 136,
            "union 2.0": 259,
            "union 2.1": 295,
            "union 2.1 lite": 91,
        }[name]
    )
