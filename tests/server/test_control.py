"""A server whose model has a ControlNet."""

import base64

import pytest

from tests.checkpoints_convert.test_control import saved
from zimage_jax import ZImage

JOB = {"prompt": "a red fox", "width": 64, "height": 48, "steps": 3, "seed": 3}


@pytest.mark.exhaustive
def test_a_job_follows_its_control_image(start, native, picture, tmp_path):
    model, control = native("controlled"), saved("union 2.1", tmp_path)
    (tmp_path / "edges.png").write_bytes(picture)
    pipe = ZImage.load(model, control=control)
    alone = pipe.generate(**JOB, control_image=tmp_path / "edges.png", control_scale=0.8)
    job = JOB | {"control_image": base64.b64encode(picture).decode(), "control_scale": 0.8}
    with start(tmp_path / "data", "--model", model, "--control", control) as server:
        plan = server.post("/plan", job)
        done = server.wait(server.post("/jobs", job)["id"])
    assert plan["fits"]
    assert [p["latents_sha256"] for p in done["pictures"]] == [alone.report["latents_sha256"]]
    assert done["from"] == ["control_image"]
