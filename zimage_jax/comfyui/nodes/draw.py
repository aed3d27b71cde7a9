"""Nodes that draw, and their schedule."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from . import host, settings, tensors
from .load import CATEGORY, PipeType
from .text import VARIANCE

ScheduleType = io.Custom("ZIMAGE_JAX_SCHEDULE")
_SCHEDULE = {"prefetch": None}  # the model's own steps and shift


class Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboScheduler",
            display_name="Z-Image-Turbo Scheduler",
            category=CATEGORY,
            description="Noise levels, how the latents follow them, and how K and V are kept.",
            inputs=[
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Evaluations of the DiT; Turbo is made for 8. The model card's 9 are 8.",
                ),
                io.Float.Input(
                    "shift",
                    default=3.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="As ModelSamplingAuraFlow's: more spends more steps on noise.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(settings.SAMPLERS),
                    default="euler",
                    tooltip="As KSampler's; heun takes two evaluations for a step.",
                ),
                io.Combo.Input(
                    "sigmas",
                    options=list(settings.SIGMAS),
                    default="simple",
                    tooltip="As KSampler's scheduler.",
                ),
                io.Combo.Input(
                    "kv_group",
                    options=["1", "2", "4", "2:1", "4:1", "4:2"],
                    default="1",
                    tooltip="Side of the squares of image tokens that share one K and V; 2:1 is 2 "
                    "early and 1 late. More than 1 changes the picture.",
                ),
                io.Combo.Input(
                    "kv_dtype",
                    options=list(settings.KV_DTYPES),
                    default="default",
                    tooltip="How K and V are stored: fp8:fp16, int8 and less change the picture.",
                ),
                io.Float.Input(
                    "kv_switch_t",
                    default=500.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    tooltip="Time t, from 1000 to 0, at which the part after : of the two above "
                    "begins.",
                ),
                io.Int.Input(
                    "kv_reuse",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Evaluations that use the same K and V; more than 1 changes the picture.",
                ),
                io.Boolean.Input(
                    "dynamic_prefetch",
                    default=True,
                    tooltip="Copy chunks ahead of use, as many as the plan says. Off: each is copied "
                    "when it is needed.",
                ),
            ],
            outputs=[ScheduleType.Output("schedule", tooltip="For our samplers.")],
        )

    @classmethod
    def execute(cls, **widgets) -> io.NodeOutput:
        return io.NodeOutput(settings.schedule_of(**widgets))


def _common_inputs() -> list[io.Input]:
    """The widgets that both samplers have."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=settings.LARGEST_SEED,
            control_after_generate=True,
            tooltip="The noise of torch.manual_seed on a CPU, as KSampler's. Several pictures count "
            "up from it.",
        ),
        io.Int.Input(
            "width",
            default=1024,
            min=64,
            max=4096,
            step=settings.MULTIPLE,
            tooltip="Pixels; a LATENT or a picture to begin from has its own size.",
        ),
        io.Int.Input(
            "height",
            default=1024,
            min=64,
            max=4096,
            step=settings.MULTIPLE,
            tooltip="Pixels; a LATENT or a picture to begin from has its own size.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="As KSampler's: 1 is off, which is Turbo's own. More takes twice the time.",
        ),
        io.Combo.Input(
            "vae_decode",
            options=list(settings.DECODES),
            default="exact",
            tooltip="exact: whole, or in strips if memory is short. tiled: less memory, but seams "
            "change the picture. off: LATENT alone.",
        ),
        io.Int.Input(
            "tile_size",
            default=512,
            min=64,
            max=4096,
            step=64,
            tooltip="Side of a tile in pixels, for tiled.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output("image"),
        io.Latent.Output("latent", tooltip="In ComfyUI's scale: VAEDecode decodes it."),
        io.String.Output("report", tooltip="JSON: peaks, seconds, seeds, latents_sha256."),
    ]


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboSampler",
            display_name="Z-Image-Turbo Sampler",
            category=CATEGORY,
            description="Draws, from noise or from a picture, and shows the plan's chunks and its "
            "predicted peak. Slots never move, so memory cannot fragment: there is no setting for it.",
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader."),
                io.Conditioning.Input("positive", tooltip="From any encoder of qwen_3_4b."),
                *_common_inputs(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of a picture to begin from is redrawn; of no effect without one.",
                ),
                io.Combo.Input(
                    "strength_rule",
                    options=list(settings.STRENGTH_RULES),
                    default="noise",
                    tooltip="What strength means: the noise level to begin at, or what it means in "
                    "diffusers or KSampler.",
                ),
                ScheduleType.Input(
                    "schedule", optional=True, tooltip="Without one: 8 steps of Euler, shift 3."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid; read if cfg is above 1."
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="An empty one says size and number; one from VAEEncode is begun from, "
                    "within its noise mask.",
                ),
                io.Image.Input("image", optional=True, tooltip="A picture to begin from."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Of image: white is redrawn, black keeps its pixels.",
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, width, height=settings.MULTIPLE):
        return settings.check_size(width, height) or True

    @classmethod
    def execute(
        cls, pipe, positive, seed, schedule=None, negative=None, image=None, mask=None,
        latent_image=None, **widgets,
    ) -> io.NodeOutput:  # fmt: skip
        if image is not None and latent_image is not None:
            raise ValueError("image and latent_image both say what to begin from: connect one")
        if mask is not None and image is None:
            raise ValueError("mask needs an image: connect the picture that it masks")
        count = pipe.control.image.shape[0] if pipe.control else 1
        strength, rule = widgets.pop("strength"), widgets.pop("strength_rule")
        given: dict[str, Any] = {}
        if image is not None:
            count, given["image"] = image.shape[0], tensors.picture(image)
        if mask is not None:
            given["mask"] = tensors.picture(mask)
        if latent_image is not None:
            tensors.check_latent(latent_image)
            count, widgets["width"], widgets["height"] = tensors.size_of(latent_image)
            if tensors.begins_from(latent_image):
                given["latents"] = latent_image["samples"]
                given["noise_mask"] = tensors.noise_mask(latent_image)
        begins = bool(given)
        own = {"strength": strength, "strength_rule": rule} if begins else {}
        if begins:
            del widgets["width"], widgets["height"]
        own["variance"] = positive[0][1].get(VARIANCE, 0.0) if positive else 0.0
        given["features"] = tensors.features(positive, "positive")
        if negative is not None and widgets["cfg"] > 1:
            given["negative_features"] = tensors.features(negative, "negative")
        jobs = []
        for number, of_picture in enumerate(settings.seeds_from(seed, count)):
            parts = {name: tensors.one_of(value, number) for name, value in given.items()}
            jobs.append(({"seed": settings.seed_to_json(of_picture), **own}, parts))
        return _draw(cls.hidden.unique_id, pipe, schedule, jobs, at_once=True, **widgets)


