"""Z-Image-Turbo in JAX, for GPUs far smaller than the model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        ConfigError,
        ConversionError,
        DamagedError,
        DownloadError,
        EngineError,
        ForeignError,
        NonFiniteError,
        OutOfMemoryError,
        OutputError,
        UsageError,
        ZImageError,
    )
    from .model.kv import KVPolicy
    from .pipeline.job import Picture, Result, Step, ZImageWarning
    from .pipeline.pipeline import ZImage
    from .pipeline.request import Planned, Request, Started
    from .planning.plan import Memory, Plan
    from .pool import ZImagePool
    from .process import ZImageProcess

    __version__: str

# name -> module, imported on first use: importing JAX takes a second, and a command checks its
# options before
_MODULES = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ConversionError": "errors",
    "DamagedError": "errors",
    "DownloadError": "errors",
    "EngineError": "errors",
    "ForeignError": "errors",
    "KVPolicy": "model.kv",
    "Memory": "planning.plan",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "OutputError": "errors",
    "Picture": "pipeline.job",
    "Plan": "planning.plan",
    "Planned": "pipeline.request",
    "Request": "pipeline.request",
    "Result": "pipeline.job",
    "Started": "pipeline.request",
    "Step": "pipeline.job",
    "UsageError": "errors",
    "ZImage": "pipeline.pipeline",
    "ZImageCluster": "cluster",
    "ZImageError": "errors",
    "ZImagePool": "pool",
    "ZImageProcess": "process",
    "ZImageWarning": "pipeline.job",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "DamagedError",
    "DownloadError",
    "EngineError",
    "ForeignError",
    "KVPolicy",
    "Memory",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "Picture",
    "Plan",
    "Planned",
    "Request",
    "Result",
    "Started",
    "Step",
    "UsageError",
    "ZImage",
    "ZImageCluster",
    "ZImageError",
    "ZImagePool",
    "ZImageProcess",
    "ZImageWarning",
    "__version__",
]


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed package's version; for a checkout on the path, its pyproject.toml's."""
    import importlib.metadata
    import tomllib
    from pathlib import Path

    try:
        return importlib.metadata.version("zimage_jax")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text("utf-8"))["project"]["version"]
