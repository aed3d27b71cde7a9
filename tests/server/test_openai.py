"""The openai SDK against a live server."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from PIL import Image

from tests.server.conftest import png

PROMPT = {
    "prompt": "a red fox",
    "size": "64x48",
    "extra_body": {"num_inference_steps": 3, "seed": 3},
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_text_to_pictures(client, server):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    found = client.images.generate(model=model.id, n=2, **PROMPT)
    assert (found.size, found.output_format, len(found.data)) == ("64x48", "png", 2)
    seeds = [json.loads(opened(image.b64_json).info["zimage_jax"])["seed"] for image in found.data]
    assert seeds == [3, 4]
    again = client.images.generate(
        **PROMPT, response_format="url", output_format="webp", quality="auto"
    )
    data = server.get(again.data[0].url.removeprefix(server.url))
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    small, large = (
        client.images.generate(**PROMPT, output_format="jpeg", output_compression=n)
        .data[0]
        .b64_json
        for n in (5, 100)
    )
    assert len(small) < len(large)
    assert opened(small).format == "JPEG"


def test_all_that_is_sent_reaches_the_model(client):
    more = {
        "num_inference_steps": 2,
        "seed": str(2**60),
        "guidance_scale": 2.5,
        "negative_prompt": "a cat",
    }
    found = client.images.generate(prompt="a fox", size="48x64", extra_body=more)
    metadata = json.loads(opened(found.data[0].b64_json).info["zimage_jax"])
    names = ("steps", "guidance", "negative_prompt", "width", "height", "seed")
    assert [metadata[name] for name in names] == [2, 2.5, "a cat", 48, 64, 2**60]


@pytest.mark.parametrize("partial_images", [0, 3])
def test_a_stream_has_partial_images(client, partial_images):
    more = {"num_inference_steps": 40, "seed": 3}
    events = list(
        client.images.generate(
            prompt="a fox",
            size="64x48",
            stream=True,
            partial_images=partial_images,
            extra_body=more,
        )
    )
    *partial, last = events
    assert last.type == "image_generation.completed"
    assert (last.size, last.usage.total_tokens) == ("64x48", 0)
    assert opened(last.b64_json).size == (64, 48)
    assert {event.type for event in partial} <= {"image_generation.partial_image"}
    assert len(partial) <= partial_images
    assert bool(partial) == bool(partial_images)
    assert [event.partial_image_index for event in partial] == sorted(
        {event.partial_image_index for event in partial}
    )
    for event in partial:
        opened(event.b64_json).load()


def test_edits_redraw_what_is_transparent(client, picture):
    mask = np.zeros((48, 64, 4), np.uint8)
    mask[:24, :, 3] = 255  # above it is kept
    more = {"num_inference_steps": 4, "seed": 5}
    found = client.images.edit(
        image=("fox.png", picture), mask=("mask.png", png(mask)), prompt="a fox", extra_body=more
    )
    before = np.asarray(Image.open(io.BytesIO(picture)))
    after = np.asarray(opened(found.data[0].b64_json))
    assert (after[:24] == before[:24]).all()
    assert (after[24:] != before[24:]).any()
    events = list(
        client.images.edit(
            image=("fox.png", picture),
            prompt="a fox",
            stream=True,
            extra_body=more | {"strength": 0.9},
        )
    )
    assert events[-1].type == "image_edit.completed"


@pytest.mark.parametrize(
    ("arguments", "fault", "param"),
    [
        ({"size": "63x48"}, openai.BadRequestError, None),
        ({"size": "large"}, openai.BadRequestError, "size"),
        ({"n": 11}, openai.BadRequestError, "n"),
        ({"style": "vivid"}, openai.BadRequestError, "style"),
        ({"quality": "high"}, openai.BadRequestError, "quality"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_are_typed(client, arguments, fault, param):
    with pytest.raises(fault) as raised:
        client.images.generate(**{"prompt": "a fox", **arguments})
    assert raised.value.body["param"] == param
    assert raised.value.body["message"]


def test_what_an_edit_cannot_be(client, server, picture):
    with pytest.raises(openai.BadRequestError, match="expected a PNG"):
        client.images.edit(image=("fox.png", b"no picture"), prompt="a fox")
    with pytest.raises(openai.BadRequestError, match="expected one image"):
        client.images.edit(image=[("a.png", picture), ("b.png", picture)], prompt="a fox")
    with pytest.raises(openai.BadRequestError, match="no such key: fit"):
        client.images.edit(image=("a.png", picture), prompt="a fox", extra_body={"fit": "crop"})
    mask = png(np.zeros((16, 16, 4), np.uint8))
    with pytest.raises(openai.BadRequestError, match="mask must have the size"):
        client.images.edit(image=("a.png", picture), mask=("m.png", mask), prompt="a fox")
    assert "multipart" in server.refused("/v1/images/edits", {"prompt": "a fox"})


@pytest.mark.exhaustive
def test_a_client_that_leaves_cancels_its_picture(client, server):
    def leaves() -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).images.generate(
                prompt="a fox", size="64x48", extra_body={"num_inference_steps": 1000}
            )

    def left() -> None:
        events = client.images.generate(
            prompt="a fox",
            size="64x48",
            stream=True,
            partial_images=3,
            extra_body={"num_inference_steps": 1000},
        )
        next(iter(events))
        events.close()

    for leave in (leaves, left):
        leave()
        (newest,) = server.get("/jobs?limit=1")["jobs"]
        assert server.wait(newest["id"])["state"] == "cancelled"
