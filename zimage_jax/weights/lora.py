"""LoRA files in every spelling: which layers of ours they change, and how.

A key is a layer's name and a role, as in `lora_unet_layers_0_attention_to_out_0` and `lora_down`.
Names are never split at underscores: the names of both tables of the DiT (weights.names) and of the
text encoder's, with "." as "_", are looked up. Only the header is read here, and a file's values
when they are asked for. Keys that change nothing are listed with the reason.

W is PyTorch's (out, in). With weight k, and s = alpha / r (1 without alpha):

  LoRA   W + k s up down
  LoHa   W + k s (w1_a w1_b) * (w2_a w2_b)    (LyCORIS, arXiv 2108.06098)
  LoKr   W + k s kron(w1, w2), s = 1 if both factors are whole    (LyCORIS, arXiv 2309.14859)
  DoRA   W + k (V m / |W| - W), V = W + s up down    (ComfyUI `dora_scale`: the old norm), or
         / |V|    (PEFT `lora_magnitude_vector`: as in arXiv 2402.09353)
  diff   W + k diff;    set: the tensor itself, whatever k    (ComfyUI)
"""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConversionError, ForeignError
from ..files import open_regular, printable, read_json
from ..model.config import ModelConfig
from . import components, names
from .names import Entry
from .patch import Patch
from .tensors import Tensor, read_safetensors

_SHOWN = 3  # keys named in one message
_LARGEST_CONFIG = 1 << 20  # bytes
# what comes before a layer's name, with "." as "_"
_PREFIX = re.compile(
    r"(base_model_model_)?"
    r"(model_diffusion_model_|diffusion_model_|transformer_|lora_unet__?|lora_transformer_|lycoris_"
    r"|(text_encoders?_|lora_te1?_)((qwen3?_)?4b_)?(transformer_)?(model_)?)?"
)
_PEFT = r"(?:\.[\w-]+){0,2}"  # the name of an adapter, and "weight"
_ROLES = [  # what a key says after the layer's name
    ("down", rf"\.lora_A{_PEFT}|[._]lora_down\.weight|[._]lora\.down\.weight"),
    ("up", rf"\.lora_B{_PEFT}|[._]lora_up\.weight|[._]lora\.up\.weight"),
    ("magnitude", rf"\.lora_magnitude_vector{_PEFT}"),
    ("alpha", r"\.alpha"),
    ("dora_scale", r"\.dora_scale"),
    *((f"hada_{w}", rf"\.hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *((f"lokr_{w}", rf"\.lokr_{w}") for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
    ("diff", r"\.diff|\.w_norm"),
    ("diff_b", r"\.diff_b|\.b_norm"),
    ("set", r"\.set_weight"),
]
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<{role}>{of})" for role, of in _ROLES) + ")")
# dtypes of alphas beside those of matrices
_NUMBERS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
_LARGEST_ALPHA = 1e9
_WORDS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "activation text")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, opened for one model. `unused`: key -> why it changes nothing."""

    file: Path
    sha256: str
    patches: tuple[Patch, ...]
    spellings: tuple[str, ...]
    unused: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def remark(self) -> str | None:
        """One line about keys that are not used."""
        if not self.unused:
            return None
        shown = [f"{printable(key, 80)} ({why})" for key, why in list(self.unused.items())[:_SHOWN]]
        more = len(self.unused) - len(shown)
        return (
            f"{printable(self.file.name)}: {len(self.unused)} keys are not used: "
            f"{', '.join(shown)}{f' and {more} more' if more else ''}"
        )

    @property
    def trigger_words(self) -> list[str]:
        """What the metadata says the LoRA was trained to hear."""
        found = [self.metadata[key] for key in _WORDS if self.metadata.get(key)]
        counts: Counter[str] = Counter()
        for of_folder in _json(self.metadata.get("ss_tag_frequency")).values():
            for tag, count in of_folder.items() if isinstance(of_folder, dict) else ():
                counts[tag] += count if isinstance(count, int) else 0
        return [*dict.fromkeys([*found, *(tag for tag, _ in counts.most_common(8))])]

    def describe(self) -> dict[str, Any]:
        """What a person asks of a file: spelling, kinds, ranks, layers, trigger words."""
        kinds = Counter(f"DoRA of {p.kind}" if p.is_dora else p.kind for p in self.patches)
        ranks = sorted({"x".join(map(str, p.ranks)) for p in self.patches if p.ranks}, key=len)
        targets: Counter[str] = Counter()
        for patch in self.patches:
            for path in patch.entry.paths:
                unit = components.unit_of(path)
                targets[f"{patch.component} {path.removeprefix(unit + '.')}".rsplit(".", 1)[0]] += 1
        return {
            "spelling": ", ".join(self.spellings),
            "kinds": dict(kinds),
            "ranks": ranks,
            "targets": dict(targets),
            "trigger_words": self.trigger_words,
            "unused": dict(self.unused),
        }


def _json(text: str | None) -> dict[str, Any]:
    """A JSON object in metadata; empty if there is none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# -- names -----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of a source's layout: its own name, its component, and the entry of its weight."""

    name: str
    component: str
    entry: Entry
    has_bias: bool


