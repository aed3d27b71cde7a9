"""LoRA files in every spelling: which layers of ours they change, and how.

A key is a layer's name and a role, as in `lora_unet_layers_0_attention_to_out_0` and `lora_down`.
Names are never split at underscores: the names of both tables of the DiT (weights.names) and of the
text encoder's, with "." as "_", are looked up. Only the header is read here, and a file's values
when they are asked for. Keys that change nothing are listed with the reason.

W is PyTorch's (out, in). With weight k, and s = alpha / r (1 without alpha):

  LoRA   W + k s up down
  LoHa   W + k s (w1_a w1_b) * (w2_a w2_b)    (LyCORIS, arXiv 2108.06098)
  LoKr   W + k s kron(w1, w2), s = 1 if both factors are whole    (LyCORIS, arXiv 2309.14859)
  DoRA   W + k (V m / |V| - W), V = W + s up down    (arXiv 2402.09353, PEFT
         `lora_magnitude_vector`, ComfyUI `dora_scale` of inputs), norms of rows or columns; or
         / |W|    (ComfyUI `dora_scale` of outputs)
  diff   W + k diff;    set: the tensor itself, whatever k    (ComfyUI)
"""

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConversionError, ForeignError
from ..files import open_regular, parse_json, printable
from ..model.config import ModelConfig
from . import components, names
from .names import Entry
from .patch import Patch
from .peft import PeftConfig, checked_alpha, read_peft
from .sources import read_header
from .tensors import READABLE, Tensor

_SHOWN = 3  # keys named in one message
# what comes before a layer's name, with "." as "_"
_PREFIX = re.compile(
    r"(base_model_model_)?"
    r"(model_diffusion_model_|diffusion_model_|transformer_|lora_unet__?|lora_transformer_|lycoris_"
    r"|(text_encoders?_|lora_te1?_)((qwen3?_)?4b_)?(transformer_)?(model_)?)?"
)
# the name of an adapter, and "weight"
_PEFT = r"(?:\.(?!weight$|bias$)(?P<{}>[\w-]+))?(?:\.weight)?"
_ROLES = [  # what a key says after the layer's name
    ("down", rf"\.lora_A{_PEFT.format('of_down')}|[._]lora[_.]down\.weight"),
    ("up", rf"\.lora_B{_PEFT.format('of_up')}|[._]lora[_.]up\.weight"),
    ("up_bias", r"\.lora_B(?:\.(?P<of_bias>[\w-]+))?\.bias"),
    ("magnitude", rf"\.lora_magnitude_vector{_PEFT.format('of_magnitude')}"),
    ("alpha", r"\.alpha"),
    ("dora_scale", r"\.dora_scale"),
    *((f"hada_{w}", rf"\.hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *((f"lokr_{w}", rf"\.lokr_{w}") for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
    ("diff", r"\.diff|\.w_norm"),
    ("diff_b", r"\.diff_b|\.b_norm"),
    ("set", r"\.set_weight"),
    ("middle", r"[._]lora[_.]mid\.weight|\.(?:hada|lokr)_t[12]"),  # of a convolution
]
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<{role}>{of})" for role, of in _ROLES) + ")")
# dtypes of alphas beside those of matrices
_NUMBERS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
_WORDS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "activation text")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, opened for one model. `unused`: key -> why it changes nothing."""

    file: Path
    patches: tuple[Patch, ...]
    spellings: tuple[str, ...]
    unused: Mapping[str, str]
    metadata: Mapping[str, str]

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file. A job asks for it, and nothing that only describes a LoRA."""
        with open_regular(self.file, ConversionError) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()  # type: ignore[arg-type]

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
        return parse_json(text or "{}", "metadata", ConversionError)
    except ConversionError:
        return {}


# -- names -----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of a source's layout: its own name, its component, and the entry of its weight."""

    name: str
    component: str
    entry: Entry
    has_bias: bool


@functools.cache
def _layers(config: ModelConfig) -> dict[str, Layer]:
    """The name of a layer in any of the tables, with "." as "_" -> the layer. A ControlNet's take no
    LoRA."""
    config = replace(config, control=None)
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
    header = read_header(file)
    patches: dict[tuple[str, str], Patch] = {}
    unused: dict[str, str] = {}
    spellings: Counter[str] = Counter()
    for tensor in header.tensors:
        key = _Key.of(tensor.name)
        layer = None if key is None else find(config, key.layer)
        if key is None:
            unused[tensor.name] = "no LoRA's key"
        elif layer is None:
            unused[tensor.name] = "no layer of this model that takes a LoRA"
        elif key.role == "diff_b" and not layer.has_bias:
            unused[tensor.name] = "the layer has no bias"
        else:
            _check_role(tensor, key.role)
            new = Patch(layer.name, layer.component, layer.entry)
            patch = patches.setdefault((layer.component, layer.name), new)
            _check_one_adapter(patch, tensor, key)
            patch.tensors[key.role] = tensor
            spellings[_spelling(key.layer, layer)] += 1
    whole = _without_duplicates(list(patches.values()), unused)
    if not whole:
        shown = ", ".join(printable(t.name, 60) for t in header.tensors[:_SHOWN]) or "no tensors"
        raise ForeignError(f"{file}: not a LoRA of Z-Image; found {shown}")
    _set_alphas(whole, read_peft(file, header.metadata))
    for patch in whole:
        patch.check()
    return Lora(
        file,
        tuple(whole),
        tuple(of for of, _ in spellings.most_common()),
        unused,
        header.metadata,
    )


