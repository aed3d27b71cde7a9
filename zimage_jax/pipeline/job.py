"""A pipeline's input and output: jobs, steps, pictures, results.

Axes: B pictures, H, W pixels, h, w latent rows and columns, C latent channels.
"""

import contextlib
import operator
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Float32, UInt8

from .. import checks
from ..errors import UsageError
from ..files import printable, write_whole
from ..model import emphasis, samplers, sampling
from ..model.attention import CHOICES
from ..model.config import ModelConfig
from ..model.kv import KVPolicy
from ..model.samplers import Trajectory
from ..planning.plan import Plan
from ..planning.work import Work
from ..runtime.ledger import Ledger
from ..units import size
from . import picture as image
from .canvas import Canvas
from .given import Features, LatentCanvas, features_of
from .size import check_size, region_of

CONTROL_SCALE = 0.75  # diffusers' default
# what a job gives: pictures of 8 bits, what the VAE decodes in floats, or latents alone
OUTPUTS = ("picture", "image", "latents")


class ZImageWarning(UserWarning):
    """The job runs, but not exactly as requested."""


@dataclass(frozen=True)
class Step:
    """The argument of `on_step`, after each NFE."""

    index: int  # from 0
    steps: int
    t: float  # scheduler time, 1000 sigma, at which the DiT was evaluated
    latents: Float[np.ndarray, "B h w C"]
    _to_rgb: Callable[[np.ndarray], np.ndarray]

    def __repr__(self) -> str:
        return f"<Step {self.index + 1} of {self.steps}, t {self.t:.1f}>"

    def previews(self) -> UInt8[np.ndarray, "B h w 3"]:
        """Small pictures: a linear map of the latents to colours, a pixel per latent."""
        return self._to_rgb(self.latents)


@dataclass(frozen=True)
class Picture:
    pixels: UInt8[np.ndarray, "H W 3"]
    metadata: dict

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        prompt = printable(self.metadata.get("prompt", ""), 40)
        return f"<Picture {width}x{height}, seed {self.metadata.get('seed')}, {prompt!r}>"

    def save(self, path: str | Path, *, metadata: bool = True, overwrite: bool = False) -> Path:
        """Write a PNG and return its path: a name in use gets "-2", … unless `overwrite`.

        Raises UsageError if `path` names no file, OutputError if the file cannot be written.
        """
        if not isinstance(path, str | os.PathLike):
            checks.refuse("path", "a path", path)
        if Path(path).name in ("", "..") or os.path.isdir(path):
            raise UsageError(f"path {checks.shown(str(path))} names a folder: expected a file")
        data = image.encode_png(self.pixels, self.metadata if metadata else None)
        return write_whole(Path(path), data, overwrite=overwrite)


class Report(TypedDict):
    """The report of a batch; for several pictures, `prompt`, `seed` and `latents_sha256` are lists.

    Bytes are of device memory unless the key says otherwise; seconds are wall-clock time.
    """

    prompt: str | list[str]
    seed: int | list[int]
    latents_sha256: str | list[str]
    width: int
    height: int
    steps: int
    nfes: int
    guidance: float
    negative_prompt: str
    noise: str
    sampler: str
    sigmas: str
    shift: float
    prompt_weights: bool
    text_weight: float
    variance: float
    cfg_normalization: NotRequired[float]
    cfg_truncation: NotRequired[float]
    region: NotRequired[int]
    lora: NotRequired[list[dict[str, Any]]]  # names, weights and checksums
    image: NotRequired[dict[str, Any]]  # what a picture began from, and its strength
    control: NotRequired[dict[str, Any]]  # the ControlNet, the control image and its scale
    kv: dict[str, Any]  # arguments of KVPolicy.parse
    dtype: str  # of the computation
    formats: str  # of the stored parameters
    model: str
    versions: dict[str, str]
    schedule: str
    chunks: int  # of the main blocks
    resident_chunks: int
    attention: str  # how the main blocks' attention was computed
    device: str
    seconds: dict[str, float]  # by stage, total, load and compile
    first_preview_seconds: float | None  # until the first NFE's latents
    compilations: int
    warnings: list[str]
    predicted_seconds: float | None
    predicted_peak_bytes: int
    predicted_peak_bytes_by_stage: dict[str, int]
    predicted_arrays_by_stage: dict[str, dict[str, int]]
    peak_device_bytes: int
    peak_device_bytes_from: str  # "allocator", or "ledger" if the device counts no bytes
    ledger_peak_bytes: int
    allocator_peak_bytes: int | None
    peak_device_bytes_by_stage: dict[str, int]  # the ledger's
    copied_bytes: int  # from host to device
    copied_bytes_by_stage: dict[str, int]
    copied_bytes_saved_by_reuse: int
    most_jobs_in_flight: int  # that shared a stage with this one, itself included
    kv_bytes: int  # the most K and V held at once
    kv_bytes_without_policy: int
    kv_bytes_of_a_block_by_nfe: list[int]
    host_bytes: int  # of parameters kept in host memory between jobs
    devices: list[dict[str, Any]]  # peaks, copied bytes and chunks of each


