"""Prompt to picture: the only place that composes text encoder, DiT, sampler and VAE.

    from zimage_jax import ZImage

    result = ZImage.load("model").generate("a red circle", seed=7)
    result.pictures[0].save("circle.png")

Axes: B pictures, G contexts (B, or 2 B with guidance), h, w latent rows and columns, C latent channels.
"""

import hashlib
import importlib.metadata
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from . import dit, image, prompt, sampling, text_encoder, vae
from .checkpoint import COMPONENTS, Checkpoint
from .errors import NonFiniteError, UsageError
from .ops import Attend
from .staging import Ledger, Program, allocator_peak

SCHEDULES = ("resident", "scan")
TINY = Path(__file__).parent / "assets" / "tiny"


class ZImageWarning(UserWarning):
    """Something was not done as the words of the job suggest."""


@dataclass(frozen=True)
class Step:
    """What a callback sees after each NFE."""

    index: int  # from 0
    steps: int
    t: float  # the scheduler's time, 1000 sigma, at which the model was evaluated
    latents: Float[np.ndarray, "B h w C"]
    _to_rgb: Callable[[np.ndarray], np.ndarray]

    def previews(self) -> UInt8[np.ndarray, "B h w 3"]:
        """Small pictures, made linearly from the latents."""
        return self._to_rgb(self.latents)


@dataclass(frozen=True)
class Picture:
    pixels: UInt8[np.ndarray, "H W 3"]
    metadata: dict

    def save(self, path: str | Path, *, metadata: bool = True, overwrite: bool = False) -> Path:
        """Write a PNG; a name in use gets "-2", … unless `overwrite`. Returns the path used."""
        data = image.encode_png(self.pixels, self.metadata if metadata else None)
        return image.write_new(Path(path), data, overwrite=overwrite)


@dataclass(frozen=True)
class Result:
    pictures: list[Picture]
    report: dict  # one value per picture for prompt, seed, latents_sha256: a list when there are several
    latents: Float[np.ndarray, "B h w C"]


