"""LoRA files: every spelling against plain numpy, what is not used, and what is refused."""

import hashlib
import json
import os
import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import small
from tests.weights import lora_files
from zimage_jax.errors import ConversionError, ForeignError, UsageError, ZImageError
from zimage_jax.model.layers import Side, named_arrays
from zimage_jax.weights import components, names, peft
from zimage_jax.weights.adapters import Adapters, Merged, padded
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.lora import find, open_lora

CONFIG = small.CONFIGS["plain"]
WEIGHT = 0.7


@pytest.fixture(scope="module")
def checkpoint(native) -> Checkpoint:
    return Checkpoint(native("plain"))


@pytest.fixture
def opened(tmp_path):
    def write(made: lora_files.Made, name: str = "x.safetensors"):
        save_file(made.tensors, tmp_path / name, made.metadata)
        return open_lora(tmp_path / name, CONFIG)

    return write


def native_changes(changes: lora_files.Changes) -> dict[tuple[str, str], np.ndarray]:
    """(component, our path) -> what is added to the parameter there."""
    found = {}
    for component in ("transformer", "text_encoder"):
        spec = components.spec(CONFIG, component)
        for tensor, entry in names.expected(small.TABLES[component], spec).items():
            for key in (tensor, tensor.removesuffix(".weight")):
                if (component, key) in changes:
                    change = names.to_native(changes[component, key], entry.transform)
                    found[component, entry.paths[0]] = change
    assert len(found) == len(changes)
    return found


