"""AUTOMATIC1111's API, as far as this model draws what it asks for.

Clients send every key that they know. Those without a meaning here are accepted with the values
that change nothing, and refused by name with others.
"""

import io
import json
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field, create_model

from ..errors import UsageError
from ..files import printable
from ..model.choices import LARGEST_LORA_WEIGHT, MOST_LORAS
from ..model.samplers import SAMPLERS, SCHEDULES
from ..pipeline.opened import decode
from ..pipeline.picture import A1111, texts_in
from .body import Body
from .errors import RefusedError
from .jobs import RUNNING, Jobs, Live
from .loras import Choice, Choices
from .order import MOST_PIXELS, Base64, Count, Order, Seed, Text, from_base64, order, seed_to_json
from .pictures import to_base64
from .store import CANCELLED
from .streams import ended

ORIGIN = "a1111"
_TAG = re.compile(r"<lora:([^<>]*)>")
_SAMPLERS = {A1111[name].lower(): name for name in SAMPLERS}
_SCHEDULES = {A1111[name].lower(): name for name in SCHEDULES} | {"automatic": "simple"}
_FITS = ("stretch", "crop", "pad")  # by resize_mode
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, "None")
_OFF = """
    enable_hr firstphase_width firstphase_height styles subseed_strength seed_resize_from_h
    seed_resize_from_w restore_faces tiling script_name override_settings script_args save_images
    alwayson_scripts s_churn s_tmin s_tmax s_min_uncond refiner_checkpoint inpainting_mask_invert
    include_init_images infotext
"""
# keys that must have one of those values, or one of these
_NEUTRAL: dict[str, tuple[Any, ...]] = dict.fromkeys(_OFF.split(), ())
_NEUTRAL |= {"send_images": (True,), "eta": (1,), "s_noise": (1,)}
_NEUTRAL |= {"inpainting_fill": (1,), "initial_noise_multiplier": (1,)}
# keys that are accepted with any value: parts of what must be off, and what happens to files there
_IGNORED = """
    hr_scale hr_upscaler hr_second_pass_steps hr_resize_x hr_resize_y hr_checkpoint_name
    hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt subseed do_not_save_samples
    do_not_save_grid override_settings_restore_afterwards image_cfg_scale refiner_switch_at
    force_task_id comments
"""


class Txt2Img(Body):
    prompt: Text = Field("", examples=["a red circle <lora:ink:0.8>"])
    negative_prompt: Text = ""
    seed: Seed = -1
    steps: int | None = None
    cfg_scale: float | None = Field(None, description="1 is without guidance: ours is one less")
    width: int | None = None
    height: int | None = None
    batch_size: Count = 1
    n_iter: Count = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    denoising_strength: float | None = None
    lora: Choices = Field([], description="beside the prompt's <lora:NAME:WEIGHT>")

    def arguments(self) -> dict[str, Any]:
        cfg = self.cfg_scale
        if cfg is not None and cfg < 1:
            raise UsageError(f"cfg_scale must be 1 or more, got {cfg:g}")
        prompt, lora = _without_tags(self.prompt)
        lora += [of.model_dump() for of in self.lora]
        return {
            "prompt": prompt,
            "lora": lora or None,
            "negative_prompt": self.negative_prompt or None,
            "steps": self.steps,
            "guidance": None if cfg is None else float(cfg - 1),
            "width": self.width,
            "height": self.height,
            "sampler": _named("sampler_name", self.sampler_name or self.sampler_index, _SAMPLERS),
            "sigmas": _named("scheduler", self.scheduler, _SCHEDULES),
        }

    def check_neutral(self) -> None:
        """Raises RefusedError for a key that would have to change the picture, and cannot."""
        for name in self.model_fields_set & _NEUTRAL.keys():
            value, allowed = getattr(self, name), _NEUTRAL[name]
            is_unused = name == "inpainting_fill" and not getattr(self, "mask", None)
            if not is_unused and value not in (*_NOTHING, *allowed):
                raise RefusedError(
                    400, f"{name} is not supported", "unsupported_parameter", param=name
                )

    def inputs(self) -> dict[str, bytes]:
        return {}


