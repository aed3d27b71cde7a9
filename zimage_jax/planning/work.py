"""The shapes of one job, which determine its programs, bytes and seconds. Pure."""

from dataclasses import dataclass, replace

from ..model import dit, kv, sampling
from ..model.config import DiTConfig, ModelConfig
from ..model.kv import KVPolicy, Nfe, Phase

MICRO_TOKENS = 8192  # the most tokens of a micro-batch of several pictures


@dataclass(frozen=True)
class Work:
    """The shapes of one job.

    Axes: B pictures, G contexts (B, or 2 B with guidance), L caption tokens, I image tokens, T = I
    + L, P distinct texts, h, w latent rows and columns.
    """

    batch: int
    is_guided: bool
    prompts: int
    bucket: int  # L
    h: int
    w: int
    phases: tuple[Phase, ...]  # of the K/V policy; together they have all NFEs of the job
    attention: str = "auto"  # one of model.attention.CHOICES

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
        """The work of pictures of `width` x `height` pixels; `compute` is the compute dtype."""
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
        """This work without a K/V policy: every NFE makes K and V, whole and in `compute`."""
        return replace(self, phases=(Phase(kv.plain(compute), self.steps),))

    def kv_bytes_by_nfe(self, config: DiTConfig) -> list[int]:
        """Bytes of one main block's K and V for all contexts, one number per NFE."""
        shape = self.contexts, self.tokens, config.n_heads, config.head_dim
        return [phase.kv_format.nbytes(*shape) for phase in self.phases for _ in range(phase.steps)]

    def kv_bytes(self, config: DiTConfig) -> int:
        """The most bytes of K and V at once: all main blocks' if reused, else one block's."""
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
        """Pictures computed at once: the largest divisor of B with at most MICRO_TOKENS tokens.

        It changes last bits. It therefore depends on the job alone, never on the budget.
        """
        per_picture = self.tokens * (2 if self.is_guided else 1)
        fitting = (
            m
            for m in range(2, self.batch + 1)
            if self.batch % m == 0 and m * per_picture <= MICRO_TOKENS
        )
        return max(fitting, default=1)
