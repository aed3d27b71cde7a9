"""The models that cells draw with: the tiny one of the package, and random ones of full width that are
written where reading is fastest."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scripts.bench.full_size import write_random
from zimage_jax.model.config import TURBO, ModelConfig

BLOCKS = 6  # of the short model: 2 GB beside the embedding table


def _short() -> ModelConfig:
    return replace(
        TURBO,
        transformer=replace(TURBO.transformer, n_layers=BLOCKS),
        text_encoder=replace(TURBO.text_encoder, num_hidden_layers=3),
    )


CONFIGS: dict[str, Callable[[], ModelConfig]] = {"full": lambda: TURBO, "short": _short}


def _written(name: str) -> Callable[[dict], Path]:
    return lambda cell: Path(cell["folder"]) / f"{name}-random"


def _tiny(cell: dict) -> Path:
    from zimage_jax.pipeline.pipeline import TINY

    return TINY


# a model's folder, from a cell
FOLDERS: dict[str, Callable[[dict], Path]] = {
    "tiny": _tiny,
    "full": _written("full"),
    "short": _written("short"),
}


def write(cell: dict) -> dict:
    """A random model, where it is not there yet."""
    folder = FOLDERS[cell["model"]](cell)
    if folder.exists():
        return {"seconds": 0.0, "nbytes": 0}
    began = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_random(folder, CONFIGS[cell["model"]]())
    nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = time.perf_counter() - began
    return {"nbytes": nbytes, "seconds": round(seconds, 2), "bytes_per_sec": nbytes / seconds}