@dataclass(frozen=True)
class Result:
    """`pictures` is empty unless they were the `output` asked for, and `images` None."""

    pictures: list[Picture]
    images: Float32[np.ndarray, "B H W 3"] | None  # from 0 to 1
    report: Report
    latents: Float[np.ndarray, "B h w C"]
    work: Work
    plan: Plan
    ledger: Ledger  # every copy and run; `ledger.trace()` is their timeline

    def __repr__(self) -> str:
        report = self.report
        return (
            f"<Result {len(self.latents)} of {report['width']}x{report['height']}, "
            f"{report['steps']} NFEs, schedule {report['schedule']}, "
            f"{report['seconds']['total']:.1f} s, peak {size(report['peak_device_bytes'])}>"
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch of pictures of one size: the checked arguments of `generate`."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    noise: str
    sampler: str
    sigmas: str
    shift: float
    cfg_normalization: float
    cfg_truncation: float
    features: tuple[Features, ...]  # of each prompt, in place of its text; () for texts
    negative_features: Features | None  # in place of the negative prompt
    canvas: Canvas | LatentCanvas | None  # what to begin from, and its mask
    control: Canvas | None  # the control image, which has no mask
    control_scale: float
    strength: float | None  # None without a canvas
    strength_rule: str
    differential: bool
    region: int | None  # pixels of a region's side
    kv: KVPolicy
    attention: str
    prompt_weights: bool
    text_weight: float
    variance: float
    output: str  # one of OUTPUTS

    @property
    def trajectory(self) -> Trajectory:
        return Trajectory.of(
            self.steps,
            self.shift,
            sampler=self.sampler,
            schedule=self.sigmas,
            strength=self.strength,
            rule=self.strength_rule,
            guidance=self.guidance,
            normalization=self.cfg_normalization,
            truncation=self.cfg_truncation,
            is_masked=self.canvas is not None and self.canvas.mask is not None,
            is_differential=self.differential,
        )

    def in_regions(self, config: ModelConfig) -> "Job | None":
        """This job in regions of the model's own size; None if that makes nothing smaller."""
        side = config.vae.sample_size
        if self.canvas is None or self.region is not None or max(self.width, self.height) <= side:
            return None
        return replace(self, region=side)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode: the prompts, and with guidance the negative prompt, but for those
        whose features are given."""
        negative = self.guidance and self.negative_features is None
        return (() if self.features else self.prompts) + (
            (self.negative_prompt,) if negative else ()
        )

    def features_of_contexts(self, of_text: Mapping[str, Features]) -> list[Features]:
        """Features of each context: the prompts', then with guidance the negative ones for each.
        Those of prompts vary with the picture's seed. `of_text`: those of `texts`."""
        own = self.features or [of_text[text] for text in self.prompts]
        varied = [
            emphasis.vary(of_prompt, self.variance, seed)
            for of_prompt, seed in zip(own, self.seeds, strict=True)
        ]
        if not self.guidance:
            return varied
        negative = self.negative_features
        if negative is None:
            negative = of_text[self.negative_prompt]
        return varied + [negative] * len(varied)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prompt: object,
        *,
        seed: object = -1,
        negative_prompt: object = "",
        width: object = None,
        height: object = None,
        steps: object = None,
        guidance: object = None,
        noise: object = "torch",
        sampler: object = "euler",
        sigmas: object = "simple",
        shift: object = None,
        cfg_normalization: object = 0.0,
        cfg_truncation: object = 1.0,
        features: object = None,
        negative_features: object = None,
        canvas: Canvas | LatentCanvas | None = None,
        control: Canvas | None = None,
        control_scale: object = None,
        strength: object = None,
        strength_rule: object = "noise",
        differential: object = False,
        region: object = None,
        kv: object = None,
        attention: object = "auto",
        prompt_weights: object = False,
        text_weight: object = 1.0,
        variance: object = 0.0,
        output: object = "picture",
        draws: bool = True,
    ) -> "Job":
        """Check the type and the bounds of each value; None is replaced by the model's default.

        `draws`: whether there will be NFEs; without any, texts may be empty or missing. Raises
        UsageError.
        """
        draws = draws and strength != 0
        given = () if features is None else features_of(config, "features", features)
        prompts = _prompts(prompt, len(given), draws)
        seeds = _several("seed", seed, int)
        count = _count(prompts, seeds, canvas)
        side, defaults = config.vae.sample_size, config.defaults
        if guidance is None:
            guidance = defaults.guidance
        if shift is None:
            shift = config.scheduler.shift
        if canvas is not None:
            _refuse_other_size(width, height, canvas.size, "the canvas")
            width, height = canvas.size
            region = region_of(config, width, height) if region is None else region
            strength = _strength(canvas, region is not None) if strength is None else strength
        elif strength is not None:
            raise UsageError("strength needs an image: there is none to begin from")
        if control is not None:
            _check_control(config, canvas)
            _refuse_other_size(width, height, control.size, "the control image")
            width, height = control.size
        elif control_scale is not None:
            raise UsageError("control_scale needs a control_image: there is none")
        job = cls(
            prompts=tuple((prompts * count)[:count]),
            seeds=tuple(_seed(number) for number in (seeds * count)[:count]),
            negative_prompt=checks.text("negative_prompt", negative_prompt),
            width=side if width is None else checks.whole("width", width),
            height=side if height is None else checks.whole("height", height),
            steps=defaults.steps if steps is None else checks.whole("steps", steps, 1, 1000),
            guidance=checks.real("guidance", guidance, 0, 100),
            noise=checks.one_of("noise", noise, tuple(sampling.NOISE)),
            sampler=checks.one_of("sampler", sampler, tuple(samplers.SAMPLERS)),
            sigmas=checks.one_of("sigmas", sigmas, tuple(samplers.SCHEDULES)),
            shift=checks.real("shift", shift, 0, 100, above=True),
            cfg_normalization=checks.real("cfg_normalization", cfg_normalization, 0, 100),
            cfg_truncation=checks.real("cfg_truncation", cfg_truncation, 0, 1),
            features=(given * count)[:count],
            negative_features=_negative(config, negative_prompt, negative_features),
            canvas=canvas,
            control=control,
            control_scale=checks.real(
                "control_scale", CONTROL_SCALE if control_scale is None else control_scale, 0, 10
            ),
            strength=None if strength is None else checks.real("strength", strength, 0, 1),
            strength_rule=checks.one_of(
                "strength_rule", strength_rule, tuple(samplers.STRENGTH_RULES)
            ),
            differential=checks.instance("differential", differential, bool),
            region=None if region is None else _region(config, region),
            kv=KVPolicy() if kv is None else checks.instance("kv", kv, KVPolicy),
            attention=checks.one_of("attention", attention, CHOICES),
            prompt_weights=checks.instance("prompt_weights", prompt_weights, bool),
            text_weight=checks.real("text_weight", text_weight, 0, emphasis.LARGEST_WEIGHT),
            variance=checks.real("variance", variance, 0, 1),
            output=checks.one_of("output", output, OUTPUTS),
        )
        for text in prompts if draws and job.prompt_weights and not given else ():
            emphasis.check(text)
        if isinstance(canvas, LatentCanvas) and not job.strength and job.output == "latents":
            raise UsageError("strength 0 gives the latents themselves: there is nothing to do")
        check_size(config, job.width, job.height, job.region)
        return job

    @property
    def remarks(self) -> list[str]:
        """One sentence for each part of the request that has no effect."""
        found = []
        if self.differential and (self.canvas is None or self.canvas.mask is None):
            found.append("differential has no effect without a mask")
        if not self.guidance and (self.cfg_normalization or self.cfg_truncation < 1):
            found.append("limits of guidance have no effect while guidance is 0")
        if self.negative_prompt and not self.guidance:
            found.append("the negative prompt has no effect while guidance is 0")
        if self.noise == "torch":
            found += [
                f"seed {s} draws the same noise as {s & 0xFFFFFFFF}: PyTorch uses 32 bits "
                "(--noise jax: all)"
                for s in self.seeds
                if s >> 32
            ]
        return found


