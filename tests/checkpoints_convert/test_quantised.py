"""Quantised files of ComfyUI: each layout is read as its formula says, and int8 stays int8."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from checkpoints_convert import commands
from checkpoints_convert.convert import convert
from checkpoints_convert.inspect import inspect
from tests.checkpoints_convert.published import arrays_of, comfy_files, run
from tests.checkpoints_convert.quantised_files import (
    E4M3,
    KINDS,
    LAYOUTS,
    quantise,
    quantised,
    told,
    write,
)
from zimage_jax.errors import ConversionError
from zimage_jax.weights import sources
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.encodings import Int8

F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """ComfyUI's files in float32."""
    return comfy_files(tmp_path_factory.mktemp("plain") / "comfy")


def files_in(folder, plain, layout) -> tuple[dict, dict]:
    """ComfyUI's files with DiT and text encoder in a layout, and float32 ones that mean the same."""
    stored, meaning = dict(plain), dict(plain)
    for component in ("transformer", "text_encoder"):
        tensors, meant = quantised(load_file(plain[component]), layout)
        stored[component] = write(folder / f"{component}.safetensors", tensors)
        meaning[component] = folder / f"{component}-meant.safetensors"
        save_file(meant, meaning[component])
    return stored, meaning


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_its_formula_says(plain, tmp_path, layout):
    for component in ("transformer", "text_encoder"):
        stored, meaning = quantised(load_file(plain[component]), layout)
        file = write(tmp_path / f"{component}.safetensors", stored)
        found = sources.open_file(component, file).tensors
        assert {tensor.name for tensor in found.values()} == meaning.keys()
        for tensor in found.values():
            if not tensor.is_readable:  # the last layer's norm in float64, which is never read
                assert tensor.name == "lm_head.weight"
                continue
            wanted = meaning[tensor.name]
            values = tensor.rows(0, len(wanted), F32)
            if layout == "int8_convrot":  # sums of 16 products in another order
                np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)
            else:
                np.testing.assert_array_equal(values, wanted)


def test_a_converted_file_holds_what_it_means(folder, plain, tmp_path):
    stored, meaning = files_in(tmp_path, plain, "scaled_fp8")
    found, expected = (
        run(None, tmp_path / name, files, config=folder)
        for name, files in (("found", stored), ("expected", meaning))
    )
    for component in stored:
        wanted = arrays_of(expected, component)
        for path, array in arrays_of(found, component).items():
            np.testing.assert_array_equal(array, wanted[path])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_tells_the_layout(plain, tmp_path, layout):
    stored, _ = files_in(tmp_path, plain, layout)
    for component in ("transformer", "text_encoder"):
        parts = inspect(stored[component])["components"]
        assert KINDS[layout] in parts[component]["dtypes"]
        # of weights, not of bytes
        assert (
            parts[component]["parameters"]
            == (inspect(plain[component])["components"][component]["parameters"])
        )
        assert parts[component]["bytes"] < stored[component].stat().st_size


@pytest.mark.parametrize(
    "layout",
    [pytest.param("int8", marks=pytest.mark.exhaustive), "int8_rows", "int8_convrot"],
)
def test_int8_stays_int8(folder, plain, tmp_path, layout):
    """Every value and every scale of the file is in the checkpoint; adaLN is bfloat16 as always."""
    stored, _ = files_in(tmp_path, plain, layout)
    source = sources.open_source(None, stored, folder, None)
    found = Checkpoint(convert(source, tmp_path / "out", quiet=True))
    tensors = sources.read_header(stored["transformer"]).tensors
    by_name = {tensor.name: tensor for tensor in tensors}

    def values(name, dtype):
        return by_name[name]._bytes(0, by_name[name].nbytes).view(dtype)

    kinds = set()
    for unit in found.units("transformer"):
        arrays = found.read("transformer", unit)
        for path, (encoding, tree) in found.storage.encoded("transformer", unit, arrays).items():
            layer = path.removesuffix(".kernel").replace("to_out", "out")
            part, parts = 0, 1
            for k, name in enumerate(("to_q", "to_k", "to_v")):
                if layer.endswith(name):
                    layer, part, parts = layer.replace(name, "qkv"), k, 3
            inputs = tree.values.shape[0]
            q = np.split(values(f"{layer}.weight", np.int8).reshape(-1, inputs), parts)[part]
            scale = values(f"{layer}.weight_scale", np.float32)
            scale = np.split(np.broadcast_to(scale, len(q) * parts), parts)[part]
            np.testing.assert_array_equal(tree.values, q.T)
            np.testing.assert_array_equal(tree.scale, scale)
            kinds.add(encoding)
    # 213 inputs of w2 cannot be rotated in fours: ComfyUI leaves them, and so do we
    assert kinds == {Int8(True), Int8()} if layout == "int8_convrot" else kinds == {Int8()}
    assert "modulation.kernel" not in str(found.storage.special)