@functools.cache
def _layers(config: ModelConfig) -> dict[str, Layer]:
    """The name of a layer in any of the tables, with "." as "_" -> the layer."""
    found: dict[str, Layer] = {}
    tables = (
        ("transformer", names.DIT_DIFFUSERS),
        ("transformer", names.DIT_COMFY),
        ("text_encoder", names.TEXT_ENCODER),
    )
    for component, table in tables:
        entries = names.expected(table, components.spec(config, component))
        for tensor, entry in entries.items():
            layer, _, last = tensor.rpartition(".")
            if last == "weight" and entry.paths[0].endswith((".kernel", ".scale")):
                has_bias = f"{layer}.bias" in entries
                found[layer.replace(".", "_")] = Layer(layer, component, entry, has_bias)
    return found


def find(config: ModelConfig, name: str) -> Layer | None:
    """The layer that a key's name means, in any spelling."""
    flat, layers = name.replace(".", "_"), _layers(config)
    found = _PREFIX.match(flat)
    assert found is not None  # it may be empty
    return layers.get(flat[found.end() :]) or layers.get(flat)


def _spelling(name: str, layer: Layer) -> str:
    is_fused = len(layer.entry.paths) > 1 or layer.name.endswith("attention.out")
    own = "fused" if is_fused else "split"
    for start, of in (
        ("lora_unet_", "kohya"),
        ("lora_te", "kohya"),
        ("lycoris_", "LyCORIS"),
        ("diffusion_model.", "ai-toolkit, ComfyUI"),
        ("base_model.model.", "PEFT"),
        ("transformer.", "diffusers"),
        ("text_encoder", "diffusers"),
    ):
        if name.startswith(start):
            return f"{of} ({own})"
    return f"bare names ({own})"


# -- opening ---------------------------------------------------------------------------------------


def open_lora(file: Path, config: ModelConfig) -> Lora:
    """A LoRA file for a model of this config. Its values are not read, but for its alphas.

    Raises UsageError if there is no such file, ConversionError for a damaged one or shapes that are
    not the model's, ForeignError if no key is of this model.
    """
    digest = hashlib.sha256()
    with open_regular(file, ConversionError) as f:
        while run := f.read(1 << 22):
            digest.update(run)
    header = read_safetensors(file)
    patches: dict[tuple[str, str], Patch] = {}
    unused: dict[str, str] = {}
    spellings: Counter[str] = Counter()
    for tensor in header.tensors:
        found = _KEY.fullmatch(tensor.name)
        if found is None or found.lastgroup is None:
            unused[tensor.name] = "no LoRA's key"
            continue
        name, role = found[1], found.lastgroup
        layer = find(config, name)
        if layer is None:
            unused[tensor.name] = "no layer of this model that takes a LoRA"
        elif not (tensor.is_readable or (role == "alpha" and tensor.dtype in _NUMBERS)):
            unused[tensor.name] = f"{printable(tensor.dtype, 20)} is not read"
        elif role == "diff_b" and not layer.has_bias:
            unused[tensor.name] = "the layer has no bias"
        else:
            key = layer.component, layer.name
            patch = patches.setdefault(key, Patch(layer.name, layer.component, layer.entry))
            if role in patch.tensors:
                unused[tensor.name] = f"the same as {printable(patch.tensors[role].name, 80)}"
                continue
            patch.tensors[role] = tensor
            spellings[_spelling(name, layer)] += 1
    whole = dict(_without_duplicates(patches, unused))
    if not whole:
        shown = ", ".join(printable(t.name, 60) for t in header.tensors[:_SHOWN]) or "no tensors"
        raise ForeignError(f"{file}: not a LoRA of Z-Image; found {shown}")
    _set_alphas(list(whole.values()), _peft_configs(file, header.metadata))
    for patch in whole.values():
        patch.check()
    return Lora(
        file,
        digest.hexdigest(),
        tuple(whole.values()),
        tuple(of for of, _ in spellings.most_common()),
        unused,
        header.metadata,
    )


