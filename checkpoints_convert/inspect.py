"""What a safetensors file, a diffusers folder or a native checkpoint holds, from headers alone."""

import math
from pathlib import Path

from zimage_jax.errors import ForeignError, ZImageError
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.components import COMPONENTS

from . import sources

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}


def inspect(path: Path) -> dict:
    """{"kind": …, "components": {name: {layout, tensors, parameters, bytes, dtypes}}, "notes":
    {…}}"""
    if (path / "manifest").exists():
        return _native(Checkpoint(path))
    if path.is_dir():
        components = {}
        for name in sources.COMPONENTS:
            if (path / name).is_dir():
                components[name] = _describe(sources.open_component_folder(name, path / name))
        if not components:
            raise ForeignError(
                f"{path}: neither a native checkpoint nor a folder with {', '.join(sources.COMPONENTS)}"
            )
        notes = {
            "tokenizer": "present"
            if (path / "tokenizer" / "tokenizer.json").is_file()
            else "missing"
        }
        return {"kind": "diffusers folder", "components": components, "notes": notes}
    for name in sources.COMPONENTS:
        try:
            return {
                "kind": "single file",
                "components": {name: _describe(sources.open_file(name, path))},
            }
        except ForeignError:
            continue
    header = sources.read_header(path)
    try:
        sources.open_file("transformer", path)
    except ZImageError as fault:
        notes = {"note": str(fault)}
    return {
        "kind": "safetensors file",
        "components": {"unknown": _summary("-", header)},
        "notes": notes,
    }


def _describe(component: sources.Component) -> dict:
    return _summary(component.layout, list(component.tensors.values()))


def _summary(layout: str, tensors: list[sources.Tensor]) -> dict:
    return {
        "layout": layout,
        "tensors": len(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "bytes": sum(math.prod(t.shape) * _BYTES.get(t.dtype, 1) for t in tensors),
        "dtypes": sorted({t.dtype for t in tensors}),
    }


def _native(checkpoint: Checkpoint) -> dict:
    components = {
        name: {
            "layout": "native",
            "tensors": len(checkpoint.records(name)),
            "parameters": checkpoint.parameters(name),
            "bytes": checkpoint.nbytes(name),
            "dtypes": sorted({record.dtype for record in checkpoint.records(name).values()}),
        }
        for name in COMPONENTS
    }
    notes = {
        "units": ", ".join(f"{len(checkpoint.units(name))} of {name}" for name in COMPONENTS),
        "source": ", ".join(
            f"{c} from {layout}" for c, layout in checkpoint.provenance.get("layouts", {}).items()
        ),
    }
    return {
        "kind": "native checkpoint",
        "components": components,
        "notes": {k: v for k, v in notes.items() if v},
    }
