"""The picture that a job begins from, to latents: the VAE's encoder, whole or in strips of rows.

Axes: h, w latent rows and columns, C latent channels, H, W pixels.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from ...model import vae
from ...model.config import VAEConfig
from ...model.vae_strips import encode_strips
from ...planning.plan import Memory, Option, Sizes
from ...planning.work import Work
from ..attempt import Attempt
from ..canvas import Canvas
from .vae_stage import VAEStage


class Encode(VAEStage):
    name, half, takes, apply, figure = "encode", "encoder", "picture", vae.encode, "encode"

    def shape(self, work: Work, config: VAEConfig) -> tuple[int, int, int, int]:
        return 1, work.h * config.scale, work.w * config.scale, config.in_channels

    def count(self, work: Work) -> int:
        return 1  # all pictures of a job begin from one

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        return super().options(sizes, work, memory) if work.encodes else iter(())

    def run(self, attempt: Attempt) -> Float[np.ndarray, "h w C"]:
        """The posterior's mean, as the sampler's latents."""
        canvas = attempt.job.canvas
        assert isinstance(canvas, Canvas)
        pixels = canvas.to_model()[None]
        return self.applied(attempt, self.module(attempt), pixels, encode_strips)[0]
