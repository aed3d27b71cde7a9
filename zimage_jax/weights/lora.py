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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from ..errors import ConversionError, ForeignError
from ..files import open_regular, printable, read_json
from ..model.config import ModelConfig
from . import components, names
from .names import Entry
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
_OF_KIND = {  # the roles of each kind
    "LoRA": {"down", "up"},
    "LoHa": {role for role, _ in _ROLES if role.startswith("hada")},
    "LoKr": {role for role, _ in _ROLES if role.startswith("lokr")},
    "diff": {"diff"},
    "set": {"set"},
}
_LARGEST_ALPHA = 1e9
_WORDS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "activation text")


class Factors(NamedTuple):
    """A change of low rank: up @ down, alpha / r included."""

    up: Float32[np.ndarray, "o r"]
    down: Float32[np.ndarray, "r i"]


def split_whole(matrix: Float[np.ndarray, "a b"]) -> Factors:
    """Factors of a whole matrix: itself and a unit matrix."""
    a, b = matrix.shape
    one = np.eye(min(a, b), dtype=np.float32)
    return Factors(matrix, one) if b <= a else Factors(one, matrix)


@dataclass
class Patch:
    """What a file changes of one tensor of a source's layout."""

    name: str  # of the layer there
    component: str
    entry: Entry
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by role
    alpha: float | int | None = None
    root: bool = False  # the factor is alpha / sqrt(r) (PEFT `use_rslora`)

    @property
    def kind(self) -> str:
        roles = self.tensors.keys()
        if "hada_w1_a" in roles:
            return "LoHa"
        if any(role.startswith("lokr") for role in roles):
            return "LoKr"
        return "LoRA" if roles & {"down", "up"} else "set" if "set" in roles else "diff"

    @property
    def is_dora(self) -> bool:
        return not self.tensors.keys().isdisjoint(("dora_scale", "magnitude"))

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the model's own weights."""
        return self.is_dora or "set" in self.tensors

    @property
    def is_norm(self) -> bool:
        return len(self.entry.shape) == 1

    @property
    def changes_weight(self) -> bool:
        return bool(self.tensors.keys() - {"diff_b", "alpha"})

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose product is that of the change; none of a whole one."""
        shape = {role: tensor.shape for role, tensor in self.tensors.items()}
        if self.kind == "LoRA":
            return (shape["down"][0],)
        if self.kind == "LoHa":
            return shape["hada_w1_b"][0], shape["hada_w2_b"][0]
        if self.kind == "LoKr":
            return tuple(
                shape[f"lokr_{w}_b"][0] if f"lokr_{w}_b" in shape else min(shape[f"lokr_{w}"])
                for w in ("w1", "w2")
            )
        return ()

    @property
    def rank(self) -> int:
        """Of the matrices that make the change exactly; 0 where a whole matrix is smaller, and for
        what depends on the base.

        A LoHa of rank r is one of rank r^2: each row of up is the product of a row of w1_a and one
        of w2_a. kron(u1 v1, u2 v2) is kron(u1, u2) kron(v1, v2).
        """
        if self.needs_base or self.is_norm or not self.ranks:
            return 0
        rank, (rows, columns) = math.prod(self.ranks), self.entry.shape
        part = rows // len(self.entry.paths)
        return rank if rank * (part + columns) < part * columns else 0

    @property
    def scale(self) -> float:
        """alpha / r."""
        is_whole = self.kind == "LoKr" and {"lokr_w1", "lokr_w2"} <= self.tensors.keys()
        if self.alpha is None or is_whole or not self.ranks:
            return 1.0
        r = self.ranks[0]
        if self.kind == "LoKr":
            r = self.ranks[1] if "lokr_w2_b" in self.tensors else self.ranks[0]
        return self.alpha / (math.sqrt(r) if self.root else r)

    def factors(self) -> Factors:
        """up and down of the change, for weight 1."""
        if self.kind == "LoRA":
            return Factors(np.float32(self.scale) * self._matrix("up"), self._matrix("down"))
        if self.kind == "LoHa":
            a1, b1, a2, b2 = (self._matrix(f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
            up = (a1[:, :, None] * a2[:, None]).reshape(len(a1), -1)
            down = (b1[:, None] * b2[None]).reshape(-1, b1.shape[1])
        else:
            (up1, down1), (up2, down2) = map(self._kron, ("w1", "w2"))
            up, down = np.kron(up1, up2), np.kron(down1, down2)
        return Factors(np.float32(self.scale) * up, down)

    def delta(self, base: Callable[[], Float32[np.ndarray, "..."]]) -> Float32[np.ndarray, "..."]:
        """The whole change, for weight 1. `base`: gives the model's own weights."""
        if "set" in self.tensors:
            return self._shaped("set") - base()
        if self.kind == "diff":
            return self._shaped("diff")
        change = self._product()
        if not self.is_dora:
            return change
        own = base()
        magnitude, of = (
            self._read("dora_scale" if "dora_scale" in self.tensors else "magnitude"),
            own,
        )
        if "magnitude" in self.tensors:
            of = own + change
        is_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1 and own.shape[0] != 1
        norm = np.linalg.norm(of, axis=0 if is_columns else 1, keepdims=True)
        magnitude = magnitude.reshape(norm.shape)
        return (own + change) * (magnitude / (norm + np.finfo(np.float32).eps)) - own

    def bias(self) -> Float32[np.ndarray, "o"]:
        return self._read("diff_b")

    def _product(self) -> Float32[np.ndarray, "o i"]:
        if self.kind == "LoHa":
            a1, b1, a2, b2 = (self._matrix(f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return np.float32(self.scale) * (a1 @ b1) * (a2 @ b2)
        if self.kind == "LoKr":
            (up1, down1), (up2, down2) = map(self._kron, ("w1", "w2"))
            return np.float32(self.scale) * np.kron(up1 @ down1, up2 @ down2)
        up, down = self.factors()
        return up @ down

    def _kron(self, which: str) -> Factors:
        if f"lokr_{which}" in self.tensors:
            return split_whole(self._matrix(f"lokr_{which}"))
        return Factors(self._matrix(f"lokr_{which}_a"), self._matrix(f"lokr_{which}_b"))

    def _matrix(self, role: str) -> Float32[np.ndarray, "a b"]:
        values = self._read(role)
        return values.reshape(values.shape[:2])

    def _shaped(self, role: str) -> Float32[np.ndarray, "..."]:
        return self._read(role).reshape(self.entry.shape)

    def _read(self, role: str) -> Float32[np.ndarray, "..."]:
        """A tensor in float32. Raises ConversionError if it is not finite."""
        tensor = self.tensors[role]
        rows = tensor.shape[0] if tensor.shape else 1
        flat = tensor if tensor.shape else _of_one(tensor)
        values = flat.rows(0, rows, np.dtype(np.float32)).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ConversionError(f"{tensor.file}: {printable(tensor.name)} is not finite")
        return values

    def check(self) -> None:
        """Raises ConversionError for tensors that are missing, or whose shapes do not make the
        layer's."""
        found = {role: tensor.shape for role, tensor in self.tensors.items()}
        file = next(iter(self.tensors.values())).file
        if not _makes(self.kind, found, self.entry.shape) or not self._has_scale(found):
            shapes = ", ".join(f"{role} {list(shape)}" for role, shape in sorted(found.items()))
            raise ConversionError(
                f"{file}: {printable(self.name)}: expected a {self.kind} of "
                f"{list(self.entry.shape)}, got {printable(shapes)}; it is of another model, or "
                "damaged"
            )

    def _has_scale(self, found: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether what is beside the factors has the layer's shape."""
        rows, columns = (*self.entry.shape, 1)[:2]
        sizes = [found[role] for role in ("dora_scale", "magnitude") if role in found]
        fitting = (rows,), (rows, 1), (1, columns)
        is_linear = self.kind in ("LoRA", "LoHa", "LoKr") and not self.is_norm
        return all(of in fitting and is_linear for of in sizes) and len(sizes) <= 1


def _makes(kind: str, of: Mapping[str, tuple[int, ...]], whole: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, by role, make a change of a `whole` tensor."""

    def matrix(role: str) -> tuple[int, int] | None:
        shape = of.get(role, ())
        is_matrix = len(shape) >= 2 and all(n == 1 for n in shape[2:]) and min(shape[:2]) > 0
        return (shape[0], shape[1]) if is_matrix else None

    def product(up: str, down: str) -> tuple[int, int] | None:
        a, b = matrix(up), matrix(down)
        return (a[0], b[1]) if a and b and a[1] == b[0] else None

    beside = {"dora_scale", "magnitude", "diff_b"}
    if not of.keys() <= _OF_KIND[kind] | beside or of.get("diff_b", whole[:1]) != whole[:1]:
        return False
    if kind == "LoRA":
        return product("up", "down") == whole
    if kind == "LoHa":
        both = product("hada_w1_a", "hada_w1_b"), product("hada_w2_a", "hada_w2_b")
        return both == (whole, whole)
    if kind == "LoKr":
        if any(f"lokr_{w}" in of and f"lokr_{w}_{x}" in of for w in ("w1", "w2") for x in "ab"):
            return False
        pair = [
            matrix(f"lokr_{w}") if f"lokr_{w}" in of else product(f"lokr_{w}_a", f"lokr_{w}_b")
            for w in ("w1", "w2")
        ]
        return None not in pair and tuple(math.prod(of) for of in zip(*pair, strict=True)) == whole  # type: ignore[arg-type]
    weights = [shape for role, shape in of.items() if role in ("diff", "set")]
    return all(tuple(n for n in shape if n != 1) == whole for shape in weights)


def _of_one(tensor: Tensor) -> Tensor:
    """A tensor without axes as one with an axis of 1."""
    return replace(tensor, shape=(1,))


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
