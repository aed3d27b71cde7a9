"""The three models by name, and their units.

A unit is stored in one file and moved as one: a block, or a part that is no block (stem, embedding
table, VAE decoder, VAE encoder).
"""

import functools
from typing import Any, TypeVar

import jax

from ..model import dit, text_encoder, vae
from ..model.config import ModelConfig
from ..model.layers import named_arrays

COMPONENTS = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}

Leaf = TypeVar("Leaf")


@functools.cache
def spec(config: ModelConfig, component: str) -> Any:
    """A component's module, with a ShapeDtypeStruct for every parameter."""
    return COMPONENTS[component].spec(getattr(config, component))


def unit_of(path: str) -> str:
    """The unit of a parameter: "layers.3" of "layers.3.attention.to_q.kernel"."""
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def by_unit(leaves: dict[str, Leaf]) -> dict[str, dict[str, Leaf]]:
    """Unit -> path -> leaf, in the order of `leaves`."""
    grouped: dict[str, dict[str, Leaf]] = {}
    for path, leaf in leaves.items():
        grouped.setdefault(unit_of(path), {})[path] = leaf
    return grouped


@functools.cache
def units(config: ModelConfig, component: str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Unit -> path -> parameter as the model declares it (float32), in the model's order. The
    stored leaves are `Storage.leaves`."""
    return by_unit(named_arrays(spec(config, component)))


def child(module: Any, unit: str) -> Any:
    """The submodule of a component's module that is the unit, for example "layers.3" or "stem"."""
    for name in unit.split("."):
        module = module[int(name)] if name.isdecimal() else getattr(module, name)
    return module