def test_a_mixture_keeps_each_matrix_as_it_is(folder, plain, tmp_path):
    """One block in bfloat16, one matrix elsewhere: the others stay int8."""
    tensors = {}
    for name, array in load_file(plain["transformer"]).items():
        is_plain = name.startswith("layers.0.") or name == "layers.1.attention.out.weight"
        part = {name: array} if is_plain else quantised({name: array}, "int8_rows")[0]
        tensors |= part
    files = plain | {"transformer": write(tmp_path / "mixed.safetensors", tensors)}
    source = sources.open_source(None, files, folder, None)
    found = Checkpoint(convert(source, tmp_path / "out", quiet=True))
    parameters = found.storage.parameters
    assert not any(parameters("transformer", "layers.0").values())
    assert not any(parameters("text_encoder", "layers.0").values())
    ones = parameters("transformer", "layers.1")
    assert ones["layers.1.attention.to_out.kernel"] is None
    assert ones["layers.1.feed_forward.w1.kernel"] == Int8()
    assert all(
        encoding == Int8()
        for path, encoding in parameters("transformer", "layers.2").items()
        if path.endswith(("to_q.kernel", "w2.kernel", "to_out.kernel"))
    )


def test_the_format_asked_for_is_made(folder, plain, tmp_path):
    stored, _ = files_in(tmp_path, plain, "int8_rows")
    out = tmp_path / "out"
    words = [f"--{n.replace('_', '-')}={f}" for n, f in stored.items() if n != "transformer"]
    words += [f"--dit={stored['transformer']}", f"--config={folder}", str(out), "--json"]
    shown = CliRunner().invoke(commands.convert, words)
    assert json.loads(shown.stdout)["format"] == "bfloat16, int8"
    shown = CliRunner().invoke(
        commands.convert, [*words[:-2], str(tmp_path / "b"), "--json", "--format", "bfloat16"]
    )
    assert json.loads(shown.stdout)["format"] == "bfloat16"
    assert not Checkpoint(tmp_path / "b").storage.special


def test_the_headers_metadata_tell_formats_too(folder, plain, tmp_path):
    tensors, _ = quantised(load_file(plain["transformer"]), "int8_convrot")
    layers = {
        f"model.diffusion_model.{name.removesuffix('.comfy_quant')}": json.loads(array.tobytes())
        for name, array in tensors.items()
        if name.endswith(".comfy_quant")
    }
    bare = {
        f"model.diffusion_model.{n}": a for n, a in tensors.items() if not n.endswith("comfy_quant")
    }
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    told_apart = run(
        None,
        tmp_path / "a",
        plain | {"transformer": write(tmp_path / "in.safetensors", tensors)},
        config=folder,
    )
    told_at_once = run(
        None,
        tmp_path / "b",
        plain | {"transformer": write(tmp_path / "meta.safetensors", bare, metadata)},
        config=folder,
    )
    expected = arrays_of(told_apart, "transformer")
    for path, array in arrays_of(told_at_once, "transformer").items():
        np.testing.assert_array_equal(array, expected[path])


