"""What clients ask for: the arguments of ZImage.generate as JSON, checked before a job is accepted."""

import base64
import binascii
import inspect
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, create_model

from .. import checks
from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.kv import KVPolicy
from ..pipeline.canvas import Canvas, enlarged_size
from ..pipeline.given import ARGUMENTS
from ..pipeline.job import Job
from ..pipeline.opened import decode, mask_of
from ..pipeline.pipeline import ZImage
from ..planning.plan import Memory
from .body import Body
from .loras import Choices, LoraFolders

LONGEST_PROMPT = 32_000  # characters, as OpenAI's; the model reads 512 tokens
LARGEST_BODY = 32 << 20  # bytes
MOST_PIXELS = 4096 * 4096  # of a picture that a client sends
MOST_PICTURES = 10  # of a job, as OpenAI's
EXACT = 2**53  # JSON's numbers are exact up to here

Text = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Seed = Annotated[int | str, Field(description="-1: a random one; a string beyond 2^53")]
Count = Annotated[int, Field(ge=1, le=MOST_PICTURES)]
Base64 = Annotated[str, Field(description="a picture's file in base64, or a data URL of it")]


def request_of(name: str, of: Callable, *leave_out: str, **other: Any) -> type[Body]:
    """The body whose keys are the parameters of a function. `other`: fields that differ from them,
    or are added to them."""
    parameters = inspect.signature(of).parameters.values()
    fields = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.name not in ("self", *leave_out)
    }
    return create_model(name, __base__=Body, **fields | other)


