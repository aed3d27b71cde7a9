"""The form's values, and the arguments of ZImage.generate that they are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import checks
from ...model.config import ModelConfig
from ...planning.plan import Memory

DRAWN = ("prompt", "negative_prompt", "width", "height", "steps", "guidance", "sampler", "strength")
SEEDS = ("count", "seed")
LORAS = ("loras", "lora_weight")  # names, and the weight that all of them have
LARGEST_WEIGHT = 2.0
SWITCHES = ("text_encoder", "low_vram", "chunks", "vae_tile")
FIELDS = (*DRAWN, *LORAS, *SEEDS, *SWITCHES)


def defaults(config: ModelConfig, memory: Memory) -> dict[str, Any]:
    """What the form has at first: the model's own settings, and the server's memory options."""
    side = config.vae.sample_size
    return {
        "prompt": "",
        "negative_prompt": "",
        "width": side,
        "height": side,
        "steps": config.defaults.steps,
        "guidance": config.defaults.guidance,
        "sampler": "euler",
        "strength": 0.6,
        "loras": [],
        "lora_weight": 1.0,
        "count": 1,
        "seed": "-1",
        "text_encoder": memory.text_encoder == "staged",
        "low_vram": memory.low_vram,
        "chunks": memory.chunks or 0,
        "vae_tile": memory.vae_tile or 0,
    }


def arguments(values: Mapping[str, Any], memory: Memory, *, has_picture: bool) -> dict[str, Any]:
    """A job's arguments as JSON, without seed and pictures. `memory`: the server's options."""
    said = {name: values[name] for name in DRAWN}
    if not has_picture:
        del said["strength"]
    said |= {name: whole(values[name]) for name in ("width", "height", "steps")}
    if values["loras"]:
        weight = float(values["lora_weight"])
        said["lora"] = [{"name": name, "weight": weight} for name in values["loras"]]
    wanted = _switched(memory, values)
    if wanted != memory:
        said["memory"] = _to_json(wanted)
    return said


def whole(value: Any) -> Any:
    """Sliders may send 512.0. What is no number is refused later."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _switched(memory: Memory, values: Mapping[str, Any]) -> Memory:
    """Raises UsageError for switches that contradict what the server was started with."""
    is_staged = memory.text_encoder == "staged"
    if values["text_encoder"] != is_staged:
        staged = "staged" if values["text_encoder"] else "auto"
        memory = dataclasses.replace(memory, text_encoder=staged)
    chunks, tile = (
        checks.whole(name, whole(values[name] or 0), 0) for name in ("chunks", "vae_tile")
    )
    if chunks != (memory.chunks or 0):
        memory = dataclasses.replace(memory, chunks=chunks or None, max_chunk_bytes=None)
    return dataclasses.replace(memory, low_vram=bool(values["low_vram"]), vae_tile=tile or None)


def _to_json(memory: Memory) -> dict[str, Any]:
    found = {
        f.name: getattr(memory, f.name)
        for f in dataclasses.fields(Memory)
        if getattr(memory, f.name) != f.default
    }
    if "pins" in found:
        found["pins"] = [list(pin) for pin in found["pins"]]
    return found


def of_job(given: Mapping[str, Any], seed: int, first: Mapping[str, Any]) -> dict[str, Any]:
    """The form of a job's arguments: fields, and under "rest" what the form has no field for.

    `first`: the form's defaults.
    """
    rest = dict(given)
    memory = rest.pop("memory", {})
    fields = {name: rest.pop(name, first[name]) for name in DRAWN}
    fields |= {name: first[name] for name in LORAS}
    lora = rest.pop("lora", [])
    weights = {of.get("weight", 1.0) for of in lora}
    if len(weights) == 1 and abs(min(weights)) <= LARGEST_WEIGHT:
        fields |= {"loras": [of["name"] for of in lora], "lora_weight": min(weights)}
    elif lora:
        rest["lora"] = lora
    fields |= {"count": 1, "seed": str(seed)}
    fields |= {
        "text_encoder": memory.get("text_encoder", "auto") == "staged"
        if memory
        else first["text_encoder"],
        "low_vram": memory.get("low_vram", first["low_vram"]),
        "chunks": memory.get("chunks") or first["chunks"],
        "vae_tile": memory.get("vae_tile") or first["vae_tile"],
    }
    return fields | {"rest": {k: v for k, v in rest.items() if k not in OF_PICTURE}}


# what belongs to a picture that is no longer there
OF_PICTURE = ("image", "mask", "fit", "mask_blur", "mask_grow", "crop_mask", "differential")


def of_metadata(metadata: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The form of one of our pictures."""
    of_image = metadata.get("image", {})
    names = (
        *("prompt", "negative_prompt", "width", "height", "steps", "guidance", "noise", "sampler"),
        *("sigmas", "shift", "cfg_normalization", "cfg_truncation", "region", "attention", "kv"),
        *("prompt_weights", "text_weight", "variance"),
    )
    given = {name: metadata[name] for name in names if metadata.get(name) is not None}
    if "lora" in metadata:
        given["lora"] = [
            {"name": Path(of["name"]).stem, "weight": of["weight"]} for of in metadata["lora"]
        ]
    if "strength" in of_image:
        given["strength"] = of_image["strength"]
    return of_job(given, metadata["seed"], first)
