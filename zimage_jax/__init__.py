"""Z-Image-Turbo in JAX, for GPUs far smaller than the model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import ZImageError
    from .model.kv import KVPolicy
    from .pipeline.job import Picture, Result, Step, ZImageWarning
    from .pipeline.pipeline import ZImage
    from .planning.planner import Memory, Plan

__all__ = [
    "KVPolicy",
    "Memory",
    "Picture",
    "Plan",
    "Result",
    "Step",
    "ZImage",
    "ZImageError",
    "ZImageWarning",
]


def __getattr__(name: str):
    """The public names on first use: a command checks its words before JAX takes its second to
    import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import errors
    from .pipeline import pipeline

    return getattr(pipeline, name, None) or getattr(errors, name)
