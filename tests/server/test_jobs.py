"""Jobs by the native API: accepted, followed, cancelled, kept."""

import base64
import hashlib
import io
import json
import threading

import pytest
from PIL import Image

from tests.schedules import MODEL
from zimage_jax import ZImage
from zimage_jax.server.order import EXACT

JOB = {"prompt": "a red fox", "width": 64, "height": 48, "steps": 3}
LONG = JOB | {"steps": 400}


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_a_job_draws_what_generate_draws(server, native):
    accepted = server.post("/jobs", JOB | {"seed": 3, "count": 2, "kv": {"reuse": 1}})
    assert accepted["state"] in ("queued", "running")
    done = server.wait(accepted["id"])
    assert done["seeds"] == [3, 4]
    assert [p["seed"] for p in done["pictures"]] == [3, 4]
    pipe = ZImage.load(native(MODEL))
    for picture, seed in zip(done["pictures"], (3, 4), strict=True):
        alone = pipe.generate(**JOB, seed=seed).report["latents_sha256"]
        assert picture["latents_sha256"] == alone
        image = opened(server.get(picture["url"]))
        assert image.size == (64, 48)
        metadata = json.loads(image.info["zimage_jax"])
        assert (metadata["seed"], metadata["prompt"]) == (seed, "a red fox")
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]


def test_a_picture_in_other_formats(server):
    done = server.wait(server.post("/jobs", JOB)["id"])
    url = done["pictures"][0]["url"].removesuffix(".png")
    for form in ("jpeg", "webp"):
        data = server.get(f"{url}.{form}?compression=80")
        image = opened(data)
        assert (image.format, image.size) == (form.upper(), (64, 48))
        assert b"trainedAlgorithmicMedia" in data
    assert len(server.get(f"{url}.jpeg?compression=5")) < len(server.get(f"{url}.jpeg"))
    assert server.ask("GET", f"{url}.gif")[0] == 404
    assert server.ask("GET", "/pictures/..%2Fjobs.db")[0] == 404
    assert server.ask("GET", f"/pictures/{'0' * 24}-0.png")[0] == 404


def test_seeds_beyond_what_json_has_are_strings(server):
    seed = 2**64 - 2
    done = server.wait(
        server.post("/jobs", JOB | {"seed": str(seed), "noise": "jax", "count": 2})["id"]
    )
    assert done["seeds"] == [str(seed), str(seed + 1)]
    assert server.post("/jobs", JOB | {"seed": EXACT})["seeds"] == [EXACT]
    assert "seed must be" in server.refused("/jobs", JOB | {"seed": str(2**64)})
    assert "seed must be" in server.refused("/jobs", JOB | {"seed": str(2**64 - 1), "count": 2})
    assert "seed must be a whole number" in server.refused("/jobs", JOB | {"seed": "7x"})


