"""A model with a ControlNet: the parameters of both, each in its own files and format."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..model.config import ModelConfig
from ..model.control import is_of_branch
from .checkpoint import CONTROL, ModelFiles, stored_units
from .formats import Storage

_ALIKE = ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels")


class Controlled:
    """`model` with the units of `control`. Raises CheckpointError if the ControlNet is another
    model's."""

    def __init__(self, model: ModelFiles, control: ModelFiles):
        ours, theirs = model.config.transformer, control.config.transformer
        for name in _ALIKE:
            own, other = getattr(ours, name), getattr(theirs, name)
            if own != other:
                raise CheckpointError(
                    f"{control.path}: made for a transformer of {name} {other}, and that of "
                    f"{model.path} has {own}; give the ControlNet of this model"
                )
        self._model, self._control = model, control
        self.path, self.remarks, self.is_in_place = model.path, model.remarks, model.is_in_place
        self.config = replace(model.config, control=control.config.control)
        self.storage = _storage(self.config, model.storage, control.storage)

    def tokenizer(self) -> Path:
        """The model's."""
        return self._model.tokenizer()

    def _of(self, unit: str) -> ModelFiles:
        return self._control if is_of_branch(unit) else self._model

    def units(self, component: str) -> list[str]:
        """A component's units, in the model's order."""
        return self.storage.units(component)

    def nbytes(self, component: str, unit: str | None = None) -> int:
        """Bytes of a unit, or of a whole component, in memory."""
        if unit is not None:
            return self._of(unit).nbytes(component, unit)
        return self._model.nbytes(component) + self._control.nbytes(component)

    def parameters(self, component: str) -> int:
        """Number of a component's parameters."""
        return self._model.parameters(component) + self._control.parameters(component)

    def buffer_bytes(self, component: str, unit: str) -> int:
        """Bytes of the smallest buffer that `read` takes for a unit or a half."""
        return self._of(unit).buffer_bytes(component, unit)

    def read(
        self, component: str, unit: str, buffer: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """As of the files that have the unit."""
        return self._of(unit).read(component, unit, buffer)


def _storage(config: ModelConfig, own: Storage, of: Storage) -> Storage:
    """The ControlNet's parameters have rows of their own, because its patterns might match the
    model's, and the model's those of the ControlNet."""
    rows = [
        (f"{component}.{path}", of.of(component, path))
        for component, unit in stored_units(of, CONTROL)
        for path in of.parameters(component, unit)
        if of.of(component, path) != of.format
    ]
    special = (*own.special, ("transformer.control_*", of.format), *rows)
    return Storage(config, own.format, special)