def beside(adapters: Adapters) -> dict[tuple[str, str], np.ndarray]:
    """(component, path of the parameter) -> all that is added to it."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for (component, unit), arrays in adapters.arrays().items():
        own = adapters.checkpoint.read(component, unit)
        for path, array in arrays.items():
            layer, _, which = path.rpartition(".side.")
            if path.endswith(".change"):
                found[component, path.removesuffix("change") + "scale"] = array
            elif which == "bias":
                found[component, f"{layer}.bias"] = array
            elif which in ("kernel", "up", "rows", "columns"):
                added = array
                if which == "up":
                    added = arrays[f"{layer}.side.down"] @ array
                elif which in ("rows", "columns"):
                    factor = array if which == "rows" else array[:, None]
                    added = own[f"{layer}.kernel"] * factor
                before = found.get((component, f"{layer}.kernel"), np.float32(0))
                found[component, f"{layer}.kernel"] = before + added
    return found


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-5 * max(1e-6, np.abs(wanted).max()))


@pytest.mark.parametrize("spelling", lora_files.SPELLINGS)
def test_every_spelling_changes_what_plain_numpy_says(spelling, opened, checkpoint):
    made = lora_files.SPELLINGS[spelling](CONFIG)
    lora = opened(made)
    fused = {key for key in made.tensors if ".qkv." in key or ".out.lora" in key}
    assert lora.unused.keys() == (fused if spelling == "Anime-Z" else set())
    adapters = Adapters(checkpoint, ((lora, WEIGHT),))
    weight = 1 if spelling == "set" else WEIGHT
    wanted = {key: weight * change for key, change in native_changes(made.changes).items()}
    found = beside(adapters)
    for key in found.keys() | wanted.keys():
        assert close(found[key], wanted.get(key, np.zeros_like(found[key]))), key
    merged = Merged(Adapters(checkpoint, ((lora, WEIGHT),), is_merged=True))
    for component in ("transformer", "text_encoder"):
        for unit in checkpoint.units(component):
            before, after = (of.read(component, unit) for of in (checkpoint, merged))
            for path, own in before.items():
                change = wanted.get((component, path), np.float32(0))
                assert close(after[path], own + change), path


def test_several_are_one_pair_of_padded_matrices(opened, checkpoint):
    first = lora_files.lora(CONFIG, lambda n: f"transformer.{n}", rank=4)
    second = lora_files.lora(CONFIG, lambda n: f"diffusion_model.{n}", rank=12, seed=1)
    loras = (opened(first, "a.safetensors"), 0.5), (opened(second, "b.safetensors"), -1.0)
    adapters = Adapters(checkpoint, loras)
    assert {row.rank for row in adapters.storage.beside} == {16}
    changes = {k: 0.5 * first.changes[k] - second.changes[k] for k in first.changes}
    found = beside(adapters)
    for key, change in native_changes(changes).items():
        assert close(found[key], change)
    again = Adapters(checkpoint, (loras[0], (loras[1][0], 0.25)))
    assert again.storage == adapters.storage  # the same programs for other weights
    assert again.key != adapters.key


def test_blocks_share_what_is_beside_them(opened, checkpoint):
    """A LoRA of one block: the others, and the refiner, have zeros there, and the same slots."""
    made = lora_files.lora(CONFIG, lambda n: f"transformer.{n}", of=["layers.1.attention.to_v"])
    storage = Adapters(checkpoint, ((opened(made), 1.0),)).storage
    kinds = storage.alike("transformer", ["layers.0", "layers.1", "noise_refiner.0"])
    assert len(set(kinds)) == 1
    own = checkpoint.storage
    dim = CONFIG.transformer.dim
    more = storage.nbytes("transformer", "layers.0") - own.nbytes("transformer", "layers.0")
    assert more == 4 * 2 * 16 * dim
    assert storage.without_loras == own


def test_what_is_beside_a_layer_is_never_larger_than_a_matrix(opened, checkpoint):
    """17 ranks are padded to 32: of the layers of 48 x 48 a whole matrix is smaller, of others not."""
    first = lora_files.lora(CONFIG, lambda n: f"transformer.{n}", rank=4)
    second = lora_files.dora(CONFIG, "in", lora_files.loha(CONFIG, rank=2))
    third = lora_files.lora(CONFIG, lambda n: f"transformer.{n}", rank=9, seed=1)
    made = {"a": first, "b": second, "c": third}
    loras = tuple((opened(of, f"{name}.safetensors"), 0.5) for name, of in made.items())
    adapters = Adapters(checkpoint, loras)
    for row in adapters.storage.beside:
        is_square = "attention" in row.layer
        sizes = row.rank, row.kernel, row.columns
        assert sizes == ((0, True, False) if is_square else (32, False, True)), row
    found = beside(adapters)
    changes = {k: 0.5 * sum(of.changes[k] for of in made.values()) for k in first.changes}
    for key, change in native_changes(changes).items():
        assert close(found[key], change), key


def test_ranks_are_padded_to_few():
    assert [padded(r) for r in (0, 1, 16, 17, 64, 65)] == [0, 16, 16, 32, 64, 128]


def test_no_two_layers_have_one_name():
    """Names are looked up with "_" for ".": none may mean two layers."""
    for config in small.CONFIGS.values():
        for component, table in (
            ("transformer", names.DIT_DIFFUSERS),
            ("transformer", names.DIT_COMFY),
            ("text_encoder", names.TEXT_ENCODER),
        ):
            entries = names.expected(table, components.spec(config, component))
            for tensor, entry in entries.items():
                if tensor.endswith(".weight") and entry.paths[0] != "embed_tokens":
                    layer = find(config, tensor.removesuffix(".weight"))
                    assert layer is not None
                    assert (layer.component, layer.entry) == (component, entry)


def test_what_is_not_used_is_listed(opened):
    made = lora_files.lora(CONFIG, lambda n: f"transformer.{n}")
    made.tensors |= {
        "transformer.layers.99.attention.to_q.lora_A.weight": np.ones((4, 48), np.float32),
        "text_encoder.layers.2.mlp.up_proj.lora_A.weight": np.ones((4, 32), np.float32),
        "transformer.layers.0.attention.to_q.diff_b": np.ones(48, np.float32),
        "transformer.layers.0.attention.to_q.lora_C.weight": np.ones((4, 4), np.float32),
        "lora_unet_layers_0_attention_qkv.alpha": np.ones((), np.float32),
        "note": np.ones(1, np.float32),
    }
    lora = opened(made)
    assert lora.unused == {
        "transformer.layers.99.attention.to_q.lora_A.weight": "no layer of this model that takes a LoRA",
        "text_encoder.layers.2.mlp.up_proj.lora_A.weight": "no layer of this model that takes a LoRA",
        "transformer.layers.0.attention.to_q.diff_b": "the layer has no bias",
        "transformer.layers.0.attention.to_q.lora_C.weight": "no LoRA's key",
        "lora_unet_layers_0_attention_qkv.alpha": "an alpha without factors",
        "note": "no LoRA's key",
    }
    assert lora.remark is not None
    assert "6 keys are not used" in lora.remark


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.float16])
def test_an_alpha_has_any_dtype(dtype, opened):
    made = lora_files.SPELLINGS["musubi"](CONFIG)
    alphas = {k: np.array(3, dtype) for k in made.tensors if k.endswith("alpha")}
    made.tensors |= alphas
    assert {patch.scale for patch in opened(made).patches} == {3 / 4}


def test_it_describes_itself(opened):
    made = lora_files.SPELLINGS["musubi"](CONFIG)
    tags = {"folder": {"ohwx": 12, "a cat": 3}}
    made.metadata = {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "zorn"}
    found = opened(made).describe()
    assert found["spelling"] == "kohya (split)"
    assert found["kinds"] == {"LoRA": 24}
    assert found["ranks"] == ["4"]
    assert found["targets"]["transformer attention.to_out"] == 3
    assert found["trigger_words"] == ["zorn", "ohwx", "a cat"]


def test_a_peft_folder_has_its_alpha_beside(tmp_path):
    made = lora_files.SPELLINGS["PEFT"](CONFIG)
    file = tmp_path / "adapter_model.safetensors"
    save_file(made.tensors, file)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "use_rslora": true}')
    assert {patch.scale for patch in open_lora(file, CONFIG).patches} == {6 / 2}


def with_settings(settings: dict | str) -> lora_files.Made:
    made = lora_files.SPELLINGS["diffusers"](CONFIG)
    made.metadata = {
        "lora_adapter_metadata": settings
        if isinstance(settings, str)
        else json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    }
    return made


PATTERNS = {
    r".*feed_forward\.w[12]": 6,
    "to_q": 5,
    r"layers\.(0|1)\.attention\.to_(q|k)": 7,
    r"^layers.1.attention.to_v$": 9,
    r"w3|adaLN_modulation\.0": 11,
    "eed_forward.w3": 13,
}


def test_patterns_of_alpha_are_peft_s(opened):
    """As its get_pattern_key: the first that matches the end of a layer's name, from a dot on."""
    scales = {p.name: p.scale for p in opened(with_settings({"alpha_pattern": PATTERNS})).patches}
    for name, scale in scales.items():
        fitting = [v for k, v in PATTERNS.items() if re.match(rf"(.*\.)?({k})$", name)]
        assert scale == (fitting or [8])[0] / 4, name
    assert len(set(scales.values())) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha_pattern": {"(": 3}}, "is no pattern"),
        ({"alpha_pattern": {"(?R)": 3}}, "is no pattern"),
        ({"alpha_pattern": {"a" * 501: 3}}, "is no pattern"),
        ({"alpha_pattern": {"to_q": "x"}}, "to_q: expected a number"),
        ({"alpha_pattern": [3]}, "expected an object"),
        ({"alpha_pattern": {r"(.+?.+?)+(?<!\w)": 3}}, "take more than"),
        ({"lora_alpha": True}, "lora_alpha: expected a number"),
        ("{", "not JSON"),
    ],
)
def test_settings_that_peft_would_not_take_are_refused(settings, words, opened, monkeypatch):
    monkeypatch.setattr(peft, "_PATIENCE", 0.1)
    with pytest.raises(ConversionError, match=words) as raised:
        opened(with_settings(settings))
    assert str(raised.value).isprintable()


