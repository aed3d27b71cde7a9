"""The converter: layouts, strictness, interruption, and every kind of bad source."""

import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from checkpoints_convert import commands, sources
from checkpoints_convert.convert import convert
from checkpoints_convert.inspect import inspect
from tests import small
from tests.model.test_config import PUBLISHED
from zimage_jax import interrupts
from zimage_jax.errors import (
    ConfigError,
    ConversionError,
    ForeignError,
    OutputError,
    UsageError,
    ZImageError,
)
from zimage_jax.model import dit, text_encoder, vae
from zimage_jax.model.config import BASE, TURBO, DefaultsConfig
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import components, writer
from zimage_jax.weights import names as rules
from zimage_jax.weights.checkpoint import Checkpoint

CONFIG = small.CONFIGS["five_blocks"]
TENSORS = small.random_tensors(CONFIG)  # copy before you change one
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}


@functools.cache
def expected_arrays(component: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """What a checkpoint of TENSORS holds."""
    return named_arrays(small.our_model(component, CONFIG, TENSORS[component], dtype))


def published_like(component: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """A component's tensors as the published folder has them: the text encoder with its unused last
    layer."""
    tensors = dict(TENSORS[component])
    if component == "text_encoder":
        last = CONFIG.text_encoder.n_layers
        tensors |= {
            n.replace("layers.0.", f"layers.{last}."): a
            for n, a in tensors.items()
            if n.startswith("layers.0.")
        } | {"norm.weight": np.ones(CONFIG.text_encoder.hidden_size, np.float32)}
    return {n: a.astype(dtype) for n, a in tensors.items()}


def write_configs(folder: Path) -> None:
    for name, (_, place) in sources._CONFIGS.items():
        part, file = CONFIG.to_json()[name], folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(part))
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(small.tokenizer().to_str())


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A diffusers folder with the DiT in three shards."""
    path = tmp_path_factory.mktemp("source") / "published"
    write_configs(path)
    for component, stem in STEMS.items():
        tensors = published_like(component)
        if component != "transformer":
            save_file(tensors, path / component / f"{stem}.safetensors")
            continue
        index = {}
        for k in range(3):
            shard = f"{stem}-{k + 1:05d}-of-00003.safetensors"
            part = {n: tensors[n] for n in list(tensors)[k::3]}
            save_file(part, path / component / shard)
            index |= dict.fromkeys(part, shard)
        (path / component / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"weight_map": index})
        )
    return path


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(published, tmp_path / "published")


def run(
    src: Path | None, dst: Path, files=None, config=None, tokenizer=None, dtype="float32"
) -> Checkpoint:
    source = sources.open_source(src, files or {}, config, tokenizer)
    return Checkpoint(convert(source, dst, dtype, quiet=True))


def arrays_of(found: Checkpoint, component: str) -> dict[str, np.ndarray]:
    return {p: a for unit in found.units(component) for p, a in found.read(component, unit).items()}


def assert_holds(found: Checkpoint, dtype=np.float32) -> None:
    for component in components.COMPONENTS:
        expected = expected_arrays(component, dtype)
        got = arrays_of(found, component)
        assert got.keys() == expected.keys()
        for path, array in got.items():
            np.testing.assert_array_equal(array, expected[path])


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


def comfy_files(folder: Path, *, prefix: str = "", flux_vae: bool = True) -> dict[str, Path]:
    """The same weights under ComfyUI's names, made by the inverse of nothing but NumPy."""
    folder.mkdir()
    tensors = TENSORS
    renamed = {}
    for name, array in tensors["transformer"].items():
        if ".to_q." in name:
            parts = [
                tensors["transformer"][name.replace("to_q", t)] for t in ("to_q", "to_k", "to_v")
            ]
            renamed[name.replace("to_q", "qkv")] = np.concatenate(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            for old, new in {
                "all_x_embedder.2-1": "x_embedder",
                "all_final_layer.2-1": "final_layer",
                "to_out.0": "out",
                "norm_q": "q_norm",
                "norm_k": "k_norm",
            }.items():
                name = name.replace(old, new)
            renamed[name] = array
    renamed["norm_final.weight"] = np.ones(3, np.float32)
    dit_file, text_file, vae_file = (folder / f"{n}.safetensors" for n in ("dit", "text", "ae"))
    save_file({prefix + n: a for n, a in renamed.items()}, dit_file)
    save_file(
        {"model." + n: a for n, a in published_like("text_encoder").items()}
        | {"lm_head.weight": np.ones(2)},
        text_file,
    )
    save_file(flux_named(tensors["vae"]) if flux_vae else tensors["vae"], vae_file)
    return {"transformer": dit_file, "text_encoder": text_file, "vae": vae_file}


def flux_named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' VAE names to those of Flux's ae.safetensors, as BFL's autoencoder numbers its
    modules."""
    levels, named = len(CONFIG.vae.block_out_channels), {}
    for name, array in tensors.items():
        side, *rest = name.split(".")
        new = ".".join(rest)
        for i in range(levels):
            new = new.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.@").replace(
                f"down_blocks.{i}.", f"down.{i}."
            )
        new = new.replace("@", "")
        for old, other in {
            "resnets.": "block.",
            "upsamplers.0": "upsample",
            "downsamplers.0": "downsample",
            "conv_shortcut": "nin_shortcut",
            "mid_block.block.0": "mid.block_1",
            "mid_block.block.1": "mid.block_2",
            "mid_block.attentions.0": "mid.attn_1",
            "attn_1.group_norm": "attn_1.norm",
            "to_out.0": "proj_out",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "conv_norm_out": "norm_out",
        }.items():
            new = new.replace(old, other)
        is_point = "attn_1" in new and array.ndim == 2
        named[f"{side}.{new}"] = (
            np.ascontiguousarray(array[:, :, None, None]) if is_point else array
        )
    return named


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


# -- strictness ------------------------------------------------------------------------------------


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
    duplicate = sources.read_header(first)[0].name
    part = {
        n: a
        for n, a in published_like("transformer").items()
        if n in {t.name for t in sources.read_header(shard)}
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


def test_a_gguf_file_is_named(folder, tmp_path):
    file = tmp_path / "z.gguf"
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    with pytest.raises(ForeignError, match="a GGUF file"):
        run(folder, tmp_path / "out", {"transformer": file})


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


def test_fp8_with_scales_is_refused_and_not_misread(folder, tmp_path):
    files = comfy_files(tmp_path / "comfy")

    def scaled(tensors):
        name = "layers.0.feed_forward.w1.scale_weight"
        return tensors | {name: ("F32", [], np.float32(2).tobytes())}

    rewrite(files["transformer"], scaled)
    with pytest.raises(ConversionError, match=r"unknown layers.0.feed_forward.w1.scale_weight"):
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
            "not the name of a file beside it",
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
    monkeypatch.setattr(sources, "published_md5", lambda: sums)
    sources.verify(folder, quiet=True)
    sums[names[0]] = "0" * 32
    sums["gone.json"] = "1" * 32
    with pytest.raises(ConversionError) as fault:
        sources.verify(folder, quiet=True)
    assert "gone.json is missing" in str(fault.value)
    assert f"{names[0]} has MD5" in str(fault.value)


def test_the_published_sums_name_sixteen_files():
    assert len(sources.published_md5()) == 16
    assert all(len(digest) == 32 for digest in sources.published_md5().values())


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
