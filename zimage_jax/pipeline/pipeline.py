"""Prompt to picture.

    from zimage_jax import ZImage

    result = ZImage.load("model").generate("a red circle", seed=7)
    result.pictures[0].save("circle.png")

Axes: B pictures, h, w latent rows and columns, C latent channels.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import checks
from ..errors import NonFiniteError, OutOfMemoryError, UsageError
from ..files import printable
from ..model import emphasis
from ..model import prompt as prompts_of
from ..model.kv import KVPolicy
from ..planning.plan import Memory, Plan
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..runtime.placement import Placement, default_dtype, is_exhausted
from ..runtime.programs import Programs
from ..runtime.store import ParameterStore
from ..units import COMPUTE, size
from ..weights import formats
from ..weights.checkpoint import Checkpoint
from ..weights.components import COMPONENTS
from . import report as reports
from .attempt import Attempt
from .canvas import Canvas, enlarged_size
from .job import Job, Picture, Result, Step, ZImageWarning
from .opened import Source, open_picture
from .plans import Plans
from .preview import Preview
from .stages import STAGES
from .turn import Turn

TINY = Path(__file__).parent.parent / "assets" / "tiny"


class ZImage:
    """An opened model. Threads may share one: their jobs run one after the other.

    Parameters are read when they are first needed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: prompts_of.Prompts,
        dtype: str,
        memory: Memory,
        placement: Placement,
    ):
        self.config, self.name = checkpoint.config, checkpoint.path.resolve().name
        self.dtype, self.memory = jnp.dtype(dtype), memory
        self._checkpoint, self._prompts, self._placement = checkpoint, prompts, placement
        self._programs = Programs(checkpoint.storage, dtype, placement)
        self._plans = Plans(self._programs)
        self._store = ParameterStore(checkpoint, placement, self._programs)
        self._preview, self._turn = Preview(checkpoint), Turn()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str | None = None,
        memory: Memory | None = None,
        device: jax.Device | None = None,
    ) -> "ZImage":
        """Open a native checkpoint; without a `path`, the tiny model inside the package.

        `dtype`: of the computation, bfloat16, float16 or float32. The default is bfloat16 on a GPU,
        float16 on a GPU without bfloat16 (before compute capability 8.0), and float32 on a CPU.
        With float16 the VAE computes in float32. `memory`: where parameters are and how they move;
        by default everything stays on the device if it fits. `device`: by default the process's
        first.

        Raises CheckpointError if the folder is missing, foreign or damaged.
        """
        if dtype is not None:
            checks.one_of("dtype", dtype, COMPUTE)
        memory = Memory() if memory is None else checks.instance("memory", memory, Memory)
        checkpoint, placement = Checkpoint(TINY if path is None else path), Placement.on(device)
        own = default_dtype(placement.target)
        if dtype == "bfloat16" and own == "float16":
            warnings.warn(
                "this GPU has no bfloat16: it is emulated in float32, which is slow and takes more "
                "memory (--dtype float16)",
                ZImageWarning,
                stacklevel=2,
            )
        dtype = dtype or own
        return cls(
            checkpoint,
            prompts_of.Prompts.load(checkpoint.tokenizer),
            dtype,
            memory,
            placement,
        )

    def __repr__(self) -> str:
        return f"<ZImage {self.name}: {self.describe()}>"

    def describe(self) -> str:
        """One line for a person: the model's sizes, its formats, its compute dtype and its
        device."""

        def count(component: str) -> str:
            number = self._checkpoint.parameters(component)
            return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"

        held = ", ".join(
            f"{component.replace('_', ' ')} {count(component)}" for component in COMPONENTS
        )
        return (
            f"{held}; stored in {formats.names(self._checkpoint.storage)}, "
            f"computing in {self.dtype} on {self._placement.device.device_kind}"
        )

    # -- the job -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = -1,
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        sampler: str = "euler",
        sigmas: str = "simple",
        shift: float | None = None,
        guidance: float | None = None,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        noise: str = "torch",
        image: Source | Canvas | None = None,
        strength: float | None = None,
        strength_rule: str = "noise",
        fit: str | None = None,
        mask: Source | None = None,
        mask_blur: float | None = None,
        mask_grow: int | None = None,
        crop_mask: int | None = None,
        differential: bool = False,
        region: int | None = None,
        kv: KVPolicy | None = None,
        attention: str = "auto",
        prompt_weights: bool = False,
        text_weight: float = 1.0,
        variance: float = 0.0,
        memory: Memory | None = None,
        on_plan: Callable[[Plan, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Draw pictures of one size: one per prompt and seed; a single prompt or seed serves all.

        `width`, `height`: pixels; None is the model's own, or the image's. `steps`: evaluations of
        the DiT (NFEs); `sampler` heun takes nearly two for a step. `guidance`: as in diffusers, 0
        is off; ComfyUI's cfg is one more. For steps, shift and guidance, None is the checkpoint's
        default. `sampler`, `sigmas`: model.samplers lists them.

        `image`: a picture to begin from (a path, a PIL image, or an array [H, W, 3 or 4] of uint8
        or of floats in 0..1), fitted to the size by `fit` (crop, pad or stretch). `strength`: how
        much of it is redrawn, 0 to 1; `strength_rule` says what that means. `mask`: white is
        redrawn, black keeps its bytes; without one, transparent parts of the image are redrawn.
        `mask_blur` and `mask_grow`: pixels of the image. `crop_mask`: draw only the masked part,
        with so many pixels around it, at the full size, and paste it back. `differential`: grey
        says how much is redrawn. `region`: draw in overlapping regions with sides of so many
        pixels; by default only if the size is too large for the model or the memory.

        `prompt_weights`: brackets weigh words, as in "a (red:1.3) circle" (model.emphasis has the
        syntax); without it they are text. `text_weight`: weight of text in quotes, 0 to 4.
        `variance`: noise on each prompt's features from the picture's seed, 0 to 1, so that
        pictures of one prompt differ more. `kv`: how the DiT stores K and V (precision, groups,
        reuse), which changes the picture. `attention`: the kernel (model.attention.Attend lists them), which
        changes last bits. `memory`: replaces, for this job, the one given to `load`.

        `on_plan(plan, budget)`, budget in bytes, is called before anything runs, and again if the
        device ran out of memory and another plan is tried. `on_step(step)` is called after every
        NFE. It may raise to stop the job; the schedule `scan` runs to its end first.

        Raises UsageError for a job that cannot be drawn, or if called from a callback of this
        model's own job; OutOfMemoryError if no plan fits; NonFiniteError if the latents are not
        finite.
        """
        with self._turn.of_job(), jax.default_device(self._placement.device):
            warned: list[str] = []
            fitting: dict[str, Any] = {
                "mask": mask,
                "fit": fit,
                "mask_blur": mask_blur,
                "mask_grow": mask_grow,
                "crop_mask": crop_mask,
            }
            given = {name: value for name, value in fitting.items() if value is not None}
            if image is None or isinstance(image, Canvas):
                canvas = image
                for name in given:
                    why = "there is none" if image is None else "a canvas has its own"
                    raise UsageError(f"{name} needs an image: {why}")
            else:
                canvas = self.canvas(image, width=width, height=height, **given)
            job = self._job(
                warned,
                prompt,
                seed=seed,
                negative_prompt=negative_prompt,
                width=width,
                height=height,
                steps=steps,
                sampler=sampler,
                sigmas=sigmas,
                shift=shift,
                guidance=guidance,
                cfg_normalization=cfg_normalization,
                cfg_truncation=cfg_truncation,
                noise=noise,
                canvas=canvas,
                strength=strength,
                strength_rule=strength_rule,
                differential=differential,
                region=region,
                kv=kv,
                attention=attention,
                prompt_weights=prompt_weights,
                text_weight=text_weight,
                variance=variance,
            )
            encoded, memory = self._tokens(job, warned), self._memory(memory)
            return self._generate(job, encoded, memory, warned, on_plan, on_step)

    def _generate(
        self,
        job: Job,
        encoded: dict[str, prompts_of.Encoded],
        memory: Memory,
        warned: list[str],
        on_plan: Callable[[Plan, int], None] | None,
        on_step: Callable[[Step], None] | None,
    ) -> Result:
        began, work = time.perf_counter(), self._work(job, encoded)
        budget = memory.max_vram_bytes or self._store.free_device_bytes()
        ahead = self._placement.runs_ahead
        ledger = Ledger(ahead)
        self._store.read_ahead(budget, memory.host_bytes, ledger)
        while True:
            try:
                plan = self._plans.plan(work, memory, budget)
            except OutOfMemoryError as fault:
                in_regions = job.in_regions(self.config)
                if in_regions is None:
                    raise
                _warn(warned, f"{fault}; drawing in regions of {in_regions.region} pixels")
                job = in_regions
                work = self._work(job, encoded)
                continue
            if on_plan is not None:
                with self._turn.of_callback():
                    on_plan(plan, budget)
            try:
                attempt = self._attempt(job, encoded, work, plan, memory, ledger, on_step, began)
                return self._draw(attempt, warned)
            except jax.errors.JaxRuntimeError as fault:
                if not is_exhausted(fault):
                    raise
                self._store.clear()
            if ahead:  # two programs in flight may take the scratch of both
                ahead, then = 0, "trying a program at a time"
            else:  # the planner raises OutOfMemoryError when no plan is smaller
                budget, then = plan.peak_bytes - 1, "trying a smaller one"
            ledger = Ledger(ahead)
            _warn(warned, f"out of device memory with a plan of {size(plan.peak_bytes)}; {then}")

    def _attempt(
        self,
        job: Job,
        encoded: dict,
        work: Work,
        plan: Plan,
        memory: Memory,
        ledger: Ledger,
        on_step,
        began: float,
    ) -> Attempt:
        path = job.trajectory

        def observe(index: int, latents: np.ndarray) -> None:
            if attempt.first_preview_seconds is None:
                attempt.first_preview_seconds = round(time.perf_counter() - began, 4)
            if not np.isfinite(latents).all():
                raise NonFiniteError(
                    f"the latents are not finite after NFE {index + 1} of {path.nfes} in "
                    f"{self.dtype}; the weights are damaged or the dtype is too narrow "
                    "(--dtype float32)"
                )
            if on_step is not None:
                t = float(path.scheduler_times[index])
                step = Step(index, path.nfes, t, latents, self._preview.pixels)
                with self._turn.of_callback():
                    on_step(step)

        attempt = Attempt(
            job=job,
            trajectory=path,
            encoded=encoded,
            work=work,
            plan=plan,
            programs=self._programs,
            loan=self._store.lend(ledger, kept=plan.kept, host_bytes=memory.host_bytes),
            placement=self._placement,
            ledger=ledger,
            observe=observe,
        )
        return attempt

    def _draw(self, attempt: Attempt, warned: list[str]) -> Result:
        ledger, began = attempt.ledger, time.perf_counter()
        try:
            for stage in STAGES:
                if stage.name in attempt.plan.choices:
                    self._run(stage, attempt)
        finally:
            attempt.loan.release()
        ledger.seconds["total"] = time.perf_counter() - began
        return self._result(attempt, warned)

    @staticmethod
    def _run(stage, attempt: Attempt) -> Any:
        """Run a stage, then drop its arrays from the device, except kept parameters."""
        with attempt.ledger.stage(stage.name):
            attempt.results[stage.name] = stage.run(attempt)
            attempt.ledger.drop("activations")
            attempt.loan.release()
        return attempt.results[stage.name]

    def encode(
        self, texts: Sequence[str], memory: Memory | None = None
    ) -> list[Float[np.ndarray, "T E"]]:
        """Features of each text: Qwen3's hidden_states[-2]. Raises like `generate`."""
        with self._turn.of_job(), jax.default_device(self._placement.device):
            warned: list[str] = []
            job = self._job(warned, texts, seed=0, steps=1, guidance=0.0)
            memory, encoded = self._memory(memory), self._tokens(job, warned)
            work = self._work(job, encoded)
            text_stage = next(stage for stage in STAGES if stage.name == "text")
            budget = memory.max_vram_bytes or self._store.free_device_bytes()
            plan = self._plans.planner.of([text_stage]).plan(work, memory, budget)
            ledger = Ledger(self._placement.runs_ahead)
            attempt = self._attempt(job, encoded, work, plan, memory, ledger, None, 0.0)
            try:
                features = self._run(text_stage, attempt)
            finally:
                attempt.loan.release()
            return [features[text] for text in job.prompts]

    # -- before the stages -------------------------------------------------------------------------

    def _job(self, warned: list[str], prompt, **options) -> Job:
        job = Job.of(self.config, prompt, **options)
        for remark in job.remarks:
            _warn(warned, remark)
        return job

    def canvas(
        self,
        image: Source,
        *,
        mask: Source | None = None,
        width: int | None = None,
        height: int | None = None,
        fit: str = "crop",
        mask_blur: float = 0.0,
        mask_grow: int = 0,
        crop_mask: int | None = None,
    ) -> Canvas:
        """A picture to begin from, fitted to the size to draw: `generate` takes it as its `image`.

        The arguments are those of `generate`. Raises UsageError.
        """
        return Canvas.of(
            image,
            mask,
            width=width,
            height=height,
            multiple=self.config.pixel_multiple,
            fit=fit,
            mask_blur=mask_blur,
            mask_grow=mask_grow,
            crop_mask=crop_mask,
            model_side=self.config.vae.sample_size,
        )

    def enlarged(
        self, picture: Source | Picture, factor: float | int = 2, **options: Any
    ) -> Canvas:
        """A picture `factor` times as large, to be drawn again: a canvas for `generate`.

        Its sides are rounded to what the model draws. `options`: as for `canvas`, without a size.
        Without a `strength`, `generate` takes one that keeps the composition. Raises UsageError.
        """
        image = picture.pixels if isinstance(picture, Picture) else picture
        opened, multiple = open_picture(image, "picture"), self.config.pixel_multiple
        width, height = enlarged_size(opened, factor, multiple)
        made = self.canvas(image, width=width, height=height, **{"fit": "stretch", **options})
        return replace(made, enlarges=True)

    def _memory(self, memory: Memory | None) -> Memory:
        return self.memory if memory is None else checks.instance("memory", memory, Memory)

    def _tokens(self, job: Job, warned: list[str]) -> dict[str, prompts_of.Encoded]:
        """The tokens of each distinct text, with a warning for one that is cut."""
        encoded = {
            text: emphasis.encode(
                self._prompts, text, has_weights=job.prompt_weights, text_weight=job.text_weight
            )
            for text in job.texts
        }
        for e in encoded.values():
            if e.cut:
                _warn(
                    warned,
                    f"the prompt is longer than {prompts_of.MAX_TOKENS} tokens; "
                    f"cut off: {printable(e.cut)!r}",
                )
        return encoded

    def _work(self, job: Job, encoded: dict[str, prompts_of.Encoded]) -> Work:
        return Work.of(
            self.config,
            job.width,
            job.height,
            job.trajectory,
            job.kv,
            self.dtype,
            bucket=prompts_of.bucket(max(len(e.ids) for e in encoded.values())),
            batch=len(job.prompts),
            prompts=len(emphasis.to_run(encoded.values())),
            encodes=job.canvas is not None,
            region=job.region,
            attention=job.attention,
        )

    # -- after the stages --------------------------------------------------------------------------

    def _result(self, attempt: Attempt, warned: list[str]) -> Result:
        job, latents = attempt.job, attempt.latents
        common = reports.metadata(attempt, self.name)
        each = [
            {
                "prompt": text,
                "seed": seed,
                "latents_sha256": hashlib.sha256(row.tobytes()).hexdigest(),
            }
            for text, seed, row in zip(job.prompts, job.seeds, latents, strict=True)
        ]
        pictures = [
            Picture(pixels, {**own, **common})
            for pixels, own in zip(attempt.results[STAGES[-1].name], each, strict=True)
        ]
        report = reports.report(attempt, common, each, warned, self._store.host_bytes)
        return Result(pictures, report, latents, attempt.work, attempt.plan, attempt.ledger)


def _warn(warned: list[str], message: str) -> None:
    warned.append(message)
    warnings.warn(message, ZImageWarning, stacklevel=4)
