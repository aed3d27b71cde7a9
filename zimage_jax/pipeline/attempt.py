"""The state that the stages of one attempt at a job share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from ..model.config import ModelConfig
from ..model.prompt import Encoded
from ..model.samplers import Trajectory
from ..planning.plan import Plan
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..runtime.placement import Placement
from ..runtime.programs import Programs
from ..runtime.recorder import Recorder
from ..runtime.store import Loan
from ..weights.adapters import Adapters
from .given import LatentCanvas
from .job import Job


@dataclass(kw_only=True)
class Attempt:
    """A job in flight, under one plan. `results`: of finished stages, by name."""

    number: int  # of the job, in this process
    job: Job
    trajectory: Trajectory
    encoded: dict[str, Encoded]  # tokens of each distinct text
    work: Work
    plan: Plan
    programs: Programs
    adapters: Adapters | None  # LoRAs
    loan: Loan
    placement: Placement
    recorder: Recorder
    ledger: Ledger
    observe: Callable[[int, np.ndarray], None]  # called after every NFE with its index and latents
    began: float  # when the job came in flight, by time.perf_counter
    first_preview_seconds: float | None = (
        None  # until the first NFE's latents, from the job's start
    )
    results: dict[str, Any] = field(default_factory=dict)
    whole: Any = None  # what the denoise stage goes on from, if its arrays on the device are lost

    @property
    def latents(self) -> Float[np.ndarray, "B h w C"]:
        """The final latents; the picture's own if no NFE changes them."""
        found = self.results.get("denoise")
        return self.first if found is None else found

    @property
    def first(self) -> Float[np.ndarray, "B h w C"]:
        """The latents that the job begins from: given ones, or those of its picture."""
        canvas = self.job.canvas
        found = canvas.latents if isinstance(canvas, LatentCanvas) else self.results["encode"]
        return np.broadcast_to(found, (self.work.batch, *found.shape[-3:]))

    @property
    def config(self) -> ModelConfig:
        return self.programs.config

    def name(self, arrays: str) -> str:
        """The name of this job's `arrays` among those of all jobs in flight."""
        return f"{arrays} of job {self.number}"

    def hold(self, *arrays) -> None:
        """Count `arrays` as the stage's activations on the first device, in place of the ones
        before."""
        self.recorder.hold(self.name("activations"), arrays)

    def drop(self) -> None:
        """The stage's activations have left the device."""
        self.recorder.drop(self.name("activations"))
