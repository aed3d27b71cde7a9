"""The three models by name, and the units that their parameters are stored and moved in: a block, or what is no block."""

import functools
from typing import Any, TypeVar

import jax

from ..model import dit, text_encoder, vae
from ..model.config import ModelConfig
from ..model.layers import named_arrays

COMPONENTS = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}

Leaf = TypeVar("Leaf")


@functools.cache
def spec(config: ModelConfig, component: str):
    """The module of a component, with a ShapeDtypeStruct for every parameter."""
    return COMPONENTS[component].spec(getattr(config, component))


def unit_of(path: str) -> str:
    """The unit of a parameter: "layers.3" of "layers.3.attention.to_q.kernel"."""
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def by_unit(leaves: dict[str, Leaf]) -> dict[str, dict[str, Leaf]]:
    """Unit -> path -> leaf, in the order of the model, which is the order of a unit's leaves."""
    grouped: dict[str, dict[str, Leaf]] = {}
    for path, leaf in leaves.items():
        grouped.setdefault(unit_of(path), {})[path] = leaf
    return grouped


@functools.cache
def units(config: ModelConfig, component: str) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Unit -> path -> parameter, as the model has them, whatever they are stored as."""
    return by_unit(named_arrays(spec(config, component)))


def child(module: Any, unit: str) -> Any:
    """The part of a component's module that is a unit, as "layers.3" or "stem"."""
    for name in unit.split("."):
        module = module[int(name)] if name.isdecimal() else getattr(module, name)
    return module