def test_a_scale_beside_bfloat16_counts(folder, plain, tmp_path):
    """Layers that a scaled_fp8 file leaves as they are may have a scale of 1, or another."""
    tensors = load_file(plain["transformer"])
    name = "layers.0.feed_forward.w1.weight"
    meant = tensors | {name: tensors[name] * np.float32(2)}
    scaled = tensors | {name.replace(".weight", ".scale_weight"): np.float32(2).reshape(1)}
    found, expected = (
        run(
            None,
            tmp_path / key,
            plain | {"transformer": write(tmp_path / f"{key}.safetensors", t)},
            config=folder,
        )
        for key, t in (("found", scaled), ("expected", meant))
    )
    np.testing.assert_array_equal(
        arrays_of(found, "transformer")["layers.0.feed_forward.w1.kernel"],
        arrays_of(expected, "transformer")["layers.0.feed_forward.w1.kernel"],
    )


LAYER = "layers.0.feed_forward.w1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"comfy_quant": told({"format": "mxfp8"})}, "'mxfp8', expected int8_tensorwise"),
        ({"comfy_quant": told({"format": ["int8"]})}, "this format is not read"),
        ({"comfy_quant": told({})}, "this format is not read"),
        ({"comfy_quant": np.frombuffer(b"[1]", np.uint8)}, "expected a JSON object"),
        ({"comfy_quant": np.frombuffer(b"{" * 99, np.uint8)}, "not JSON"),
        ({"comfy_quant": np.zeros(5000, np.uint8)}, "at most 4096 bytes of JSON"),
        ({"weight_scale": None}, "has no weight_scale"),
        ({"weight_scale": np.ones((3, 1), np.float32)}, r"expected one scale or 213, got \[3, 1\]"),
        ({"weight_scale": np.ones((213, 1), np.int8)}, "expected a weight_scale in F32"),
        (
            {
                "comfy_quant": told(
                    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 7}
                )
            },
            "convrot in groups of 7",
        ),
        (
            {
                "comfy_quant": told(
                    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
                )
            },
            "that divides the inputs",
        ),
        (
            {
                "comfy_quant": told(
                    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": [4]}
                )
            },
            r"groups of \[4\]",
        ),
        ({"comfy_quant": None}, "I8, not F32"),
        ({"weight": np.ones((213, 40), np.uint8)}, "U8 of format 'int8_tensorwise'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(folder, plain, tmp_path, change, words):
    tensors = load_file(plain["transformer"])
    stored = tensors | quantise(LAYER, tensors[f"{LAYER}.weight"], "int8_rows")[0]
    for name, array in change.items():
        stored[f"{LAYER}.{name}"] = array
    stored = {name: array for name, array in stored.items() if array is not None}
    files = plain | {"transformer": write(tmp_path / "bad.safetensors", stored)}
    with pytest.raises(ConversionError, match=words) as fault:
        run(None, tmp_path / "out", files, config=folder)
    assert LAYER in str(fault.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1])
