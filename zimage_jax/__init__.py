"""Z-Image-Turbo in JAX, for GPUs far smaller than the model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import ZImageError
    from .pipeline import Picture, Result, Step, ZImage, ZImageWarning

__all__ = ["Picture", "Result", "Step", "ZImage", "ZImageError", "ZImageWarning"]


def __getattr__(name: str):
    """The public names on first use: a command checks its words before JAX takes its second to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import errors, pipeline

    return getattr(pipeline, name, None) or getattr(errors, name)