def _negative(config: ModelConfig, text: object, features: object) -> Features | None:
    """The features in place of the negative prompt `text`. Raises UsageError."""
    if features is None:
        return None
    if text:
        raise UsageError("negative_prompt and negative_features: give one of them")
    found, *more = features_of(config, "negative_features", features)
    if more:
        raise UsageError("negative_features must be those of one text")
    return found


def _count(prompts: list, seeds: list, canvas: Canvas | LatentCanvas | None) -> int:
    """How many pictures these are. Raises UsageError."""
    count = max(len(prompts), len(seeds), 0 if canvas is None else canvas.count)
    if not prompts or not seeds or any(len(of) not in (1, count) for of in (prompts, seeds)):
        raise UsageError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: expected as many of one as of the "
            "other, or one"
        )
    if canvas is not None and canvas.count not in (1, count):
        raise UsageError(
            f"latents of {canvas.count} pictures, for {count}: expected as many, or one"
        )
    return count


def _refuse_other_size(width: object, height: object, size: tuple[int, int], what: str) -> None:
    """Raises UsageError if a side is given that is not the one of `what`."""
    for name, value, own in zip(("width", "height"), (width, height), size, strict=True):
        if value not in (None, own):
            raise UsageError(f"{name} {checks.shown(value)}: {what} has {own}")


