"""A server whose model has a ControlNet."""

import base64

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints_convert.test_control import saved
from tests.server.test_tensors import KEY, drawn
from zimage_jax import ZImage

JOB = {"prompt": "a red fox", "width": 64, "height": 48, "steps": 3, "seed": 3}


@pytest.mark.long
def test_a_job_follows_its_control_image(start, native, picture, tmp_path):
    model, control = native("controlled"), saved("union 2.1", tmp_path)
    (tmp_path / "edges.png").write_bytes(picture)
    pipe = ZImage.load(model, control=control)
    alone = pipe.generate(**JOB, control_image=tmp_path / "edges.png", control_scale=0.8)
    job = JOB | {"control_image": base64.b64encode(picture).decode(), "control_scale": 0.8}
    pixels = np.asarray(Image.open(tmp_path / "edges.png"))[None]
    arguments = "--model", model, "--control", control, "--tensors"
    with start(tmp_path / "data", *arguments, ZIMAGE_API_KEY=KEY) as server:
        plan = server.post("/plan", job)
        done = server.wait(server.post("/jobs", job)["id"])
        own = {n: v for n, v in job.items() if n not in ("control_image", "width", "height")}
        said, _ = drawn(server, {"control_image": pixels}, **own)  # which says the size
    assert plan["fits"]
    assert [p["latents_sha256"] for p in done["pictures"]] == [alone.report["latents_sha256"]]
    assert done["from"] == ["control_image"]
    assert said[-1][0]["reports"][0]["latents_sha256"] == alone.report["latents_sha256"]