class _Key(NamedTuple):
    """What a tensor's name says: the layer's name as it is spelled, the adapter's, and the role."""

    layer: str
    adapter: str | None
    role: str

    @classmethod
    def of(cls, name: str) -> "_Key | None":
        found = _KEY.fullmatch(name)
        if found is None:
            return None
        role = next(role for role, _ in _ROLES if found[role] is not None)
        adapters = (found[group] for group in ("of_down", "of_up", "of_bias", "of_magnitude"))
        return cls(found[1], next(filter(None, adapters), None), role)


def _check_role(tensor: Tensor, role: str) -> None:
    """Raises ConversionError for a tensor that the change needs, and that is not read."""
    where = f"{tensor.file}: {printable(tensor.name)}"
    if role == "middle":
        raise ConversionError(
            f"{where}: a change of a convolution, by three factors; this model's layers are matrices"
        )
    readable = [*READABLE, *(_NUMBERS if role == "alpha" else ())]
    if tensor.dtype not in readable:
        raise ConversionError(
            f"{where}: expected one of {', '.join(readable)}, got {printable(tensor.dtype, 20)}"
        )


def _check_one_adapter(patch: Patch, tensor: Tensor, key: _Key) -> None:
    """Raises ConversionError if a layer is changed in two spellings, or by two adapters."""
    for other in patch.tensors.values():
        of = _Key.of(other.name)
        assert of is not None
        has_other_adapter = None not in (of.adapter, key.adapter) and of.adapter != key.adapter
        if of.layer != key.layer or of.role == key.role or has_other_adapter:
            raise ConversionError(
                f"{tensor.file}: {printable(tensor.name, 80)} and {printable(other.name, 80)} are "
                "two changes of one layer; keep one of them"
            )


def _without_duplicates(patches: list[Patch], unused: dict[str, str]) -> list[Patch]:
    """Patches without those that are there twice, fused and split: then the split ones count. An
    alpha alone changes nothing.

    Raises ConversionError if not all parts of a fused layer are there too.
    """

    def is_split(patch: Patch) -> bool:
        return len(patch.entry.paths) == 1 and not patch.name.endswith("attention.out")

    split = {(p.component, p.entry.paths[0]): p for p in patches if is_split(p)}
    found = []
    for patch in patches:
        parts = [split.get((patch.component, path)) for path in patch.entry.paths]
        there = [part for part in parts if part is not None]
        if patch.tensors.keys() == {"alpha"}:
            why = "an alpha without factors"
        elif is_split(patch) or not there:
            found.append(patch)
            continue
        elif all(part is not None and part.tensors.keys() != {"alpha"} for part in parts):
            why = "the split layers are there too, and are used"
        else:
            one, other = (next(iter(of.tensors.values())) for of in (patch, there[0]))
            raise ConversionError(
                f"{one.file}: {printable(other.name, 80)} is a part of what "
                f"{printable(one.name, 80)} changes, and the other parts are not there: keep either"
            )
        unused.update({tensor.name: why for tensor in patch.tensors.values()})
    return found


def _set_alphas(patches: list[Patch], configs: list[PeftConfig]) -> None:
    """Give each patch its alpha: from the file, else from PEFT's config.

    Raises ConversionError for an alpha that is no finite number.
    """
    for patch in patches:
        tensor = patch.tensors.pop("alpha", None)
        if tensor is None:
            for config in configs:
                if config.component in (None, patch.component):
                    patch.alpha, patch.root = config.alpha(patch.name), config.root
            continue
        where = f"{tensor.file}: {printable(tensor.name)}"
        if math.prod(tensor.shape) != 1:
            raise ConversionError(
                f"{where}: expected one number, got {printable(list(tensor.shape))}"
            )
        patch.alpha = checked_alpha(_number(tensor), where)


def _number(tensor: Tensor) -> float:
    """The value of a tensor that has one, of any dtype."""
    if tensor.is_readable:
        with np.errstate(all="ignore"):
            return float(tensor.number())
    count, dtype = tensor.nbytes // 4, _NUMBERS[tensor.dtype]
    words = replace(tensor, dtype="F32", shape=(count,)).rows(0, count, np.dtype(np.float32))
    return float(np.frombuffer(words.tobytes(), dtype)[0])
