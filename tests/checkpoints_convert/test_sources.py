"""Sources that are refused: what is wrong is said in one line, and nothing is written."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.inspect import inspect
from tests import small
from tests.checkpoints_convert.published import (
    CONFIG,
    STEMS,
    TENSORS,
    arrays_of,
    comfy_files,
    published_like,
    run,
)
from zimage_jax.errors import (
    ConfigError,
    ConversionError,
    ForeignError,
    ZImageError,
)
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import sources


def edit(folder: Path, change) -> None:
    """Change the tensors of the folder's VAE file."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = published_like("vae")
    change(tensors)
    save_file(tensors, file)


def test_every_fault_is_reported_at_once_and_nothing_is_written(folder, tmp_path):
    def spoil(tensors):
        del tensors["encoder.conv_in.bias"]
        tensors["encoder.conv_extra.weight"] = np.ones((2, 2), np.float32)
        tensors["decoder.conv_out.bias"] = np.ones(4, np.float32)
        tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"].astype(np.int32)

    edit(folder, spoil)
    shard = sorted((folder / "transformer").glob("*-00002-*"))[0]
    first = sorted((folder / "transformer").glob("*-00001-*"))[0]
    duplicate = sources.read_header(first).tensors[0].name
    part = {
        n: a
        for n, a in published_like("transformer").items()
        if n in {t.name for t in sources.read_header(shard).tensors}
    }
    save_file(part | {duplicate: published_like("transformer")[duplicate]}, shard)
    with pytest.raises(ConversionError) as fault:
        run(folder, tmp_path / "out")
    message = str(fault.value)
    for count in ("1 missing", "1 unknown", "1 duplicate", "1 misshapen", "1 I32, not"):
        assert count in message
    for words in (
        "vae: missing encoder.conv_in.bias [16]",
        "vae: unknown encoder.conv_extra.weight [2, 2]",
        "vae: misshapen decoder.conv_out.bias: expected [3], got [4]",
        "vae: I32, not F32, BF16, F16, F8_E4M3, F8_E5M2: decoder.conv_in.bias",
        duplicate,
    ):
        assert words in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_nan_weights_are_named(folder, tmp_path, value):
    def spoil(tensors):
        tensors["decoder.up_blocks.1.resnets.0.conv1.weight"][3, 2, 1, 0] = value

    edit(folder, spoil)
    with pytest.raises(
        ConversionError,
        match=r"decoder\.up_blocks\.1\.resnets\.0\.conv1\.weight has NaN or infinity",
    ):
        run(folder, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def corrupt_header(file: Path, change) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.write_bytes(f.read_bytes()[:-100]),
        lambda f: f.write_bytes(f.read_bytes()[:4]),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        lambda f: f.write_bytes(b"PK\x03\x04" + b"\0" * 64),
        lambda f: corrupt_header(
            f, lambda h: h["encoder.conv_in.bias"].update(data_offsets=[0, 1 << 40])
        ),
        lambda f: corrupt_header(f, lambda h: h["encoder.conv_in.bias"].update(shape=[1 << 40])),
        lambda f: corrupt_header(f, lambda h: h["encoder.conv_in.bias"].update(dtype="F77")),
    ],
)
def test_a_file_that_is_cut_or_lies_is_one_line(folder, tmp_path, spoil):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    spoil(file)
    with pytest.raises(ConversionError) as fault:
        run(folder, tmp_path / "out")
    assert str(fault.value).startswith(f"{file}: not a whole safetensors file")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "Flux"),
        (["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"], "SDXL"),
        (["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"], "SDXL"),
        (["some.other.weight"], "some.other.weight"),
        (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "a LoRA"),
        (["lora_unet__layers_0_attention_to_q.lora_down.weight"], "a LoRA"),
        (["control_layers.0.before_proj.weight"], "ControlNet"),
        (["layers.0.attention.qkv.weight", "siglip_embedder.0.weight"], "Omni"),
        (["layers.0.attention.to_q.weight", "dec_net.a.weight"], "pixel space"),
        (["vae.decoder.up_blocks.0.a", "model.layers.0.self_attn.q_norm.weight"], "model.layers.0"),
        (["\x1b[31m" + "x" * 5000], r"\\x1b\[31mx"),
    ],
)
def test_another_model_is_named(folder, tmp_path, names, model):
    file = tmp_path / "other.safetensors"
    save_file({n: np.ones((2, 2), np.float32) for n in names}, file)
    with pytest.raises(ForeignError, match=model) as fault:
        run(folder, tmp_path / "out", {"transformer": file})
    assert "not Z-Image's transformer" in str(fault.value)
    assert str(fault.value).isprintable()
    assert len(str(fault.value)) < 600


