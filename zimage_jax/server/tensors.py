"""Text features, latents and pictures as tensors, for a program that has the queue: ComfyUI's nodes.

Nothing is stored: a job lives as long as its connection. Tensors are in ComfyUI's layouts (0.33.0):

    features  [B, S, E]       CONDITIONING: Qwen3's hidden state -2 without padding, before the norm
                              (comfy/text_encoders/z_image.py); ComfyUI reads "(word:1.3)" as text
    latents   [B, C, h, w]    LATENT: as the VAE has them. Its sampler shifts and scales them, unless
                              all are 0 (comfy/latent_formats.py Flux, comfy/samplers.py inner_sample)
    noise_mask [1 or B, h, w] of the latents' size, 1 is redrawn (comfy/utils.py reshape_mask)
    image     [B, H, W, 3]    IMAGE: 0 to 1; mask [1 or B, H, W]: MASK, 1 is redrawn
    control_image [1 or B, H, W, 3]  IMAGE: what a ControlNet follows, of any size

Axes: B pictures, S tokens, E feature width, C latent channels, h, w latent rows and columns.
"""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from fastapi import Request as Connection
from fastapi.responses import StreamingResponse
from jaxtyping import Float32
from PIL import Image
from pydantic import Field, ValidationError

from ..errors import EngineError, UsageError
from ..model.config import ModelConfig
from ..pipeline.job import Result, Step
from ..pipeline.pipeline import ZImage
from ..pipeline.request import Event, Handle, Planned, Started
from ..weights.packed import pack, unpack
from .body import Body
from .errors import RefusedError, invalid, refusal_of
from .jobs import Jobs
from .loras import Choices, LoraFolders
from .order import AS_JSON, MemoryOptions, Text, as_arguments, given, request_of, seeds_of
from .streams import PING, until

MOST, MOST_PIXELS = 64, 64 << 20  # pictures of a job, and pixels of all of them
SAFETENSORS, FRAMES = "application/x-safetensors", "application/octet-stream"
_DIMENSIONS = {"image": "[B, H, W, 3]", "mask": "[B, H, W]", "control_image": "[B, H, W, 3]"}
_TENSORS = ("features", "negative_features", "latents", "noise_mask", *_DIMENSIONS)

Encoding = request_of(
    "Encoding",
    ZImage.encode,
    "texts",
    prompt=(Text, ...),
    lora=(Choices, []),
    memory=(MemoryOptions | None, None),
)
Drawing = request_of(
    "TensorDrawing",
    ZImage.generate,
    *("on_plan", "on_step", "lora_merge", *_TENSORS),
    **AS_JSON,
    lora=(Choices, []),
    prompt=(Text | None, None),
    count=(Annotated[int, Field(ge=1, le=MOST)], 1),
    output=(Literal["latents", "image", "both"], "both"),
)


class Decoding(Body):
    memory: MemoryOptions | None = None  # type: ignore[valid-type]


def to_sampler(latents: np.ndarray, config: ModelConfig) -> Float32[np.ndarray, "B h w C"]:
    """ComfyUI's LATENT as the sampler's latents. Raises UsageError."""
    if latents.ndim != 4:
        raise UsageError(f"latents must be [B, C, h, w], got {list(latents.shape)}")
    values = latents.astype(np.float32).transpose(0, 2, 3, 1)
    if not values.any():  # EmptySD3LatentImage
        return values
    return (values - np.float32(config.vae.shift_factor)) * np.float32(config.vae.scaling_factor)


def from_sampler(latents: np.ndarray, config: ModelConfig) -> Float32[np.ndarray, "B C h w"]:
    """The sampler's latents as ComfyUI's LATENT."""
    scale, shift = (np.float32(n) for n in (config.vae.scaling_factor, config.vae.shift_factor))
    return (latents / scale + shift).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Wanted:
    """A job: the arguments of ZImage.generate for each picture, and the tensors to answer with."""

    pictures: list[dict[str, Any]]
    names: tuple[str, ...]


