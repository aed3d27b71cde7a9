"""Formats: how the parameters of a unit are stored, and how they become what a layer computes with.

A format turns a module of specs into the module whose leaves are the stored ones. A stored parameter is an array, or a
registered pytree of arrays that the layers know how to use. The leaves of that module, in order, are what lies in files,
in host memory and in slots; nothing that moves them knows what they mean.
"""

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.kv import UNUSED_WHEN_REUSED
from ..model.layers import named_arrays, with_arrays
from ..units import DTYPES, tree_bytes
from . import components


@dataclass(frozen=True)
class Format:
    """Every parameter as one array of `dtype`, a name of units.DTYPES."""

    dtype: str

    @property
    def name(self) -> str:
        return self.dtype

    def stored(self, path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        """What stands for a parameter: a ShapeDtypeStruct, or a pytree of them."""
        return jax.ShapeDtypeStruct(leaf.shape, DTYPES[self.dtype])


FORMATS = {name: Format(name) for name in ("bfloat16", "float32")}


def named(name: str) -> Format:
    """Raises UsageError for a name that is not in FORMATS."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Storage:
    """A model's parameters as stored: the format of every unit, and what follows from it.

    `special` rows (pattern, format) stand for units whose name, as in "transformer.layers.3", matches the pattern; the
    last match wins. Whatever needs shapes, dtypes or bytes of parameters asks here. Leaves come in the module's order.
    """

    config: ModelConfig
    format: Format
    special: tuple[tuple[str, Format], ...] = ()

    def of(self, component: str, unit: str) -> Format:
        """The format of a unit."""
        name = f"{component}.{unit}"
        return next(
            (f for p, f in reversed(self.special) if fnmatch.fnmatchcase(name, p)), self.format
        )

    def units(self, component: str) -> list[str]:
        """Units in the model's order."""
        return list(components.units(self.config, component))

    def module(self, component: str, unit: str) -> Any:
        """A unit's module, with a ShapeDtypeStruct for every stored leaf."""
        return components.child(_stored(self, component), unit)

    def leaves(self, component: str, unit: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Path within the component -> stored leaf of a unit."""
        return _leaves(self, component)[unit]

    def specs(self, component: str, unit: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The stored leaves of a unit."""
        return tuple(self.leaves(component, unit).values())

    def trees(self, component: str, units: Sequence[str]) -> tuple[jax.tree_util.PyTreeDef, ...]:
        """The structures that turn these units' leaves into their modules; equal ones are one object."""
        of = _trees(self, component)
        return tuple(of[unit] for unit in units)

    def nbytes(self, component: str, *units: str) -> int:
        """Stored bytes of these units."""
        return sum(tree_bytes(self.specs(component, unit)) for unit in units)

    def assemble(self, component: str, arrays: Mapping[str, Sequence]) -> Any:
        """A component's module from leaves by unit: of all units, or of one half of the VAE, the other being None."""
        structure, paths = _structure(self, component, frozenset(arrays))
        table = {
            path: leaf
            for unit, leaves in arrays.items()
            for path, leaf in zip(self.leaves(component, unit), leaves, strict=True)
        }
        return jax.tree.unflatten(structure, [table[path] for path in paths])

    def without_kv(self, component: str, unit: str, leaves: Sequence) -> tuple:
        """A DiT block's leaves for an NFE that reuses K and V: None in place of those that make them."""
        unused = tuple(f"{unit}.{name}" for name in UNUSED_WHEN_REUSED)
        paths = self.leaves(component, unit)
        return tuple(
            None if path.startswith(unused) else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        )


def uniform(config: ModelConfig, name: str) -> Storage:
    """A model all of whose units have one format, by its name. Raises UsageError for an unknown name."""
    return Storage(config, named(name))


@functools.cache
def _stored(storage: Storage, component: str) -> Any:
    def stored(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        return storage.of(component, components.unit_of(path)).stored(path, leaf)

    return with_arrays(components.spec(storage.config, component), stored)


@functools.cache
def _leaves(storage: Storage, component: str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    return components.by_unit(named_arrays(_stored(storage, component)))


@functools.cache
def _trees(storage: Storage, component: str) -> dict[str, jax.tree_util.PyTreeDef]:
    """By unit. One object for all that are equal: to compare two takes 0.1 ms, which is asked for at every visit."""
    made: dict[jax.tree_util.PyTreeDef, jax.tree_util.PyTreeDef] = {}
    trees = {u: jax.tree.structure(storage.module(component, u)) for u in storage.units(component)}
    return {unit: made.setdefault(tree, tree) for unit, tree in trees.items()}


@functools.cache
def _structure(
    storage: Storage, component: str, held: frozenset[str]
) -> tuple[Any, tuple[str, ...]]:
    """The structure of a component of which only the units `held` are there, and the paths of its leaves in order.

    Cached: to build the VAE's module takes 10 ms, and a picture asks three times.
    """
    module = jax.tree.map(
        lambda leaf: leaf, _stored(storage, component)
    )  # a copy, to take units from
    for unit in set(storage.units(component)) - held:
        setattr(module, unit, None)
    return jax.tree.structure(module), tuple(named_arrays(module))
