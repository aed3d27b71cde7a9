"""Models read from other programs' files as they are, without a native checkpoint on disk."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DamagedError, ForeignError, UsageError, ZImageError
from ..files import kind_of, printable
from ..model.config import PRESETS, ModelConfig
from . import components, formats, origins
from .checkpoint import ALIGNMENT, CONTROL, Checkpoint, ModelFiles, stored_units
from .components import COMPONENTS
from .origins import Origins
from .sources import Component, Source, fits, open_control_file, open_file, open_source

# subfolders of ComfyUI's models/; the second is the older name
_COMFYUI = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}
_SUFFIXES = (".safetensors", ".gguf")
_TOKENIZER = "tokenizer.json"


class InPlace:
    """A model or a ControlNet in PyTorch or GGUF files, read like a `Checkpoint`.

    Matrices that the files have in an int8 of ours stay so, all else is bfloat16. Every unit is
    made anew when it is read: transposed, dequantised, and refused if it has NaN or infinity. The
    files have no checksums; one that was changed since it was opened is refused.

    Raises ConversionError if the tensors are not exactly those of the configured model.
    """

    is_in_place = True

    def __init__(self, path: Path, source: Source):
        source.check()
        source.read_tokenizer()
        self.path, self.config, self._tokenizer = path, source.config, source.tokenizer
        self.remarks = source.remarks()
        self._origins = {c: Origins(source, c) for c in source.components}
        self.storage = origins.storage(source, self._origins)
        self._units = stored_units(self.storage, source.kind)
        self._identity = source.identity()

    def tokenizer(self) -> Path:
        """Path of the tokenizer.json."""
        assert self._tokenizer is not None, "a ControlNet has no tokenizer"
        return self._tokenizer

    def units(self, component: str) -> list[str]:
        """A component's units, in the model's order."""
        return [unit for of, unit in self._units if of == component]

    def nbytes(self, component: str, unit: str | None = None) -> int:
        """Bytes of a unit, or of a whole component, in memory."""
        units = self.units(component) if unit is None else [unit]
        return self.storage.nbytes(component, *units)

    def parameters(self, component: str) -> int:
        """Number of a component's parameters."""
        of = components.units(self.config, component)
        return sum(leaf.size for unit in self.units(component) for leaf in of[unit].values())

    def buffer_bytes(self, component: str, unit: str) -> int:
        """Bytes of the smallest buffer that `read` takes for a unit or a half."""
        leaves = self.storage.leaves(component, unit).values()
        return sum(-(-_nbytes(leaf) // ALIGNMENT) * ALIGNMENT for leaf in leaves) + ALIGNMENT

    def read(
        self, component: str, unit: str, buffer: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Path -> array of a unit, or of half a block, as views of one aligned buffer.

        `buffer`: as of Checkpoint.read. Raises DamagedError if a file was changed, ConversionError
        for NaN and infinity.
        """
        self._refuse_changed(component, components.unit_of(unit))
        if buffer is None:
            buffer = np.empty(self.buffer_bytes(component, unit), np.uint8)
        place, arrays = -buffer.ctypes.data % ALIGNMENT, {}
        for path, leaf in self.storage.leaves(component, unit).items():
            data = buffer[place : place + _nbytes(leaf)]
            arrays[path] = data.view(leaf.dtype).reshape(leaf.shape)
            place += -(-_nbytes(leaf) // ALIGNMENT) * ALIGNMENT
        for path, encoding in self.storage.parameters(component, unit).items():
            if encoding is None:
                _fill(arrays[path], self._origins[component].runs(path, arrays[path].dtype))
                continue
            tree = self._origins[component].encoded(path, encoding)
            for name, leaf in formats.leaves_of(path, tree):
                arrays[name][...] = leaf
        return arrays

    def _refuse_changed(self, component: str, unit: str) -> None:
        for file in self._origins[component].files(unit):
            _, nbytes, changed = self._identity[file]
            if kind_of(file, DamagedError) == "file":
                found = file.stat()
                if (found.st_size, found.st_mtime_ns) == (nbytes, changed):
                    continue
            raise DamagedError(f"{file}: not the file that was opened; open the model again")


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _fill(array: np.ndarray, runs: Iterator[np.ndarray]) -> None:
    first = 0
    for run in runs:
        array[first : first + len(run)] = run
        first += len(run)


# -- opening ---------------------------------------------------------------------------------------


def open_model(path: str | Path) -> ModelFiles:
    """A native checkpoint, or other programs' files, which are read in place.

    `path`: a native checkpoint; a folder in diffusers layout; ComfyUI's folder, or its models
    folder, if it has one of each of Z-Image's models; or files separated by commas, in any order:
    the three models, tokenizer.json, and instead of some of them a folder in diffusers layout. Raises
    UsageError where it is not clear which files are meant, CheckpointError and ConversionError.
    """
    whole = Path(path)
    if "," in str(path) and not kind_of(whole):
        return _of_dit(_listed([Path(part.strip()) for part in str(path).split(",")]))
    if kind_of(whole / "manifest", ForeignError) or kind_of(whole, ForeignError) != "folder":
        return Checkpoint(whole)  # which says what is wrong
    if kind_of(whole / "model_index.json") or kind_of(whole / "transformer" / "config.json"):
        return InPlace(whole, open_source(whole, {}, None, None))
    for models in (whole, whole / "models"):
        if any(kind_of(models / name) == "folder" for name in _COMFYUI["transformer"]):
            return _of_dit(_comfyui(whole, models))
    return Checkpoint(whole)


def open_control(path: str | Path, config: ModelConfig) -> ModelFiles:
    """A ControlNet: a native one, or its authors' file, which is read in place.

    `config`: of the model that it controls. Raises CheckpointError and ConversionError.
    """
    path = Path(path)
    if kind_of(path, ForeignError) == "file":
        return InPlace(path, open_control_file(path, config))
    return Checkpoint(path, CONTROL)


def _of_dit(source: Source) -> InPlace:
    """The model, named by its transformer's file."""
    return InPlace(source.components["transformer"].files[0], source)


def _listed(paths: list[Path]) -> Source:
    """The source of files, and perhaps a folder in diffusers layout."""
    folder, tokenizer = None, None
    files: dict[str, Path] = {}
    for path in paths:
        kind = kind_of(path)
        if not kind:
            raise UsageError(f"--model: {printable(path, 300)}: no such file or folder")
        if kind == "folder":
            if folder is not None:
                raise UsageError(f"--model: two folders, {folder} and {path}; expected one at most")
            folder = path
        elif path.suffix == ".json":
            tokenizer = path
        else:
            for component in _components(path):
                if component in files:
                    raise UsageError(
                        f"--model: two files of the {component.replace('_', ' ')}: "
                        f"{files[component]} and {path}"
                    )
                files[component] = path
    _refuse_missing(folder, files, tokenizer)
    return open_source(folder, files, None, tokenizer)


def _refuse_missing(folder: Path | None, files: dict[str, Path], tokenizer: Path | None) -> None:
    if folder is not None:
        return
    missing = [c.replace("_", " ") for c in COMPONENTS if c not in files]
    missing += [] if tokenizer else [_TOKENIZER]
    if missing:
        raise UsageError(
            f"--model: no file for {', '.join(missing)}; expected the three models and "
            f"{_TOKENIZER} (of Tongyi-MAI/Z-Image-Turbo), separated by commas"
        )


def _components(path: Path) -> list[str]:
    """The components that a file has. Raises ForeignError if it has none of Z-Image."""
    found, faults = [], []
    for component in COMPONENTS:
        try:
            open_file(component, path)
            found.append(component)
        except ForeignError as fault:
            faults.append(fault)
    if not found:
        what = re.sub(r".*; ", "", str(faults[0]))
        raise ForeignError(f"{path}: none of Z-Image's models; {what}")
    return found


def _comfyui(root: Path, models: Path) -> Source:
    """The source of ComfyUI's folder, if it has one file of each."""
    found = {c: _fitting(c, [models / name for name in names]) for c, names in _COMFYUI.items()}
    for component, files in found.items():
        if len(files) == 1:
            continue
        where = f"{models}/{_COMFYUI[component][0]}"
        what = f"Z-Image's {component.replace('_', ' ')}"
        names = ", ".join(printable(f.name) for f in files[:4]) or "no file"
        raise UsageError(
            f"--model {root}: expected one file of {what} in {where}, found {names}; name the "
            "files, separated by commas"
        )
    places = [models / name for names in _COMFYUI.values() for name in names]
    tokenizers = [place / _TOKENIZER for place in (root, models, *places)]
    tokenizer = next((t for t in tokenizers if kind_of(t) == "file"), None)
    if tokenizer is None:
        raise UsageError(
            f"--model {root}: no {_TOKENIZER}, which ComfyUI's files lack; put that of "
            f"Tongyi-MAI/Z-Image-Turbo into {models}/text_encoders"
        )
    return open_source(None, {c: files[0] for c, files in found.items()}, None, tokenizer)


def _fitting(component: str, folders: list[Path]) -> list[Path]:
    """The files in these folders that have the component in the published shapes."""
    files = [f for folder in folders for f in sorted(folder.rglob("*")) if f.suffix in _SUFFIXES]
    found = []
    for file in files:
        try:
            opened: Component = open_file(component, file)
        except ZImageError:
            continue  # another model's, or damaged: not the one that is looked for
        if fits(PRESETS["turbo"], opened):
            found.append(file)
    return found
