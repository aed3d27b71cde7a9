"""A picture larger than the model draws, as overlapping regions that are drawn together.

Every NFE computes all regions, each like a picture of its own, and then blends their latents where
they overlap, so that all continue from one canvas. (MultiDiffusion, arXiv 2302.08113)

Axes: B pictures, R regions of a picture, H, W rows and columns of the canvas in latents, h, w those
of a region, C channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float


@dataclass(frozen=True)
class Regions:
    """Where the regions of one picture are: rows of regions from the top, each from the left."""

    height: int  # of the canvas, in latents
    width: int
    side: int  # of a region; less where the canvas is smaller

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        return min(self.side, self.height), min(self.side, self.width)

    @property
    def corners(self) -> list[tuple[int, int]]:
        h, w = self.shape
        return [(top, left) for top in starts(self.height, h) for left in starts(self.width, w)]

    @property
    def count(self) -> int:
        return len(self.corners)

    def split(self, canvas: Any) -> Any:
        """The regions of every picture, picture by picture: [B H W C] to [B R h w C], flat."""
        h, w = self.shape
        parts = [canvas[:, top : top + h, left : left + w] for top, left in self.corners]
        xp = np if isinstance(canvas, np.ndarray) else jnp
        return xp.stack(parts, 1).reshape(-1, h, w, canvas.shape[-1])

    def blend(self, parts: Float[Array, "BR h w C"]) -> Float[Array, "B H W C"]:
        """The canvas: the weighted mean of the regions that overlap."""
        (h, w), corners = self.shape, self.corners
        parts = lax.optimization_barrier(parts)  # as if each region had been drawn alone
        of_picture = parts.reshape(-1, len(corners), h, w, parts.shape[-1])
        canvas = jnp.zeros((of_picture.shape[0], self.height, self.width, parts.shape[-1]))
        for index, ((top, left), weights) in enumerate(zip(corners, self._weights(), strict=True)):
            added = of_picture[:, index] * weights
            canvas = canvas.at[:, top : top + h, left : left + w].add(added)
        return lax.optimization_barrier(canvas)

    def _weights(self) -> list[Float[np.ndarray, "1 h w 1"]]:
        """The share of each region in its places; together they are 1 everywhere."""
        h, w = self.shape
        total, found = np.zeros((self.height, self.width)), []
        for top, left in self.corners:
            of_rows = ramp(h, top > 0, top + h < self.height)
            of_columns = ramp(w, left > 0, left + w < self.width)
            found.append(np.outer(of_rows, of_columns))
            total[top : top + h, left : left + w] += found[-1]
        return [
            (part / total[top : top + h, left : left + w]).astype(np.float32)[None, :, :, None]
            for part, (top, left) in zip(found, self.corners, strict=True)
        ]


def starts(length: int, side: int) -> list[int]:
    """Even starts of spans of `side` latents, which overlap by a quarter or more."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (side - side // 4)) + 1
    return [2 * round(at / 2) for at in np.linspace(0, length - side, count)]


def ramp(side: int, falls_before: bool, falls_after: bool) -> Float[np.ndarray, "side"]:
    """Weights of a span: they fall over a quarter of it towards a neighbour.

    The outermost latents hardly count: they look like the border of a picture, and show as a seam
    (scripts/results/pictures.md).
    """
    weights, edge = np.ones(side), max(1, side // 4)
    slope = np.clip((np.arange(edge) - 0.5) / max(1, edge - 1), 0.01, 1)
    if falls_before:
        weights[:edge] *= slope
    if falls_after:
        weights[-edge:] *= slope[::-1]
    return weights
