"""Prompt to picture.

    from zimage_jax import ZImage

    result = ZImage.load("model").generate("a red circle", seed=7)
    result.pictures[0].save("circle.png")

The file is long by the public API, whose signatures and docstrings are two of five lines.

Axes: B pictures, h, w latent rows and columns, C latent channels.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import checks
from ..errors import UsageError
from ..files import printable
from ..model import prompt as prompts_of
from ..model.kv import KVPolicy
from ..planning.plan import Budget, Memory, Plan
from ..runtime.placement import Placement, default_dtype
from ..runtime.programs import Programs
from ..runtime.store import ParameterStore
from ..units import COMPUTE
from ..weights import formats
from ..weights.checkpoint import ModelFiles
from ..weights.components import COMPONENTS
from ..weights.controlled import Controlled
from ..weights.in_place import open_control, open_model
from ..weights.search import TINY
from . import report as reports
from .canvas import Canvas, enlarged_size
from .engine import IN_FLIGHT, Engine
from .given import Features, LatentCanvas
from .intake import Intake
from .job import Job, Picture, Result, Step, ZImageWarning
from .loras import Fitted, Fittings
from .opened import Source, open_picture
from .plans import Plans
from .preview import Preview
from .request import Event, Planned, Request
from .stages import STAGES, TEXT, WITHOUT_DECODE


class ZImage:
    """An opened model. Threads may share one: what is in flight together shares the weights.

    Parameters are read when they are first needed.
    """

    def __init__(
        self,
        checkpoint: ModelFiles,
        prompts: prompts_of.Prompts,
        dtype: str,
        memory: Memory,
        placement: Placement,
        in_flight: int = IN_FLIGHT,
        control_name: str | None = None,
    ):
        self.config, self.name = checkpoint.config, checkpoint.path.resolve().name
        self.control_name = control_name
        self.dtype, self.memory = jnp.dtype(dtype), memory
        self._checkpoint, self._placement = checkpoint, placement
        self._programs = Programs(checkpoint.storage, dtype, placement)
        self._plans = Plans(self._programs)
        self._store = ParameterStore(checkpoint, placement, self._programs)
        self._engine = Engine(
            self._programs, self._plans, self._store, placement, Preview(checkpoint), in_flight
        )
        self._intake = Intake(prompts, self._programs, self._store, self._engine)
        self._plain = Fitted(self._programs, self._plans)
        self._fittings = Fittings(checkpoint, self._plain, placement)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        control: str | Path | None = None,
        dtype: str | None = None,
        memory: Memory | None = None,
        device: jax.Device | Sequence[jax.Device] | None = None,
        in_flight: int | None = None,
    ) -> "ZImage":
        """Open a model; without a `path`, the tiny one inside the package.

        `path`: a native checkpoint, or other programs' files, which are read in place: a folder in
        diffusers layout, ComfyUI's folder, or files separated by commas (weights.in_place.open_model).
        `control`: a ControlNet, native or its authors' file, for jobs with a `control_image`.
        `dtype`: of the computation, bfloat16, float16 or float32. The default is bfloat16 on a GPU,
        float16 on a GPU without bfloat16 (before compute capability 8.0), and float32 on a CPU.
        With float16 the VAE computes in float32. `memory`: where parameters are and how they move;
        by default everything stays on the device if it fits. `device`: by default the process's
        first; of several, each has a share of the blocks, and tokens pass from one to the other
        (`memory.max_vram_bytes` may be a tuple then, with one for each). `in_flight`: the most jobs that share the weights on their way over the device, 16 by
        default.

        Raises CheckpointError if the folder is missing, foreign or damaged; ConversionError if
        other programs' files have not exactly the model's tensors.
        """
        if dtype is not None:
            checks.one_of("dtype", dtype, COMPUTE)
        memory = Memory() if memory is None else checks.instance("memory", memory, Memory)
        files = open_model(TINY if path is None else path)
        placement = Placement.on(*_devices(device))
        for remark in files.remarks:
            warnings.warn(remark, ZImageWarning, stacklevel=2)
        control_name = None
        if control is not None:
            of_control = open_control(control, files.config)
            files, control_name = Controlled(files, of_control), of_control.path.resolve().name
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
            files,
            prompts_of.Prompts.load(files.tokenizer()),
            dtype,
            memory,
            placement,
            IN_FLIGHT if in_flight is None else checks.whole("in_flight", in_flight, 1, 64),
            control_name,
        )

    def __repr__(self) -> str:
        return f"<ZImage {self.name}: {self.describe()}>"

    def measure(self) -> None:
        """Measure the device's rates, for half a second, where no table has them: plans have
        predicted seconds then."""
        self._plans.measure()

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
            f"computing in {self.dtype} on {self._placement}"
        )

    @property
    def in_flight(self) -> int:
        """The most jobs that share the weights on their way over the device."""
        return self._engine.most

    @property
    def signs_of_life(self) -> int:
        """Programs that were compiled or launched so far."""
        launches = sum(recorder.launches for recorder in self._engine.recorder.each)
        return launches + self._programs.compilations

    @property
    def held(self) -> dict[str, int]:
        """Device bytes now, by array: parameters, slots, and what belongs to jobs in flight."""
        each = self._engine.recorder.each
        if len(each) == 1:
            return dict(each[0].held)
        return {
            f"device {recorder.device}: {name}": nbytes
            for recorder in each
            for name, nbytes in recorder.held.items()
        }

    # -- the job -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        features: Features | Sequence[Features] | None = None,
        seed: int | Sequence[int] = -1,
        negative_prompt: str = "",
        negative_features: Features | None = None,
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
        latents: Float[np.ndarray, "B h w C"] | None = None,
        noise_mask: Float[np.ndarray, "m h w"] | None = None,
        strength: float | None = None,
        strength_rule: str = "noise",
        fit: str | None = None,
        mask: Source | None = None,
        mask_blur: float | None = None,
        mask_grow: int | None = None,
        crop_mask: int | None = None,
        differential: bool = False,
        region: int | None = None,
        control_image: Source | Canvas | None = None,
        control_scale: float | None = None,
        lora: Sequence[tuple[str | Path, float | int]] = (),
        lora_merge: bool = False,
        kv: KVPolicy | None = None,
        attention: str = "auto",
        prompt_weights: bool = False,
        text_weight: float = 1.0,
        variance: float = 0.0,
        output: str = "picture",
        memory: Memory | None = None,
        on_plan: Callable[[Plan, Budget], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Draw pictures of one size: one per prompt and seed; a single prompt or seed serves all.

        `width`, `height`: pixels; None is the model's own, or the image's. `steps`: evaluations of
        the DiT (NFEs); `sampler` heun takes nearly two for a step. `guidance`: as in diffusers, 0
        is off; ComfyUI's cfg is one more. For steps, shift and guidance, None is the checkpoint's
        default. `sampler`, `sigmas`: model.samplers lists them. `features`, `negative_features`:
        what `encode` gives for a text, in place of the text, which is not encoded then. The bits are
        the same if the texts of a job were encoded together.

        `image`: a picture to begin from (a path, a PIL image, or an array [H, W, 3 or 4] of uint8
        or of floats in 0..1), fitted to the size by `fit` (crop, pad or stretch). `strength`: how
        much of it is redrawn, 0 to 1; `strength_rule` says what that means. `mask`: white is
        redrawn, black keeps its bytes; without one, transparent parts of the image are redrawn.
        `mask_blur` and `mask_grow`: pixels of the image. `crop_mask`: draw only the masked part,
        with so many pixels around it, at the full size, and paste it back. `differential`: grey
        says how much is redrawn. `region`: draw in overlapping regions with sides of so many
        pixels; by default only if the size is too large for the model or the memory.

        `latents`: what to begin from in place of an image, as `Result.latents` has them, of each
        picture or one for all. `noise_mask`: [1 or B, h, w], 0 to 1, what is redrawn of them.

        `control_image`: what the picture follows (edges, depth, a pose, as the ControlNet takes
        them), opaque, fitted to the size like `image`; `control_scale`: how much, by default 0.75.
        The ControlNet is the one given to `load`.
        `lora`: LoRA files with their weights, as in [("style.safetensors", 0.8)]; weights.lora has
        the spellings. They are computed beside the model's own parameters, whose bytes stay as they
        are, so that another weight or another file reads nothing of the model again. `lora_merge`:
        they are added to the parameters when these are read, which rounds the sum, and reads the
        model again for every other set of LoRAs.

        `prompt_weights`: brackets weigh words, as in "a (red:1.3) circle" (model.emphasis has the
        syntax); without it they are text. `text_weight`: weight of text in quotes, 0 to 4.
        `variance`: noise on each prompt's features from the picture's seed, 0 to 1, so that
        pictures of one prompt differ more. `kv`: how the DiT stores K and V (precision, groups,
        reuse), which changes the picture. `attention`: the kernel (model.attention.Attend lists them), which
        changes last bits. `output`: "picture" gives pictures of 8 bits, "image" gives
        `Result.images` in floats, "latents" leaves out the VAE's decoder. `memory`: replaces, for
        this job, the one given to `load`.

        `on_plan(plan, budget)`, budget in bytes (a tuple for several devices), is called before anything runs, and again if the
        device ran out of memory and another plan is tried. `on_step(step)` is called after every
        NFE. It may raise to stop the job; the schedule `scan` runs to its end first.

        Raises UsageError for a job that cannot be drawn, or if called from a callback of this
        model's own job; OutOfMemoryError if no plan fits; NonFiniteError if the latents are not
        finite;
        ForeignError or ConversionError for a file that is no LoRA of this model.
        """
        request = self._request(
            prompt,
            features=features,
            seed=seed,
            negative_prompt=negative_prompt,
            negative_features=negative_features,
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
            image=image,
            latents=latents,
            noise_mask=noise_mask,
            strength=strength,
            strength_rule=strength_rule,
            fit=fit,
            mask=mask,
            mask_blur=mask_blur,
            mask_grow=mask_grow,
            crop_mask=crop_mask,
            differential=differential,
            region=region,
            control_image=control_image,
            control_scale=control_scale,
            lora=lora,
            lora_merge=lora_merge,
            kv=kv,
            attention=attention,
            prompt_weights=prompt_weights,
            text_weight=text_weight,
            variance=variance,
            output=output,
            memory=memory,
        )
        if on_plan is not None:
            with self._engine.callback():
                on_plan(request.plan, request.budget)
        request.wants_steps = on_step is not None
        return self._follow(request, on_plan, on_step)

    def submit(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        on_event: Callable[[Event | None], None] | None = None,
        **options: Any,
    ) -> Request:
        """Like `generate`, but returns at once; `result` of the Request waits.

        Requests in flight together share every copy of the weights, and draw the same pictures as
        alone. `options`: the arguments of `generate`, without callbacks. `on_event(event)` is
        called in the engine's thread, for which it must not wait: Started, Planned, Step, a
        warning's text, and None at the end. Raises UsageError and OutOfMemoryError.
        """
        return self.submit_all([{"prompt": prompt, "on_event": on_event, **options}])[0]

    def plan(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Planned:
        """The plan that a job would have alone, and the budget in bytes; nothing runs.

        `options`: the arguments of `generate`. Raises UsageError and OutOfMemoryError.
        """
        request = self._request(prompt, **options)
        return Planned(request.plan, request.budget)

    def read(self, plan: Plan) -> int:
        """Read into host memory what a plan streams from there. Returns the bytes.

        Without it the first picture waits for the disk.
        """
        streams = [choice.stream for choice in plan.choices.values() if choice.stream is not None]
        return sum(self._store.read(stream, plan.host_window) for stream in streams)

    def submit_all(self, jobs: Sequence[Mapping[str, Any]]) -> list[Request]:
        """Submit jobs, each the arguments of `submit`, so that they begin together."""

        def request(*, on_event=None, **job: Any) -> Request:
            made = self._request(**job)
            made.listener, made.wants_steps = on_event, on_event is not None
            return made

        requests = [request(**job) for job in jobs]
        self._engine.submit(*requests)
        return requests

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_weights: bool = False,
        text_weight: float = 1.0,
        lora: Sequence[tuple[str | Path, float | int]] = (),
        memory: Memory | None = None,
    ) -> list[Float[np.ndarray, "T E"]]:
        """Features of each text: Qwen3's hidden_states[-2], moved by their weights.

        The options are those of `generate`, and so is what it raises; a text may be empty.
        """
        request = self._encoding(
            texts, memory, lora, prompt_weights=prompt_weights, text_weight=text_weight
        )
        return self._follow(request, None, None)

    def submit_encode(
        self,
        texts: Sequence[str],
        *,
        on_event: Callable[[Event | None], None] | None = None,
        lora: Sequence[tuple[str | Path, float | int]] = (),
        memory: Memory | None = None,
        **options: Any,
    ) -> Request:
        """Like `encode`, but returns at once, as `submit` does."""
        request = self._encoding(texts, memory, lora, **options)
        request.listener = on_event
        self._engine.submit(request)
        return request

    def _encoding(
        self, texts: Sequence[str], memory: Memory | None, lora: Any, **options: Any
    ) -> Request:
        def features(request: Request) -> list[Float[np.ndarray, "T E"]]:
            found = request.attempt.results["text"]
            return [found[text] for text in request.job.prompts]

        options |= {"seed": 0, "steps": 1, "guidance": 0.0, "draws": False}
        return self._intake.request(
            *(texts, self._memory(memory), tuple(TEXT), features),
            *(self._fittings.of(lora), options),
        )

    def decode(
        self, latents: Float[np.ndarray, "B h w C"], *, memory: Memory | None = None
    ) -> Float[np.ndarray, "B H W 3"]:
        """What the VAE's decoder makes of latents, from 0 to 1; in tiles with `Memory.vae_tile`.
        The arguments are those of `generate`, and so is what it raises."""
        found = self.generate(latents=latents, strength=0.0, output="image", memory=memory, seed=0)
        assert found.images is not None
        return found.images

    def _follow(
        self,
        request: Request,
        on_plan: Callable[[Plan, Budget], None] | None,
        on_step: Callable[[Step], None] | None,
    ) -> Any:
        """Submit a request and call the callbacks until it has ended. What they raise cancels
        it."""
        self._engine.submit(request)
        try:
            for event in request.events():
                with self._engine.callback():
                    if isinstance(event, str):
                        warnings.warn(event, ZImageWarning, stacklevel=3)
                    elif isinstance(event, Step) and on_step is not None:
                        on_step(event)
                    elif isinstance(event, Planned) and on_plan is not None:
                        on_plan(event.plan, event.budget)
        except BaseException:
            request.cancel()
            request.wait()
            raise
        return request.result()

    def _request(
        self,
        prompt: Any = None,
        *,
        image: Source | Canvas | None = None,
        control_image: Source | Canvas | None = None,
        latents: Any = None,
        noise_mask: Any = None,
        width: int | None = None,
        height: int | None = None,
        mask: Source | None = None,
        fit: str | None = None,
        mask_blur: float | None = None,
        mask_grow: int | None = None,
        crop_mask: int | None = None,
        lora: object = (),
        lora_merge: object = False,
        memory: Memory | None = None,
        **options: Any,
    ) -> Request:
        """The request of a job. The arguments are those of `generate`."""
        fitting: dict[str, Any] = {
            "mask": mask,
            "fit": fit,
            "mask_blur": mask_blur,
            "mask_grow": mask_grow,
            "crop_mask": crop_mask,
        }
        given = {name: value for name, value in fitting.items() if value is not None}
        self._engine.check_caller()
        if image is not None and latents is not None:
            raise UsageError("image and latents: give one of them to begin from")
        if noise_mask is not None and latents is None:
            raise UsageError("noise_mask needs latents: there are none")
        canvas: Canvas | LatentCanvas | None
        if image is None or isinstance(image, Canvas):
            canvas = image
            for name in given:
                why = "there is none" if image is None else "a canvas has its own"
                raise UsageError(f"{name} needs an image: {why}")
        else:
            canvas = self.canvas(image, width=width, height=height, **given)
        if latents is not None:
            canvas = LatentCanvas.of(self.config, latents, noise_mask)
        known = inspect.signature(Job.of).parameters.keys() - {"draws", "canvas", "control"}
        for name in options.keys() - known:
            raise UsageError(
                f"no such argument: {printable(name, 40)}; ZImage.generate has them all"
            )
        if control_image is not None:
            if canvas is not None:
                width, height = canvas.size
            if not isinstance(control_image, Canvas):
                control_image = self.control_canvas(control_image, width=width, height=height)
            options["control"] = control_image
        options |= {"width": width, "height": height, "canvas": canvas}
        stages = WITHOUT_DECODE if options.get("output") == "latents" else STAGES
        memory, fitted = self._memory(memory), self._fittings.of(lora, merge=lora_merge)
        return self._intake.request(prompt, memory, tuple(stages), self._result, fitted, options)

    # -- pictures to begin from --------------------------------------------------------------------

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

    def control_canvas(
        self,
        image: Source,
        *,
        width: int | None = None,
        height: int | None = None,
        fit: str = "crop",
    ) -> Canvas:
        """A control image at the size to draw, by default its own: `generate` takes it as its
        `control_image`. `fit`: as of `canvas`. Raises UsageError."""
        multiple = self.config.pixel_multiple
        return Canvas.of_control(image, width=width, height=height, multiple=multiple, fit=fit)

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

    # -- after the stages --------------------------------------------------------------------------

    def _result(self, request: Request) -> Result:
        attempt = request.attempt
        job, latents = attempt.job, attempt.latents
        common = reports.metadata(attempt, self.name, self.control_name)
        each = [
            {
                "prompt": text,
                "seed": seed,
                "latents_sha256": hashlib.sha256(row.tobytes()).hexdigest(),
            }
            for text, seed, row in zip(job.prompts, job.seeds, latents, strict=True)
        ]
        drawn = attempt.results.get(request.stages[-1].name, ())  # latents may be as they were
        pictures, images = [], None
        if job.output == "picture":
            pictures = [
                Picture(pixels, {**own, **common}) for pixels, own in zip(drawn, each, strict=True)
            ]
        elif job.output == "image":
            images = np.stack(drawn)
        report = reports.report(attempt, common, each, request.warned, self._store.host_bytes)
        return Result(pictures, images, report, latents, attempt.work, attempt.plan, attempt.ledger)


def _devices(given: jax.Device | Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices of `load`. Raises UsageError for one that is given twice."""
    found = () if given is None else (given,) if isinstance(given, jax.Device) else tuple(given)
    if len(set(found)) < len(found):
        raise UsageError("device: each is given once")
    return found
