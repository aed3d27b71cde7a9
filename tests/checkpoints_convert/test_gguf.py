"""GGUF files: every type is read as the `gguf` package dequantises it, in the names of ComfyUI,
stable-diffusion.cpp and llama.cpp."""

import struct

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from checkpoints_convert import commands
from checkpoints_convert.inspect import inspect
from tests.checkpoints_convert.gguf_files import (
    K_QUANTS,
    TYPES,
    gguf,
    k_blocks,
    llama_names,
    mixed,
    write,
)
from tests.checkpoints_convert.published import CONFIG, arrays_of, comfy_files, run
from zimage_jax.errors import ConversionError, UsageError
from zimage_jax.weights import gguf_file, sources

F32 = np.dtype(np.float32)
QKV = "layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return comfy_files(tmp_path_factory.mktemp("plain") / "comfy")


def encoder_parts(plain) -> dict:
    """The text encoder's tensors, quantised, under llama.cpp's names."""
    tensors = load_file(plain["text_encoder"])
    tensors.pop("lm_head.weight")
    return llama_names(mixed(tensors)[0])


@pytest.fixture
def packed(plain, tmp_path):
    """DiT and text encoder as GGUF, and safetensors files of the same meaning."""
    stored, meant = dict(plain), dict(plain)
    for component in ("transformer", "text_encoder"):
        tensors = load_file(plain[component])
        tensors.pop("lm_head.weight", None)
        parts, meaning = mixed(tensors)
        is_text = component == "text_encoder"
        parts = llama_names(parts) if is_text else parts
        arch = {"arch": "qwen3", "rope__freq_base": 10000.0} if is_text else {}
        stored[component] = write(tmp_path / f"{component}.gguf", parts, **arch)
        meant[component] = tmp_path / f"{component}-meant.safetensors"
        save_file(meaning, meant[component])
    return stored, meant


def test_a_model_in_gguf_is_read_as_gguf_dequantises(folder, packed, tmp_path):
    found, expected = (
        run(None, tmp_path / name, files, config=folder)
        for name, files in zip(("found", "expected"), packed, strict=True)
    )
    assert found.config == CONFIG
    for component in packed[0]:
        wanted = arrays_of(expected, component)
        for path, array in arrays_of(found, component).items():
            np.testing.assert_array_equal(array, wanted[path])


def test_inspect_tells_the_types(packed, plain):
    parts = inspect(packed[0]["text_encoder"])["components"]
    assert set(parts["text_encoder"]["dtypes"]) >= {"F32", "Q8_0"}
    parts = inspect(packed[0]["transformer"])["components"]
    assert set(parts["transformer"]["dtypes"]) >= {"BF16", "F16", "F32"}
    count = inspect(plain["transformer"])["components"]["transformer"]["parameters"]
    assert parts["transformer"]["parameters"] == count


@pytest.mark.parametrize("kind", K_QUANTS, ids=str)
def test_a_k_quant_is_read_as_gguf_dequantises(tmp_path, kind):
    data = k_blocks(kind, 300, 768)
    file = write(tmp_path / "k.gguf", {QKV: (data, kind)})
    (tensor,) = sources.open_file("transformer", file).tensors.values()
    assert (tensor.shape, tensor.kind, tensor.nbytes) == ((300, 768), kind.name, data.nbytes)
    expected = gguf.quants.dequantize(data, kind)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(tensor.rows(0, 300, F32), expected)
    np.testing.assert_array_equal(tensor.rows(100, 200, F32), expected[100:200])


def test_the_prefix_of_stable_diffusion_cpp(folder, plain, packed, tmp_path):
    parts, _ = mixed(load_file(plain["transformer"]))
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in parts.items()}
    files = packed[0] | {"transformer": write(tmp_path / "sd.gguf", prefixed)}
    assert set(inspect(files["transformer"])["components"]) == {"transformer"}
    run(None, tmp_path / "out", files, config=folder)


def test_a_reshaped_tensor_has_its_own_shape_back(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "r.gguf", "lumina2")
    writer.add_array(f"comfy.gguf.orig_shape.{QKV}", [6, 128])
    writer.add_tensor(QKV, np.arange(768, dtype=np.float32).reshape(3, 256))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = sources.open_file("transformer", tmp_path / "r.gguf").tensors.values()
    np.testing.assert_array_equal(tensor.rows(1, 6, F32), np.arange(128, 768.0).reshape(5, 128))