KV = request_of("KV", KVPolicy.parse)
MemoryOptions = request_of("MemoryOptions", Memory, pins=(list[list[int | str]], []))
AS_JSON: dict[str, Any] = {
    "negative_prompt": (Text, ""),
    "seed": (Seed, -1),
    "kv": (KV | None, None),
    "memory": (MemoryOptions | None, None),
}
Drawing = request_of(
    "Drawing",
    ZImage.generate,
    *("on_plan", "on_step", *ARGUMENTS),
    "lora_merge",  # it reads the whole model again, for every job
    **AS_JSON,
    prompt=(Text, Field(examples=["a red circle"])),
    count=(
        Annotated[int, Field(ge=1, le=MOST_PICTURES, description="pictures; the seed counts up")],
        1,
    ),
    image=(Base64 | None, None),
    mask=(Base64 | None, None),
    control_image=(Base64 | None, None),
    lora=(Choices, []),
    enlarge=(
        float | None,
        Field(None, description="draw the image again, so many times as large; it sets the size"),
    ),
)
_FITTING = inspect.signature(ZImage.canvas).parameters.keys() - {
    "self",
    "image",
    "mask",
    "width",
    "height",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked request for pictures."""

    origin: str
    arguments: dict[str, Any]  # of ZImage.generate, as JSON, without seed and pictures
    seeds: tuple[int, ...]
    inputs: dict[str, bytes]  # files of image, mask and control_image
    canvas: Canvas | None  # what image and mask become
    control: Canvas | None  # what control_image becomes

    def to_plan(self, loras: LoraFolders) -> dict[str, Any]:
        """The arguments of ZImage.plan. Raises UsageError."""
        found = as_arguments(self.arguments, loras) | {"seed": self.seeds[0]}
        opened = {"image": self.canvas, "control_image": self.control}
        opened = {name: canvas for name, canvas in opened.items() if canvas is not None}
        settled = _FITTING | {"width", "height"} if opened else set()  # in the canvases
        return {n: v for n, v in found.items() if n not in settled} | opened

    def with_size(self, width: int, height: int) -> "Order":
        """The same, of another size: for a plan."""
        return replace(self, arguments=self.arguments | {"width": width, "height": height})


def order(
    config: ModelConfig,
    loras: LoraFolders,
    origin: str,
    given: Mapping[str, Any],
    *,
    seed: int | str | None = -1,
    count: int = 1,
    inputs: Mapping[str, bytes] | None = None,
    enlarge: float | None = None,
) -> Order:
    """Check a request as ZImage.generate would. This decodes pictures, so call it in a thread.

    `given`: arguments of generate as JSON, those that are None left out. `enlarge`: as the factor of
    ZImage.enlarged. Raises UsageError.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    inputs, seeds = dict(inputs or {}), seeds_of(seed, count)
    if enlarge is not None:
        arguments |= _enlarged(config, inputs, arguments, enlarge)
    loras.check(arguments.get("lora", []))
    job = as_arguments(arguments, loras)
    for name in ("memory", "lora"):
        job.pop(name, None)
    fitting = {name: job.pop(name) for name in _FITTING & job.keys()}
    for name in ({"mask": None} | fitting) if "image" not in inputs else ():
        if name in fitting or name in inputs:
            raise UsageError(f"{name} needs an image: there is none")
    canvas = None
    if "image" in inputs:
        size = {name: job.get(name) for name in ("width", "height")}
        canvas = replace(_canvas(config, inputs, size | fitting), enlarges=enlarge is not None)
        job |= dict.fromkeys(size)
    control = None
    if "control_image" in inputs:
        rows, columns = canvas.pixels.shape[:2] if canvas else (job.get("height"), job.get("width"))
        control = Canvas.of_control(
            decode(inputs["control_image"], "control_image", MOST_PIXELS),
            width=columns,
            height=rows,
            multiple=config.pixel_multiple,
        )
        job |= {"control": control, "width": None, "height": None}
    checked = Job.of(config, job.pop("prompt"), seed=seeds[0], canvas=canvas, **job)
    if enlarge is not None:
        # the engine gets a picture that is enlarged already
        arguments["strength"] = checked.strength
    return Order(
        origin=origin,
        arguments=arguments,
        seeds=seeds,
        inputs=inputs,
        canvas=canvas,
        control=control,
    )


def _canvas(config: ModelConfig, inputs: Mapping[str, bytes], fitting: Mapping[str, Any]) -> Canvas:
    """What a job begins from. Raises UsageError."""
    return Canvas.of(
        decode(inputs["image"], "image", MOST_PIXELS),
        mask_of(decode(inputs["mask"], "mask", MOST_PIXELS)) if "mask" in inputs else None,
        **fitting,
        multiple=config.pixel_multiple,
        model_side=config.vae.sample_size,
    )


def _enlarged(
    config: ModelConfig, inputs: Mapping[str, bytes], arguments: Mapping[str, Any], factor: float
) -> dict[str, Any]:
    if "image" not in inputs:
        raise UsageError("enlarge needs an image: there is none")
    for name in ("width", "height"):
        if name in arguments:
            raise UsageError(f"enlarge sets the size: {name} cannot be given")
    opened = decode(inputs["image"], "image", MOST_PIXELS)
    width, height = enlarged_size(opened, factor, config.pixel_multiple)
    return {"fit": "stretch", "width": width, "height": height}


def as_arguments(arguments: Mapping[str, Any], loras: LoraFolders) -> dict[str, Any]:
    """Arguments as JSON -> those of ZImage.generate. Raises UsageError."""
    found = dict(arguments)
    if "lora" in found:
        found["lora"] = loras.chosen(found["lora"])
    if "kv" in found:
        found["kv"] = KVPolicy.parse(**found["kv"])
    if "memory" in found:
        pins = tuple(map(_pin, found["memory"].get("pins", ())))
        found["memory"] = Memory(**found["memory"] | {"pins": pins})
    return found


def _pin(pair: list) -> tuple[int | str, str]:
    if len(pair) != 2 or not isinstance(pair[1], str):
        raise UsageError(
            'pins must be pairs of a chunk and resident or streamed, as in [2, "resident"]'
        )
    return pair[0], pair[1]


def given(request: Body) -> dict[str, Any]:
    """What a request says, without the values that it leaves to us."""
    return request.model_dump(exclude_unset=True, mode="json")


def from_base64(name: str, text: str) -> bytes:
    """The bytes of base64 or of a data URL. Raises UsageError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name} is not base64: expected a picture's file") from None


def seed_to_json(seed: int) -> int | str:
    return seed if seed <= EXACT else str(seed)


def seeds_of(seed: int | str | None, count: int, most: int = MOST_PICTURES) -> tuple[int, ...]:
    """`count` seeds: a seed counts up, -1 is drawn for each picture. Raises UsageError."""
    checks.whole("the number of pictures", count, 1, most)
    if isinstance(seed, str):
        if (
            not (seed.removeprefix("-").isascii() and seed.removeprefix("-").isdigit())
            or len(seed) > 20
        ):
            checks.refuse("seed", "a whole number", seed)
        seed = int(seed)
    if seed in (None, -1):
        return tuple(secrets.randbits(32) for _ in range(count))
    first = checks.whole("seed", seed, 0, checks.LARGEST_SEED)
    return tuple(checks.whole("seed", first + n, 0, checks.LARGEST_SEED) for n in range(count))