def wanted(config: ModelConfig, loras: LoraFolders, data: bytes) -> Wanted:
    """The job in a safetensors body: call it in a thread. Raises UsageError and RefusedError."""
    arrays, body = _opened(data, Drawing, _TENSORS)
    for name, shape in _DIMENSIONS.items():
        if name in arrays and arrays[name].ndim != len(shape.split()):
            raise UsageError(f"{name} must be {shape}, got {list(arrays[name].shape)}")
    if "latents" in arrays:
        arrays["latents"] = to_sampler(arrays["latents"], config)
    said = given(body)
    count, output = said.pop("count", 1), said.pop("output", "both")
    count = max(count, *(len(array) for array in arrays.values()), 1)
    for name, array in arrays.items():
        if len(array) not in (1, count):
            raise UsageError(f"{name} has {len(array)} pictures of {count}: expected 1 or {count}")
    _check_pixels(config, arrays, said, count)
    seeds = seeds_of(said.pop("seed", -1), count, MOST)
    arguments = _arguments(said, loras)
    arguments["output"] = "latents" if output == "latents" else "image"

    def of(picture: int, name: str, array: np.ndarray) -> np.ndarray:
        one = array[picture % len(array)]
        return one[None] if name in ("latents", "noise_mask") else one

    pictures = [
        {**arguments, **{name: of(n, name, a) for name, a in arrays.items()}, "seed": seed}
        for n, seed in enumerate(seeds)
    ]
    return Wanted(pictures, ("latents", "image") if output == "both" else (output,))


def _arguments(said: dict[str, Any], loras: LoraFolders) -> dict[str, Any]:
    """The arguments of ZImage's methods in a body. Raises UsageError."""
    found = {name: value for name, value in said.items() if value is not None}
    loras.check(found.get("lora", []))  # so that no message names a folder
    return as_arguments(found, loras)


def _check_pixels(
    config: ModelConfig, arrays: dict[str, np.ndarray], said: dict[str, Any], count: int
) -> None:
    """Raises UsageError for an answer over 0.8 GB."""
    width = height = config.vae.sample_size
    if "latents" in arrays:
        height, width = (config.vae.scale * n for n in arrays["latents"].shape[1:3])
    elif pictures := [arrays[name] for name in ("image", "control_image") if name in arrays]:
        height, width = pictures[0].shape[1:3]
    width, height = said.get("width") or width, said.get("height") or height
    if count * width * height > MOST_PIXELS:
        raise UsageError(
            f"{count} pictures of {width}x{height}: expected at most {MOST_PIXELS >> 20} of 1024x1024, "
            "or as many pixels"
        )


def _opened(
    data: bytes, kind: type[Body], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], Body]:
    """The tensors of a body, and the job in its metadata."""
    arrays, metadata = unpack(data)
    for name, array in arrays.items():
        if name not in names:
            raise UsageError(f"no such tensor; there are {', '.join(names)}")
        if not array.size or not array.ndim:
            raise UsageError(f"{name} is empty")
    try:
        return arrays, kind.model_validate_json(metadata.get("job", "{}"))
    except ValidationError as fault:
        raise invalid(list(fault.errors())) from None  # type: ignore[arg-type]


# -- the engine's events ---------------------------------------------------------------------------


