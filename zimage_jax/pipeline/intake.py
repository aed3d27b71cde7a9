"""Makes requests: a job is checked, its texts become tokens, and it is planned, in its owner's
thread."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ..errors import OutOfMemoryError
from ..files import printable
from ..model import emphasis
from ..model import prompt as prompts_of
from ..planning.plan import Memory, Stage, each
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..runtime.programs import Programs
from ..runtime.recorder import Recorder
from ..runtime.store import ParameterStore
from .canvas import Canvas
from .engine import Engine
from .job import Job
from .loras import Fitted
from .request import Request


class Intake:
    """The way of one model's jobs to its engine. Threads may share it."""

    def __init__(
        self,
        prompts: prompts_of.Prompts,
        programs: Programs,
        store: ParameterStore,
        engine: Engine,
    ):
        self._prompts, self._programs = prompts, programs
        self._store, self._engine = store, engine
        self._planning = threading.Lock()

    def request(
        self,
        prompt: Any,
        memory: Memory,
        stages: tuple[Stage, ...],
        finish: Callable[[Request], Any],
        fitted: Fitted,
        options: dict[str, Any],
    ) -> Request:
        """A request that is not submitted yet. `options`: of Job.of.

        Raises UsageError, also inside a callback, and OutOfMemoryError if no plan fits.
        """
        self._engine.check_caller()
        began, ledger, config = time.perf_counter(), Ledger(), self._programs.config
        with jax.default_device(self._programs.placement.device):
            job = Job.of(config, prompt, **options)
            encoded = {
                text: emphasis.encode(
                    self._prompts, text, has_weights=job.prompt_weights, text_weight=job.text_weight
                )
                for text in job.texts
            }
            warnings = [*job.remarks, *fitted.remarks, *_cuts(encoded)]
            work = self._work(job, encoded)
            budget = self._engine.budget(memory)
            if not fitted.is_merged:  # the parameters are others then
                free = sum(each(budget))
                self._store.read_ahead(free, memory.host_bytes, Recorder(ledger))
            with self._planning:
                try:
                    plan = fitted.plans.plan(work, memory, budget, stages)
                except OutOfMemoryError as fault:
                    in_regions = job.in_regions(config)
                    if in_regions is None:
                        raise
                    warnings.append(f"{fault}; drawing in regions of {in_regions.region} pixels")
                    job = in_regions
                    work = self._work(job, encoded)
                    plan = fitted.plans.plan(work, memory, budget, stages)
        warnings += self._store.remarks(plan)
        return Request(
            job=job,
            encoded=encoded,
            work=work,
            memory=memory,
            fitted=fitted,
            stages=stages,
            plan=plan,
            budget=budget,
            finish=finish,
            ledger=ledger,
            warned=warnings,
            began=began,
        )

    def _work(self, job: Job, encoded: dict[str, prompts_of.Encoded]) -> Work:
        given = [f for f in (*job.features, job.negative_features) if f is not None]
        lengths = [len(e.ids) for e in encoded.values()] + [len(features) for features in given]
        return Work.of(
            self._programs.config,
            job.width,
            job.height,
            job.trajectory,
            job.kv,
            self._programs.dtype,
            bucket=prompts_of.bucket(max(lengths, default=1)),
            batch=len(job.prompts),
            prompts=len(emphasis.to_run(encoded.values())),
            encodes=isinstance(job.canvas, Canvas),
            controls=job.control is not None,
            region=job.region,
            attention=job.attention,
        )


def _cuts(encoded: dict[str, prompts_of.Encoded]) -> list[str]:
    """A warning for each text that is too long."""
    return [
        f"the prompt is longer than {prompts_of.MAX_TOKENS} tokens; cut off: {printable(e.cut)!r}"
        for e in encoded.values()
        if e.cut
    ]