def test_a_scale_that_is_none_is_refused(folder, plain, tmp_path, scale):
    tensors = load_file(plain["transformer"])
    stored = tensors | quantise(LAYER, tensors[f"{LAYER}.weight"], "int8_rows")[0]
    stored[f"{LAYER}.weight_scale"][5] = scale
    files = plain | {"transformer": write(tmp_path / "bad.safetensors", stored)}
    source = sources.open_source(None, files, folder, None)
    with pytest.raises(ConversionError, match=r"weight_scale: expected finite|NaN or infinity"):
        convert(source, tmp_path / "out", "layers.0=int8", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_makes_zeros(folder, plain, tmp_path):
    tensors = load_file(plain["transformer"])
    stored = tensors | quantise(LAYER, tensors[f"{LAYER}.weight"], "int8_rows")[0]
    stored[f"{LAYER}.weight_scale"][5] = 0
    files = plain | {"transformer": write(tmp_path / "zero.safetensors", stored)}
    source = sources.open_source(None, files, folder, None)
    found = Checkpoint(convert(source, tmp_path / "out", quiet=True))
    arrays = found.read("transformer", "layers.0")
    assert not arrays[f"{LAYER}.kernel.values"][:, 5].any()
    assert arrays[f"{LAYER}.kernel.values"][:, 4].any()


# -- against the tools that make such files --------------------------------------------------------


@pytest.fixture(scope="module")
def kitchen():
    pytest.importorskip("comfy_kitchen", reason="the comparison needs comfy-kitchen")
    import torch

    return torch, pytest.importorskip("comfy_kitchen.backends.eager.quantization")


def kitchen_tensors(torch, eager, layout: str, w) -> tuple[dict, np.ndarray]:
    """A matrix in a layout, quantised and dequantised by comfy-kitchen."""
    if layout.startswith("fp8"):
        dtype = torch.float8_e5m2 if layout == "fp8_e5m2" else torch.float8_e4m3fn
        scale = w.abs().max() / torch.finfo(dtype).max
        q = eager.quantize_per_tensor_fp8(w, scale, dtype)
        meant = eager.dequantize_per_tensor_fp8(q, scale, torch.float32)
        name = str(dtype).removeprefix("torch.")
        raw = q.view(torch.uint8).numpy().view(E4M3)
        if layout == "fp8_e5m2":
            from tests.checkpoints_convert.quantised_files import E5M2

            raw = raw.view(E5M2)
        return {
            "weight": raw,
            "weight_scale": scale.numpy(),
            "comfy_quant": told({"format": name}),
        }, meant.numpy()
    if layout == "nvfp4":
        scale_2 = (w.abs().max() / (6 * 448)).reshape(1)
        q, blocks = eager.quantize_nvfp4(w, scale_2)
        meant = eager.dequantize_nvfp4(q, scale_2, blocks, torch.float32)
        return {
            "weight": q.numpy(),
            "weight_scale": blocks.view(torch.uint8).numpy().view(E4M3),
            "weight_scale_2": scale_2.numpy(),
            "comfy_quant": told({"format": "nvfp4"}),
        }, meant.numpy()
    config: dict = {"format": "int8_tensorwise"}
    if layout == "int8_convrot":
        q, scale = eager.quantize_int8_convrot_weight(w, 256)
        meant = eager.dequantize_int8_convrot_weight(q, scale, 256)
        config |= {"convrot": True, "convrot_groupsize": 256}
    else:
        make = eager.quantize_int8_tensorwise if layout == "int8" else eager.quantize_int8_rowwise
        q, scale = make(w)
        meant = eager.dequantize_int8_simple(q, scale)
    return {
        "weight": q.numpy(),
        "weight_scale": scale.numpy(),
        "comfy_quant": told(config),
    }, meant.numpy()


@pytest.mark.live
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "scaled_fp8"])
@pytest.mark.parametrize("shape", [(384, 512), (300, 2560), (2560, 1024)])
def test_a_matrix_of_comfy_kitchen_is_read_as_it_dequantises(kitchen, tmp_path, layout, shape):
    torch, eager = kitchen
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    w[3] *= 30
    w[7] = 0
    stored, meant = kitchen_tensors(torch, eager, layout, w)
    own = {f"layers.0.attention.qkv.{name}": array for name, array in stored.items()}
    file = write(tmp_path / "one.safetensors", own)
    (tensor,) = sources.open_file("transformer", file).tensors.values()
    found = tensor.rows(0, shape[0], F32)
    part = tensor.rows(130, 290, F32)  # as of a fused tensor
    if layout == "int8_convrot":  # sums of 256 products in another order
        largest = np.abs(meant).max()
        np.testing.assert_allclose(found, meant, rtol=0, atol=1e-6 * largest)
        np.testing.assert_allclose(part, found[130:290], rtol=0, atol=1e-6 * largest)
    else:
        np.testing.assert_array_equal(found, meant)
        np.testing.assert_array_equal(part, found[130:290])
