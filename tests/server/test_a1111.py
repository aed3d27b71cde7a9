"""A client of A1111's API (webuiapi) against a live server, and plain HTTP where it has no call."""

import base64
import io
import threading

import pytest
from PIL import Image

webuiapi = pytest.importorskip("webuiapi")

pytestmark = pytest.mark.exhaustive  # a server of its own

SMALL = {"width": 64, "height": 48, "steps": 3, "cfg_scale": 1.0, "sampler_name": "Euler"}


@pytest.fixture(scope="module")
def client(server):
    made = webuiapi.WebUIApi(port=server.port)
    yield made
    made.session.close()


def test_text_to_pictures(client):
    found = client.txt2img(prompt="a red fox", seed=3, batch_size=2, **SMALL)
    assert [image.size for image in found.images] == [(64, 48)] * 2
    assert found.info["all_seeds"] == [3, 4]
    assert "Seed: 4" in found.info["infotexts"][1]
    assert (
        "Steps: 3, Sampler: Euler, Schedule type: Simple, CFG scale: 1"
        in found.image.info["parameters"]
    )
    info = client.png_info(found.image)
    assert info.info == found.image.info["parameters"]


def test_guidance_is_one_less(client):
    found = client.txt2img(prompt="a fox", negative_prompt="a cat", **SMALL | {"cfg_scale": 3.5})
    assert "CFG scale: 3.5" in found.info["infotexts"][0]
    assert "Negative prompt: a cat" in found.info["infotexts"][0]


def test_from_a_picture(client, picture):
    image = Image.open(io.BytesIO(picture))
    found = client.img2img([image], prompt="a fox", denoising_strength=0.7, **SMALL)
    assert "Denoising strength: 0.7" in found.info["infotexts"][0]
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 24, 64, 48))
    found = client.img2img(
        [image],
        mask_image=mask,
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=False,
        prompt="a fox",
        **SMALL,
    )
    kept = (0, 0, 64, 24)
    assert found.image.crop(kept).tobytes() == image.crop(kept).tobytes()


def test_lists_and_options(client, server):
    assert {"Euler", "Euler a", "Heun"} <= {of["name"] for of in client.get_samplers()}
    assert {"simple", "beta"} <= {of["name"] for of in client.get_schedulers()}
    name = client.util_get_current_model()
    assert client.util_get_model_names() == [name]
    client.set_options({"sd_model_checkpoint": name})
    assert server.ask("POST", "/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})[0] == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_hr": True}, "enable_hr is not supported"),
        ({"tiling": True}, "tiling is not supported"),
        ({"styles": ["x"]}, "styles is not supported"),
        ({"alwayson_scripts": {"ControlNet": {}}}, "alwayson_scripts is not supported"),
        ({"sampler_name": "LCM"}, "sampler_name: expected one of euler"),
        ({"cfg_scale": 0.5}, "cfg_scale must be 1 or more"),
        ({"hr_scales": 2}, "no such key: hr_scales"),
    ],
)
def test_what_would_change_the_picture_is_refused_by_name(server, change, message):
    status, _, body = server.ask(
        "POST", "/sdapi/v1/txt2img", {"prompt": "a fox", **SMALL, **change}
    )
    assert status == 400
    assert message in body["detail"]


def test_progress_and_interrupt(client):
    found: list = []

    def draw() -> None:
        found.append(client.txt2img(prompt="a fox", **SMALL | {"steps": 1000}))

    assert client.get_progress()["progress"] == 0
    thread = threading.Thread(target=draw)
    thread.start()
    other = webuiapi.WebUIApi(port=int(client.baseurl.split(":")[2].split("/")[0]))
    while not (progress := other.get_progress())["state"]["sampling_step"]:
        assert thread.is_alive()
    assert 0 < progress["progress"] < 1
    assert progress["state"]["sampling_steps"] == 1000
    preview = Image.open(io.BytesIO(base64.b64decode(progress["current_image"])))
    assert preview.format == "PNG"
    other.interrupt()
    other.session.close()
    thread.join(60)
    assert found[0].info["is_interrupted"]
    assert found[0].images == []
