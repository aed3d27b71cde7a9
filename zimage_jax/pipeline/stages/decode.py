"""Latents to pictures with the VAE: whole, in strips of rows, or in blended tiles.

Axes: B pictures, h, w latent rows and columns, C latent channels, H, W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, UInt8

from ...model import vae
from ...model.vae_strips import decode_strips, decode_tiles, layer_costs, strip_programs
from ...planning.plan import Choice, Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.work import Work
from ...runtime.programs import Programs
from ...units import tree_bytes
from ...weights import components
from .. import picture
from ..attempt import Attempt


@dataclass(frozen=True)
class DecodeChoice(Choice):
    """`rows`: pixel rows of a strip. `tile`: side of a tile in pixels. Neither: decode whole."""

    rows: int | None = None
    tile: int | None = None


class Decode:
    name = "decode"

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        config = sizes.config.vae
        weights = {"VAE decoder": sizes.storage.nbytes("vae", "decoder")}
        latents = {"latents": work.h * work.w * config.latent_channels * 4}
        stays = frozenset({("vae", "decoder")})
        if memory.vae_tile:
            yield Option(DecodeChoice(tile=memory.vae_tile), weights, latents, stays)
            return
        yield Option(DecodeChoice(), weights, latents, stays)
        rows = work.h * config.scale // 2
        while rows >= config.scale:
            # in strips the latents and the feature maps are on the host
            yield Option(DecodeChoice(rows=rows), weights, {}, stays)
            rows //= 2

    def compiled(self, programs: Programs, work: Work, choice: DecodeChoice) -> int:
        config, attend = programs.config.vae, programs.attend(work)
        dtype = vae.compute_dtype(programs.dtype)
        decoder = programs.storage.assemble(
            "vae", {"decoder": programs.storage.specs("vae", "decoder")}
        )
        if choice.rows is not None:
            shape = (1, work.h, work.w, config.latent_channels)
            calls = strip_programs(decoder.decoder, shape, dtype, choice.rows, attend)
            return max(
                programs(c.function, **c.static).compiled(*c.arguments)[1]
                + tree_bytes(c.arguments[1:])
                for c in calls
            )
        side = choice.tile // config.scale if choice.tile else None
        h, w = (min(n, side) if side else n for n in (work.h, work.w))
        latents = jax.ShapeDtypeStruct((1, h, w, config.latent_channels), np.float32)
        return programs(vae.decode, dtype=dtype, attend=attend).compiled(decoder, latents)[1]

    def stored(self, figures: Figures, work: Work, choice: DecodeChoice) -> int:
        height, width = (figures.config.vae.scale * n for n in (work.h, work.w))
        if choice.rows is None:
            side = choice.tile or max(height, width)
            return figures.at("decode", min(height, side) * min(width, side))
        return figures.strips(choice.rows * width, height * width)

    def seconds(self, timing: Timing, choice: DecodeChoice) -> float:
        work, config = timing.work, timing.sizes.config
        shape = (1, work.h, work.w, config.vae.latent_channels)
        costs = layer_costs(components.spec(config, "vae").decoder, shape)
        products, elements = (sum(column) for column in zip(*costs, strict=True))
        crossing = 0 if choice.rows is None else elements * timing.sizes.compute_bytes
        each = 2 * products / timing.rates.flops + crossing / timing.rates.link
        return timing.unit("vae", "decoder") + work.batch * each

    def run(self, attempt: Attempt) -> list[UInt8[np.ndarray, "H W 3"]]:
        (leaves,) = attempt.loan.pin("vae", ["decoder"])
        decoder = attempt.programs.storage.assemble("vae", {"decoder": leaves})
        return [self._decode(attempt, decoder, row) for row in attempt.results["denoise"]]

    def _decode(
        self, attempt: Attempt, decoder: vae.VAE, latents: Float[np.ndarray, "h w C"]
    ) -> UInt8[np.ndarray, "H W 3"]:
        choice = attempt.plan.choices[self.name]
        dtype = vae.compute_dtype(attempt.programs.dtype)
        attend = attempt.programs.attend(attempt.work)

        def apply(function, weights, *arrays, **static):
            attempt.hold(*arrays)
            return attempt.programs(function, **static)(attempt.ledger, weights, *arrays)

        if choice.rows is not None:
            pixels = decode_strips(decoder, latents[None], dtype, choice.rows, apply, attend)
        elif choice.tile is not None:
            pixels = decode_tiles(decoder, latents[None], dtype, choice.tile, apply, attend)
        else:
            pixels = np.asarray(
                apply(vae.decode, decoder, latents[None], dtype=dtype, attend=attend)
            )
        attempt.ledger.drop("activations")
        return picture.to_uint8(pixels[0])
