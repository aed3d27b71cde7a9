"""Formats on conversion: of PyTorch sources, and from one native checkpoint to another."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints_convert import commands
from checkpoints_convert.convert import reencode
from checkpoints_convert.inspect import inspect
from tests import small
from tests.weights.test_checkpoint import edit_manifest
from zimage_jax.errors import ConversionError, DamagedError, UsageError
from zimage_jax.weights import writer
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save

CONFIG = small.CONFIGS["plain"]
MIX = "layers.*=int8,text_encoder=lossless,vae=float32"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """dtype -> a native checkpoint in it of the same bfloat16 numbers, with a matrix that has too
    many exceptions."""
    tensors, made = small.random_tensors(CONFIG), {}
    tensors["transformer"]["layers.1.feed_forward.w2.weight"][:8] *= 1e-9
    for dtype in ("bfloat16", "float32"):
        models = {c: small.our_model(c, CONFIG, tensors[c], "bfloat16") for c in small.MODELS}
        path = tmp_path_factory.mktemp("sources") / dtype
        made[dtype] = save(
            path, uniform(CONFIG, dtype), models, small.tokenizer().to_str().encode(), {}
        )
    return made


def files_of(folder) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))
    }


def arrays_of(path) -> dict:
    """component.path -> the matrix a lossless, float32 or bfloat16 checkpoint stores."""
    checkpoint, found = Checkpoint(path), {}
    for component in small.MODELS:
        for unit in checkpoint.units(component):
            leaves = checkpoint.read(component, unit)
            trees = checkpoint.storage.encoded(component, unit, leaves)
            for name in checkpoint.storage.parameters(component, unit):
                encoding, tree = trees.get(name, (None, None))
                found[f"{component}.{name}"] = (
                    leaves[name] if encoding is None else encoding.decode(tree)
                )
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lossless_and_back_gives_the_same_files(sources, tmp_path, dtype):
    packed = reencode(Checkpoint(sources[dtype]), tmp_path / "packed", "lossless", quiet=True)
    again = reencode(Checkpoint(packed), tmp_path / "again", "bfloat16", quiet=True)
    assert files_of(again) == files_of(sources["bfloat16"])
    whole, spared = (
        sum(Checkpoint(p).nbytes("transformer", f"layers.{n}") for n in (0, 1))
        for p in (sources["bfloat16"], packed)
    )
    assert 0.75 < spared / whole < 0.85
    same = reencode(Checkpoint(packed), tmp_path / "same", "lossless", quiet=True)
    assert files_of(same) == files_of(packed)


def test_a_matrix_with_too_many_exceptions_is_plain_in_every_block(sources, tmp_path):
    packed = Checkpoint(
        reencode(Checkpoint(sources["bfloat16"]), tmp_path / "packed", "lossless", quiet=True)
    )
    for unit in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"):
        encodings = packed.storage.parameters("transformer", unit)
        assert encodings[f"{unit}.feed_forward.w2.kernel"] is None
        assert encodings[f"{unit}.feed_forward.w1.kernel"] is not None
    assert len(set(packed.storage.alike("transformer", ["layers.0", "layers.1"]))) == 1


def test_formats_mix_by_patterns(sources, tmp_path):
    path = reencode(Checkpoint(sources["float32"]), tmp_path / "mixed", MIX, quiet=True)
    storage = Checkpoint(path).storage
    assert storage.of("transformer", "layers.1.attention.to_q.kernel").name == "int8"
    assert storage.of("transformer", "noise_refiner.0.attention.to_q.kernel").name == "bfloat16"
    assert storage.of("text_encoder", "layers.1.mlp.up_proj.kernel").name == "lossless"
    assert storage.of("vae", "decoder.conv_in.kernel").name == "float32"
    parts = inspect(path)["components"]
    assert list(parts["transformer"]["formats"]) == ["bfloat16", "int8"]
    assert sum(parts["transformer"]["formats"].values()) == parts["transformer"]["bytes"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4", "format 'int4': expected one of bfloat16, float32, lossless, int8"),
        ("layers.*=int4", "format 'int4': expected one of"),
        ("layer.*=int8", r"'layer.\*=int8': the pattern matches nothing; expected a component"),
        ("", "format ''"),
    ],
)
def test_a_format_that_is_none_is_one_line(sources, tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        reencode(Checkpoint(sources["bfloat16"]), tmp_path / "out", text, quiet=True)
    assert not list(tmp_path.iterdir())


def test_int8_is_copied_and_never_widened(sources, tmp_path):
    narrow = reencode(Checkpoint(sources["float32"]), tmp_path / "narrow", "int8", quiet=True)
    same = reencode(Checkpoint(narrow), tmp_path / "same", "int8,vae=float32", quiet=True)
    for component in ("transformer", "text_encoder"):
        for file in (narrow / component).iterdir():
            assert file.read_bytes() == (same / component / file.name).read_bytes()
    with pytest.raises(ConversionError, match=r"to_k\.kernel is stored in int8, which has lost"):
        reencode(Checkpoint(narrow), tmp_path / "wide", "bfloat16", quiet=True)
    assert not list(tmp_path.glob("wide*"))


def test_a_conversion_to_another_format_goes_on(sources, tmp_path, monkeypatch):
    write, count = writer.Writer.write, iter(range(99))

    def stops(self, *args):
        if next(count) == 4:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(writer.Writer, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        reencode(Checkpoint(sources["bfloat16"]), tmp_path / "out", "lossless", quiet=True)
    written = []
    monkeypatch.setattr(
        writer.Writer, "write", lambda self, *args: (written.append(args[:2]), write(self, *args))
    )
    path = reencode(Checkpoint(sources["bfloat16"]), tmp_path / "out", "lossless", quiet=True)
    storage = Checkpoint(path).storage
    assert 0 < len(written) < sum(len(storage.units(c)) for c in small.MODELS)
    whole = reencode(Checkpoint(sources["bfloat16"]), tmp_path / "whole", "lossless", quiet=True)
    assert files_of(path) == files_of(whole)


def test_the_command_takes_a_native_checkpoint(sources, tmp_path):
    def run(*words):
        return CliRunner().invoke(commands.convert, list(map(str, words)))

    source, out = sources["float32"], tmp_path / "out"
    found = run(source, out, "--format", "lossless", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["format"] == "lossless"
    assert arrays_of(out).keys() == arrays_of(source).keys()
    refused = run(source, tmp_path / "other", "--variant", "base")
    assert refused.exit_code == 2
    assert "is a native checkpoint: only --format" in refused.output


# -- damage ---------------------------------------------------------------------------------------


def rewrite(folder, unit: str, leaf: str, change) -> None:
    """Change one stored array, and every checksum with it."""
    from xxhash import xxh3_64_hexdigest

    record = Checkpoint(folder).records("transformer")[leaf]
    file = folder / "transformer" / f"{unit}.safetensors"
    data = bytearray(file.read_bytes())
    part = slice(record.offset, record.offset + record.nbytes)
    array = np.frombuffer(data[part], record.dtype).reshape(record.shape).copy()
    change(array)
    data[part] = array.tobytes()
    file.write_bytes(data)

    def sign(manifest):
        manifest["arrays"]["transformer"][unit][leaf][3] = xxh3_64_hexdigest(array.tobytes())

    edit_manifest(folder, sign)


@pytest.mark.parametrize(
    ("form", "leaf", "change", "said"),
    [
        ("lossless", "base", lambda a: a.fill(241), "base: expected 0 to 240, got 241"),
        ("lossless", "base", lambda a: a.fill(65535), "base: expected 0 to 240, got 65535"),
        ("lossless", "places", lambda a: a.fill(-1), "places: expected strictly ascending"),
        ("lossless", "places", lambda a: a.fill(2**31 - 1), "places: expected strictly"),
        ("lossless", "places", lambda a: a.sort(axis=-1), None),
        ("int8", "scale", lambda a: a.fill(np.nan), "scale: expected finite numbers above 0"),
    ],
)
def test_values_out_of_range_behind_right_checksums_are_one_line(
    sources, tmp_path, form, leaf, change, said
):
    path = reencode(Checkpoint(sources["float32"]), tmp_path / "out", form, quiet=True)
    rewrite(path, "layers.0", f"layers.0.attention.to_q.kernel.{leaf}", change)
    if said is None:
        Checkpoint(path).read("transformer", "layers.0")
        return
    with pytest.raises(DamagedError, match=rf"layers\.0\.safetensors: \S+to_q\.kernel\.{said}"):
        Checkpoint(path).read("transformer", "layers.0")


@pytest.mark.parametrize(
    "rows",
    [[["*", "int4"]], [["*"]], "lossless", [["layers.0", "float32"]], [[1, "int8"]], {"a": 1}],
)
def test_rows_of_formats_that_do_not_fit_the_files_are_one_line(sources, tmp_path, rows):
    path = reencode(Checkpoint(sources["float32"]), tmp_path / "out", "lossless", quiet=True)
    edit_manifest(path, lambda m: m.update(formats=rows))
    with pytest.raises(DamagedError, match="manifest"):
        Checkpoint(path)
