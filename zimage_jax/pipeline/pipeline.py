"""Prompt to picture: the only place that composes text encoder, DiT, sampler and VAE.

    from zimage_jax import ZImage

    result = ZImage.load("model").generate("a red circle", seed=7)
    result.pictures[0].save("circle.png")

Axes: B pictures, G contexts (B, or 2 B with guidance), h, w latent rows and columns, C latent
channels."""

import hashlib
import importlib.metadata
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from ..errors import NonFiniteError, OutOfMemoryError, UsageError
from ..model import dit, ops, prompt, sampling, text_encoder, vae
from ..model.kv import KVPolicy
from ..model.vae_strips import decode_strips, decode_tiles
from ..planning import cards
from ..planning.planner import GIB, Memory, Plan, Planner, StreamPlan, Work
from ..runtime.compiled import CompiledCosts, Programs
from ..runtime.ledger import Ledger
from ..runtime.placement import allocator_peak, default_dtype, runs_ahead
from ..runtime.staging import Stream, Tiers, is_exhausted, read_blocks
from ..weights import components
from ..weights.checkpoint import Checkpoint
from ..weights.components import COMPONENTS
from . import picture as image
from .job import Job, Picture, Result, Step, ZImageWarning, check_size
from .stages.denoise import Denoiser

TINY = Path(__file__).parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class _Run:
    """One attempt at a job under a plan."""

    job: Job
    work: Work
    plan: Plan
    memory: Memory
    on_step: Callable[[Step], None] | None
    ledger: Ledger = field(default_factory=Ledger)


