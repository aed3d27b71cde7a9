"""One LoRA's change of one tensor: its kind, its rank, and its values.

weights/lora.py has the formulas and makes these of files.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from ..errors import ConversionError
from ..files import printable
from .names import Entry
from .tensors import Tensor

_HALVES = ("w1", "w2")
_OF_KIND = {  # the roles of each kind
    "LoRA": {"down", "up"},
    "LoHa": {f"hada_{w}_{x}" for w in _HALVES for x in "ab"},
    "LoKr": {f"lokr_{w}{x}" for w in _HALVES for x in ("", "_a", "_b")},
    "diff": {"diff"},
    "set": {"set"},
}


class Factors(NamedTuple):
    """A change of low rank: up @ down, alpha / r included.

    A DoRA also changes W itself: rows * W, or W * columns, is added.
    """

    up: Float32[np.ndarray, "o r"]
    down: Float32[np.ndarray, "r i"]
    rows: Float32[np.ndarray, "o"] | None = None
    columns: Float32[np.ndarray, "i"] | None = None


Base = Callable[[], Float32[np.ndarray, "..."]]


def split_whole(
    matrix: Float32[np.ndarray, "a b"],
) -> tuple[Float32[np.ndarray, "a r"], Float32[np.ndarray, "r b"]]:
    """Factors of a whole matrix: itself and a unit matrix."""
    a, b = matrix.shape
    one = np.eye(min(a, b), dtype=np.float32)
    return (matrix, one) if b <= a else (one, matrix)


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
        return self._magnitude is not None

    @property
    def is_of_columns(self) -> bool:
        """Whether a DoRA has a magnitude for each input; else it has one for each output."""
        shape = () if self._magnitude is None else self._magnitude.shape
        return len(shape) == 2 and shape[0] == 1 != self.entry.shape[0]

    @property
    def _magnitude(self) -> Tensor | None:
        return self.tensors.get("dora_scale") or self.tensors.get("magnitude")

    @property
    def changes_weight(self) -> bool:
        return bool(self.tensors.keys() - {"diff_b"})

    @property
    def changes_bias(self) -> bool:
        return not self.tensors.keys().isdisjoint(("diff_b", "up_bias"))

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
        """Of the matrices that make the change exactly; 0 of a change that none make.

        A LoHa of rank r is one of rank r^2: each row of up is the product of a row of w1_a and one
        of w2_a. kron(u1 v1, u2 v2) is kron(u1, u2) kron(v1, v2).
        """
        return math.prod(self.ranks) if self.ranks else 0

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

    def factors(self, base: Base) -> Factors:
        """The change, for weight 1. `base`: gives the model's own weights."""
        up, down = self._matrices()
        if not self.is_dora:
            return Factors(up, down)
        s = self._factor(base(), up @ down)
        if self.is_of_columns:
            return Factors(up, down * s, columns=s[0] - 1)
        return Factors(up * s, down, rows=s[:, 0] - 1)

    def delta(self, base: Base) -> Float32[np.ndarray, "..."]:
        """The whole change, for weight 1."""
        if "set" in self.tensors:
            return self._shaped("set") - base()
        if self.kind == "diff":
            return self._shaped("diff")
        change = self._product()
        if not self.is_dora:
            return change
        own = base()
        s = self._factor(own, change)
        return own * (s - 1) + change * s

    def _factor(
        self, own: Float32[np.ndarray, "o i"], change: Float32[np.ndarray, "o i"]
    ) -> Float32[np.ndarray, "a b"]:
        """s of a DoRA, as a column or a row."""
        magnitude = self._read("dora_scale" if "dora_scale" in self.tensors else "magnitude")
        is_old = "dora_scale" in self.tensors and not self.is_of_columns
        of, axis = own if is_old else own + change, 0 if self.is_of_columns else 1
        norm = np.linalg.norm(of, axis=axis, keepdims=True)
        return magnitude.reshape(norm.shape) / (norm + np.finfo(np.float32).eps)

    def bias(self) -> Float32[np.ndarray, "o"]:
        """What is added to the bias, for weight 1."""
        found = np.zeros(self.entry.shape[0], np.float32)
        if "diff_b" in self.tensors:
            found += self._read("diff_b")
        if "up_bias" in self.tensors:
            found += np.float32(self.scale) * self._read("up_bias")
        return found

    def _matrices(self) -> tuple[Float32[np.ndarray, "o r"], Float32[np.ndarray, "r i"]]:
        """up and down, with alpha / r in up."""
        if self.kind == "LoRA":
            return np.float32(self.scale) * self._matrix("up"), self._matrix("down")
        if self.kind == "LoHa":
            a1, b1, a2, b2 = (self._matrix(f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
            up = (a1[:, :, None] * a2[:, None]).reshape(len(a1), -1)
            down = (b1[:, None] * b2[None]).reshape(-1, b1.shape[1])
        else:
            (up1, down1), (up2, down2) = map(self._kron, ("w1", "w2"))
            up, down = np.kron(up1, up2), np.kron(down1, down2)
        return np.float32(self.scale) * up, down

    def _product(self) -> Float32[np.ndarray, "o i"]:
        if self.kind == "LoHa":
            a1, b1, a2, b2 = (self._matrix(f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return np.float32(self.scale) * (a1 @ b1) * (a2 @ b2)
        if self.kind == "LoKr":
            (up1, down1), (up2, down2) = map(self._kron, ("w1", "w2"))
            return np.float32(self.scale) * np.kron(up1 @ down1, up2 @ down2)
        up, down = self._matrices()
        return up @ down

    def _kron(self, which: str) -> tuple[Float32[np.ndarray, "a r"], Float32[np.ndarray, "r b"]]:
        if f"lokr_{which}" in self.tensors:
            return split_whole(self._matrix(f"lokr_{which}"))
        return self._matrix(f"lokr_{which}_a"), self._matrix(f"lokr_{which}_b")

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
        """Raises ConversionError for tensors that are missing, or of two kinds, or whose shapes do
        not make the layer's."""
        found = {role: tensor.shape for role, tensor in self.tensors.items()}
        file = next(iter(self.tensors.values())).file
        where = f"{file}: {printable(self.name)}"
        kinds = [kind for kind, roles in _OF_KIND.items() if roles & found.keys()]
        if len(kinds) > 1:
            raise ConversionError(
                f"{where}: expected one change of a layer, got a {' and a '.join(kinds)}; keep one"
            )
        if not _makes(self.kind, found, self.entry.shape) or not self._has_scale(found):
            shapes = ", ".join(f"{role} {list(shape)}" for role, shape in sorted(found.items()))
            raise ConversionError(
                f"{where}: expected a {self.kind} of {list(self.entry.shape)}, got "
                f"{printable(shapes)}; it is of another model, or damaged"
            )

    def _has_scale(self, found: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether what is beside the factors has the layer's shape."""
        rows, columns = (*self.entry.shape, 1)[:2]
        sizes = [found[role] for role in ("dora_scale", "magnitude") if role in found]
        fitting = (rows,), (rows, 1), (1, columns)
        is_bare = "up_bias" in found or self.kind in ("diff", "set")  # PEFT has no DoRA with a bias
        return all(of in fitting and not is_bare for of in sizes) and len(sizes) <= 1


def _makes(kind: str, of: Mapping[str, tuple[int, ...]], whole: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, by role, make a change of a `whole` tensor."""

    def matrix(role: str) -> tuple[int, int] | None:
        shape = of.get(role, ())
        is_matrix = len(shape) >= 2 and all(n == 1 for n in shape[2:]) and min(shape[:2]) > 0
        return (shape[0], shape[1]) if is_matrix else None

    def product(up: str, down: str) -> tuple[int, int] | None:
        a, b = matrix(up), matrix(down)
        return (a[0], b[1]) if a and b and a[1] == b[0] else None

    biases = {"diff_b"} | ({"up_bias"} if kind == "LoRA" else set())
    if not of.keys() <= _OF_KIND[kind] | biases | {"dora_scale", "magnitude"}:
        return False
    if any(of.get(role, whole[:1]) != whole[:1] for role in biases):
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
        return None not in pair and tuple(math.prod(of) for of in zip(*pair, strict=True)) == whole
    weights = [shape for role, shape in of.items() if role in ("diff", "set")]
    return all(tuple(n for n in shape if n != 1) == whole for shape in weights)


def _of_one(tensor: Tensor) -> Tensor:
    """A tensor without axes as one with an axis of 1."""
    return replace(tensor, shape=(1,))
