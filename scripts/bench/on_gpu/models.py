"""The models that cells draw with: the tiny one of the package, and random ones of full width that are
written where reading is fastest."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoints_convert.convert import reencode
from scripts.bench.full_size import write_random
from zimage_jax.model.config import TURBO, ModelConfig
from zimage_jax.weights.checkpoint import Checkpoint

BLOCKS = 6  # of the short model: 2 GB beside the embedding table


def _short() -> ModelConfig:
    return replace(
        TURBO,
        transformer=replace(TURBO.transformer, n_layers=BLOCKS),
        text_encoder=replace(TURBO.text_encoder, num_hidden_layers=3),
    )


CONFIGS: dict[str, Callable[[], ModelConfig]] = {"full": lambda: TURBO, "short": _short}


def folder_of(cell: dict) -> Path:
    """Of a cell's model: "tiny", a name in CONFIGS, or one of these and a format as in
    "full-lossless"."""
    from zimage_jax.weights.search import TINY

    name = cell["model"]
    return TINY if name == "tiny" else Path(cell["folder"]) / f"{name}-random"


def write(cell: dict) -> dict:
    """A random model, where it is not there yet."""
    name, _, form = cell["model"].partition("-")
    folder = folder_of(cell)
    if folder.exists():
        return {"seconds": 0.0, "nbytes": 0}
    if form:
        write({**cell, "model": name})
    began = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if form:
        reencode(Checkpoint(folder_of({**cell, "model": name})), folder, form, quiet=True)
    else:
        write_random(folder, CONFIGS[name]())
    nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = time.perf_counter() - began
    return {"nbytes": nbytes, "seconds": round(seconds, 2), "bytes_per_sec": nbytes / seconds}
