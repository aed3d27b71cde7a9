"""The shapes of one job, which determine its programs, bytes and seconds. Pure."""

import math
from dataclasses import dataclass, replace

import numpy as np

from ..model import dit, kv
from ..model.config import DiTConfig, ModelConfig
from ..model.kv import KVPolicy, Nfe, Phase
from ..model.regions import Regions
from ..model.samplers import Trajectory, Update

PLAIN = Trajectory.of(1, 1.0).template  # Euler without guidance or mask
MICRO_TOKENS = 8192  # the most tokens of a micro-batch of several pictures


@dataclass(frozen=True)
class Work:
    """The shapes of one job.

    Axes: B pictures, R regions of a picture, V = B R views, G contexts (V, or 2 V with guidance), L
    caption tokens, I image tokens of a view, T = I + L, P distinct texts, h, w latent rows and
    columns of a picture.
    """

    batch: int
    prompts: int
    bucket: int  # L
    h: int
    w: int
    phases: tuple[Phase, ...]  # of the K/V policy; together they have all NFEs of the job
    update: Update = PLAIN  # of a step: what the sampler needs, with 0 for every number
    encodes: bool = False  # the job begins from a picture
    side: int | None = None  # latents of a region's side; None: a picture is drawn whole
    attention: str = "auto"  # one of model.attention.CHOICES
    control_layers: int = 0  # blocks of a ControlNet beside the main ones; 0: without one

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        width: int,
        height: int,
        trajectory: Trajectory,
        policy: KVPolicy,
        compute,
        *,
        bucket: int,
        batch: int = 1,
        prompts: int = 1,
        encodes: bool = False,
        controls: bool = False,
        region: int | None = None,
        attention: str = "auto",
    ) -> "Work":
        """The work of pictures of `width` x `height` pixels; `compute` is the compute dtype.

        `controls`: with the config's ControlNet. `region`: pixels of a region's side, where pictures are drawn in regions.
        """
        h, w = height // config.vae.scale, width // config.vae.scale
        side = None if region is None else region // config.vae.scale
        without_phases = cls(
            batch=batch,
            prompts=prompts,
            bucket=bucket,
            h=h,
            w=w,
            phases=(),
            update=trajectory.template,
            encodes=encodes,
            control_layers=config.control.layers if controls and config.control else 0,
            side=side if side is not None and side < max(h, w) else None,
            attention=attention,
        )
        rows, columns = without_phases.view
        phases = policy.phases(trajectory.scheduler_times, compute, rows // 2, columns // 2)
        return replace(without_phases, phases=phases)

    @property
    def whole(self) -> "Work":
        """This work with texts and an NFE, whatever the job leaves out."""
        plain = (Phase(kv.plain(np.float32), 1),)
        return replace(self, prompts=max(1, self.prompts), phases=self.phases or plain)

    @property
    def is_guided(self) -> bool:
        return self.update.guidance is not None

    @property
    def regions(self) -> Regions | None:
        return None if self.side is None else Regions(self.h, self.w, self.side)

    @property
    def view(self) -> tuple[int, int]:
        """Latent rows and columns of what the DiT draws at once: a picture or a region."""
        return (self.h, self.w) if self.regions is None else self.regions.shape

    @property
    def views(self) -> int:
        """Pictures, or regions of all pictures."""
        return self.batch * (1 if self.regions is None else self.regions.count)

    def latents_bytes(self, channels: int, *, in_one_program: bool) -> int:
        """Bytes of the latents between programs, and of what else the steps need.

        One program for all NFEs gets whole pictures and every step's noise, and keeps the sampler's
        memory to itself.
        """
        update, of_views = self.update, self.views * math.prod(self.view)
        if in_one_program:
            latents, noises = self.batch * self.h * self.w, self.steps
        else:
            latents, noises = of_views * (1 + (update.carry is not None)), 1
        found = latents * channels
        if update.noise is not None:
            found += noises * of_views * channels
        if update.kept is not None:
            found += of_views * (2 * channels + 1)
        return 4 * found

    @property
    def nfes(self) -> tuple[Nfe, ...]:
        return tuple(nfe for phase in self.phases for nfe in phase.nfes())

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def contexts(self) -> int:
        return self.views * (2 if self.is_guided else 1)

    @property
    def captions(self) -> int:
        """One per picture, and with guidance one more: regions share their picture's."""
        return self.batch * (2 if self.is_guided else 1)

    @property
    def image_tokens(self) -> int:
        return dit.padded(math.prod(self.view) // 4)

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.bucket

    def without_policy(self, compute) -> "Work":
        """This work without a K/V policy: every NFE makes K and V, whole and in `compute`."""
        return replace(self, phases=(Phase(kv.plain(compute), self.steps),))

    def kv_bytes_by_nfe(self, config: DiTConfig) -> list[int]:
        """Bytes of one main block's K and V for all contexts, one number per NFE."""
        shape = self.contexts, self.tokens, config.n_heads, config.head_dim
        return [phase.kv_format.nbytes(*shape) for phase in self.phases for _ in range(phase.steps)]

    def kv_bytes(self, config: DiTConfig) -> int:
        """The most bytes of K and V at once: all main blocks' if reused, else one block's."""
        shape = self.tokens, config.n_heads, config.head_dim
        running = self.contexts * self.micro_batch // self.views
        found = (
            p.kv_format.nbytes(self.contexts, *shape) * (config.n_layers + self.control_layers)
            if p.caches
            else p.kv_format.nbytes(running, *shape)
            for p in self.phases
        )
        return max(found, default=0)

    @property
    def micro_batch(self) -> int:
        """Views computed at once: the largest divisor of V with at most MICRO_TOKENS tokens.

        It changes last bits. It therefore depends on the job alone, never on the budget.
        """
        per_picture = self.tokens * (2 if self.is_guided else 1)
        fitting = (
            m
            for m in range(2, self.views + 1)
            if self.views % m == 0 and m * per_picture <= MICRO_TOKENS
        )
        return max(fitting, default=1)
