"""The control image to control tokens, once per job: the VAE's encoder, then the embedder.

Axes: V regions of a picture (1 if it is drawn whole), I image tokens of one, D width, H, W pixels,
h, w latent rows and columns, C latent channels.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float

from ...model import control, vae
from ...model.config import ModelConfig, VAEConfig
from ...model.vae_strips import encode_strips
from ...planning.plan import Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.work import Work
from ...runtime.programs import Programs
from ..attempt import Attempt
from .vae_stage import VAEChoice, VAEStage

COMPONENT = "transformer"


class Control(VAEStage):
    name, half, takes, apply, figure = "control", "encoder", "control image", vae.encode, "encode"

    def shape(self, work: Work, config: VAEConfig) -> tuple[int, int, int, int]:
        return 1, work.h * config.scale, work.w * config.scale, config.in_channels

    def count(self, work: Work) -> int:
        return 1  # all pictures of a job have one

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        if not work.control_layers or not work.phases:
            return
        units = _units(sizes.config)
        more = {unit: sizes.storage.nbytes(COMPONENT, unit) for unit in units}
        for option in super().options(sizes, work, memory):
            assert option.stays is not None
            stays = option.stays | {(COMPONENT, unit, 0) for unit in units}
            yield option._replace(weights={**option.weights, **more}, stays=stays)

    def compiled(self, programs: Programs, work: Work, choice: VAEChoice, device: int = 0) -> int:
        encoding = super().compiled(programs, work, choice)
        config = programs.config
        views = 1 if work.regions is None else work.regions.count
        shape = views, *work.view, config.vae.latent_channels
        latents = jax.ShapeDtypeStruct(shape, np.float32)
        modules = [programs.module(COMPONENT, unit) for unit in _units(config)]
        embed = programs(embed_tokens, dtype=programs.dtype).compiled(modules, latents)[1]
        # the pixels are not there any more, the latents are
        pixels = 4 * int(np.prod(self.shape(work, config.vae))) if choice.rows is None else 0
        return max(encoding, embed + 4 * latents.size - pixels)

    def stored(self, figures: Figures, work: Work, choice: VAEChoice, device: int = 0) -> int:
        tokens = work.image_tokens * (1 if work.regions is None else work.regions.count)
        # patches, and tokens before and after the refiner's map
        return max(
            super().stored(figures, work, choice), 3 * tokens * 2 * figures.config.transformer.dim
        )

    def seconds(self, timing: Timing, choice: VAEChoice) -> float:
        units = _units(timing.sizes.config)
        return super().seconds(timing, choice) + sum(timing.unit(COMPONENT, u) for u in units)

    def run(self, attempt: Attempt) -> Float[np.ndarray, "V I D"]:
        """Tokens of one picture; all pictures of the job have the same."""
        image, work = attempt.job.control, attempt.work
        assert image is not None
        modules = [attempt.loan.module(COMPONENT, unit) for unit in _units(attempt.config)]
        pixels = image.to_model()[None]
        latents = self.applied(attempt, self.module(attempt), pixels, encode_strips)
        if work.regions is not None:
            latents = work.regions.split(latents)
        attempt.hold(latents)
        embed = attempt.programs(embed_tokens, dtype=attempt.programs.dtype)
        found = np.asarray(embed(attempt.recorder, modules, latents))
        attempt.drop()
        return found


def embed_tokens(modules: list, latents: Float[jax.Array | np.ndarray, "V h w C"], *, dtype):
    """control.embed, of the modules of `_units`."""
    embedder, stem, *before = modules
    return control.embed(embedder, stem, before[0] if before else None, latents, dtype)


def _units(config: ModelConfig) -> tuple[str, ...]:
    assert config.control is not None
    before = ("control_before",) if config.control.refiner == "control_layers" else ()
    return ("control_embedder", "stem", *before)