@contextlib.contextmanager
def _submitted(submits: Sequence[Callable[..., Handle]]):
    """Submit jobs together: a queue of their numbers and events, and the jobs. What has not ended at
    the end of the block is cancelled."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | None]]()
    handles: list[Handle] = []

    def hearing(number: int) -> Callable[[Event | None], None]:
        def hear(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return hear

    try:
        for number, submit in enumerate(submits):
            handles.append(submit(on_event=hearing(number)))
        yield events, handles
    finally:
        for handle in handles:
            if not handle.done():
                handle.cancel()


async def _result(connection: Connection, jobs: Jobs, submit: Callable[..., Handle]) -> Any:
    """The result of one job, which is cancelled if its client goes away."""
    ended = asyncio.Event()

    async def follow(events: asyncio.Queue) -> None:
        while (await events.get())[1] is not None:
            pass
        ended.set()

    try:
        with _submitted([submit]) as (events, (handle,)):
            following = asyncio.create_task(follow(events))
            try:
                await until(connection, ended)
            finally:
                following.cancel()
            if not ended.is_set():
                raise RefusedError(409, "the job was cancelled", "cancelled")
            return handle.result(0)
    except (Exception, CancelledError) as fault:
        raise _refusal(jobs, fault) from None


def _refusal(jobs: Jobs, fault: BaseException) -> RefusedError:
    """How a client is told that its job ended. A server without an engine ends."""
    if isinstance(fault, CancelledError):
        return RefusedError(503, "the server is stopping", "stopping")
    if isinstance(fault, EngineError) and jobs.engine.is_closed:
        jobs.break_off(fault)
    return refusal_of(fault if isinstance(fault, Exception) else RuntimeError(fault))


# -- frames ----------------------------------------------------------------------------------------


def frame(event: str, payload: bytes = b"", **facts: Any) -> bytes:
    """Four bytes with the length of a JSON object, the object, and as many bytes as it says."""
    head = json.dumps({"event": event, **facts, "bytes": len(payload)}).encode()
    return len(head).to_bytes(4, "big") + head + payload


async def _frames(jobs: Jobs, job: Wanted) -> AsyncIterator[bytes]:
    submits = [
        lambda on_event, of=of: jobs.engine.submit(**of, on_event=on_event) for of in job.pictures
    ]
    try:
        with _submitted(submits) as (events, handles):
            yield frame("queued", pictures=len(handles))
            left = len(handles)
            while left:
                try:
                    picture, event = await asyncio.wait_for(events.get(), PING)
                except TimeoutError:
                    yield frame("alive")
                    continue
                if event is None:
                    left -= 1
                    jobs.note(handles[picture].result(0))
                else:
                    yield await jobs.aside(_told, picture, event)
            results = [handle.result(0) for handle in handles]
            payload = await jobs.aside(_answer, jobs.engine.config, job, results)
            yield frame("done", payload, reports=[result.report for result in results])
    except (Exception, CancelledError) as fault:
        refusal = _refusal(jobs, fault)
        yield frame("error", error=str(refusal), code=refusal.code)


def _told(picture: int, event: Event) -> bytes:
    if isinstance(event, Step):
        buffer = io.BytesIO()
        Image.fromarray(event.previews()[0]).save(buffer, "JPEG", quality=90)
        facts = {"picture": picture, "nfe": event.index + 1, "of": event.steps}
        return frame("step", buffer.getvalue(), **facts, preview="image/jpeg")
    if isinstance(event, Planned):
        plan = event.plan
        return frame(
            "plan",
            picture=picture,
            mode=str(plan.denoise or "none"),
            predicted_peak_bytes=plan.peak_bytes,
            budget_bytes=event.of_fullest,
            predicted_seconds=plan.seconds,
        )
    if isinstance(event, Started):
        return frame("started", picture=picture)
    return frame("warning", picture=picture, warning=event)


def _answer(config: ModelConfig, job: Wanted, results: Sequence[Result]) -> bytes:
    found = {}
    if "latents" in job.names:
        found["latents"] = from_sampler(np.concatenate([r.latents for r in results]), config)
    if "image" in job.names:
        found["image"] = np.concatenate([r.images for r in results])
    return pack(found)


# -- routes ----------------------------------------------------------------------------------------


def router(jobs: Jobs) -> APIRouter:
    routes = APIRouter(prefix="/tensors", tags=["tensors"])
    of_tensors = {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}}
    body = {"requestBody": of_tensors | {"required": True}}

    @routes.post("/encode", response_class=Response)
    async def encode(asked: Encoding, connection: Connection):  # type: ignore[valid-type]
        """A prompt's `features`. The keys are the arguments of ZImage.encode."""
        jobs.check_intake()
        options = await jobs.aside(_arguments, given(asked), jobs.loras)
        texts = [options.pop("prompt")]

        def submit(on_event):
            return jobs.engine.encode(texts, **options, on_event=on_event)

        (features,) = await _result(connection, jobs, submit)
        packed = pack({"features": features[None].astype(np.float32)})
        return Response(packed, media_type=SAFETENSORS)

    @routes.post("/draw", response_class=StreamingResponse, openapi_extra=body)
    async def draw(connection: Connection):
        """Draw from tensors, and answer with frames: queued, plan, started, step with a preview, and
        at last done with the tensors, or error."""
        jobs.check_intake()
        job = await jobs.aside(wanted, jobs.engine.config, jobs.loras, await connection.body())
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_frames(jobs, job), media_type=FRAMES, headers=headers)

    @routes.post("/decode", response_class=Response, openapi_extra=body)
    async def decode(connection: Connection):
        """`latents` to `image` by the VAE; in tiles with memory.vae_tile."""
        jobs.check_intake()
        data = await connection.body()

        def opened() -> dict[str, Any]:
            arrays, asked = _opened(data, Decoding, ["latents"])
            if "latents" not in arrays:
                raise UsageError("expected the tensor latents")
            options = _arguments(given(asked), jobs.loras)
            return options | {"latents": to_sampler(arrays["latents"], jobs.engine.config)}

        options = await jobs.aside(opened) | {"strength": 0.0, "output": "image", "seed": 0}

        def submit(on_event):
            return jobs.engine.submit(**options, on_event=on_event)

        result = await _result(connection, jobs, submit)
        packed = await jobs.aside(pack, {"image": result.images})
        return Response(packed, media_type=SAFETENSORS)

    return routes