@dataclass(frozen=True)
class Job:
    """One batch of pictures of one size: what `generate` was asked for, checked and with its seeds drawn."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    noise: str

    def __post_init__(self):
        for text in self.prompts:
            if not text.strip():
                raise UsageError("the prompt is empty: say what to draw")
        for seed in self.seeds:
            if not 0 <= seed <= sampling.LARGEST_SEED:
                raise UsageError(f"seed {seed} is out of range: 0 to {sampling.LARGEST_SEED}, or -1 for a random one")
        if self.noise not in sampling.NOISE:
            raise UsageError(f"noise {self.noise!r}: expected one of {', '.join(sampling.NOISE)}")
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"steps must be from 1 to 1000, got {self.steps}")
        if not 0 <= self.guidance <= 100:
            raise UsageError(f"guidance must be from 0 (off) to 100, got {self.guidance}")


class ZImage:
    """A loaded model. `generate` may be called any number of times."""

    def __init__(self, checkpoint: Checkpoint, models: dict, prompts: prompt.Prompts, dtype, ledger: Ledger):
        self.config, self.name = checkpoint.config, checkpoint.path.resolve().name
        self.dtype = jnp.dtype(dtype)
        self._models, self._prompts, self._load_ledger = models, prompts, ledger
        self._programs: dict[tuple, Program] = {}
        self._preview_basis: np.ndarray | None = None
        self._warnings: list[str] = []

    @classmethod
    def load(cls, path: str | Path | None = None, *, dtype: str | None = None) -> "ZImage":
        """Load a native checkpoint, or the tiny model inside the package when none is named.

        `dtype` is what is computed in: bfloat16 on a GPU and float32 on a CPU by default.

        Raises CheckpointError when the folder is missing, foreign or damaged.
        """
        ledger = Ledger()
        with ledger.stage("load"):
            checkpoint = Checkpoint(path or TINY)
            prompts = prompt.Prompts.load(checkpoint.tokenizer)
            models = {}
            for component in COMPONENTS:
                models[component] = checkpoint.load(component)
                ledger.hold(component, models[component])
        return cls(checkpoint, models, prompts, dtype or default_dtype(), ledger)

    def describe(self) -> str:
        """One line for a person: what was loaded and where it computes."""
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(model)) for name, model in self._models.items()}
        held = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3g} B" for name, size in sizes.items())
        return f"{held}; computing in {self.dtype} on {jax.local_devices()[0].device_kind}"

    # -- the job ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = -1,
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int = 8,
        guidance: float = 0.0,
        noise: str = "torch",
        schedule: str = "resident",
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Pictures of one size, one per prompt or per seed (one of either serves all of the other).

        `steps` counts evaluations of the DiT (NFEs); `guidance` is diffusers' (0 is off; ComfyUI's cfg minus one).
        `on_step` is called after every NFE and may raise to stop. Raises UsageError for a job that cannot be drawn and
        NonFiniteError when the latents leave the finite numbers.
        """
        self._warnings = []
        job = self._job(prompt, seed, negative_prompt, width, height, steps, guidance, noise)
        if schedule not in SCHEDULES:
            raise UsageError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
        ledger, began = Ledger(), time.perf_counter()
        ledger.held.update(self._load_ledger.held)
        with ledger.stage("text"):
            context, sides = self._context(job, ledger)
        with ledger.stage("denoise"):
            latents = self._denoise(job, context, sides, schedule, on_step, ledger)
        with ledger.stage("decode"):
            pixels = [self._decode(row, ledger) for row in latents]
        ledger.seconds["total"] = time.perf_counter() - began
        return self._result(job, schedule, np.asarray(latents), pixels, ledger)

    def _job(self, prompt, seed, negative_prompt, width, height, steps, guidance, noise) -> Job:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        count = max(len(prompts), len(seeds))
        if not prompts or not seeds or {len(prompts), len(seeds)} - {1, count}:
            raise UsageError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: expected as many of one as of the other, or one"
            )
        # a drawn seed stays below 2^32, where every noise and every other program takes it
        drawn = [secrets.randbits(32) if s == -1 else s for s in (seeds * count if len(seeds) == 1 else seeds)]
        default = self.config.vae.sample_size
        job = Job(
            tuple(prompts * count if len(prompts) == 1 else prompts), tuple(drawn), negative_prompt,
            width or default, height or default, steps, float(guidance), noise,
        )  # fmt: skip
        self.check_size(job.width, job.height)
        if negative_prompt and not job.guidance:
            self._warn("the negative prompt has no effect while guidance is 0")
        if job.noise == "torch":
            for s in drawn:
                if s >> 32:
                    self._warn(
                        f"seed {s} draws the same noise as {s & 0xFFFFFFFF}: PyTorch uses 32 bits (--noise jax: all)"
                    )
        return job

    def check_size(self, width: int, height: int) -> None:
        """Raises UsageError for a size the model cannot draw."""
        multiple = self.config.pixel_multiple
        for name, value in (("width", width), ("height", height)):
            if value < multiple or value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UsageError(f"{name} must be a multiple of {multiple}, got {value} (the nearest is {near})")
        limits = [n * multiple for n in self.config.transformer.axes_lens[1:]]
        if height > limits[0] or width > limits[1]:
            raise UsageError(
                f"this model draws at most {limits[1]} x {limits[0]} pixels, {width} x {height} were asked for"
            )

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        warnings.warn(message, ZImageWarning, stacklevel=4)

    # -- its stages ---------------------------------------------------------------------------------------------------

    def _program(self, function: Callable, **static) -> Program:
        key = (function, *static.items())
        if key not in self._programs:
            self._programs[key] = Program(function, **static)
        return self._programs[key]

    def _attend(self, batch: int, tokens: int) -> Attend:
        heads = self.config.transformer.n_heads
        return Attend.choose(jax.default_backend(), self.dtype, batch, tokens, tokens, heads)

    def encode(self, texts: Sequence[str], ledger: Ledger | None = None) -> list[Float[np.ndarray, "T E"]]:
        """Text features of each prompt, without padding: Qwen3's hidden_states[-2]."""
        encoded = [self._prompts.encode(text) for text in texts]
        for e in encoded:
            if e.cut:
                self._warn(f"the prompt is longer than {prompt.MAX_TOKENS} tokens; cut off: {e.cut!r}")
        ids, lengths = prompt.batch_ids(encoded)
        model = self._models["text_encoder"]
        x = text_encoder.embed(model.embed_tokens[...], ids).astype(self.dtype)
        features = self._program(text_encoder.run)(ledger or Ledger(), tuple(model.layers), x)
        return [np.asarray(f[:n]) for f, n in zip(features, lengths, strict=True)]

    def _context(self, job: Job, ledger: Ledger) -> tuple[Float[jax.Array, "G L D"], dit.Sides]:
        texts = job.prompts + (job.negative_prompt,) * len(job.prompts) * bool(job.guidance)
        unique = list(dict.fromkeys(texts))
        features = dict(zip(unique, self.encode(unique, ledger), strict=True))
        lengths = np.array([len(features[t]) for t in texts], np.int32)
        padded = np.zeros(
            (len(texts), prompt.bucket(int(lengths.max())), self.config.text_encoder.hidden_size), self.dtype
        )
        for row, text in zip(padded, texts, strict=True):
            row[: len(features[text])] = features[text]
        scale = self.config.vae.scale
        sides = dit.sides(self.config.transformer, job.height // scale, job.width // scale, lengths, padded.shape[1])
        run = self._program(dit.context, attend=self._attend(*padded.shape[:2]))
        return run(ledger, self._models["transformer"], padded, lengths, sides.caption), sides

    def _denoise(self, job, context, sides, schedule, on_step, ledger) -> Float[jax.Array | np.ndarray, "B h w C"]:
        config, scale = self.config, self.config.vae.scale
        size = job.height // scale, job.width // scale, config.transformer.in_channels
        latents = np.stack([sampling.NOISE[job.noise](seed, *size) for seed in job.seeds])
        sigmas = sampling.sigmas(job.steps, config.scheduler.shift)
        times = sampling.times(sigmas)
        static = {"is_guided": bool(job.guidance), "attend": self._attend(*sides.joint.cos.shape[:2])}
        model, guidance = self._models["transformer"], np.float32(job.guidance)

        def report(index, latents) -> None:
            index, latents = int(index), np.asarray(latents)
            if not np.isfinite(latents).all():
                raise NonFiniteError(
                    f"the latents are not finite after NFE {index + 1} of {job.steps} in {self.dtype}; the weights are "
                    "damaged or the dtype is too narrow (--dtype float32)"
                )
            if on_step is not None:
                on_step(Step(index, job.steps, float(1000 * sigmas[index]), latents, self._to_rgb))

        if schedule == "scan":
            run = self._program(sampling.sample, **static, on_step=report if on_step else None)
            latents = run(ledger, model, latents, sigmas, times, context, sides, guidance)
            if on_step is None:
                report(job.steps - 1, latents)
            return latents
        run = self._program(sampling.nfe, **static)
        for index in range(job.steps):
            now = sigmas[index], sigmas[index + 1], times[index]
            latents = run(ledger, model, latents, *now, context, sides, guidance)
            report(index, latents)
        return latents

    def _decode(self, latents: Float[jax.Array, "h w C"], ledger: Ledger) -> UInt8[np.ndarray, "H W 3"]:
        pixels = self._program(vae.decode, dtype=self.dtype)(ledger, self._models["vae"], latents[None])
        return image.to_uint8(np.asarray(pixels[0]))

    def _to_rgb(self, latents: Float[np.ndarray, "B h w C"]) -> UInt8[np.ndarray, "B h w 3"]:
        """Linear in the latents, with the VAE's own answer to each channel: what it decodes from constant latents."""
        if self._preview_basis is None:
            channels = latents.shape[-1]
            probes = np.concatenate([np.zeros((1, channels)), np.eye(channels), -np.eye(channels)]).astype(np.float32)
            decode = self._program(vae.decode, dtype=self.dtype)
            flat = [
                np.asarray(decode(Ledger(), self._models["vae"], np.tile(p, (1, 4, 4, 1)))).mean((0, 1, 2))
                for p in probes
            ]
            zero, plus, minus = flat[0], np.array(flat[1 : channels + 1]), np.array(flat[channels + 1 :])
            self._preview_basis = np.concatenate([(plus - minus) / 2, zero[None]])
        *basis, zero = self._preview_basis
        return image.to_uint8(latents @ np.array(basis) + zero)

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _result(self, job: Job, schedule: str, latents, pixels, ledger: Ledger) -> Result:
        common = {
            "width": job.width,
            "height": job.height,
            "steps": job.steps,
            "guidance": job.guidance,
            "negative_prompt": job.negative_prompt,
            "noise": job.noise,
            "dtype": str(self.dtype),
            "model": self.name,
            "versions": versions(),
        }
        each = [
            {"prompt": text, "seed": seed, "latents_sha256": hashlib.sha256(row.tobytes()).hexdigest()}
            for text, seed, row in zip(job.prompts, job.seeds, latents, strict=True)
        ]
        pictures = [Picture(p, {**own, **common}) for p, own in zip(pixels, each, strict=True)]
        seconds = {**self._load_ledger.seconds, **ledger.seconds}
        seconds["compile"] = sum(program.compile_seconds for program in self._programs.values())
        measured = allocator_peak()
        report = {
            **{key: each[0][key] if len(each) == 1 else [own[key] for own in each] for key in each[0]},
            **common,
            "schedule": schedule,
            "device": jax.local_devices()[0].device_kind,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "warnings": self._warnings,
            "peak_device_bytes": ledger.peak if measured is None else measured,
            "peak_device_bytes_from": "ledger" if measured is None else "allocator",
            "peak_device_bytes_by_stage": ledger.peak_by_stage,
        }
        return Result(pictures, report, latents)


def default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("zimage_jax", "jax", "jaxlib", "flax")}
    return found | {"python": platform.python_version()}
