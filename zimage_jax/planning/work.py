"""The shapes of one job, from which programs, bytes and seconds follow. Pure."""

from dataclasses import dataclass, replace

from ..model import dit, kv, sampling
from ..model.config import DiTConfig, ModelConfig
from ..model.kv import KVPolicy, Nfe, Phase

MICRO_TOKENS = 8192  # a micro-batch takes as many pictures as keep its tokens under this


@dataclass(frozen=True)
class Work:
    """The shapes of one job.

    Axes: B pictures, G contexts (B, or 2 B with guidance), L caption tokens, I image tokens, T = I
    + L, P distinct prompts, h, w latent rows and columns."""

    batch: int
    is_guided: bool
    prompts: int
    bucket: int  # L
    h: int
    w: int
    phases: tuple[Phase, ...]  # of the K/V policy; their NFEs are the job's
    attention: str = "auto"  # a word of model.attention.CHOICES

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        width: int,
        height: int,
        steps: int,
        policy: KVPolicy,
        compute,
        *,
        bucket: int,
        batch: int = 1,
        is_guided: bool = False,
        prompts: int = 1,
        attention: str = "auto",
    ) -> "Work":
        """Pictures of a size in pixels, computed in a dtype."""
        h, w = height // config.vae.scale, width // config.vae.scale
        times = 1000 * sampling.sigmas(steps, config.scheduler.shift)[:-1]
        phases = policy.phases(times, compute, h // 2, w // 2)
        return cls(batch, is_guided, prompts, bucket, h, w, phases, attention)

    @property
    def nfes(self) -> tuple[Nfe, ...]:
        return tuple(nfe for phase in self.phases for nfe in phase.nfes())

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def contexts(self) -> int:
        return self.batch * (2 if self.is_guided else 1)

    @property
    def image_tokens(self) -> int:
        return dit.padded(self.h * self.w // 4)

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.bucket

    def without_policy(self, compute) -> "Work":
        """The same with K and V whole, in the compute dtype, of every NFE its own."""
        return replace(self, phases=(Phase(kv.plain(compute), self.steps),))

    def kv_bytes_by_nfe(self, config: DiTConfig) -> list[int]:
        """Of the K and V of one main block, in every NFE, for all contexts."""
        shape = self.contexts, self.tokens, config.n_heads, config.head_dim
        return [phase.kv_format.nbytes(*shape) for phase in self.phases for _ in range(phase.steps)]

    def kv_bytes(self, config: DiTConfig) -> int:
        """The most K and V held at once: those of every main block where they are reused, else of
        the one that runs."""
        shape = self.tokens, config.n_heads, config.head_dim
        running = self.contexts * self.micro_batch // self.batch
        return max(
            p.kv_format.nbytes(self.contexts, *shape) * config.n_layers
            if p.caches
            else p.kv_format.nbytes(running, *shape)
            for p in self.phases
        )

    @property
    def micro_batch(self) -> int:
        """Pictures computed at once: the largest divisor of B that keeps its tokens under
        MICRO_TOKENS. It changes last bits, so it follows from the job alone, never from the
        budget."""
        per_picture = self.tokens * (2 if self.is_guided else 1)
        fitting = (
            m
            for m in range(2, self.batch + 1)
            if self.batch % m == 0 and m * per_picture <= MICRO_TOKENS
        )
        return max(fitting, default=1)
