"""What was accepted is drawn once, whatever ends the server or its engine."""

import base64
import os
import shutil
import signal
import time

import pytest

from scripts.bench.live_server import PATIENCE, LiveServer
from tests.schedules import MODEL
from zimage_jax import serve

JOB = {"prompt": "a red fox", "width": 64, "height": 48, "steps": 30}
LONG = JOB | {"steps": 1000, "count": 4}


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    with start(tmp_path_factory.mktemp("crash") / "data") as made:
        yield made


def pictures(server: LiveServer, job: str) -> list[bytes]:
    done = server.wait(job)
    assert done["state"] == "done", done
    return [server.get(picture["url"]) for picture in done["pictures"]]


@pytest.mark.exhaustive
def test_after_kill_9_every_accepted_job_is_drawn_once(server, picture):
    jobs = [JOB | {"seed": n, "count": 1 + n % 2, "steps": 5 + 20 * n} for n in range(4)]
    accepted = [server.post("/jobs", job)["id"] for job in jobs]
    unseeded = server.post("/jobs", JOB)
    image = {"image": base64.b64encode(picture).decode(), "strength": 0.5}
    accepted_image = server.post("/jobs", {"prompt": "a fox", "steps": 30, "seed": 9, **image})[
        "id"
    ]
    server.wait(accepted[0])
    assert server.get(f"/jobs/{accepted[-1]}")["state"] == "running"
    server.kill()
    ours = (
        server.data / "inputs" / f"{'0' * 24}-image",
        server.data / "pictures" / f".{'0' * 24}-0.png.x.tmp",
    )
    theirs = server.data / "pictures" / "holiday.png"
    for path in (*ours, theirs):
        path.write_bytes(b"left behind")
    server.start()
    assert not any(path.exists() for path in ours)
    assert theirs.read_bytes() == b"left behind"
    drawn = [pictures(server, job) for job in accepted]
    assert pictures(server, accepted_image)
    assert server.wait(unseeded["id"])["seeds"] == unseeded["seeds"]
    assert len(server.get("/jobs?limit=200")["jobs"]) == len(jobs) + 2
    again = [pictures(server, server.post("/jobs", job)["id"]) for job in jobs]
    assert again == drawn, "the same bytes as without a crash"
    files = {path.name for path in (server.data / "pictures").iterdir()} - {theirs.name}
    listed = [p["url"] for job in server.get("/jobs?limit=200")["jobs"] for p in job["pictures"]]
    assert files == {url.removeprefix("/pictures/") for url in listed}


@pytest.mark.long
def test_an_engine_that_is_killed_costs_time_and_no_picture(server):
    starts = server.get("/health")["engine_starts"]
    job = server.post("/jobs", JOB | {"steps": 300, "seed": 1})["id"]
    server.wait(job, "running")
    os.kill(server.engine(), signal.SIGKILL)
    assert server.wait(job)["state"] == "done"
    assert server.get("/health")["engine_starts"] == starts + 1


@pytest.mark.long
def test_sigterm_stores_what_runs(server):
    job = server.post("/jobs", LONG | {"seed": 1})["id"]
    server.wait(job, "running")
    with server.events(f"/jobs/{job}/events") as events:
        next(events)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while server.ask("GET", "/health")[0] == 200:
            pass
        status, headers, body = server.ask("POST", "/jobs", JOB)
        assert (status, body["error"]["code"]) == (503, "stopping")
        assert int(headers["retry-after"]) > 0
        assert list(events)[-1][0] == "stored"
    assert server.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 10
    server.start()
    assert server.get(f"/jobs/{job}")["state"] in ("queued", "running")
    assert server.ask("DELETE", f"/jobs/{job}")[0] == 200


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(server):
    job = server.post("/jobs", LONG)["id"]
    server.wait(job, "running")
    server.process.send_signal(signal.SIGTERM)
    while server.ask("GET", "/health")[0] == 200:
        pass
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2
    server.start()
    server.ask("DELETE", f"/jobs/{job}")


@pytest.mark.exhaustive
def test_what_cannot_be_served_is_said_in_a_line(server, tmp_path, run):
    for arguments, code, message in [
        (["--data", server.data, "--port", 0], 1, "another server uses this folder"),
        (["--port", server.port], 2, "cannot listen there"),
        (["--host", "0.0.0.0", "--port", 0], 2, "give it an --api-key"),
        (["--host", "192.0.2.1", "--api-key", "12345678"], 2, "cannot listen there"),
        (["--api-key", "schlüssel"], 2, "expected 8 or more ASCII"),
        (["--api-key", "short"], 2, "expected 8 or more"),
        (["--port", 0, "--data", tmp_path / "data", "--model", tmp_path / "none"], 1, "none"),
    ]:
        found, out, error = run("--no-page", *arguments, command=serve.command)
        assert (found, out, error.count("\n")) == (code, "", 1), error
        assert error.startswith("error: ")
        assert message in error


def test_ctrl_c_ends_it_as_it_ends_the_other_commands(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE) == 130
    assert server.log.read_text().endswith("interrupted\n")


@pytest.mark.long
def test_without_an_engine_the_server_ends_and_keeps_its_jobs(start, native, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(native(MODEL), model)
    with start(tmp_path / "data", "--model", model) as server:
        job = server.post("/jobs", LONG)["id"]
        server.wait(job, "running")
        model.rename(tmp_path / "elsewhere")
        os.kill(server.engine(), signal.SIGKILL)
        assert server.process.wait(PATIENCE) == 1
        assert "cannot be started again" in server.log.read_text()
        (tmp_path / "elsewhere").rename(model)
        server.start()
        assert server.get(f"/jobs/{job}")["state"] in ("queued", "running")


@pytest.mark.long
def test_a_picture_that_cannot_be_kept_is_drawn_another_time(start, tmp_path):
    with start(tmp_path / "data") as server:
        (server.data / "pictures").rmdir()
        (server.data / "pictures").write_bytes(b"")
        job = server.post("/jobs", JOB)["id"]
        assert server.process.wait(PATIENCE) == 1
        assert "cannot be written" in server.log.read_text()
        (server.data / "pictures").unlink()
        server.start()
        assert pictures(server, job)
