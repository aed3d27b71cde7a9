"""The three models by name, and the units their arrays are stored and moved in: a block, or what is
no block."""

import functools
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ..model import dit, text_encoder, vae
from ..model.config import ModelConfig
from ..model.kv import UNUSED_WHEN_REUSED
from ..model.layers import named_arrays

COMPONENTS = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@functools.cache
def spec(config: ModelConfig, component: str):
    """The module of a component, with a ShapeDtypeStruct for every parameter."""
    return COMPONENTS[component].spec(getattr(config, component))


def unit_of(path: str) -> str:
    """The unit an array is stored and moved with: "layers.3" of
    "layers.3.attention.to_q.kernel"."""
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


@functools.cache
def units(config: ModelConfig, component: str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Unit -> path -> spec, in the order of the model, which is the order of a unit's leaves."""
    grouped: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, leaf in named_arrays(spec(config, component)).items():
        grouped.setdefault(unit_of(path), {})[path] = leaf
    return grouped


def unit_spec(config: ModelConfig, component: str, unit: str):
    """The module of one unit, as in "layers.3" or "stem"."""
    module: Any = spec(config, component)
    for name in unit.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def leaves(
    config: ModelConfig, component: str, unit: str, dtype: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of a unit's arrays as stored."""
    return tuple(
        jax.ShapeDtypeStruct(a.shape, DTYPES[dtype])
        for a in units(config, component)[unit].values()
    )


def nbytes(config: ModelConfig, component: str, unit: str, dtype: str) -> int:
    """Stored bytes of a unit."""
    return sum(a.size for a in units(config, component)[unit].values()) * DTYPES[dtype].itemsize


def tree_bytes(tree) -> int:
    """Bytes of arrays, or of ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def without_keys_values(config: ModelConfig, unit: str, leaves: tuple) -> tuple:
    """A DiT block's leaves for an NFE that reuses K and V: None in place of what makes them."""
    paths = units(config, "transformer")[unit]
    return tuple(
        None if p.endswith(UNUSED_WHEN_REUSED) else leaf
        for p, leaf in zip(paths, leaves, strict=True)
    )


@functools.cache
def _structure(config: ModelConfig, component: str, held: frozenset[str]):
    """The structure of a component of which only these units are there, and the paths of its leaves
    in order. Kept: building the VAE's module takes 10 ms, and a picture wants it three times."""
    module = COMPONENTS[component].spec(getattr(config, component))
    for unit in units(config, component).keys() - held:
        setattr(module, unit, None)
    return jax.tree.structure(module), tuple(named_arrays(module))


def assemble(config: ModelConfig, component: str, arrays: dict[str, Any]):
    """A component as its module, from leaves by unit: all of them, or for the VAE one half, the
    other being None."""
    structure, paths = _structure(config, component, frozenset(arrays))
    table = {
        path: leaf
        for unit, leaves in arrays.items()
        for path, leaf in zip(units(config, component)[unit], leaves, strict=True)
    }
    return jax.tree.unflatten(structure, [table[path] for path in paths])