class Img2Img(Txt2Img):
    init_images: list[Base64] = Field(min_length=1, max_length=1)
    mask: Base64 | None = None
    resize_mode: Annotated[int, Field(ge=0, le=2)] = 0
    mask_blur: int = 4
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    denoising_strength: float | None = 0.75

    def arguments(self) -> dict[str, Any]:
        found = super().arguments() | {
            "strength": self.denoising_strength,
            "strength_rule": "diffusers",  # the last share of the steps
            "fit": _FITS[self.resize_mode],
        }
        if self.mask is None:
            return found
        found["mask_blur"] = self.mask_blur
        if self.inpaint_full_res:
            del found["fit"]
            found["crop_mask"] = self.inpaint_full_res_padding
        return found

    def inputs(self) -> dict[str, bytes]:
        found = {"image": from_base64("init_images", self.init_images[0])}
        return found if self.mask is None else found | {"mask": from_base64("mask", self.mask)}


def _with_neutral(model: type[Txt2Img]) -> Any:
    neutral: dict[str, Any] = dict.fromkeys([*_NEUTRAL, *_IGNORED.split()], (Any, None))
    return create_model(model.__name__, __base__=model, **neutral)


def _without_tags(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """A prompt without its tags <lora:NAME:WEIGHT>, and the LoRAs that they name.

    Raises UsageError for a tag that says something else, as a weight for each model does.
    """
    found = []
    for tag in _TAG.findall(prompt):
        name, _, weight = tag.partition(":")
        try:
            choice = Choice(name=name, weight=float(weight or 1))
        except ValueError:
            raise UsageError(
                f"<lora:{printable(tag, 80)}>: expected <lora:NAME> or <lora:NAME:WEIGHT> with a "
                f"weight of -{LARGEST_LORA_WEIGHT} to {LARGEST_LORA_WEIGHT}"
            ) from None
        found.append(choice.model_dump())
    if len(found) > MOST_LORAS:
        raise UsageError(f"prompt: expected at most {MOST_LORAS} LoRAs, got {len(found)}")
    return (_TAG.sub("", prompt).strip() if found else prompt), found


def _named(name: str, value: str | None, names: dict[str, str]) -> str | None:
    if value is None:
        return None
    if value.lower() not in names:
        raise UsageError(f"{name}: expected one of {', '.join(names)}")
    return names[value.lower()]


TXT2IMG, IMG2IMG = _with_neutral(Txt2Img), _with_neutral(Img2Img)


class PngInfo(Body):
    image: Base64


def router(jobs: Jobs) -> APIRouter:
    routes = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    _draw(routes, jobs)
    _lists(routes, jobs)
    return routes


def _draw(routes: APIRouter, jobs: Jobs) -> None:
    @routes.post("/txt2img")
    async def txt2img(body: TXT2IMG, request: Request):  # type: ignore[valid-type]
        return await _answer(jobs, request, body)

    @routes.post("/img2img")
    async def img2img(body: IMG2IMG, request: Request):  # type: ignore[valid-type]
        return await _answer(jobs, request, body)

    @routes.get("/progress")
    async def progress(skip_current_image: bool = False):
        live = _current(jobs)
        found: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "current_image": None}
        state: dict[str, Any] = {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
        }
        state |= {"job": "", "job_count": len(jobs.live), "job_no": 0, "job_timestamp": ""}
        state |= {"sampling_step": 0, "sampling_steps": 0}
        if live is not None and live.began is not None:
            share = live.progress
            found["progress"] = share
            if share:
                found["eta_relative"] = (time.monotonic() - live.began) * (1 - share) / share
            state |= {"job": live.id, "job_no": len(live.pictures)}
            state["job_timestamp"] = time.strftime(
                "%Y%m%d%H%M%S", time.localtime(live.record.created)
            )
            if live.steps:
                picture = max(live.steps)
                step = live.steps[picture]
                state |= {"sampling_step": step.index + 1, "sampling_steps": step.steps}
                if not skip_current_image:
                    found["current_image"] = to_base64(live.preview(picture))
        return found | {"state": state, "textinfo": None}

    @routes.post("/interrupt")
    async def interrupt():
        """End the job that `progress` shows, if it is one of this API."""
        live = _current(jobs)
        if live is not None and live.record.origin == ORIGIN:
            await jobs.cancel(live)
        return {}

    @routes.post("/png-info")
    async def png_info(body: PngInfo):
        return await jobs.aside(_png_info, body)


