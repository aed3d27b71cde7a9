"""OpenAI's API of images, as the openai SDK calls it."""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, Json, ValidationError
from starlette.datastructures import UploadFile

from .body import Body
from .errors import RefusedError, invalid
from .jobs import Jobs, Live
from .loras import Choices
from .order import MOST_PIXELS, Count, Order, Seed, Text, order
from .pictures import Format, encoded, to_base64, transparent_as_mask
from .store import DONE
from .streams import PING, Events, cancelled_with, check_done, ended, stream

_SIZE = r"auto|[0-9]{1,5}x[0-9]{1,5}"
_FORM = {"max_files": 3, "max_fields": 40, "max_part_size": 1 << 20}


class Generation(Body):
    """Beside OpenAI's keys: seed, num_inference_steps, guidance_scale, negative_prompt and lora."""

    prompt: Text = Field(examples=["a red circle"])
    model: str | None = None
    n: Count | None = 1
    size: Annotated[str, Field(pattern=f"^({_SIZE})$")] | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Format | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    seed: Seed | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: Text | None = None
    lora: Choices | None = None
    # what has no other meaning here than its default
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None

    def arguments(self) -> dict[str, Any]:
        width, height = None, None
        if self.size not in (None, "auto"):
            width, height = map(int, self.size.split("x"))
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "steps": self.num_inference_steps,
            "guidance": None if self.guidance_scale is None else float(self.guidance_scale),
            "width": width,
            "height": height,
            "lora": None if self.lora is None else [of.model_dump() for of in self.lora],
        }

    @property
    def form(self) -> Format:
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        return 100 if self.output_compression is None else self.output_compression


class Edit(Generation):
    """The fields of a form, beside its files `image` and `mask`. `strength`: how much is redrawn."""

    lora: Json[Choices] | None = None  # a form's fields are text
    strength: float | None = None
    input_fidelity: Literal["low"] | None = None

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"strength": self.strength}


def router(jobs: Jobs) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def models():
        return {"object": "list", "data": [_model(jobs)]}

    @routes.get("/models/{name}")
    async def model(name: str):
        _check_model(jobs, name)
        return _model(jobs)

    @routes.post("/images/generations")
    async def generations(body: Generation, request: Request):
        return await _answer(jobs, request, body, {}, "image_generation")

    @routes.post("/images/edits", openapi_extra={"requestBody": _form_schema()})
    async def edits(request: Request):
        """A form with the file `image`, and with `mask`, whose transparent parts are redrawn."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise RefusedError(400, "expected multipart/form-data", "invalid_request")
        async with request.form(**_FORM) as form:
            fields: dict[str, str] = {}
            files: dict[str, bytes] = {}
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in fields or name in files:
                    raise RefusedError(400, f"expected one {name}", "invalid_request", param=name)
                if isinstance(value, UploadFile):
                    files[name] = await value.read()
                else:
                    fields[name] = value
        for name in files.keys() - {"image", "mask"}:
            raise RefusedError(400, "files must be image and mask", "unknown_parameter", param=name)
        if "image" not in files:
            raise RefusedError(400, "image is missing", "missing_parameter", param="image")
        try:
            body = Edit.model_validate(fields, strict=False)
        except ValidationError as fault:
            raise invalid(fault.errors()) from None  # type: ignore[arg-type]
        return await _answer(jobs, request, body, files, "image_edit")

    return routes


def _form_schema() -> dict[str, Any]:
    schema = Edit.model_json_schema()
    for name in ("image", "mask"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _model(jobs: Jobs) -> dict[str, Any]:
    return {"id": jobs.engine.name, "object": "model", "created": 0, "owned_by": "zimage_jax"}


def _check_model(jobs: Jobs, name: str | None) -> None:
    if name not in (None, jobs.engine.name):
        message = f"no such model; there is {jobs.engine.name}"
        raise RefusedError(404, message, "model_not_found", param="model")


async def _answer(
    jobs: Jobs, request: Request, body: Generation, files: Mapping[str, bytes], kind: str
):
    _check_model(jobs, body.model)
    jobs.check_intake()
    live = await jobs.accept(await jobs.aside(_order, jobs, body, files))
    if body.stream:
        return stream(_events(jobs, live, body, kind))
    await ended(request, jobs, live)
    size = _size(live)
    data = []
    for number in sorted(live.pictures):
        if body.response_format == "url":
            query = "" if body.form == "png" else f"?compression={body.compression}"
            data.append(
                {"url": f"{request.base_url}pictures/{live.id}-{number}.{body.form}{query}"}
            )
        else:
            data.append({"b64_json": await _picture(jobs, live, number, body)})
    common = {"created": int(time.time()), "background": "opaque", "output_format": body.form}
    return common | {"size": size, "data": data}


def _order(jobs: Jobs, body: Generation, files: Mapping[str, bytes]) -> Order:
    inputs = dict(files)
    if "mask" in inputs:
        inputs["mask"] = transparent_as_mask(inputs["mask"], MOST_PIXELS)
    return order(
        jobs.engine.config,
        jobs.loras,
        "openai",
        body.arguments(),
        seed=body.seed,
        count=body.n or 1,
        inputs=inputs,
    )


async def _picture(jobs: Jobs, live: Live, number: int, body: Generation) -> str:
    path = jobs.store.picture(live.id, number)
    return to_base64(await jobs.aside(encoded, path, body.form, body.compression))


def _size(live: Live) -> str:
    first = next(iter(live.pictures.values()))
    return f"{first['width']}x{first['height']}"


async def _events(jobs: Jobs, live: Live, body: Generation, kind: str) -> Events:
    """Of each picture up to `partial_images` small previews, and the picture."""
    partial, shown = dict.fromkeys(range(len(live.record.seeds)), 0), set[int]()
    common = {
        "created_at": int(time.time()),
        "size": body.size or "auto",
        "quality": "auto",
        "background": "opaque",
        "output_format": body.form,
    }
    with cancelled_with(jobs, live):
        async for is_change in live.changes(PING):
            if not is_change:
                yield None
                continue
            for number, step in list(live.steps.items()):
                due = (step.index + 1) * ((body.partial_images or 0) + 1) // step.steps
                if partial[number] < due and step.index + 1 < step.steps and number not in shown:
                    name, index = f"{kind}.partial_image", partial[number]
                    partial[number] = due
                    preview = await jobs.aside(
                        encoded, live.preview(number), body.form, body.compression
                    )
                    yield (
                        name,
                        {
                            **{"type": name, **common},
                            "partial_image_index": index,
                            "b64_json": to_base64(preview),
                        },
                    )
            for number in sorted(live.pictures.keys() - shown):
                shown.add(number)
                name = f"{kind}.completed"
                yield (
                    name,
                    {
                        **{"type": name, **common, "size": _size(live), "usage": _NO_USAGE},
                        "b64_json": await _picture(jobs, live, number, body),
                    },
                )
        if live.state != DONE:
            try:
                check_done(live)
            except RefusedError as refusal:
                yield "error", {"type": "error", **refusal.to_json()}


# the SDK's type has it; nothing is counted here
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