def test_a_bias_of_peft_is_beside_layers_that_have_none(opened, checkpoint):
    """`lora_bias`: it is scaled as the matrices are."""
    made = lora_files.SPELLINGS["diffusers, alpha in the header"](CONFIG)
    bias = np.arange(48, dtype=np.float32)
    made.tensors["transformer.layers.0.attention.to_q.lora_B.bias"] = bias
    made.tensors["transformer.layers.0.adaLN_modulation.0.lora_B.bias"] = np.ones(192, np.float32)
    lora = opened(made)
    assert not lora.unused
    found = beside(Adapters(checkpoint, ((lora, 0.5),)))
    assert close(found["transformer", "layers.0.attention.to_q.bias"], 2 * 0.5 * bias)
    assert close(found["transformer", "layers.0.modulation.bias"], np.ones(192))
    with pytest.raises(UsageError, match="no bias to merge"):
        Adapters(checkpoint, ((lora, 0.5),), is_merged=True).merged(
            "transformer", "layers.0", checkpoint.read("transformer", "layers.0")
        )


def test_what_is_no_lora_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A checkpoint of 12 GB is not hashed to say that it is none."""
    save_file({"a.weight": np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed"))
    with pytest.raises(ForeignError, match="not a LoRA"):
        open_lora(tmp_path / "x.safetensors", CONFIG)


@pytest.mark.parametrize("of", ["rows", "columns", "both"])
def test_dora_s_factors_need_no_whole_matrix(of):
    """Of W in float64: (1 + rows) * W, W * (1 + columns), and both changes added."""
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (3, 6)))
    rows, columns = (rng.standard_normal(n).astype(np.float32) for n in (4, 6))
    side = Side(rows=rows if of != "columns" else None, columns=columns if of != "rows" else None)
    change = np.zeros((6, 4))
    if side.rows is not None:
        change += w * rows.astype(np.float64)
    if side.columns is not None:
        change += w * columns.astype(np.float64)[:, None]
    own, given = jnp.asarray(w), jnp.asarray(x)
    assert close(np.asarray(side.of_own(given, own, jnp.float32)), x @ (w + change))
    half = side.of_own(given.astype(jnp.float16), own, jnp.float16)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half.astype(np.float32), x @ (w + change), rtol=0.02, atol=0.02)


def test_refusals(tmp_path, opened):
    def refused(tensors: dict, fault: type[ZImageError], words: str) -> None:
        with pytest.raises(fault, match=words) as raised:
            opened(lora_files.Made(tensors, {}))
        assert "\n" not in str(raised.value)

    ok = np.ones((4, 48), np.float32)
    key = "transformer.layers.0.attention.to_q"
    refused({"a.lora_A.weight": ok}, ForeignError, "not a LoRA of Z-Image")
    refused({f"{key}.lora_A.weight": ok}, ConversionError, "expected a LoRA")
    wide = {f"{key}.lora_A.weight": ok, f"{key}.lora_B.weight": np.ones((49, 4), np.float32)}
    refused(wide, ConversionError, r"\[48, 48\]")
    none = {
        f"{key}.lora_A.weight": np.ones((0, 48), np.float32),
        f"{key}.lora_B.weight": np.ones((48, 0), np.float32),
    }
    refused(none, ConversionError, "expected a LoRA")
    good = {f"{key}.lora_A.weight": ok, f"{key}.lora_B.weight": np.ones((48, 4), np.float32)}
    refused(good | {f"{key}.alpha": np.ones(2, np.float32)}, ConversionError, "one number")
    nan = np.array(np.nan, np.float32)
    refused(good | {f"{key}.alpha": nan}, ConversionError, "expected a number")
    os.mkfifo(tmp_path / "pipe")
    for path in ("pipe", "missing"):
        with pytest.raises(ZImageError):
            open_lora(tmp_path / path, CONFIG)


Q = "transformer.layers.0.attention.to_q"
A, B = np.ones((4, 48), np.float32), np.ones((48, 4), np.float32)
SQUARE = np.ones((48, 48), np.float32)
FUSED = {
    "diffusion_model.layers.0.attention.qkv.lora_A.weight": A,
    "diffusion_model.layers.0.attention.qkv.lora_B.weight": np.ones((144, 4), np.float32),
}
OF_Q = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
REFUSED = {
    "crossed adapters": (
        {f"{Q}.lora_A.one.weight": A, f"{Q}.lora_B.two.weight": B},
        "two changes of one layer",
    ),
    "two adapters": (
        {f"{Q}.lora_{x}.{of}.weight": m for of in ("one", "two") for x, m in (("A", A), ("B", B))},
        "two changes of one layer",
    ),
    "two spellings": (
        OF_Q | {"lora_unet_layers_0_attention_to_q.lora_down.weight": A},
        "two changes of one layer",
    ),
    "LoRA and diff": (OF_Q | {f"{Q}.diff": SQUARE}, "got a LoRA and a diff; keep one"),
    "LoRA and set": (OF_Q | {f"{Q}.set_weight": SQUARE}, "got a LoRA and a set; keep one"),
    "diff and set": (
        {f"{Q}.diff": SQUARE, f"{Q}.set_weight": SQUARE},
        "got a diff and a set; keep one",
    ),
    "a stray alpha beside fused layers": (
        FUSED | {"diffusion_model.layers.0.attention.to_q.alpha": np.ones((), np.float32)},
        "to_q.alpha is a part of what",
    ),
    "fused beside one of its parts": (FUSED | OF_Q, "the other parts are not there"),
    "PEFT's DoRA with a bias": (
        OF_Q
        | {f"{Q}.lora_B.bias": np.ones(48, np.float32)}
        | {f"{Q}.lora_magnitude_vector": np.ones(48, np.float32)},
        "expected a LoRA",
    ),
    "a bias without a LoRA": ({f"{Q}.lora_B.bias": np.ones(48, np.float32)}, "expected a"),
    "an alpha of 16 bits": (
        OF_Q | {f"{Q}.alpha": np.array(1, np.int16)},
        "expected one of F32, .*, got I16",
    ),
    "a magnitude of 8 bits": (
        OF_Q | {f"{Q}.dora_scale": np.ones((48, 1), np.uint8)},
        "expected one of F32, .*, got U8",
    ),
    **{
        role: (
            OF_Q | {f"{Q}.{role}": np.ones((4, 4, 1, 1), np.float32)},
            "a change of a convolution",
        )
        for role in ("lora_mid.weight", "lokr_t2", "hada_t1", "hada_t2")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_two_meanings_or_none_is_refused(case, opened):
    tensors, words = REFUSED[case]
    with pytest.raises(ConversionError, match=words) as raised:
        opened(lora_files.Made(tensors, {}))
    assert str(raised.value).isprintable()


def test_values_that_are_not_finite_are_refused(opened, checkpoint):
    made = lora_files.SPELLINGS["diffusers"](CONFIG)
    name = next(iter(made.tensors))
    made.tensors[name][0, 0] = np.inf
    with pytest.raises(ConversionError, match="not finite"):
        Adapters(checkpoint, ((opened(made), 1.0),)).arrays()
    made.tensors[name][0, 0] = 1
    with pytest.raises(UsageError, match="use smaller ones"):
        Adapters(checkpoint, ((opened(made), 1e39),)).arrays()


def test_the_spec_names_every_array(opened, checkpoint):
    adapters = Adapters(checkpoint, ((opened(lora_files.SPELLINGS["diff"](CONFIG)), 1.0),))
    for (component, unit), arrays in adapters.arrays().items():
        own, wanted = (of.leaves(component, unit) for of in (checkpoint.storage, adapters.storage))
        assert arrays.keys() == wanted.keys() - own.keys()
        module = named_arrays(adapters.storage.module(component, unit))
        assert len(module) == len(wanted)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut out, doubled or replaced; in the header, mostly, whose length is kept right."""
    size = int.from_bytes(data[:8], "little")
    at = rng.randrange(8 + size if rng.random() < 0.8 else len(data))
    end = min(len(data), at + rng.choice((1, 4, 100)))
    old = data[at:end]
    made = rng.choice(
        (b"", old * 2, rng.randbytes(len(old)), bytes(len(old)), b"\xff" * len(old), b"[" * 5000)
    )
    if at >= 8 and end <= 8 + size and rng.random() < 0.7:
        header = data[8:at] + made + data[end : 8 + size]
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return data[:at] + made + data[end:]


