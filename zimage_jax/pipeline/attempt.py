"""The state that the stages of one attempt at a job share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from ..model.config import ModelConfig
from ..model.prompt import Encoded
from ..model.samplers import Trajectory
from ..planning.plan import Plan, StreamPlan
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..runtime.placement import Placement
from ..runtime.programs import Programs
from ..runtime.store import Loan
from ..runtime.stream import Stream
from .job import Job


@dataclass(kw_only=True)
class Attempt:
    """One attempt at a job, under one plan. `results`: of finished stages, by name."""

    job: Job
    trajectory: Trajectory
    encoded: dict[str, Encoded]  # tokens of each distinct text
    work: Work
    plan: Plan
    programs: Programs
    loan: Loan
    placement: Placement
    ledger: Ledger
    observe: Callable[[int, np.ndarray], None]  # called after every NFE with its index and latents
    first_preview_seconds: float | None = (
        None  # until the first NFE's latents, from the job's start
    )
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> Float[np.ndarray, "B h w C"]:
        """The final latents; the picture's own if no NFE changes them."""
        if "denoise" in self.results:
            return self.results["denoise"]
        encoded = self.results["encode"]
        return np.broadcast_to(encoded, (self.work.batch, *encoded.shape))

    @property
    def config(self) -> ModelConfig:
        return self.programs.config

    def stream(self, plan: StreamPlan, sweeps: int = 1, **rest) -> Stream:
        return self.loan.stream(plan, sweeps, **rest)

    def hold(self, *arrays) -> None:
        """Count `arrays` as the stage's activations on the device, in place of the ones before."""
        self.ledger.hold("activations", arrays)
