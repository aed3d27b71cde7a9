"""Latents to pictures with the VAE: whole, in strips of rows, or in blended tiles.

Axes: B pictures, h, w latent rows and columns, C latent channels, H, W pixels.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8

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

    def run(
        self, attempt: Attempt
    ) -> list[UInt8[np.ndarray, "H W 3"]] | list[Float32[np.ndarray, "H W 3"]]:
        """Pictures of 8 bits; of an "image", floats from 0 to 1."""
        decoder, canvas, found = self.module(attempt), attempt.job.canvas, []
        for latents in attempt.latents:
            pixels = self.applied(attempt, decoder, latents[None], decode_strips, decode_tiles)[0]
            is_pasted = canvas is not None and canvas.mask is not None
            if attempt.job.output == "image" and not is_pasted:
                found.append(np.clip(pixels / 2 + np.float32(0.5), 0, 1))
                continue
            drawn = picture.to_uint8(pixels)
            drawn = drawn if canvas is None else canvas.finish(drawn)
            found.append(drawn if attempt.job.output == "picture" else drawn / np.float32(255))
        return found
