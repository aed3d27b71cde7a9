"""Formats: how the parameters of a unit are stored.

A format replaces each parameter of a spec by its stored form: an array, or a registered pytree of
arrays that the layers can use. The leaves of the resulting module, in order, are the contents of
files, host memory and slots. The code that moves leaves does not know what they mean.
"""

import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
from flax import nnx

from ..dtypes import DTYPES
from ..errors import UsageError
from ..files import printable
from ..model import dit
from ..model.config import ModelConfig
from ..model.kv import UNUSED_WHEN_REUSED
from ..model.layers import Linear, Side, named_arrays, with_arrays
from ..units import tree_bytes
from . import components
from .encodings import Encoding, Int8, Lossless


@dataclass(frozen=True)
class Format:
    """Stores matrices of blocks by `encoding`, and any other parameter as an array of `dtype`, a
    name in units.DTYPES.

    Only blocks visit the device again and again. The stem, the embedding table and the VAE are 7 %
    of the published model, and most of that is the table, whose rows the host looks up.
    """

    name: str  # in FORMATS and in manifests
    dtype: str
    encoding: Encoding | None = None

    def encoding_of(self, path: str, leaf: jax.ShapeDtypeStruct) -> Encoding | None:
        """The encoding of the parameter `leaf`; None if it is stored as an array."""
        is_in_block = "." in components.unit_of(path)
        encodes = self.encoding is not None and is_in_block and self.encoding.admits(path, leaf)
        return self.encoding if encodes else None

    def stored(self, path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        """The stored form of the parameter `leaf`: a ShapeDtypeStruct, or a pytree of them."""
        encoding = self.encoding_of(path, leaf)
        if encoding is not None:
            return encoding.stored(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, DTYPES[self.dtype])


FORMATS = {
    made.name: made
    for made in (
        Format("bfloat16", "bfloat16"),
        Format("float32", "float32"),
        Format("lossless", "bfloat16", Lossless()),
        Format("int8", "bfloat16", Int8()),
        Format("int8-hadamard", "bfloat16", Int8(rotates=True)),
    )
}


def named(name: str) -> Format:
    """The format of this name. Raises UsageError if it is not in FORMATS."""
    if name not in FORMATS:
        raise UsageError(f"format {printable(name)!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


class Beside(NamedTuple):
    """What is stored beside a layer: matrices of a `rank` (0 for none), a whole `kernel`, factors of
    `rows` and `columns`, a `bias` (model.layers.Side; of a norm its `change`).

    It is beside the layer of this name in all units that are alike `unit`: what some of them lack is
    zero there, so that they share slots and programs.
    """

    component: str
    unit: str
    layer: str  # within the unit, as in "attention.to_q"
    rank: int = 0
    kernel: bool = False
    rows: bool = False
    columns: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Storage:
    """The format of every parameter of a model, and the shapes, dtypes and bytes that follow.

    A row (pattern, format) of `special` gives the format of the parameters that match the pattern
    (fnmatch): by component, unit or path, the latter two with the component before them or without,
    as in "text_encoder", "layers.3" or "transformer.layers.*.attention.to_q.kernel". The last
    matching row wins; other parameters have `format`. Leaves are in the module's order. Where a
    method takes units, it takes halves of blocks too (components.halves). A component or unit that
    the model does not have raises KeyError.
    """

    config: ModelConfig
    format: Format
    special: tuple[tuple[str, Format], ...] = ()
    beside: tuple[Beside, ...] = ()  # of LoRAs

    @property
    def without_loras(self) -> "Storage":
        """The parameters that the checkpoint has."""
        return replace(self, beside=())

    def of(self, component: str, path: str) -> Format:
        """The format of a parameter."""
        for pattern, special in reversed(self.special):
            if _matches(pattern, component, path):
                return special
        return self.format

    def parameters(self, component: str, unit: str) -> dict[str, Encoding | None]:
        """Path -> encoding of a unit's parameters; None for those stored as arrays."""
        leaves = components.units(self.config, component)[components.unit_of(unit)]
        return {
            path: self.of(component, path).encoding_of(path, leaf)
            for path, leaf in components.of_half(unit, leaves).items()
        }

    def encoded(
        self, component: str, unit: str, leaves: Mapping[str, Any]
    ) -> dict[str, tuple[Encoding, Any]]:
        """Path -> (encoding, tree) of a unit's encoded parameters; the arrays are those of `leaves`,
        by path."""
        found: dict[str, tuple[Encoding, Any]] = {}
        for path, encoding in self.parameters(component, unit).items():
            if encoding is not None:
                names = encoding.tree._fields
                arrays = (leaves[f"{path}.{name}"] for name in names)
                found[path] = encoding, encoding.tree(*arrays)
        return found

    def units(self, component: str) -> list[str]:
        """A component's units, in the model's order."""
        return list(components.units(self.config, component))

    def module(self, component: str, unit: str) -> Any:
        """A unit's module, with a ShapeDtypeStruct for every stored leaf. Of a half: its block's,
        without the other half's parameters."""
        module = components.child(_stored(self, component), components.unit_of(unit))
        if half := components.half_of(unit):
            module = jax.tree.map(lambda leaf: leaf, module)  # a copy
            for other in dit.HALVES.keys() - {half}:
                for name in dit.HALVES[other]:
                    if hasattr(module, name):
                        setattr(module, name, None)
        return module

    def leaves(self, component: str, unit: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Path within the component -> stored leaf, of a unit."""
        return _leaves(self, component)[unit]

    def specs(self, component: str, unit: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The stored leaves of a unit."""
        return tuple(self.leaves(component, unit).values())

    def trees(self, component: str, units: Sequence[str]) -> tuple[jax.tree_util.PyTreeDef, ...]:
        """The structures with which `jax.tree.unflatten` makes these units' modules from leaves.

        Equal structures are one object.
        """
        of = _trees(self, component)
        return tuple(of[unit] for unit in units)

    def nbytes(self, component: str, *units: str) -> int:
        """Stored bytes of these units, without file headers."""
        of = _nbytes(self, component)
        return sum(of[unit] for unit in units)

    def alike(self, component: str, units: Sequence[str]) -> tuple[int, ...]:
        """A number for each unit: equal where the stored leaves have equal shapes and dtypes."""
        of = _alike(self, component)
        return tuple(of[unit] for unit in units)

    def units_alike(self, component: str, unit: str) -> list[str]:
        """The units whose stored leaves have the shapes and dtypes of this unit's."""
        of = _alike(self, component)
        return [other for other in self.units(component) if of[other] == of[unit]]

    def assemble(self, component: str, arrays: Mapping[str, Sequence]) -> Any:
        """A component's module from unit -> leaves. What is missing in `arrays` becomes None (one
        half of the VAE, or groups of blocks)."""
        structure, paths = _structure(self, component, frozenset(arrays))
        table = {
            path: leaf
            for unit, leaves in arrays.items()
            for path, leaf in zip(self.leaves(component, unit), leaves, strict=True)
        }
        return jax.tree.unflatten(structure, [table[path] for path in paths])

    def of_half(self, component: str, half: str, leaves: Sequence) -> tuple:
        """The leaves of a half, out of all leaves of its block."""
        paths = self.leaves(component, components.unit_of(half))
        of_block = dict(zip(paths, leaves, strict=True))
        return tuple(components.of_half(half, of_block).values())

    def without_kv(self, component: str, unit: str, leaves: Sequence) -> tuple:
        """A DiT block's leaves for an NFE that reuses K and V: None for each unused leaf."""
        unused = tuple(f"{components.unit_of(unit)}.{name}." for name in UNUSED_WHEN_REUSED)
        paths = self.leaves(component, unit)
        return tuple(
            None if path.startswith(unused) else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        )


def uniform(config: ModelConfig, name: str) -> Storage:
    """The storage of a model whose units all have the named format. Raises UsageError if the name
    is not in FORMATS."""
    return Storage(config, named(name))


def parse(config: ModelConfig, text: str) -> Storage:
    """The storage that a command's option names: a format, or PATTERN=FORMAT, or several of them
    separated by commas. Parameters that no pattern matches are in bfloat16.

    Raises UsageError for an unknown format, and for a pattern that matches nothing.
    """
    storage = uniform(config, "bfloat16")
    for word in text.split(","):
        pattern, _, name = word.strip().rpartition("=")
        if not pattern:
            storage = replace(storage, format=named(name))
            continue
        storage = replace(storage, special=(*storage.special, (pattern, named(name))))
        if not any(
            _matches(pattern, component, path)
            for component in components.COMPONENTS
            for unit in components.units(config, component).values()
            for path in unit
        ):
            raise UsageError(
                f"format {printable(word)!r}: the pattern matches nothing; expected a component "
                f"({', '.join(components.COMPONENTS)}), a unit such as layers.3, or a path"
            )
    return storage


def describe(storage: Storage) -> str:
    """The text from which `parse` makes this storage."""
    return ",".join([storage.format.name, *(f"{p}={f.name}" for p, f in storage.special)])


def names(storage: Storage) -> str:
    """The formats of a storage, the one of most parameters first, for a line of text."""
    return ", ".join(dict.fromkeys([storage.format.name, *(f.name for _, f in storage.special)]))


def is_encoded(storage: Storage) -> bool:
    """Whether some format of a storage has an encoding."""
    return any(f.encoding is not None for f in (storage.format, *(f for _, f in storage.special)))


def leaves_of(path: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, array) of each leaf of an encoded parameter."""
    for name, array in zip(tree._fields, tree, strict=True):
        yield f"{path}.{name}", array


def _matches(pattern: str, component: str, path: str) -> bool:
    unit = components.unit_of(path)
    names = component, f"{component}.{unit}", unit, f"{component}.{path}", path
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


@functools.cache
def _stored(storage: Storage, component: str) -> Any:
    def stored(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        return storage.of(component, path).stored(path, leaf)

    module = with_arrays(components.spec(storage.config, component), stored)
    for row in storage.beside:
        if row.component == component:
            for unit in storage.without_loras.units_alike(component, row.unit):
                _put_beside(module, storage, row, unit)
    return module


def _put_beside(module: Any, storage: Storage, row: Beside, unit: str) -> None:
    """Give the layer of a `row` in a unit the specs of what is stored beside it."""
    path = f"{unit}.{row.layer}"
    layer = components.child(module, path)
    is_linear = isinstance(layer, Linear)
    own_format = storage.of(row.component, f"{path}.{'kernel' if is_linear else 'scale'}")

    def spec(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, DTYPES[own_format.dtype])

    if not is_linear:
        layer.change = nnx.Param(spec(*layer.scale.shape))
        return
    own = components.child(components.spec(storage.config, row.component), path).kernel
    inputs, outputs = own.shape
    made: Any = (
        spec(inputs, row.rank) if row.rank else None,
        spec(row.rank, outputs) if row.rank else None,
        spec(inputs, outputs) if row.kernel else None,
        spec(outputs) if row.rows else None,
        spec(inputs) if row.columns else None,
        spec(outputs) if row.bias else None,
    )
    layer.side = nnx.Param(Side(*made))


@functools.cache
def _leaves(storage: Storage, component: str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Unit or half -> path -> stored leaf."""
    units = components.by_unit(named_arrays(_stored(storage, component)))
    return units | {
        half: components.of_half(half, leaves)
        for unit, leaves in units.items()
        for half in components.halves(component, unit)
    }


@functools.cache
def _nbytes(storage: Storage, component: str) -> dict[str, int]:
    """Unit or half -> stored bytes."""
    return {
        name: tree_bytes(storage.specs(component, name)) for name in _leaves(storage, component)
    }


@functools.cache
def _alike(storage: Storage, component: str) -> dict[str, int]:
    """Unit or half -> a number that those with the same stored shapes and dtypes share."""
    numbers: dict[tuple, int] = {}
    specs = {name: storage.specs(component, name) for name in _leaves(storage, component)}
    return {name: numbers.setdefault(of, len(numbers)) for name, of in specs.items()}


@functools.cache
def _trees(storage: Storage, component: str) -> dict[str, jax.tree_util.PyTreeDef]:
    """Unit or half -> tree structure. Equal structures are one object: comparing two takes 0.1 ms a
    visit."""
    made: dict[jax.tree_util.PyTreeDef, jax.tree_util.PyTreeDef] = {}
    names = _leaves(storage, component)
    trees = {name: jax.tree.structure(storage.module(component, name)) for name in names}
    return {name: made.setdefault(tree, tree) for name, tree in trees.items()}


@functools.cache
def _structure(
    storage: Storage, component: str, held: frozenset[str]
) -> tuple[Any, tuple[str, ...]]:
    """The tree structure of a component with only the units `held`, and the paths of its leaves.

    Cached: building the VAE's module takes 10 ms, and each picture needs it three times.
    """
    module = jax.tree.map(lambda leaf: leaf, _stored(storage, component))  # a copy
    groups = {unit.split(".")[0] for unit in held}
    for unit in set(storage.units(component)) - held:
        if unit.split(".")[0] not in groups:  # one half of the VAE; a DiT without its ControlNet
            setattr(module, unit.split(".")[0], None)
    return jax.tree.structure(module), tuple(named_arrays(module))