# -- which text encoder it is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        ("Qwen3 4B", False),
        ("Qwen3-4B", False),
        ("Qwen_3_4b-Q6_K", False),
        ("Qwen3 4B Instruct 2507", True),
        ("Qwen3-4B-Thinking-2507", True),
        ("Qwen3 4B Z Image Engineer V4", True),
        ("\x1b[31mQwen", True),
        (None, False),
    ],
)
def test_another_text_encoder_is_named(folder, plain, packed, tmp_path, name, warns):
    """Its tensors have the pipeline's names and shapes: its header alone tells."""
    parts = encoder_parts(plain)
    own = {"name": name} if name else {}
    file = write(tmp_path / "text.gguf", parts, "qwen3", rope__freq_base=5e6, **own)
    source = sources.open_source(None, packed[0] | {"text_encoder": file}, folder, None)
    assert source.config.text_encoder.rope_theta == 5e6  # its own is computed with
    assert len(source.remarks()) == warns
    for remark in source.remarks():
        assert "text.gguf calls itself '" in remark
        assert "is not the Qwen3-4B" in remark
        assert remark.isprintable()


def test_the_command_warns_of_another_text_encoder(folder, plain, packed, tmp_path):
    parts = encoder_parts(plain)
    file = write(tmp_path / "text.gguf", parts, "qwen3", name="Qwen3 4B Instruct 2507")
    words = [str(folder), str(tmp_path / "out"), "--text-encoder", str(file)]
    shown = CliRunner().invoke(commands.convert, words)
    assert shown.exit_code == 0
    assert "warning: the text encoder in text.gguf calls itself 'Qwen3 4B Instruct" in shown.stderr
    assert inspect(file)["notes"] == {"name": "Qwen3 4B Instruct 2507"}


# -- refused ---------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named(packed, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UsageError, match=r"needs gguf: run scripts/setup gguf"):
        sources.read_header(packed[0]["transformer"])


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def tensor(name=b"a", shape=(32, 2), kind=0, offset=0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


KEY = text(b"k") + struct.pack("<IB", 0, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF", "does not end within 4 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "expected 65536 at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "does not end within"),
        (HEAD + KEY + tensor(shape=(1,) * 9), "has 9 axes"),
        (HEAD + KEY + tensor(), "does not fit the file"),
        (HEAD + KEY + tensor(shape=(1 << 63, 1 << 63)), "does not fit the file"),
        (HEAD + KEY + tensor(offset=1 << 63, shape=(0,)), "does not fit the file"),
        (HEAD + KEY + tensor(kind=24) + bytes(999), "type 24, which gguf does not dequantise"),
        (HEAD + KEY + tensor(kind=9999) + bytes(999), "type 9999"),
        (HEAD + KEY + tensor(kind=8, shape=(33, 32)) + bytes(9999), "rows of 33 in blocks of 32"),
        (HEAD + KEY + tensor(b"\xff"), "codec can't decode"),
        (HEAD + text(b"k") + struct.pack("<I", 99), "a value of type 99"),
        # arrays that are said to go on for ever: of numbers, of strings, of arrays
        (HEAD + text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 62), "does not end within"),
        (HEAD + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 62), "does not end within"),
        (HEAD + text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 62), "an array of type 9"),
        (HEAD + text(b"k") + struct.pack("<IQ", 8, 1 << 62), "does not end within"),
        (HEAD + text(b"k" * 70_000) + bytes(99), "a name of over 65536 bytes"),
        (
            HEAD + text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor() + bytes(999),
            "alignment 0",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensor() + tensor() + bytes(999),
            "two tensors of one name",
        ),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path, data, words):
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    with pytest.raises(ConversionError, match=words) as fault:
        sources.read_header(file)
    assert str(fault.value).startswith(f"{file}: not a whole GGUF file")
    assert str(fault.value).isprintable()


def test_infinity_in_a_block_is_named(folder, packed, plain, tmp_path):
    parts = encoder_parts(plain)
    data, _ = parts["blk.0.attn_q.weight"]
    data[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    files = packed[0] | {"text_encoder": write(tmp_path / "inf.gguf", parts, "qwen3")}
    with pytest.raises(ConversionError, match=r"self_attn\.q_proj\.weight has NaN or infinity"):
        run(None, tmp_path / "out", files, config=folder)


@pytest.mark.parametrize("theta", [float("nan"), 0.0, -1e6, float("inf")])
def test_a_rotary_base_that_is_none_is_refused(folder, plain, packed, tmp_path, theta):
    parts = encoder_parts(plain)
    file = write(tmp_path / "text.gguf", parts, "qwen3", rope__freq_base=theta)
    with pytest.raises(ConversionError, match=r"rope\.freq_base is"):
        sources.open_source(None, packed[0] | {"text_encoder": file}, folder, None)


def test_the_names_of_types_are_those_of_gguf():
    assert struct.pack("<I", gguf.GGUF_MAGIC) == gguf_file.MAGIC
    assert TYPES.Q8_0.name == "Q8_0"