def rewrite(file: Path, change) -> None:
    """Change a safetensors file's tensors as (dtype, shape, bytes), whatever NumPy lacks."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensors = {
        n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()
    }
    tensors, header, body = change(tensors), {}, b""
    for name, (dtype, shape, part) in tensors.items():
        offsets = [len(body), len(body) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += part
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_quantised_file_is_one_line_per_kind(folder, tmp_path):
    """Of its hundred tensors three are named."""
    files = comfy_files(tmp_path / "comfy")
    rewrite(
        files["transformer"],
        lambda tensors: {
            n: ("I8", shape, part[: len(part) // 4]) for n, (_, shape, part) in tensors.items()
        },
    )
    with pytest.raises(
        ConversionError, match=r"I8, not F32, BF16, F16, F8_E4M3, F8_E5M2: "
    ) as fault:
        run(folder, tmp_path / "out", files)
    assert str(fault.value).endswith("more")
    assert str(fault.value).count("\n") == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_a_file_cast_to_fp8_is_read(folder, tmp_path, name, dtype):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"

    def cast(tensors):
        found = {}
        for tensor, (_, shape, part) in tensors.items():
            narrow = np.frombuffer(part, np.float32).astype(dtype)
            found[tensor] = name, shape, narrow.tobytes()
        return found

    rewrite(file, cast)
    got = arrays_of(run(folder, tmp_path / "out"), "vae")
    narrow = {n: a.astype(dtype).astype(np.float32) for n, a in TENSORS["vae"].items()}
    expected = named_arrays(small.our_model("vae", CONFIG, narrow))
    for path, array in got.items():
        np.testing.assert_array_equal(array, expected[path])


def test_scales_without_their_weight_are_unknown(folder, tmp_path):
    files = comfy_files(tmp_path / "comfy")

    def scaled(tensors):
        name = "layers.0.feed_forward.w9.scale_weight"
        return tensors | {name: ("F32", [], np.float32(2).tobytes())}

    rewrite(files["transformer"], scaled)
    with pytest.raises(ConversionError, match=r"unknown layers.0.feed_forward.w9.scale_weight"):
        run(folder, tmp_path / "out", files)


def test_hostile_names_of_tensors_are_escaped_and_cut(folder, tmp_path):
    def spoil(tensors):
        tensors["\x1b[31m\n" + "x" * 100_000] = np.ones(2, np.float32)

    edit(folder, spoil)
    with pytest.raises(ConversionError, match="1 unknown") as fault:
        run(folder, tmp_path / "out")
    assert str(fault.value).count("\n") == 1
    assert str(fault.value).replace("\n", "").isprintable()
    assert len(str(fault.value)) < 1000


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (
            lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
            ConversionError,
            "the tokenizer is missing",
        ),
        (
            lambda f: (f / "vae" / "config.json").unlink(),
            ConfigError,
            "vae/config.json: cannot be read",
        ),
        (lambda f: (f / "vae" / "config.json").write_text("{"), ConfigError, "not JSON"),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            ConversionError,
            "expected diffusion",
        ),
        (
            lambda f: next((f / "transformer").glob("*-00002-*")).unlink(),
            ConversionError,
            "00002-of-00003",
        ),
        (
            lambda f: (
                f / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
            ).write_text('{"weight_map": {"a": "../../etc/passwd"}}'),
            ConversionError,
            "not the name of a safetensors file beside it",
        ),
    ],
)
def test_an_incomplete_folder_is_one_line(folder, tmp_path, spoil, kind, words):
    spoil(folder)
    with pytest.raises(kind) as fault:
        run(folder, tmp_path / "out")
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
PLACES = (
    "vae/config.json",
    "scheduler/scheduler_config.json",
    INDEX,
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/tokenizer.json",
)


@pytest.mark.parametrize("name", PLACES)
def test_a_pipe_is_never_waited_for(folder, tmp_path, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ZImageError, match=f"{name}: expected a file, found a device, a pipe"):
        run(folder, tmp_path / "out")


def test_a_pipe_as_a_component_or_to_inspect_is_never_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for component in STEMS:
        with pytest.raises(ConversionError, match="found a device, a pipe"):
            run(folder, tmp_path / "out", {component: tmp_path / "pipe"})
    with pytest.raises(ZImageError, match="found a device, a pipe"):
        inspect(tmp_path / "pipe")
    with pytest.raises(ZImageError, match="found a device, a pipe"):
        run(tmp_path / "pipe", tmp_path / "out")


@pytest.mark.parametrize("name", PLACES)
def test_a_device_is_not_read(folder, tmp_path, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ZImageError, match="found a device"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[]",
            "5",
            "null",
            '"x"',
            "[" * 100_000,
            '{"a":' * 100_000,
            "\x1b[31m",
            '{"weight_map": {}}',
        ),
        *('{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "\\ud800"}}'),
        *(
            '{"weight_map": {"a": "\\u0000"}}',
            '{"weight_map": {"a": "a/b"}}',
            '{"weight_map": {"a": ""}}',
        ),
        '{"weight_map": {"a": "' + "x" * 9999 + '"}}',
    ],
)
def test_a_shard_index_that_is_none_is_one_line(folder, tmp_path, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ConversionError) as fault:
        run(folder, tmp_path / "out")
    assert str(fault.value).isprintable()
    assert len(str(fault.value)) < 5000


def test_a_name_that_no_file_can_have_is_one_line(folder, tmp_path):
    long = tmp_path / ("x" * 300)
    for attempt in (
        lambda: run(long, tmp_path / "out"),
        lambda: run(folder, tmp_path / "out", tokenizer=long),
        lambda: inspect(long),
    ):
        with pytest.raises(ZImageError, match="File name too long"):
            attempt()


def test_a_pickle_is_not_opened(folder, tmp_path):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(ConversionError, match="is a pickle and is not opened"):
        run(folder, tmp_path / "out")


def test_an_unknown_config_key_is_named(folder, tmp_path):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_moe": True}))
    with pytest.raises(ConfigError, match="unknown key 'use_moe'"):
        run(folder, tmp_path / "out")
