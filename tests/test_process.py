"""The engine in a process of its own: what kills it costs time, and no picture."""

import os
import pickle
import random
import signal
import time
from concurrent.futures import CancelledError

import pytest

from tests.schedules import JOB, MODEL
from zimage_jax import Memory, ZImage, process
from zimage_jax.errors import CheckpointError, EngineError, OutOfMemoryError, UsageError
from zimage_jax.pipeline.request import Started
from zimage_jax.process import ZImageProcess

RING = Memory(schedule="ring")
JOBS = [JOB | {"prompt": "a star", "seed": n, "steps": 2 + n % 3} for n in range(6)]


@pytest.fixture(scope="module")
def model(native):
    return native(MODEL)


@pytest.fixture(scope="module")
def alone(model):
    pipe = ZImage.load(model, memory=RING)
    return [pipe.generate(**job).report["latents_sha256"] for job in JOBS]


@pytest.fixture(scope="module")
def engine(model):
    starts: list = []
    with ZImageProcess(model, memory=RING, on_start=lambda *of: starts.append(of)) as made:
        yield made
        assert len(starts) == made.starts
        assert all(nbytes > 0 for _, nbytes in starts)
        assert all({"start", "open", "plan", "read"} == seconds.keys() for seconds, _ in starts)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def checksums(requests: list) -> list[str]:
    return [request.result(300).report["latents_sha256"] for request in requests]


def test_pictures_are_those_of_this_process(engine, alone):
    events: list = []
    requests = [engine.submit(**job, on_event=events.append) for job in JOBS]
    assert checksums(requests) == alone
    assert sum(isinstance(event, Started) for event in events) == len(JOBS)
    steps = [event for event in events if hasattr(event, "latents")]
    assert len(steps) == sum(job["steps"] for job in JOBS)
    assert steps[0].previews().shape == (1, 6, 8, 3)
    assert events.count(None) == len(JOBS)
    assert "float32 on cpu" in engine.describe()


def test_a_plan_and_errors_come_back(engine):
    assert engine.plan("a", **JOB).result(60).plan.schedule == "ring"
    for options, fault in (({"width": 3}, UsageError), ({"wdth": 64}, UsageError)):
        with pytest.raises(fault):
            engine.submit("a", **options).result(60)
    with pytest.raises(OutOfMemoryError) as raised:
        engine.submit("a", **JOB, memory=Memory(max_vram_bytes=1000)).result(60)
    assert raised.value.needed > 1000
    seed = engine.submit("a", **JOB | {"seed": -1}).result(60).report["seed"]
    assert 0 <= seed < 2**32


def test_a_job_is_cancelled_there(engine):
    request = engine.submit(**JOB | {"prompt": "a", "steps": 500})
    until(lambda: request.is_started)
    request.cancel()
    with pytest.raises(CancelledError):
        request.result(60)


def test_a_job_is_cancelled_before_it_is_there(engine):
    request = engine.submit(**JOB | {"prompt": "a", "steps": 500})
    request.cancel()
    with pytest.raises(CancelledError):
        request.result(60)


def test_what_cannot_go_to_another_process_is_refused(engine, alone):
    with pytest.raises(UsageError, match="go to another process"):
        engine.submit("a", **JOB, image=lambda: None)
    assert checksums([engine.submit(**JOBS[0])]) == alone[:1]


def test_a_listener_that_raises_cancels_its_job(engine):
    def fails(event):
        raise ValueError("a listener's own fault")

    with pytest.raises(CancelledError):
        engine.submit(**JOB | {"prompt": "a", "steps": 500}, on_event=fails).result(60)


def killed(engine: ZImageProcess, kills: int, rng: random.Random) -> None:
    """Kill the process, `kills` times while jobs are in flight."""
    for _ in range(kills):
        starts = engine.starts
        time.sleep(rng.uniform(0.1, 0.4))
        os.kill(engine.pid, signal.SIGKILL)
        until(lambda: engine.starts > starts)  # noqa: B023


@pytest.mark.exhaustive
def test_a_killed_process_is_started_again_and_every_job_drawn_once(engine, alone):
    seen: list[list] = [[] for _ in JOBS]
    requests = [
        engine.submit(**job, on_event=events.append) for job, events in zip(JOBS, seen, strict=True)
    ]
    cancelled = engine.submit(**JOB | {"prompt": "a", "steps": 500})
    until(lambda: cancelled.is_started)
    before = engine.starts
    cancelled.is_cancelled = True  # said while nobody listens
    killed(engine, 1, random.Random(0))
    assert checksums(requests) == alone
    assert engine.starts == before + 1
    with pytest.raises(CancelledError):
        cancelled.result(60)
    for job, events in zip(JOBS, seen, strict=True):
        steps = [event.index for event in events if hasattr(event, "latents")]
        assert steps == list(range(job["steps"])), "no step is told twice"
        assert events.count(None) == 1


@pytest.mark.exhaustive
def test_other_memory_options_are_a_new_start(engine, alone):
    requests = [engine.submit(**job) for job in JOBS]
    try:
        engine.restart(Memory(schedule="swap"))
        assert checksums(requests) == alone
        assert engine.plan("a", **JOB).result(60).plan.schedule == "swap"
    finally:
        engine.restart(RING)


@pytest.mark.exhaustive
def test_a_hung_process_is_killed(engine, alone, monkeypatch):
    monkeypatch.setattr(engine, "_patience", 6.0)
    before, request = engine.starts, engine.submit(**JOBS[0] | {"steps": 60})
    until(lambda: request.is_started)
    os.kill(engine.pid, signal.SIGSTOP)
    assert request.result(300).report["steps"] == 60
    assert engine.starts > before


@pytest.mark.exhaustive
def test_a_job_that_kills_it_every_time_is_ended(engine, monkeypatch):
    monkeypatch.setattr(process, "TRIES", 1)
    request = engine.submit(**JOB | {"prompt": "a", "steps": 500})
    until(lambda: request.is_started)
    os.kill(engine.pid, signal.SIGSEGV)
    with pytest.raises(EngineError, match=r"ended 1 times before an NFE of this job \(signal 11\)"):
        request.result(60)
    assert engine.submit(**JOB, prompt="a").result(60)


def test_what_cannot_be_opened_is_said(model, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no such folder|not a"):
        ZImageProcess(tmp_path / "nothing")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match=r"ended at its start \(exit code 1\)"):
        ZImageProcess(model)


def test_errors_cross_processes():
    fault = OutOfMemoryError("too little", 7)
    again = pickle.loads(pickle.dumps(fault))
    assert (str(again), again.needed) == ("too little", 7)


def test_a_closed_engine_takes_no_jobs(engine):
    """The last test of this engine: it may be closed twice."""
    waiting = engine.submit(**JOB | {"prompt": "a", "steps": 500})
    pid = engine.pid
    engine.close()
    with pytest.raises(CancelledError):
        waiting.result(1)
    with pytest.raises(EngineError, match="closed"):
        engine.submit("a")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
