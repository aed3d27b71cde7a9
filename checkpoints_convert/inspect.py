"""The contents of a safetensors or GGUF file, a LoRA, a diffusers folder or a native checkpoint, from headers."""

import math
from pathlib import Path

from zimage_jax.errors import ConversionError, ForeignError
from zimage_jax.files import kind_of, printable
from zimage_jax.model.config import TURBO
from zimage_jax.units import tree_bytes
from zimage_jax.weights import sources
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.components import COMPONENTS
from zimage_jax.weights.formats import Storage
from zimage_jax.weights.lora import open_lora
from zimage_jax.weights.search import TINY
from zimage_jax.weights.tensors import Header, Tensor


def inspect(path: Path) -> dict:
    """{"kind": …, "components": {name: {layout, tensors, parameters, bytes, dtypes}}, "notes": {…}}

    Raises ForeignError, CheckpointError or ConversionError if `path` is none of the three kinds or
    is damaged.
    """
    if kind_of(path / "manifest", ForeignError):
        return _native(Checkpoint(path, kind=None))
    kind = kind_of(path, ForeignError)
    if kind == "folder":
        components = {}
        for name in sources.COMPONENTS:
            if kind_of(path / name) == "folder":
                components[name] = _describe(sources.open_component_folder(name, path / name))
        if not components:
            raise ForeignError(
                f"{path}: neither a native checkpoint nor a folder with "
                f"{', '.join(sources.COMPONENTS)}"
            )
        tokenizer = kind_of(path / "tokenizer" / "tokenizer.json")
        notes = {"tokenizer": "present" if tokenizer == "file" else "missing"}
        return {"kind": "diffusers folder", "components": components, "notes": notes}
    header, components, faults = sources.read_header(path), {}, []
    if found := _lora(path):
        return found
    for name in sources.COMPONENTS:
        try:
            components[name] = _describe(sources.open_file(name, path))
        except ForeignError as fault:
            faults.append(str(fault))
    if components:
        return {"kind": "single file", "components": components, "notes": _named(header)}
    return {
        "kind": "file",
        "components": {"unknown": _summary("-", header.tensors)},
        "notes": {"note": faults[0]},
    }


def _named(header: Header) -> dict[str, str]:
    """What a header calls its model."""
    names = [header.metadata[key] for key in sources.NAMES if header.metadata.get(key)]
    return {"name": printable(names[0])} if names else {}


def _lora(path: Path) -> dict | None:
    """What a LoRA changes of the published model, or of the tiny one; None if the file is none."""
    try:
        try:
            found = open_lora(path, TURBO).describe()
        except ConversionError as fault:  # its shapes are another model's
            try:
                found = open_lora(path, Checkpoint(TINY).config).describe()
            except ConversionError:
                raise fault from None
    except ForeignError:
        return None
    notes = {
        "spelling": found["spelling"],
        "kinds": ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items()),
        "ranks": ", ".join(found["ranks"]),
        "targets": ", ".join(f"{name} x {count}" for name, count in found["targets"].items()),
        "trigger words": printable(", ".join(found["trigger_words"])),
        "not used": ", ".join(f"{printable(k)} ({why})" for k, why in found["unused"].items()),
    }
    return {
        "kind": "LoRA",
        "components": {"lora": _summary("-", sources.read_header(path).tensors)},
        "notes": {key: value for key, value in notes.items() if value},
        "lora": found,
    }


def _describe(component: sources.Component) -> dict:
    return _summary(component.layout, list(component.tensors.values()))


def _summary(layout: str, tensors: list[Tensor]) -> dict:
    return {
        "layout": layout,
        "tensors": len(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "dtypes": sorted({t.kind for t in tensors}),
    }


def _formats(storage: Storage, component: str, units: list[str]) -> dict[str, int]:
    """Format -> the bytes of a component's parameters that are stored so."""
    found: dict[str, int] = {}
    for unit in units:
        leaves = storage.leaves(component, unit)
        for path in storage.parameters(component, unit):
            own = [leaf for name, leaf in leaves.items() if f"{name}.".startswith(f"{path}.")]
            format_name = storage.of(component, path).name
            found[format_name] = found.get(format_name, 0) + tree_bytes(own)
    return dict(sorted(found.items()))


def _native(checkpoint: Checkpoint) -> dict:
    components = {
        name: {
            "layout": "native",
            "tensors": len(checkpoint.records(name)),
            "parameters": checkpoint.parameters(name),
            "bytes": checkpoint.nbytes(name),
            "dtypes": sorted({record.dtype for record in checkpoint.records(name).values()}),
            "formats": _formats(checkpoint.storage, name, checkpoint.units(name)),
        }
        for name in COMPONENTS
        if checkpoint.units(name)
    }
    if checkpoint.config.control is not None:
        control = checkpoint.config.control
        notes = {
            "units": f"{len(checkpoint.units('transformer'))}",
            "control": f"{control.layers} blocks, {control.in_channels} channels, refiner "
            f"{control.refiner}",
        }
        return {"kind": "native ControlNet", "components": components, "notes": notes}
    layouts, defaults = checkpoint.provenance.get("layouts"), checkpoint.config.defaults
    if not isinstance(layouts, dict):  # the checkpoint was not converted (the tiny model)
        layouts = {}
    notes = {
        "units": ", ".join(f"{len(checkpoint.units(name))} of {name}" for name in COMPONENTS),
        "source": ", ".join(
            f"{printable(c)} from {printable(layout)}" for c, layout in layouts.items()
        ),
        "defaults": f"{defaults.steps} steps, guidance {defaults.guidance:g}",
    }
    return {
        "kind": "native checkpoint",
        "components": components,
        "notes": {k: v for k, v in notes.items() if v},
    }
