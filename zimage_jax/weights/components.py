"""The three models by name, and their units.

A unit is stored in one file: a block, or a part that is no block (stem, embedding table, VAE
decoder, VAE encoder). A unit is moved as one, or a block of the transformer in two halves, which
have names of their own: "layers.3.attention" and "layers.3.feed_forward".
"""

import functools
from typing import Any, TypeVar

import jax

from ..model import control, dit, text_encoder, vae
from ..model.config import ModelConfig
from ..model.layers import named_arrays

COMPONENTS = {"transformer": dit, "text_encoder": text_encoder, "vae": vae}

Leaf = TypeVar("Leaf")


@functools.cache
def spec(config: ModelConfig, component: str) -> Any:
    """A component's module, with a ShapeDtypeStruct for every parameter. The transformer's has those
    of its ControlNet, where the config has one."""
    if component == "transformer" and config.control is not None:
        return control.ControlledDiT(config.transformer, config.control)
    return COMPONENTS[component].spec(getattr(config, component))


def unit_of(path: str) -> str:
    """The unit of a parameter or a half: "layers.3" of "layers.3.attention.to_q.kernel"."""
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


def halves(component: str, unit: str) -> tuple[str, ...]:
    """The names of a unit's halves in the order they run; none where it is moved as one."""
    is_halved = "." in unit and COMPONENTS[component] is dit
    return tuple(f"{unit}.{half}" for half in dit.HALVES) if is_halved else ()


def half_of(name: str) -> str | None:
    """A name in dit.HALVES; None for the name of a unit."""
    half = name.removeprefix(unit_of(name)).removeprefix(".")
    return half or None


def has_attention(name: str) -> bool:
    """Whether a block, or a half, has the attention."""
    return half_of(name) != "feed_forward"


def of_half(name: str, leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """The leaves, by path, of a half or a unit, out of those of its unit."""
    half = half_of(name)
    if half is None:
        return leaves
    unit = unit_of(name) + "."
    parts = dit.HALVES[half]
    return {p: leaf for p, leaf in leaves.items() if p.removeprefix(unit).split(".")[0] in parts}
