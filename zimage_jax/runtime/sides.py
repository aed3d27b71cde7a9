"""What LoRAs store beside a model's layers: in host memory, on the device, and together with the
leaves of a unit.

The arrays stay in host memory as long as the LoRAs are in use, also where blocks are read through a
window: they are 1 % of the model at rank 32.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jax import Array

from ..units import tree_bytes
from ..weights import components
from ..weights.adapters import Adapters
from .placement import HOST, Placement
from .reader import Chunk, Leaves, Reader, Source
from .recorder import Recorder

OfPath = Mapping[str, Array]  # path -> array


class Sides:
    """The arrays beside a model's layers. `storage`: of the model with them.

    Page-locked memory belongs to one device: each further device has a copy of what it uses.
    """

    def __init__(self, adapters: Adapters, placement: Placement):
        """Raises what `adapters.arrays` raises."""
        self.storage = adapters.storage
        self._host = placement.put(adapters.arrays(), HOST)
        self._first = placement.each[0]
        self._copies: dict[tuple[str, str, Placement], dict[str, Array]] = {}
        self._lock = threading.Lock()

    @property
    def host_bytes(self) -> int:
        return tree_bytes(self._host) + tree_bytes(list(self._copies.values()))

    def of(self, component: str, name: str, placement: Placement) -> OfPath:
        """The arrays of a unit or a half, in host memory for a device; empty if there are none."""
        of_unit = self._host.get((component, components.unit_of(name)), {})
        found = components.of_half(name, of_unit)
        if placement == self._first or not found:
            return found
        with self._lock:
            key = component, name, placement
            if key not in self._copies:
                arrays = {path: np.asarray(array) for path, array in found.items()}
                self._copies[key] = placement.put(arrays, HOST)
            return self._copies[key]

    def together(self, component: str, name: str, own: Sequence, beside: OfPath) -> Leaves:
        """The leaves of a unit or a half: its own and those beside it, in the module's order."""
        paths = self.storage.without_loras.leaves(component, name)
        leaves = {**dict(zip(paths, own, strict=True)), **beside}
        return tuple(leaves[path] for path in self.storage.leaves(component, name))


class SidedSource:
    """A source of a component's units together with what is beside them."""

    def __init__(self, source: Source, sides: Sides, component: str):
        self._source, self._sides, self._component = source, sides, component

    def open(
        self, order: Sequence[tuple[str, ...]], recorder: Recorder, placement: Placement
    ) -> "SidedReader":
        """A job's reader. Raises UsageError if the window is smaller than a chunk."""
        reader = self._source.open(order, recorder, placement)
        return SidedReader(reader, self._sides, self._component, order, placement)


class SidedReader:
    """A job's reader of a SidedSource."""

    def __init__(
        self,
        reader: Reader,
        sides: Sides,
        component: str,
        order: Sequence[tuple[str, ...]],
        placement: Placement,
    ):
        self._reader, self._sides, self._component = reader, sides, component
        self._order, self._placement = iter(order), placement

    def take(self, *, without_kv: bool = False) -> Chunk:
        sides, component = self._sides, self._component
        chunk = self._reader.take(without_kv=without_kv)
        found = []
        for name, own in zip(next(self._order), chunk, strict=True):
            beside = sides.of(component, name, self._placement)
            leaves = sides.together(component, name, own, beside)
            found.append(
                sides.storage.without_kv(component, name, leaves) if without_kv else leaves
            )
        return tuple(found)

    def used(self) -> None:
        self._reader.used()

    def close(self) -> None:
        self._reader.close()
