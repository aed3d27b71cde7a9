"""Latents to pictures with the VAE: whole, in strips of rows, or in blended tiles.

Axes: B pictures, h, w latent rows and columns, C latent channels, H, W pixels.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from ...model import vae
from ...model.config import VAEConfig
from ...model.vae_strips import decode_strips, decode_tiles
from ...planning.plan import Memory, Option, Sizes
from ...planning.work import Work
from .. import picture
from ..attempt import Attempt
from .vae_stage import VAEChoice, VAEStage


class Decode(VAEStage):
    name, half, takes, apply, figure = "decode", "decoder", "latents", vae.decode, "decode"

    def shape(self, work: Work, config: VAEConfig) -> tuple[int, int, int, int]:
        return 1, work.h, work.w, config.latent_channels

    def count(self, work: Work) -> int:
        return work.batch

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        found = super().options(sizes, work, memory)
        if memory.vae_tile:
            found = iter([next(found)._replace(choice=VAEChoice(tile=memory.vae_tile))])
        return found

    def run(self, attempt: Attempt) -> list[UInt8[np.ndarray, "H W 3"]]:
        decoder, canvas, found = self.module(attempt), attempt.job.canvas, []
        for latents in attempt.latents:
            pixels = self.applied(attempt, decoder, latents[None], decode_strips, decode_tiles)
            drawn = picture.to_uint8(pixels[0])
            found.append(drawn if canvas is None else canvas.finish(drawn))
        return found
