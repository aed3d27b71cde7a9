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
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from . import components, dit, image, prompt, sampling, text_encoder, vae
from .checkpoint import Checkpoint
from .components import COMPONENTS
from .errors import NonFiniteError, OutOfMemoryError, UsageError
from .job import Job, Picture, Result, Step, ZImageWarning
from .planner import GIB, Memory, Plan, Planner, Work
from .programs import CompiledCosts, Programs
from .staging import Ledger, Tiers, allocator_peak, read_blocks
from .vae_strips import decode_strips, decode_tiles

TINY = Path(__file__).parent / "assets" / "tiny"


class ZImage:
    """A model ready to draw. `generate` may be called any number of times; parameters are read when first needed."""

    def __init__(self, checkpoint: Checkpoint, prompts: prompt.Prompts, dtype, memory: Memory):
        self.config, self.name = checkpoint.config, checkpoint.path.resolve().name
        self.dtype, self.memory = jnp.dtype(dtype), memory
        self._checkpoint, self._prompts = checkpoint, prompts
        self._programs = Programs(self.config, checkpoint.dtype, dtype)
        self._planner = Planner(self.config, checkpoint.dtype, self.dtype.itemsize, CompiledCosts(self._programs))
        self._tiers = Tiers(checkpoint, self._programs)
        self._preview_basis: np.ndarray | None = None
        self._observer: Callable[[np.ndarray, np.ndarray], None] = lambda index, latents: None
        self._warnings: list[str] = []

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, dtype: str | None = None, memory: Memory | None = None
    ) -> "ZImage":
        """Open a native checkpoint, or the tiny model inside the package when none is named.

        `dtype` is what is computed in: bfloat16 on a GPU and float32 on a CPU by default. `memory` says where
        parameters lie and how they move; without it everything stays on the device if it fits.

        Raises CheckpointError when the folder is missing, foreign or damaged.
        """
        checkpoint = Checkpoint(path or TINY)
        return cls(checkpoint, prompt.Prompts.load(checkpoint.tokenizer), dtype or default_dtype(), memory or Memory())

    def describe(self) -> str:
        """One line for a person: what the model is and where it computes."""
        held = ", ".join(f"{c.replace('_', ' ')} {self._checkpoint.parameters(c) / 1e9:.3g} B" for c in COMPONENTS)
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
        memory: Memory | None = None,
        on_plan: Callable[[Plan, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Pictures of one size, one per prompt or per seed (one of either serves all of the other).

        `steps` counts evaluations of the DiT (NFEs); `guidance` is diffusers' (0 is off; ComfyUI's cfg minus one).
        `memory` takes the place of what the model was loaded with. `on_plan` gets the plan and the budget in bytes
        before anything runs, and again when the device ran out of memory and a smaller one is tried. `on_step` is called
        after every NFE and may raise to stop.

        Raises UsageError for a job that cannot be drawn, OutOfMemoryError when no plan fits, NonFiniteError when the
        latents leave the finite numbers.
        """
        self._warnings = []
        job = self._job(prompt, seed, negative_prompt, width, height, steps, guidance, noise)
        memory, encoded = memory or self.memory, self._tokens(job.texts)
        work = self._work(job, encoded)
        budget = memory.max_vram_bytes or self._tiers.free_device_bytes()
        while True:
            plan = self._plan(work, memory, budget)
            if on_plan is not None:
                on_plan(plan, budget)
            try:
                return self._draw(job, encoded, work, plan, memory, on_step)
            except jax.errors.JaxRuntimeError as fault:
                if "RESOURCE_EXHAUSTED" not in str(fault):
                    raise
                self._tiers.clear(Ledger())
            budget = plan.peak_bytes - 1  # the next smaller plan, until there is none
            self._warn(f"out of device memory with a plan of {plan.peak_bytes / GIB:.2f} GiB; trying a smaller one")

    def _work(self, job: Job, encoded: dict[str, prompt.Encoded]) -> Work:
        bucket, scale = prompt.bucket(max(len(e.ids) for e in encoded.values())), self.config.vae.scale
        return Work(
            len(job.prompts), bool(job.guidance), len(encoded), bucket, job.height // scale, job.width // scale,
            job.steps,
        )  # fmt: skip

    def _plan(self, work: Work, memory: Memory, budget: int) -> Plan:
        try:
            return self._planner.plan(work, memory, budget)
        except OutOfMemoryError as fault:
            side = self._largest_side(work, memory, budget)
            advice = f"the largest square picture that fits is {side} x {side}" if side else "no smaller picture fits"
            raise OutOfMemoryError(f"{fault}; {advice}", fault.needed) from None

    def _largest_side(self, work: Work, memory: Memory, budget: int) -> int:
        """Pixels of the largest square that would fit, of 2048, 1536, 1024 and so on; 0 when none would."""
        scale = self.config.vae.scale
        for side in (2048, 1536, 1024, 768, 512, 384, 256, 128, 64):
            if (side // scale) ** 2 < work.h * work.w:
                try:
                    self._planner.plan(replace(work, h=side // scale, w=side // scale), memory, budget)
                    return side
                except OutOfMemoryError:
                    continue
        return 0

    def _draw(
        self, job: Job, encoded: dict[str, prompt.Encoded], work: Work, plan: Plan, memory: Memory, on_step
    ) -> Result:
        ledger, began = Ledger(), time.perf_counter()
        self._tiers.clear(ledger, unless=plan.kept)
        self._tiers.account(ledger)
        try:
            with ledger.stage("text"):
                features = self._text(encoded, plan, memory, ledger)
            with ledger.stage("context"):
                context, sides = self._context(job, work, features, plan, memory, ledger)
            with ledger.stage("denoise"):
                latents = self._denoise(job, work, context, sides, plan, memory, on_step, ledger)
            with ledger.stage("decode"):
                pixels = [self._decode(row, plan, ledger) for row in latents]
        finally:
            self._tiers.clear(ledger, unless=plan.kept)
        ledger.seconds["total"] = time.perf_counter() - began
        return self._result(job, plan, latents, pixels, ledger)

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

    def encode(self, texts: Sequence[str], memory: Memory | None = None) -> list[Float[np.ndarray, "T E"]]:
        """Text features of each prompt, without padding: Qwen3's hidden_states[-2]."""
        memory, encoded = memory or self.memory, self._tokens(texts)
        bucket = prompt.bucket(max(len(e.ids) for e in encoded.values()))
        work = Work(1, False, len(encoded), bucket, 2, 2, 1)
        plan = self._plan(work, memory, memory.max_vram_bytes or self._tiers.free_device_bytes())
        ledger = Ledger()
        try:
            features = self._text(encoded, plan, memory, ledger)
        finally:
            self._tiers.clear(ledger, unless=plan.kept)
        return [features[text] for text in texts]

    def _tokens(self, texts: Sequence[str]) -> dict[str, prompt.Encoded]:
        """Distinct texts as tokens, with a warning for one that is cut."""
        encoded = {text: self._prompts.encode(text) for text in texts}
        for e in encoded.values():
            if e.cut:
                self._warn(f"the prompt is longer than {prompt.MAX_TOKENS} tokens; cut off: {e.cut!r}")
        return encoded

    def _text(
        self, encoded: dict[str, prompt.Encoded], plan: Plan, memory: Memory, ledger: Ledger
    ) -> dict[str, Float[np.ndarray, "T E"]]:
        """Features by text. The embedding table is gathered where it lies, on the host."""
        ids, lengths = prompt.batch_ids(list(encoded.values()))
        (table,) = self._checkpoint.read("text_encoder", "embed_tokens").values()
        x = np.asarray(text_encoder.embed(table, ids), self.dtype)
        if plan.text is None:
            features = self._text_on_host(x)
        else:
            ledger.hold("activations", x)
            tree = self._programs.tree("text_encoder", "layers.0")
            xs = [jax.device_put(x)]
            with self._tiers.stream(
                "text_encoder", plan.text.chunks, plan.text.schedule, 1, memory.host_bytes, ledger
            ) as stream:
                for _ in plan.text.chunks:
                    xs = stream.visit(xs, [()], tree=tree)
            features = np.asarray(xs[0])
            ledger.drop("activations")
        self._tiers.clear(ledger, unless=plan.kept)
        return {text: f[:n] for text, f, n in zip(encoded, features, lengths, strict=True)}

    def _text_on_host(self, x: Float[np.ndarray, "P L E"]) -> Float[np.ndarray, "P L E"]:
        """The text encoder on the CPU, block by block from the checkpoint: no byte of the device is used."""
        cpu = jax.local_devices(backend="cpu")[0]
        tree = self._programs.tree("text_encoder", "layers.0")
        with jax.default_device(cpu):
            run = jax.jit(lambda block, x: jax.tree.unflatten(tree, block)(x))
            for unit in components.units(self.config, "text_encoder"):
                if unit.startswith("layers."):
                    block = read_blocks(self._checkpoint, "text_encoder", [unit], "device", cpu)[unit]
                    x = run(block, x)
        return np.asarray(x)

    def _context(
        self, job: Job, work: Work, features: dict, plan: Plan, memory: Memory, ledger: Ledger
    ) -> tuple[Float[jax.Array, "G L D"], dit.Sides]:
        """The refined contexts, once per prompt, and the rotations and masks of every token run."""
        texts = job.texts
        lengths = np.array([len(features[t]) for t in texts], np.int32)
        padded = np.zeros((len(texts), work.bucket, self.config.text_encoder.hidden_size), self.dtype)
        for row, text in zip(padded, texts, strict=True):
            row[: len(features[text])] = features[text]
        sides = jax.device_put(dit.sides(self.config.transformer, work.h, work.w, lengths, work.bucket))
        stem = self._unit("transformer", "stem", ledger)
        x = self._programs(dit.embed_caption)(ledger, stem, padded, lengths)
        ledger.hold("sides", sides)
        ledger.hold("activations", (padded, x))
        static = {
            "tree": self._programs.tree("transformer", "context_refiner.0"),
            "attend": self._programs.attend(*padded.shape[:2]),
        }
        with self._tiers.stream(
            "transformer", plan.context.chunks, plan.context.schedule, 1, memory.host_bytes, ledger
        ) as stream:
            for _ in plan.context.chunks:
                (x,) = stream.visit([x], [(sides.caption,)], **static)
        ledger.drop("activations")
        self._tiers.clear(ledger, unless=plan.kept)
        return x, sides

    def _denoise(
        self, job: Job, work: Work, context, sides: dit.Sides, plan: Plan, memory: Memory, on_step, ledger: Ledger
    ) -> Float[np.ndarray, "B h w C"]:
        """All NFEs: a sweep over the chunks for each, every chunk over every micro-batch while it is there."""
        noise = [sampling.NOISE[job.noise](seed, work.h, work.w, self.config.vae.latent_channels) for seed in job.seeds]
        sigmas = sampling.sigmas(job.steps, self.config.scheduler.shift)

        def report(index, latents) -> None:
            index, latents = int(index), np.asarray(latents)
            if not np.isfinite(latents).all():
                raise NonFiniteError(
                    f"the latents are not finite after NFE {index + 1} of {job.steps} in {self.dtype}; the weights are "
                    "damaged or the dtype is too narrow (--dtype float32)"
                )
            if on_step is not None:
                on_step(Step(index, job.steps, float(1000 * sigmas[index]), latents, self._to_rgb))

        sample = self._scan if plan.schedule == "scan" else self._sweeps
        latents = sample(job, work, np.stack(noise), sigmas, context, sides, plan, memory, report, on_step, ledger)
        for name in ("activations", "sides"):
            ledger.drop(name)
        self._tiers.clear(ledger, unless=plan.kept)
        return latents

    def _scan(self, job, work, noise, sigmas, context, sides, plan, memory, report, on_step, ledger):
        """One compiled program for all NFEs."""
        transformer = {unit: (unit,) for unit in components.units(self.config, "transformer")}
        leaves = {unit: self._tiers.pin("transformer", units, ledger)[0] for unit, units in transformer.items()}
        model = components.assemble(self.config, "transformer", leaves)
        ledger.hold("activations", (noise, context))
        static = {"is_guided": work.is_guided, "attend": self._programs.attend(work.contexts, work.tokens)}
        run = self._programs(sampling.sample, **static, on_step=self._observe if on_step else None)
        self._observer, guidance = report, np.float32(job.guidance)
        latents = np.asarray(run(ledger, model, noise, sigmas, sampling.times(sigmas), context, sides, guidance))
        if not on_step:
            report(job.steps - 1, latents)
        return latents

    def _observe(self, index: np.ndarray, latents: np.ndarray) -> None:
        """What the scan's program calls: one function for all jobs, or each would be compiled anew."""
        self._observer(index, latents)

    def _sweeps(self, job, work, noise, sigmas, context, sides, plan, memory, report, on_step, ledger):
        """The driver's loop; its parts are those of sampling.nfe."""
        programs, guided = self._programs, {"is_guided": work.is_guided}
        enter = programs(sampling.enter, **guided, dtype=self.dtype)
        join, leave = programs(dit.join), programs(sampling.leave, donate=(3,), **guided)
        groups = _micro_batches(work)
        latents = [jax.device_put(noise[g[: work.micro_batch]]) for g in groups]
        contexts = [context[g] for g in groups]
        image, joint = (
            [jax.tree.map(lambda a, g=g: a[g], side) for g in groups] for side in (sides.image, sides.joint)
        )
        tree = programs.tree("transformer", "layers.0")
        early, late = (
            {"tree": tree, "attend": programs.attend(len(groups[0]), tokens)}
            for tokens in (work.image_tokens, work.tokens)
        )
        stem, guidance = self._unit("transformer", "stem", ledger), np.float32(job.guidance)
        with self._tiers.stream(
            "transformer", plan.denoise.chunks, plan.denoise.schedule, job.steps, memory.host_bytes, ledger
        ) as stream:
            for index, t in enumerate(sampling.times(sigmas)):
                entered = [enter(ledger, stem, x, t) for x in latents]
                xs, times = (list(column) for column in zip(*entered, strict=True))
                beside = [(side._replace(time=time),) for side, time in zip(image, times, strict=True)]
                for _ in range(plan.refiner_chunks):
                    xs = stream.visit(xs, beside, **early)
                xs = [join(ledger, x, c) for x, c in zip(xs, contexts, strict=True)]
                ledger.hold("activations", (xs, times, contexts, latents))
                beside = [(side._replace(time=time),) for side, time in zip(joint, times, strict=True)]
                for _ in plan.main_sizes:
                    xs = stream.visit(xs, beside, **late)
                now = sigmas[index], sigmas[index + 1], guidance
                latents = [leave(ledger, stem, x, time, z, *now) for x, time, z in zip(xs, times, latents, strict=True)]
                report(index, np.concatenate(latents))
        return np.concatenate(latents)

    def _decode(self, latents: Float[np.ndarray, "h w C"], plan: Plan, ledger: Ledger) -> UInt8[np.ndarray, "H W 3"]:
        decoder = self._decoder(ledger)

        def run(function, *args, **static):
            return self._programs(function, **static)(ledger, *args)

        def run_strip(function, weights, *strip, **static):
            ledger.hold("activations", strip)
            return run(function, weights, *strip, **static)

        if plan.vae_rows is not None:
            pixels = decode_strips(decoder, latents[None], self.dtype, plan.vae_rows, run_strip)
            ledger.drop("activations")
        else:
            ledger.hold("activations", latents)
            if plan.vae_tile is not None:
                pixels = decode_tiles(decoder, latents[None], self.dtype, plan.vae_tile, run)
            else:
                pixels = run(vae.decode, decoder, latents[None], dtype=self.dtype)
            ledger.drop("activations")
        return image.to_uint8(np.asarray(pixels[0]))

    def _unit(self, component: str, unit: str, ledger: Ledger):
        """One unit on the device, as its module."""
        (leaves,) = self._tiers.pin(component, [unit], ledger)
        return jax.tree.unflatten(self._programs.tree(component, unit), leaves)

    def _decoder(self, ledger: Ledger) -> vae.VAE:
        return components.assemble(self.config, "vae", {"decoder": self._tiers.pin("vae", ["decoder"], ledger)[0]})

    def _to_rgb(self, latents: Float[np.ndarray, "B h w C"]) -> UInt8[np.ndarray, "B h w 3"]:
        """Linear in the latents, with the VAE's own answer to each channel: what it decodes from constant latents."""
        if self._preview_basis is None:
            channels = latents.shape[-1]
            probes = np.concatenate([np.zeros((1, channels)), np.eye(channels), -np.eye(channels)]).astype(np.float32)
            ledger = Ledger()
            decode, decoder = self._programs(vae.decode, dtype=self.dtype), self._decoder(ledger)
            flat = [np.asarray(decode(ledger, decoder, np.tile(p, (1, 4, 4, 1)))).mean((0, 1, 2)) for p in probes]
            zero, plus, minus = flat[0], np.array(flat[1 : channels + 1]), np.array(flat[channels + 1 :])
            self._preview_basis = np.concatenate([(plus - minus) / 2, zero[None]])
        *basis, zero = self._preview_basis
        return image.to_uint8(latents @ np.array(basis) + zero)

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _result(self, job: Job, plan: Plan, latents, pixels, ledger: Ledger) -> Result:
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
        seconds = {**ledger.seconds, "compile": self._programs.compile_seconds}
        measured = allocator_peak()
        report = {
            **{key: each[0][key] if len(each) == 1 else [own[key] for own in each] for key in each[0]},
            **common,
            "schedule": plan.schedule,
            "chunks": len(plan.main_sizes),
            "resident_chunks": plan.resident_chunks,
            "device": jax.local_devices()[0].device_kind,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "compilations": self._programs.compilations,
            "warnings": self._warnings,
            "predicted_peak_bytes": plan.peak_bytes,
            "predicted_peak_bytes_by_stage": plan.peak_bytes_by_stage,
            "peak_device_bytes": ledger.peak if measured is None else measured,
            "peak_device_bytes_from": "ledger" if measured is None else "allocator",
            "peak_device_bytes_by_stage": ledger.peak_by_stage,
            "copied_bytes": ledger.copied_bytes,
            "copied_bytes_by_stage": ledger.copied_by_stage,
            "host_bytes": self._tiers.host_bytes,
        }
        return Result(pictures, report, latents, plan, ledger)


def _micro_batches(work: Work) -> list[np.ndarray]:
    """Rows of the contexts that each micro-batch computes: its prompts', then with guidance their negatives'."""
    rows = np.arange(work.batch).reshape(-1, work.micro_batch)
    return [np.concatenate([r, r + work.batch]) if work.is_guided else r for r in rows]


def default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("zimage_jax", "jax", "jaxlib", "flax")}
    return found | {"python": platform.python_version()}
