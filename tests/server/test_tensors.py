"""The routes for tensors: ComfyUI's layouts, frames, refusals, and what ends with its client."""

import contextlib
import http.client
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from scripts.bench.live_server import LiveServer
from tests.schedules import MODEL
from zimage_jax import ZImage
from zimage_jax.errors import UsageError
from zimage_jax.model.config import TURBO
from zimage_jax.server.loras import LoraFolders
from zimage_jax.server.tensors import from_sampler, to_sampler, wanted
from zimage_jax.weights.packed import pack, unpack

KEY = "a key of tests"
JOB = {"seed": 7, "width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def server(start, lora_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("tensors") / "data"
    below = tmp_path_factory.mktemp("below")
    (below / "styles").symlink_to(lora_folder)
    folders = "--loras", tmp_path_factory.mktemp("none"), "--loras", below
    with start(data, "--tensors", "--parent", os.getpid(), *folders, ZIMAGE_API_KEY=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def pipe(native) -> ZImage:
    return ZImage.load(native(MODEL))


def body(tensors=None, **job) -> bytes:
    return safetensors.numpy.save(tensors or {}, {"job": json.dumps(job)})


@contextlib.contextmanager
def opened(server, data: bytes, path: str = "/tensors/draw"):
    """The response of a request, until the end of the block."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", path, data, {"Authorization": f"Bearer {KEY}"})
        with connection.getresponse() as response:
            yield response


def frames(response):
    """(what a frame says, its payload) of each."""
    while head := response.read(4):
        facts = json.loads(response.read(int.from_bytes(head, "big")))
        yield facts, response.read(facts["bytes"])


def drawn(server, tensors, **job):
    """All frames of a job, and the tensors of the last."""
    with opened(server, body(tensors, **job)) as response:
        assert response.status == 200, response.read()
        found = list(frames(response))
    assert found[-1][0]["event"] == "done", found[-1]
    return found, unpack(found[-1][1])[0]


def refused(server, data: bytes, path: str = "/tensors/draw") -> str:
    with opened(server, data, path) as response:
        said = response.read()
    assert response.status == 400, said
    return json.loads(said)["error"]["message"]


def features(server, prompt: str, **options) -> np.ndarray:
    status, headers, data = server.ask("POST", "/tensors/encode", {"prompt": prompt, **options})
    assert status == 200, data
    assert headers["content-type"] == "application/x-safetensors"
    return unpack(data)[0]["features"]


@pytest.mark.exhaustive
def test_a_prompt_is_drawn_by_its_features_as_by_generate(server, pipe):
    found = features(server, "a red fox")
    (own,) = pipe.encode(["a red fox"])
    np.testing.assert_array_equal(found, own[None])
    said, tensors = drawn(server, {"features": found}, **JOB)
    expected = pipe.generate("a red fox", **JOB, output="image")
    (report,) = said[-1][0]["reports"]
    assert report["latents_sha256"] == expected.report["latents_sha256"]
    np.testing.assert_allclose(
        to_sampler(tensors["latents"], pipe.config), expected.latents, atol=1e-6
    )
    np.testing.assert_array_equal(tensors["image"], expected.images)
    events = [facts["event"] for facts, _ in said if facts["event"] != "alive"]  # a slow machine
    assert sorted(events) == sorted(["queued", "started", "plan", "step", "step", "done"])
    assert all(data[:3] == b"\xff\xd8\xff" for facts, data in said if facts["event"] == "step")
    (plan,) = (facts for facts, _ in said if facts["event"] == "plan")
    assert plan["predicted_peak_bytes"] == report["predicted_peak_bytes"]
    assert plan["mode"].startswith("resident")
    with opened(server, body({"latents": tensors["latents"]}), "/tensors/decode") as response:
        image = unpack(response.read())[0]["image"]
    np.testing.assert_allclose(image, tensors["image"], atol=1e-5)


def test_a_lora_of_a_folder_below_is_the_encoders_too(server, pipe, lora_folder):
    lora = {"lora": [{"name": "styles/ink", "weight": 2.0}]}
    own = {"lora": [(lora_folder / "ink.safetensors", 2.0)]}
    found = features(server, "a red fox", **lora)
    np.testing.assert_array_equal(found[0], pipe.encode(["a red fox"], **own)[0])
    said, _ = drawn(server, {"features": found}, **JOB, **lora, output="latents")
    expected = pipe.generate("a red fox", **JOB, **own, output="latents").report["latents_sha256"]
    assert said[-1][0]["reports"][0]["latents_sha256"] == expected
    assert refused(server, body(prompt="a", lora=[{"name": "styles/other"}])).startswith(
        "styles/other.safetensors: not a LoRA"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_control_image_is_given_to_each_picture(count):
    image = np.arange(count * 6, dtype=np.uint8).reshape(count, 1, 2, 3)
    job = body({"control_image": image}, prompt="a", seed=7, count=2, control_scale=0.5)
    for number, picture in enumerate(wanted(TURBO, LoraFolders([], TURBO), job).pictures):
        assert (picture["seed"], picture["control_scale"]) == (7 + number, 0.5)
        np.testing.assert_array_equal(picture["control_image"], image[number % count])


@pytest.mark.parametrize(
    ("shape", "job", "words"),
    [
        ((8, 8, 3), {}, r"control_image must be \[B, H, W, 3\], got \[8, 8, 3\]"),
        ((2, 8, 8, 3), {"count": 3}, "control_image has 2 pictures of 3"),
        ((1, 16, 4096, 3), {"count": 64, "height": 4096}, "64 pictures of 4096x4096"),
    ],
)
def test_a_control_image_that_is_refused(shape, job, words):
    data = body({"control_image": np.zeros(shape, np.uint8)}, prompt="a", **job)
    with pytest.raises(UsageError, match=words):
        wanted(TURBO, LoraFolders([], TURBO), data)


def test_options_of_the_text_and_of_memory(server, pipe):
    options = {"prompt_weights": True, "memory": {"schedule": "ring"}}
    found = features(server, "a (red:1.5) fox", **options)
    (own,) = pipe.encode(["a (red:1.5) fox"], prompt_weights=True)
    np.testing.assert_array_equal(found, own[None])
    assert features(server, "").shape[0] == 1
    said, _ = drawn(
        server, {"features": found}, **JOB, memory={"schedule": "ring"}, output="latents"
    )
    assert said[-1][0]["reports"][0]["schedule"] == "ring"


def test_a_batch_has_a_picture_for_each_of_its_latents(server, pipe):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 16, 4, 4)).astype(np.float32)
    mask = np.zeros((1, 4, 4), np.float32)
    mask[:, :2] = 1
    tensors = {"latents": latents, "noise_mask": mask}
    job = {"prompt": "a fox", "seed": 7, "steps": 2, "output": "latents"}
    said, found = drawn(server, tensors, **job)
    assert list(found) == ["latents"]
    assert [report["seed"] for report in said[-1][0]["reports"]] == [7, 8]
    np.testing.assert_allclose(found["latents"][:, :, 2:], latents[:, :, 2:], atol=1e-5)
    given = to_sampler(latents[1:], pipe.config)
    expected = pipe.generate("a fox", latents=given, noise_mask=mask, seed=8, steps=2).latents
    np.testing.assert_array_equal(
        to_sampler(found["latents"][1:], pipe.config).round(5), expected.round(5)
    )


def test_pictures_of_a_batch(server):
    image = np.stack([np.full((32, 32, 3), n, np.uint8) for n in (40, 200)])
    mask = np.zeros((1, 32, 32), np.float32)
    mask[:, :, :16] = 1
    job = {"prompt": "a fox", "seed": 7, "steps": 2, "output": "image"}
    _, found = drawn(server, {"image": image, "mask": mask}, **job)
    np.testing.assert_array_equal(found["image"][:, :, 16:], image[:, :, 16:] / np.float32(255))
    as_floats = {"image": image / np.float32(255), "mask": mask}
    np.testing.assert_array_equal(drawn(server, as_floats, **job)[1]["image"], found["image"])


def test_comfyuis_scale():
    z = np.random.default_rng(0).normal(size=(1, 4, 6, 16)).astype(np.float32)
    latent = from_sampler(z, TURBO)
    assert latent.shape == (1, 16, 4, 6)
    # latent_formats.Flux.process_in
    np.testing.assert_allclose(((latent - 0.1159) * 0.3611).transpose(0, 2, 3, 1), z, atol=1e-6)
    np.testing.assert_allclose(to_sampler(latent, TURBO), z, atol=1e-6)
    assert not to_sampler(np.zeros((1, 16, 4, 6), np.float32), TURBO).any(), "an empty latent"


def test_what_is_refused(server):
    ones = np.ones((1, 4, 4), np.float32)
    assert "expected a safetensors file" in refused(server, b"\xff" * 100)
    assert "not a whole safetensors file" in refused(server, body({"mask": ones})[:-1])
    assert "no such tensor; there are features" in refused(server, body({"weights": ones}))
    assert "no such key: job" in refused(server, body(job="x"))
    assert "latents must be [B, C, h, w]" in refused(server, body({"latents": ones}))
    assert "mask must be [B, H, W]" in refused(server, body({"mask": ones[0]}, prompt="a"))
    assert "image has 2 pictures of 3" in refused(
        server, body({"image": np.ones((2, 8, 8, 3), np.uint8)}, prompt="a", count=3)
    )
    large = {"prompt": "a", "count": 64, "width": 2048, "height": 1024}
    assert "expected at most 64 of 1024x1024" in refused(server, body(**large))
    assert "F64" in refused(server, body({"mask": np.ones((1, 2, 2))}))
    assert "expected the tensor latents" in refused(server, pack({}), "/tensors/decode")
    job = body({"image": np.ones((1, 8, 8, 3), np.uint8)}, prompt="a", width=3)
    with opened(server, job) as response:
        ((facts, _),) = [f for f in frames(response) if f[0]["event"] == "error"]
    assert facts["code"] == "invalid_request"
    assert "width must be" in facts["error"]
    control = {"control_image": np.ones((1, 32, 32, 3), np.uint8)}
    with opened(server, body(control, prompt="a", control_scale=0.5)) as response:
        ((facts, _),) = [f for f in frames(response) if f[0]["event"] == "error"]
    assert "control_image needs a ControlNet" in facts["error"]
    status, _, _ = server.ask("POST", "/tensors/draw", b"", {"Authorization": "Bearer no"})
    assert status == 401


def test_a_job_ends_with_its_connection(server):
    with opened(server, body(prompt="a fox", width=32, height=32, steps=900)) as response:
        steps = (facts for facts, _ in frames(response) if facts["event"] == "step")
        assert next(steps)["of"] == 900
    drawn(server, None, prompt="b", **JOB)
    assert server.get("/memory")["devices"][0]["jobs"] == 0


@pytest.mark.exhaustive
def test_the_server_ends_with_its_parent(native, tmp_path):
    sleeper = subprocess.Popen(["sleep", "600"])
    arguments = "--model", native(MODEL), "--no-page", "--parent", sleeper.pid
    with LiveServer(tmp_path / "data", *arguments) as made:
        status, _, _ = made.ask("POST", "/tensors/draw", b"")
        assert status == 404, "without --tensors"
        sleeper.kill()
        sleeper.wait()
        assert made.process.wait(60) == 0
    assert "process 4194304" in started_with(4194304, tmp_path)


def started_with(parent: int, folder) -> str:
    command = [sys.executable, "-m", "zimage_jax.serve", "--data", folder / "x", "--parent", parent]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    return done.stderr


def test_unpack_reads_what_pack_wrote_and_bounds_the_header():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1,), np.uint8)}
    found, metadata = unpack(pack(arrays))
    assert metadata == {}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    for data in (
        b"",
        b"\0" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        b"\2" + b"\0" * 7 + b"[]",
    ):
        with pytest.raises(UsageError, match="safetensors"):
            unpack(data)