def _lists(routes: APIRouter, jobs: Jobs) -> None:
    @routes.get("/options")
    async def options():
        return {"sd_model_checkpoint": jobs.engine.name, "samples_format": "png"}

    @routes.post("/options")
    async def set_options(body: dict[str, Any]):
        for name, value in body.items():
            if name != "sd_model_checkpoint" or value != jobs.engine.name:
                message = (
                    "the only option is sd_model_checkpoint, and its only value the model's name"
                )
                raise RefusedError(400, message, "unsupported_parameter")
        return {}

    @routes.get("/samplers")
    async def samplers():
        return [{"name": A1111[name], "aliases": [name], "options": {}} for name in SAMPLERS]

    @routes.get("/schedulers")
    async def schedulers():
        fixed = {"default_rho": -1, "need_inner_model": False}
        return [{"name": n, "label": A1111[n], "aliases": None, **fixed} for n in SCHEDULES]

    @routes.get("/sd-models")
    async def models():
        name = jobs.engine.name
        hashes = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **hashes}]

    @routes.get("/loras")
    async def loras():
        rows = await jobs.aside(jobs.loras.describe)
        return [
            {
                "name": row["name"],
                "alias": row["name"],
                "path": row["file"],
                "metadata": {"trigger_words": row["trigger_words"]},
            }
            for row in rows
            if "error" not in row
        ]

    @routes.post("/refresh-loras")
    async def refresh_loras():
        """The folder is listed anew each time."""
        return {}


def _current(jobs: Jobs) -> Live | None:
    """The oldest job of this API in flight, or of any."""
    running = [live for live in jobs.live.values() if live.state == RUNNING]
    return next(
        (live for live in running if live.record.origin == ORIGIN), next(iter(running), None)
    )


async def _answer(jobs: Jobs, request: Request, body: Txt2Img) -> dict[str, Any]:
    body.check_neutral()
    jobs.check_intake()
    live = await jobs.accept(await jobs.aside(_order, jobs, body))
    try:
        await ended(request, jobs, live)
    except RefusedError:
        if live.state != CANCELLED:
            raise
    return await jobs.aside(_result, jobs, live, body)


def _order(jobs: Jobs, body: Txt2Img) -> Order:
    count = body.batch_size * body.n_iter
    return order(
        *(jobs.engine.config, jobs.loras, ORIGIN, body.arguments()),
        seed=body.seed,
        count=count,
        inputs=body.inputs(),
    )


def _result(jobs: Jobs, live: Live, body: Txt2Img) -> dict[str, Any]:
    """The pictures that were drawn: fewer than asked for if the job was interrupted."""
    files = [jobs.store.picture(live.id, number).read_bytes() for number in sorted(live.pictures)]
    texts = [_text(data) for data in files]
    info = {
        **body.model_dump(
            include={"prompt", "negative_prompt", "steps", "cfg_scale", "batch_size"}
        ),
        **{
            name: value
            for name, value in next(iter(live.pictures.values()), {}).items()
            if name in _SHOWN
        },
        "seed": seed_to_json(live.record.seeds[0]),
        "all_seeds": [seed_to_json(seed) for seed in live.record.seeds],
        "all_prompts": [body.prompt] * len(live.record.seeds),
        "infotexts": texts,
        "is_interrupted": live.state == CANCELLED,
    }
    asked = body.model_dump(exclude_unset=True, exclude={"init_images", "mask"}, mode="json")
    return {
        "images": [to_base64(data) for data in files],
        "parameters": asked,
        "info": json.dumps(info),
    }


_SHOWN = ("width", "height", "steps")


def _text(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        return str(image.info.get("parameters", ""))


def _png_info(body: PngInfo) -> dict[str, Any]:
    data = from_base64("image", body.image)
    decode(data, "image", MOST_PIXELS)
    if not data.startswith(b"\x89PNG"):
        return {"info": "", "items": {}, "parameters": {}}
    items = texts_in(data)
    return {"info": items.pop("parameters", ""), "items": items, "parameters": {}}