def _without_duplicates(
    patches: dict[tuple[str, str], Patch], unused: dict[str, str]
) -> Iterator[tuple[tuple[str, str], Patch]]:
    """Patches without those that are there twice, fused and split: then the split ones count. An
    alpha alone changes nothing."""
    by_path: dict[tuple[str, str], list[Patch]] = {}
    for patch in patches.values():
        for path in patch.entry.paths:
            by_path.setdefault((patch.component, path), []).append(patch)

    def is_split(patch: Patch) -> bool:
        return len(patch.entry.paths) == 1 and not patch.name.endswith("attention.out")

    for key, patch in patches.items():
        why = None
        if patch.tensors.keys() == {"alpha"}:
            why = "an alpha without factors"
        elif not is_split(patch) and any(
            is_split(other)
            for path in patch.entry.paths
            for other in by_path[patch.component, path]
            if other is not patch
        ):
            why = "the split layers are there too, and are used"
        if why is None:
            yield key, patch
        else:
            unused.update({tensor.name: why for tensor in patch.tensors.values()})


def _set_alphas(patches: list[Patch], configs: list[dict[str, Any]]) -> None:
    """Give each patch its alpha: from the file, else from PEFT's config.

    Raises ConversionError for an alpha that is no finite number.
    """
    for patch in patches:
        tensor = patch.tensors.pop("alpha", None)
        if tensor is not None:
            if math.prod(tensor.shape) != 1:
                raise ConversionError(
                    f"{tensor.file}: {printable(tensor.name)}: expected one number, got "
                    f"{printable(list(tensor.shape))}"
                )
            value = _number(tensor)
            if not abs(value) <= _LARGEST_ALPHA:  # NaN is not either
                raise ConversionError(
                    f"{tensor.file}: {printable(tensor.name)}: expected a number, finite and at "
                    f"most {_LARGEST_ALPHA:g}, got {value}"
                )
            patch.alpha = value
        for config in configs if tensor is None else ():
            if config["component"] in (None, patch.component):
                patch.alpha, patch.root = _alpha_of(config, patch.name)


def _number(tensor: Tensor) -> float:
    """The value of a tensor that has one, of any dtype."""
    if tensor.is_readable:
        with np.errstate(all="ignore"):
            return float(tensor.number())
    count, dtype = tensor.nbytes // 4, _NUMBERS[tensor.dtype]
    words = replace(tensor, dtype="F32", shape=(count,)).rows(0, count, np.dtype(np.float32))
    return float(np.frombuffer(words.tobytes(), dtype)[0])


def _peft_configs(file: Path, metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """PEFT's settings: in diffusers' metadata, by component, or in adapter_config.json beside a
    file that PEFT wrote."""
    found = []
    in_header = _json(metadata.get("lora_adapter_metadata"))
    for component in ("transformer", "text_encoder"):
        own = {
            key.removeprefix(f"{component}."): value
            for key, value in in_header.items()
            if key.startswith(f"{component}.")
        }
        if own:
            found.append({**own, "component": component})
    beside = file.with_name("adapter_config.json")
    if not found and file.name == "adapter_model.safetensors" and beside.is_file():
        found.append({**read_json(beside, _LARGEST_CONFIG, ConversionError), "component": None})
    return found


def _alpha_of(config: dict[str, Any], name: str) -> tuple[float | int | None, bool]:
    """alpha of a layer, and whether it is divided by the root of the rank."""
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) <= _LARGEST_ALPHA:  # type: ignore[arg-type]
        alpha = None
    return alpha, config.get("use_rslora") is True