SHAPES_OF = re.compile(rb'"shape":\[[^]]*\]|"dtype":"[^"]*"|\.(lora_|hada_|lokr_)\w+')


def renamed(rng: random.Random, data: bytes) -> bytes:
    """A shape, a dtype or a role of the header replaced by another's."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    first, second = (rng.choice(list(SHAPES_OF.finditer(header))) for _ in range(2))
    header = header[: first.start()] + second[0] + header[first.end() :]
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@pytest.mark.parametrize(
    "count", [40, pytest.param(2000, marks=pytest.mark.long)], ids="{} mutations".format
)
def test_a_hostile_file_ends_in_one_line(count, tmp_path, checkpoint):
    rng, file, faults = random.Random(0), tmp_path / "x.safetensors", []
    whole = []
    for of in ("musubi", "fused, ComfyUI", "LoHa", "LoKr, half", "DoRA, out", "diff"):
        made = lora_files.SPELLINGS[of](CONFIG)
        few = {
            k: v for k, v in made.tensors.items() if "layers" in k and "1" not in k.split("w")[0]
        }
        save_file(few, file, {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
        whole.append(file.read_bytes())
    for _ in range(count):
        make = renamed if rng.random() < 0.3 else mutated
        file.write_bytes(make(rng, rng.choice(whole)))
        try:
            lora = open_lora(file, CONFIG)
            lora.describe()
            Adapters(checkpoint, ((lora, 1.0),)).arrays()
        except ZImageError as fault:
            faults.append(str(fault))
    assert len(faults) > count / 4
    assert all(fault.isprintable() and len(fault) < 2000 for fault in faults)