def _check_control(config: ModelConfig, canvas: Canvas | LatentCanvas | None) -> None:
    """Raises UsageError if there can be no control image."""
    if config.control is None:
        raise UsageError(
            "control_image needs a ControlNet: load the model with control (--control FILE)"
        )
    if isinstance(canvas, Canvas) and canvas.cut is not None:
        raise UsageError("control_image cannot be given with crop_mask: it is of the whole picture")


def _strength(canvas: Canvas | LatentCanvas, in_regions: bool) -> float:
    """The strength if none is given. A small picture that is enlarged keeps its composition
    (scripts/results/pictures.md): a region sees a part of it and all of the prompt."""
    if canvas.mask is not None:
        return 1.0
    if canvas.enlarges:
        return 0.3 if in_regions else 0.5
    return 0.6


def _region(config: ModelConfig, value: object) -> int:
    multiple = 2 * config.pixel_multiple
    side = checks.whole("region", value, multiple, 65536)
    if side % multiple:
        raise UsageError(f"region must be a multiple of {multiple}, got {side}")
    return side


def _several(name: str, value: object, kind: type) -> list:
    """One value or an iterable of them, as a list."""
    if isinstance(value, kind):
        return [value]
    if kind is int and hasattr(type(value), "__index__"):  # numpy's integers, and its arrays
        with contextlib.suppress(TypeError):
            return [operator.index(value)]  # type: ignore[arg-type]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        expected = "text, or a list of texts"
        if kind is int:
            expected = "a whole number, or a list of them"
        checks.refuse(name, expected, value)
    return list(value)


def _prompts(value: object, features: int, draws: bool) -> list[str]:
    """The prompts; "" for each whose `features` are given, or that has no effect."""
    if features:
        if value is not None:
            raise UsageError("prompt and features: give one of them")
        return [""] * features
    if value is None:
        if draws:
            raise UsageError("expected a prompt, or its features")
        return [""]
    found = [checks.text("prompt", text) for text in _several("prompt", value, str)]
    if draws and not all(text.strip() for text in found):
        raise UsageError("the prompt is empty: say what to draw")
    return found


def _seed(value: object) -> int:
    """A seed; -1 draws one below 2^32, which all noise generators and other programs accept."""
    seed = checks.whole("seed", value)
    if seed == -1:
        return secrets.randbits(32)
    if not 0 <= seed <= checks.LARGEST_SEED:
        raise UsageError(
            f"seed {checks.shown(seed)} is out of range: "
            f"0 to {checks.LARGEST_SEED}, or -1 for a random one"
        )
    return seed