class BatchProcessor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboBatchProcessor",
            display_name="Z-Image-Turbo Batch Processor",
            category=CATEGORY,
            description="Draws a list of prompts, a picture each, in one sweep of the weights or one "
            "after another.",
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="A prompt a line; lines that begin with # are left out.",
                ),
                *_common_inputs(),
                io.Combo.Input(
                    "order",
                    options=["one sweep", "one after another"],
                    default="one sweep",
                    tooltip="One sweep: all share each copy of the weights, up to 16 at once, and "
                    "need memory for each. The pictures are the same.",
                ),
                io.Boolean.Input(
                    "prompt_weights",
                    default=False,
                    tooltip="Brackets weigh words, as in the Text Encoder.",
                ),
                ScheduleType.Input(
                    "schedule", optional=True, tooltip="Without one: 8 steps of Euler, shift 3."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid; read if cfg is above 1."
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, width, height=settings.MULTIPLE):
        return settings.check_size(width, height) or True

    @classmethod
    def execute(
        cls, pipe, prompts, seed, order, prompt_weights, schedule=None, negative=None, **widgets
    ) -> io.NodeOutput:
        texts = settings.prompts_of(prompts)
        if not texts:
            raise ValueError("prompts: there is none; write one a line")
        parts: dict[str, Any] = {}
        if negative is not None and widgets["cfg"] > 1:
            parts["negative_features"] = tensors.features(negative, "negative")
        jobs = [
            (
                {
                    "prompt": settings.text_of(text, prompt_weights),
                    "seed": settings.seed_to_json(number),
                    "prompt_weights": prompt_weights,
                },
                parts,
            )
            for text, number in zip(texts, settings.seeds_from(seed, len(texts)), strict=True)
        ]
        at_once = order == "one sweep"
        return _draw(cls.hidden.unique_id, pipe, schedule, jobs, at_once=at_once, **widgets)


def _draw(
    node: str,
    pipe: settings.Pipe,
    schedule: dict[str, Any] | None,
    jobs: Sequence[tuple[dict[str, Any], dict[str, torch.Tensor | None]]],
    *,
    at_once: bool,
    cfg: float,
    vae_decode: str,
    tile_size: int,
    width: int | None = None,
    height: int | None = None,
) -> io.NodeOutput:
    """Draw jobs, a picture each: their keys, and their tensors."""
    common = dict(schedule or _SCHEDULE) | {"lora": pipe.loras_of_job()}
    controls: list[dict[str, torch.Tensor | None]] = [{}] * len(jobs)
    if pipe.control is not None:
        images = pipe.control.image
        if images.shape[0] not in (1, len(jobs)):
            raise ValueError(
                f"control: {images.shape[0]} images for {len(jobs)} pictures: expected one, or one "
                "for each"
            )
        common["control_scale"] = pipe.control.scale
        controls = [{"control_image": tensors.one_of(images, n)} for n in range(len(jobs))]
    shown = host.Shown(node, len(jobs))
    cap = host.ready(pipe, shown.tell)
    tile = tile_size if vae_decode == "tiled" else None
    common["memory"] = pipe.memory_of_job(cap, prefetch=common.pop("prefetch"), vae_tile=tile)
    common |= {"guidance": cfg - 1, "output": "latents" if vae_decode == "off" else "both"}
    if width is not None:
        common |= {"width": width, "height": height}
    bodies = [
        tensors.job(common | own, **parts, **control)
        for (own, parts), control in zip(jobs, controls, strict=True)
    ]
    found = host.ENGINE.draw(bodies, shown.hear, host.check, at_once=at_once)
    reports = [report for report, _ in found]
    drawn = [tensors.tensors(data) for _, data in found]
    shown.tell(settings.line_of_end(reports))
    image: Any = ExecutionBlocker(None)
    if vae_decode != "off":
        image = torch.cat([of["image"] for of in drawn])
    latent = {"samples": torch.cat([of["latents"] for of in drawn])}
    report = reports[0] if len(reports) == 1 else reports
    return io.NodeOutput(image, latent, json.dumps(report, indent=1, ensure_ascii=False))