class ZImage:
    """A model ready to draw. `generate` may be called any number of times; parameters are read when
    first needed."""

    def __init__(self, checkpoint: Checkpoint, prompts: prompt.Prompts, dtype, memory: Memory):
        self.config, self.name = checkpoint.config, checkpoint.path.resolve().name
        self.dtype, self.memory = jnp.dtype(dtype), memory
        self._checkpoint, self._prompts = checkpoint, prompts
        self._programs = Programs(self.config, checkpoint.dtype, dtype)
        self._planner = Planner(
            self.config, checkpoint.dtype, self.dtype.itemsize, CompiledCosts(self._programs)
        )
        self._tiers = Tiers(checkpoint, self._programs)
        self._preview_basis: np.ndarray | None = None
        self._warnings: list[str] = []

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str | None = None,
        memory: Memory | None = None,
    ) -> "ZImage":
        """Open a native checkpoint, or the tiny model inside the package when none is named.

        `dtype` is what is computed in: bfloat16, float16 or float32. By default it is bfloat16 on a
        GPU, float16 on one that has no bfloat16 (before compute capability 8.0), and float32 on a
        CPU; with float16 the VAE computes in float32. `memory` says where parameters lie and how
        they move; without it everything stays on the device if it fits.

        Raises CheckpointError when the folder is missing, foreign or damaged.
        """
        if dtype == "bfloat16" and default_dtype() == "float16":
            warnings.warn(
                "this GPU has no bfloat16: it is emulated in float32, which is slow and takes more "
                "memory (--dtype float16)",
                ZImageWarning,
                stacklevel=2,
            )
        checkpoint = Checkpoint(path or TINY)
        return cls(
            checkpoint,
            prompt.Prompts.load(checkpoint.tokenizer),
            dtype or default_dtype(),
            memory or Memory(),
        )

    def describe(self) -> str:
        """One line for a person: what the model is and where it computes."""

        def count(component: str) -> str:
            number = self._checkpoint.parameters(component)
            return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"

        held = ", ".join(
            f"{component.replace('_', ' ')} {count(component)}" for component in COMPONENTS
        )
        return f"{held}; computing in {self.dtype} on {jax.local_devices()[0].device_kind}"

    # -- the job -----------------------------------------------------------------------------------

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
        kv: KVPolicy | None = None,
        memory: Memory | None = None,
        on_plan: Callable[[Plan, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Pictures of one size, one per prompt or per seed (one of either serves all of the other).

        `steps` counts evaluations of the DiT (NFEs); `guidance` is diffusers' (0 is off; ComfyUI's
        cfg minus one). `kv` says how the DiT holds K and V, which changes the picture: precision,
        groups, reuse. `memory` takes the place of what the model was loaded with and changes
        nothing of it. `on_plan` gets the plan and the budget in bytes before anything runs, and
        again when the device ran out of memory and another try is made. `on_step` is called after
        every NFE and may raise to stop; under `scan`, which cannot be stopped, that is raised at
        the end.

        Raises UsageError for a job that cannot be drawn, OutOfMemoryError when no plan fits,
        NonFiniteError when the latents leave the finite numbers."""
        self._warnings = []
        job = self._job(
            prompt, seed, negative_prompt, width, height, steps, guidance, noise, kv or KVPolicy()
        )
        memory, encoded = memory or self.memory, self._tokens(job.texts)
        work = self._work(job, encoded)
        budget, ahead = memory.max_vram_bytes or self._tiers.free_device_bytes(), runs_ahead()
        while True:
            plan = self._plan(work, memory, budget)
            if on_plan is not None:
                on_plan(plan, budget)
            try:
                return self._draw(_Run(job, work, plan, memory, on_step, Ledger(ahead)), encoded)
            except jax.errors.JaxRuntimeError as fault:
                if not is_exhausted(fault):
                    raise
                self._tiers.clear(Ledger())
            if ahead:  # two programs at once may hold what each of them takes
                ahead, then = 0, "trying a program at a time"
            else:
                budget, then = plan.peak_bytes - 1, "trying a smaller one"  # until there is none
            self._warn(
                f"out of device memory with a plan of {plan.peak_bytes / GIB:.2f} GiB; {then}"
            )

    def _work(self, job: Job, encoded: dict[str, prompt.Encoded]) -> Work:
        bucket = prompt.bucket(max(len(e.ids) for e in encoded.values()))
        return Work.of(
            self.config,
            job.width,
            job.height,
            job.steps,
            job.kv,
            self.dtype,
            bucket=bucket,
            batch=len(job.prompts),
            is_guided=bool(job.guidance),
            prompts=len(encoded),
        )

    def _plan(self, work: Work, memory: Memory, budget: int) -> Plan:
        try:
            plan = self._planner.plan(work, memory, budget)
            return replace(plan, seconds_by_stage=self._seconds(plan, work, memory))
        except OutOfMemoryError as fault:
            side = self._largest_side(work, memory, budget)
            advice = (
                f"the largest square picture that fits is {side} x {side}"
                if side
                else "no smaller picture fits"
            )
            raise OutOfMemoryError(f"{fault}; {advice}", fault.needed) from None

    def _seconds(self, plan: Plan, work: Work, memory: Memory) -> dict[str, float] | None:
        """Predicted for a picture whose parameters are in host memory: None where the rates of the
        device, of the host's text encoder or of the disk would have to be known and are not."""
        card = cards.of_device(jax.local_devices()[0].device_kind)
        if card is None or self.dtype != jnp.bfloat16 or plan.text is None or memory.host_bytes:
            return None
        return cards.seconds(plan, work, self.config, self._checkpoint.dtype, card.rates)

    def _largest_side(self, work: Work, memory: Memory, budget: int) -> int:
        """Pixels of the largest square that would fit, of 2048, 1536, 1024 and so on; 0 when none
        would. By stored figures where there are some: a GPU's compiler takes minutes for all these
        sizes."""
        planner, card = self._planner, cards.of_device(jax.local_devices()[0].device_kind)
        if card is not None and cards.has_published_widths(self.config):
            costs = cards.StoredCosts(self.config, card)
            planner = Planner(self.config, self._checkpoint.dtype, self.dtype.itemsize, costs)
        scale = self.config.vae.scale
        for side in (2048, 1536, 1024, 768, 512, 384, 256, 128, 64):
            if (side // scale) ** 2 < work.h * work.w:
                try:
                    planner.plan(replace(work, h=side // scale, w=side // scale), memory, budget)
                    return side
                except OutOfMemoryError:
                    continue
        return 0

    def _draw(self, run: _Run, encoded: dict[str, prompt.Encoded]) -> Result:
        ledger, began = run.ledger, time.perf_counter()
        self._tiers.begin(ledger, kept=run.plan.kept, host_bytes=run.memory.host_bytes)
        try:
            with ledger.stage("text"):
                features = self._text(run, encoded)
            with ledger.stage("context"):
                context, sides, captions = self._context(run, features)
            with ledger.stage("denoise"):
                latents = self._denoise(run, context, sides, captions)
            with ledger.stage("decode"):
                pixels = [self._decode(run, row) for row in latents]
        finally:
            self._tiers.clear(ledger, unless=run.plan.kept)
        ledger.seconds["total"] = time.perf_counter() - began
        return self._result(run, latents, pixels)

    def _job(self, prompt, seed, negative_prompt, width, height, steps, guidance, noise, kv) -> Job:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        count = max(len(prompts), len(seeds))
        if not prompts or not seeds or {len(prompts), len(seeds)} - {1, count}:
            raise UsageError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: expected as many of one as of the other, or one"
            )
        # a drawn seed stays below 2^32, where every noise and every other program takes it
        drawn = [
            secrets.randbits(32) if s == -1 else s
            for s in (seeds * count if len(seeds) == 1 else seeds)
        ]
        default = self.config.vae.sample_size
        job = Job(
            tuple(prompts * count if len(prompts) == 1 else prompts),
            tuple(drawn),
            negative_prompt,
            width or default,
            height or default,
            steps,
            float(guidance),
            noise,
            kv,
        )
        check_size(self.config, job.width, job.height)
        if negative_prompt and not job.guidance:
            self._warn("the negative prompt has no effect while guidance is 0")
        if job.noise == "torch":
            for s in drawn:
                if s >> 32:
                    self._warn(
                        f"seed {s} draws the same noise as {s & 0xFFFFFFFF}: PyTorch uses 32 bits (--noise jax: all)"
                    )
        return job

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        warnings.warn(message, ZImageWarning, stacklevel=4)

    # -- its stages --------------------------------------------------------------------------------

    def encode(
        self, texts: Sequence[str], memory: Memory | None = None
    ) -> list[Float[np.ndarray, "T E"]]:
        """Text features of each prompt, without padding: Qwen3's hidden_states[-2]."""
        job = self._job(list(texts), 0, "", None, None, 1, 0.0, "torch", KVPolicy())
        memory, encoded = memory or self.memory, self._tokens(texts)
        work = self._work(job, encoded)
        plan = self._plan(work, memory, memory.max_vram_bytes or self._tiers.free_device_bytes())
        features = self._text(_Run(job, work, plan, memory, None), encoded)
        return [features[text] for text in texts]

    def _tokens(self, texts: Sequence[str]) -> dict[str, prompt.Encoded]:
        """Distinct texts as tokens, with a warning for one that is cut."""
        encoded = {text: self._prompts.encode(text) for text in texts}
        for e in encoded.values():
            if e.cut:
                self._warn(
                    f"the prompt is longer than {prompt.MAX_TOKENS} tokens; cut off: {e.cut!r}"
                )
        return encoded

    def _text(
        self, run: _Run, encoded: dict[str, prompt.Encoded]
    ) -> dict[str, Float[np.ndarray, "T E"]]:
        """Features by text. The embedding table is gathered where it lies, on the host."""
        ids, lengths = prompt.batch_ids(list(encoded.values()))
        (table,) = self._tiers.on_host("text_encoder", "embed_tokens")
        x = ops.to_tokens(np.asarray(text_encoder.embed(table, ids)), self.dtype)
        if run.plan.text is None:
            run.ledger.mark()
            features = self._text_on_host(x)
        else:
            run.ledger.hold("activations", x)
            xs = [jax.device_put(x)]
            static = {
                "tree": self._programs.tree("text_encoder", "layers.0"),
                "run": text_encoder.run,
            }
            with self._stream(run, "text_encoder", run.plan.text, 1) as stream:
                for _ in run.plan.text.chunks:
                    xs = stream.visit(xs, [()], **static)
            features = np.asarray(xs[0])
        features = ops.from_tokens(features)
        self._end_stage(run)
        return {text: f[:n] for text, f, n in zip(encoded, features, lengths, strict=True)}

    def _text_on_host(self, x: Float[np.ndarray, "P L E"]) -> Float[np.ndarray, "P L E"]:
        """The text encoder on the CPU, block by block from the checkpoint: no byte of the device is
        used."""
        cpu = jax.local_devices(backend="cpu")[0]
        tree = self._programs.tree("text_encoder", "layers.0")
        with jax.default_device(cpu):
            apply = jax.jit(lambda block, x: jax.tree.unflatten(tree, block)(x))
            for unit in components.units(self.config, "text_encoder"):
                if unit.startswith("layers."):
                    x = apply(
                        read_blocks(self._checkpoint, "text_encoder", [unit], "device", cpu)[unit],
                        x,
                    )
        return np.asarray(x)

    def _context(
        self, run: _Run, features: dict
    ) -> tuple[Float[np.ndarray, "G L D"], dit.Inputs, Int[np.ndarray, "G"]]:
        """The refined contexts, once per prompt, the rotations and masks of every token run, and
        the captions' lengths, all on the host."""
        work, ledger = run.work, run.ledger
        texts = run.job.texts
        lengths = np.array([len(features[t]) for t in texts], np.int32)
        padded = np.zeros(
            (len(texts), work.bucket, self.config.text_encoder.hidden_size), self.dtype
        )
        for row, text in zip(padded, texts, strict=True):
            row[: len(features[text])] = ops.to_tokens(features[text], self.dtype)
        sides = dit.inputs(self.config.transformer, work.h, work.w, lengths, work.bucket)
        stem = self._unit(ledger, "transformer", "stem")
        x = self._programs(dit.embed_caption)(ledger, stem, padded, lengths)
        ledger.hold("activations", (sides.caption, padded, x))
        static = {
            "tree": self._programs.tree("transformer", "context_refiner.0"),
            "run": dit.run,
            "attend": self._programs.attend(*padded.shape[:2]),
        }
        with self._stream(run, "transformer", run.plan.context, 1) as stream:
            for _ in run.plan.context.chunks:
                (x,) = stream.visit([x], [(sides.caption,)], **static)
        self._end_stage(run)
        return np.asarray(x), sides, lengths

    def _denoise(
        self,
        run: _Run,
        context: Float[np.ndarray, "G L D"],
        sides: dit.Inputs,
        captions: Int[np.ndarray, "G"],
    ) -> Float[np.ndarray, "B h w C"]:
        """Noise to latents, and what is told after every NFE."""
        job, work, config = run.job, run.work, self.config
        noise = [
            sampling.NOISE[job.noise](seed, work.h, work.w, config.transformer.in_channels)
            for seed in job.seeds
        ]
        sigmas = sampling.sigmas(job.steps, config.scheduler.shift)

        def observe(index: int, latents: np.ndarray) -> None:
            if not np.isfinite(latents).all():
                raise NonFiniteError(
                    f"the latents are not finite after NFE {index + 1} of {job.steps} in {self.dtype}; the weights are "
                    "damaged or the dtype is too narrow (--dtype float32)"
                )
            if run.on_step is not None:
                run.on_step(
                    Step(index, job.steps, float(1000 * sigmas[index]), latents, self._to_rgb)
                )

        denoiser = Denoiser(
            self._programs, self._tiers, run.plan, work, run.memory.host_bytes, run.ledger, observe
        )
        job_arrays = np.stack(noise), sigmas, context, sides, captions, job.guidance
        latents = (denoiser.scan if run.plan.schedule == "scan" else denoiser.sweep)(*job_arrays)
        self._end_stage(run)
        return latents

    def _decode(self, run: _Run, latents: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W 3"]:
        plan, ledger, dtype = run.plan, run.ledger, vae.compute_dtype(self.dtype)
        decoder = components.assemble(
            self.config, "vae", {"decoder": self._tiers.pin("vae", ["decoder"], ledger)[0]}
        )

        def apply(function, weights, *arrays, **static):
            ledger.hold("activations", arrays)
            return self._programs(function, **static)(ledger, weights, *arrays)

        if plan.vae_rows is not None:
            pixels = decode_strips(decoder, latents[None], dtype, plan.vae_rows, apply)
        elif plan.vae_tile is not None:
            pixels = decode_tiles(decoder, latents[None], dtype, plan.vae_tile, apply)
        else:
            pixels = np.asarray(apply(vae.decode, decoder, latents[None], dtype=dtype))
        ledger.drop("activations")
        return image.to_uint8(pixels[0])

    def _unit(self, ledger: Ledger, component: str, unit: str):
        """One unit on the device, as its module."""
        (leaves,) = self._tiers.pin(component, [unit], ledger)
        return jax.tree.unflatten(self._programs.tree(component, unit), leaves)

    def _stream(self, run: _Run, component: str, stream: StreamPlan, sweeps: int) -> Stream:
        host_bytes = run.memory.host_bytes
        return self._tiers.stream(
            component, stream.chunks, stream.schedule, sweeps, host_bytes, run.ledger
        )

    def _end_stage(self, run: _Run) -> None:
        """What a stage had on the device is given back, but for parameters that the plan keeps."""
        run.ledger.drop("activations")
        self._tiers.clear(run.ledger, unless=run.plan.kept)

    def _to_rgb(self, latents: Float[np.ndarray, "B h w C"]) -> UInt8[np.ndarray, "B h w 3"]:
        """Linear in the latents, with the VAE's own answer to each channel: what it decodes from
        constant latents. Asked once, on the CPU: no plan has room for a decode between two NFEs."""
        if self._preview_basis is None:
            channels, cpu = latents.shape[-1], jax.local_devices(backend="cpu")[0]
            probes = np.concatenate(
                [np.zeros((1, channels)), np.eye(channels), -np.eye(channels)]
            ).astype(np.float32)
            with jax.default_device(cpu):
                blocks = read_blocks(self._checkpoint, "vae", ["decoder"], "device", cpu)
                decoder = components.assemble(self.config, "vae", blocks)
                flat = jax.jit(vae.decode)(decoder, np.tile(probes[:, None, None], (1, 4, 4, 1)))
            colours = np.asarray(flat).mean((1, 2))
            zero, plus, minus = colours[0], colours[1 : channels + 1], colours[channels + 1 :]
            self._preview_basis = np.concatenate([(plus - minus) / 2, zero[None]])
        *basis, zero = self._preview_basis
        return image.to_uint8(latents @ np.array(basis) + zero)

    # -- what came of it ---------------------------------------------------------------------------

    def _result(self, run: _Run, latents, pixels) -> Result:
        job, plan, ledger = run.job, run.plan, run.ledger
        common = {
            "width": job.width,
            "height": job.height,
            "steps": job.steps,
            "guidance": job.guidance,
            "negative_prompt": job.negative_prompt,
            "noise": job.noise,
            "kv": job.kv.words(),
            "dtype": str(self.dtype),
            "model": self.name,
            "versions": versions(),
        }
        each = [
            {
                "prompt": text,
                "seed": seed,
                "latents_sha256": hashlib.sha256(row.tobytes()).hexdigest(),
            }
            for text, seed, row in zip(job.prompts, job.seeds, latents, strict=True)
        ]
        pictures = [Picture(p, {**own, **common}) for p, own in zip(pixels, each, strict=True)]
        # reading parameters goes on while the device computes, so "load" is part of the others
        load = sum(event.end - event.begin for event in ledger.events if event.lane == "tier")
        seconds = {**ledger.seconds, "load": load, "compile": self._programs.compile_seconds}
        measured = allocator_peak()
        report = {
            **{
                key: each[0][key] if len(each) == 1 else [own[key] for own in each]
                for key in each[0]
            },
            **common,
            "schedule": plan.schedule,
            "chunks": len(plan.main_sizes),
            "resident_chunks": plan.resident_chunks,
            "device": jax.local_devices()[0].device_kind,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "compilations": self._programs.compilations,
            "warnings": self._warnings,
            "predicted_seconds": None if plan.seconds is None else round(plan.seconds, 3),
            "predicted_peak_bytes": plan.peak_bytes,
            "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
            "peak_device_bytes": ledger.peak if measured is None else measured,
            "peak_device_bytes_from": "ledger" if measured is None else "allocator",
            "peak_device_bytes_by_stage": ledger.peak_by_stage,
            "copied_bytes": ledger.copied_bytes,
            "copied_bytes_by_stage": ledger.copied_by_stage,
            "copied_bytes_saved_by_reuse": ledger.saved_bytes,
            "kv_bytes": run.work.kv_bytes(self.config.transformer),
            "kv_bytes_without_policy": run.work.without_policy(self.dtype).kv_bytes(
                self.config.transformer
            ),
            "kv_bytes_of_a_block_by_nfe": run.work.kv_bytes_by_nfe(self.config.transformer),
            "host_bytes": self._tiers.host_bytes,
        }
        return Result(pictures, report, latents, run.work, plan, ledger)


def versions() -> dict[str, str]:
    def of(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            return "not installed"

    return {name: of(name) for name in ("zimage_jax", "jax", "jaxlib", "flax")} | {
        "python": platform.python_version()
    }