def test_from_a_picture(server, picture):
    image = base64.b64encode(picture).decode()
    job = {"prompt": "a fox", "steps": 3, "image": image, "strength": 0.5, "seed": 1}
    done = server.wait(server.post("/jobs", job)["id"])
    assert (done["from"], done["state"]) == (["image"], "done")
    assert (done["pictures"][0]["width"], done["pictures"][0]["height"]) == (64, 48)
    assert not list((server.data / "inputs").iterdir()), (
        "what a job began from is kept until it ends"
    )
    assert "mask needs an image" in server.refused("/jobs", JOB | {"mask": image})
    assert "not base64" in server.refused("/jobs", JOB | {"image": "/etc/passwd"})
    text = base64.b64encode(b"/etc/passwd").decode()
    assert "expected a PNG" in server.refused("/jobs", JOB | {"image": text})
    assert "needs a ControlNet" in server.refused("/jobs", JOB | {"control_image": image})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wdth": 64}, "no such key: wdth"),
        ({"on_step": None}, "no such key: on_step"),
        ({"width": 63}, "width must be a multiple of 16, got 63"),
        ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"steps": "3"}, "steps: Input should be a valid integer"),
        ({"steps": True}, "steps: Input should be a valid integer"),
        ({"sampler": "best"}, "sampler 'best': expected one of euler"),
        ({"count": 11}, "count: Input should be less than or equal to 10"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a" * 32_001}, "prompt: String should have at most 32000 characters"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"\ud800": 1}, "unicode"),
        ({"kv": {"group": "3"}}, "expected 1, 2 or 4"),
        ({"kv": {"x": 1}}, "no such key: kv.x"),
        ({"memory": {"schedule": "best"}}, "schedule"),
        ({"memory": {"pins": [[1]]}}, "pins must be pairs"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"fit": "crop"}, "fit needs an image"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(server, change, message):
    assert message in server.refused("/jobs", JOB | change)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
def test_what_is_no_job_is_refused(server, body):
    status, _, error = server.ask("POST", "/jobs", body, {"Content-Type": "application/json"})
    assert status in (400, 422)
    assert error["error"]["message"]


def test_events_tell_place_steps_and_end(server):
    first = server.post("/jobs", LONG)["id"]
    job = server.post("/jobs", JOB | {"steps": 30})["id"]
    with server.events(f"/jobs/{job}/events") as events:
        found = list(events)
    names = [name for name, _ in found]
    assert names[-2:] == ["picture", "done"]
    steps = [data for name, data in found if name == "step"]
    assert len(steps) > 5
    assert [s["step"] for s in steps] == sorted({s["step"] for s in steps})
    preview = opened(base64.b64decode(steps[0]["preview"]))
    assert preview.size[0] in (8, 16, 32)
    assert found[-1][1]["pictures"][0]["url"].startswith(f"/pictures/{job}")
    with server.events(f"/jobs/{job}/events") as events:
        assert [name for name, _ in events] == ["done"]
    server.ask("DELETE", f"/jobs/{first}")


def test_a_job_is_cancelled_then_removed(server):
    job = server.post("/jobs", LONG)["id"]
    server.wait(job, "running")
    with server.events(f"/jobs/{job}/events") as events:
        next(events)
        assert server.ask("DELETE", f"/jobs/{job}")[2]["state"] == "cancelled"
        assert list(events)[-1][0] == "cancelled"
    assert server.get(f"/jobs/{job}")["state"] == "cancelled"
    done = server.wait(server.post("/jobs", JOB)["id"])
    path = server.data / "pictures" / done["pictures"][0]["url"].rpartition("/")[2]
    assert path.exists()
    assert server.ask("DELETE", f"/jobs/{done['id']}")[2]["state"] == "removed"
    assert not path.exists()
    assert server.ask("GET", f"/jobs/{done['id']}")[0] == 404
    assert server.ask("DELETE", f"/jobs/{done['id']}")[0] == 404


def test_a_full_queue_says_when_to_come_again(server):
    jobs, refused = [server.post("/jobs", LONG)["id"] for _ in range(18)], []
    for _ in range(40):
        status, headers, found = server.ask("POST", "/jobs", LONG)
        if status == 429:
            refused.append((headers, found))
        else:
            jobs.append(found["id"])
    try:
        assert refused
        headers, found = refused[0]
        assert 1 <= int(headers["retry-after"]) <= 600
        assert found["error"]["type"] == "rate_limit_error"
        now = server.get("/jobs?state=accepted&limit=200")["jobs"]
        waiting = [job["position"] for job in reversed(now) if job["state"] == "queued"]
        assert waiting
        assert waiting == list(range(len(waiting)))
    finally:
        for job in jobs:
            server.ask("DELETE", f"/jobs/{job}")


def test_jobs_are_listed_newest_first(server):
    made = [server.post("/jobs", JOB)["id"] for _ in range(3)]
    found = server.get("/jobs?limit=2")["jobs"]
    assert [job["id"] for job in found] == made[:0:-1]
    older = server.get(f"/jobs?limit=1&before={found[-1]['number']}")["jobs"]
    assert older[0]["id"] == made[0]
    for job in made:
        server.wait(job)
    assert made[2] in [job["id"] for job in server.get("/jobs?state=done")["jobs"]]
    assert server.ask("GET", "/jobs?state=lost")[0] == 400


def test_a_plan_says_what_fits(server):
    found = server.post("/plan", JOB)
    assert found["fits"]
    assert 0 < found["peak_bytes"] <= found["budget_bytes"]
    assert found["streams"]["denoise"]["streamed_chunks"] == 0
    assert found["largest"]["width"] >= 64
    small = server.post("/plan", JOB | {"memory": {"max_vram_bytes": 1000}})
    assert (small["fits"], small["largest"]) == (False, None)
    assert small["needed_bytes"] > 1000
    found = server.post("/plan", JOB | {"memory": {"schedule": "ring"}})
    assert found["streams"]["denoise"]["streamed_chunks"] > 0
    assert server.get("/health")["queued"] == 0


def test_a_job_that_does_not_fit_fails_with_a_reason(server):
    job = server.post("/jobs", JOB | {"memory": {"max_vram_bytes": 1000}})["id"]
    failed = server.wait(job)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "out_of_memory")
    assert "needs" in failed["error"]["message"]


def test_memory_and_metrics(server):
    server.wait(server.post("/jobs", JOB)["id"])
    found = server.get("/memory")
    assert found["device"]["peak_bytes_by_stage"]["denoise"] > 0
    assert found["plan"]["streams"]["denoise"]["resident_bytes"] > 0
    assert found["plan"]["budget_bytes"] > 0
    assert found["host"]["engine_bytes"] > found["host"]["parameters_bytes"] >= 0
    assert isinstance(found["nvidia"], list)
    with server.events("/memory/events?seconds=0.2") as events:
        name, data = next(events)
        assert (name, data.keys()) == ("memory", found.keys())
        next(events)
    text = server.get("/metrics").decode()
    assert 'zimage_jobs_total{state="done"}' in text
    assert "zimage_picture_seconds_count" in text
    assert "zimage_engine_starts 1.0" in text


def test_the_documentation_lists_every_path_with_examples(server):
    found = server.get("/openapi.json")
    assert {"/jobs", "/plan", "/memory", "/v1/images/edits", "/sdapi/v1/txt2img"} <= found[
        "paths"
    ].keys()
    assert found["components"]["schemas"]["Drawing"]["properties"]["prompt"]["examples"]
    assert b"openapi.json" in server.get("/docs")


def test_a_client_that_is_slow_or_leaves_holds_nothing_up(server):
    job = server.post("/jobs", JOB | {"steps": 60})["id"]
    with server.events(f"/jobs/{job}/events") as events:
        next(events)
    assert server.wait(job)["state"] == "done"


def test_jobs_of_many_clients_are_drawn_once_each(server):
    found: dict[int, str] = {}

    def client(seed: int) -> None:
        done = server.wait(server.post("/jobs", JOB | {"seed": seed})["id"])
        found[seed] = hashlib.sha256(server.get(done["pictures"][0]["url"])).hexdigest()

    clients = [threading.Thread(target=client, args=[seed]) for seed in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(set(found.values())) == len(found) == 8
