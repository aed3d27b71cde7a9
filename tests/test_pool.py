"""A process per device: on a CPU each number is a process of its own, as fake devices."""

import json
import os
import signal

import pytest

from tests.schedules import JOB, MODEL
from zimage_jax import Memory, ZImage, batch
from zimage_jax.errors import EngineError
from zimage_jax.pool import ZImagePool

RING = Memory(schedule="ring")
JOBS = [JOB | {"prompt": "a star", "seed": n, "steps": 2 + n % 3} for n in range(8)]


@pytest.fixture(scope="module")
def model(native):
    return native(MODEL)


@pytest.fixture(scope="module")
def alone(model):
    pipe = ZImage.load(model)
    return [pipe.generate(**job).report["latents_sha256"] for job in JOBS]


@pytest.fixture
def pool(model, monkeypatch, cache_of_processes):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache_of_processes)
    with ZImagePool(model, devices=(0, 1), memory=(RING, Memory())) as made:
        yield made


def checksums(requests) -> list[str]:
    return [request.result(300).report["latents_sha256"] for request in requests]


@pytest.mark.exhaustive
def test_every_job_is_drawn_once_whatever_happens_to_a_process(pool, alone, monkeypatch):
    first, second = pool.processes
    requests = [pool.submit(**job) for job in JOBS]
    assert first.unfinished > 0
    assert second.unfinished > 0
    assert checksums(requests) == alone, "the same bits on any device, under any schedule"
    assert pool.plan("a", seed=0).result(60).plan.schedule in ("ring", "resident")

    def fails():
        raise EngineError("no such model")

    seen: list[list] = [[] for _ in JOBS]
    requests = [
        pool.submit(**job, on_event=events.append) for job, events in zip(JOBS, seen, strict=True)
    ]
    monkeypatch.setattr(first, "_start", fails)
    os.kill(first.pid, signal.SIGKILL)
    assert checksums(requests) == alone
    assert (first.is_closed, second.is_closed, pool.is_closed) == (True, False, False)
    for job, events in zip(JOBS, seen, strict=True):
        assert [e.index for e in events if hasattr(e, "index")] == list(range(job["steps"]))
        assert events[-1] is None

    request = pool.submit(**JOBS[0] | {"steps": 500})
    monkeypatch.setattr(second, "_start", fails)
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="cannot be started again: no such model"):
        request.result(60)
    with pytest.raises(EngineError, match="none of its processes"):
        pool.submit(**JOBS[0])


@pytest.mark.parametrize(
    ("words", "platforms", "message"),
    [
        (["--devices", "0,x"], "cpu", "--devices must be a whole number"),
        (["--devices", "0,1", "--max-vram", "1,2,3"], "cpu", "3 sizes for 2 devices"),
        (["--max-vram", "1,2"], "cpu", "2 sizes need --devices"),
        pytest.param(
            *(["--devices", "0"], "cuda,cpu", "device 0: JAX finds no such GPU"),
            marks=pytest.mark.exhaustive,
        ),
        (["--part", "3/2"], "cpu", "--part 3/2: expected I/N"),
    ],
)
def test_what_is_wrong_with_devices_is_said_in_a_line(
    run, tmp_path, monkeypatch, words, platforms, message
):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    (tmp_path / "jobs.txt").write_text("a star\n", "utf-8")
    code, _, error = run("jobs.txt", "-o", "out", *words, command=batch.command)
    assert code in (1, 2)
    assert message in error.splitlines()[-1]


def test_parts_draw_the_lines_between_them_into_one_folder(run, tmp_path):
    prompts = ["a star", "a circle", "a square", "a ring", "a cross"]
    (tmp_path / "jobs.txt").write_text("\n".join(prompts), "utf-8")
    sizes = ["jobs.txt", "-o", "out"]
    drawn = {}
    for part in ("1/2", "2/2"):
        assert run(*sizes, "--part", part, command=batch.command)[0] == 0
        name = f"results-{part.replace('/', 'of')}.jsonl"
        rows = (tmp_path / "out" / name).read_text().splitlines()
        drawn[part] = sorted(json.loads(row)["line"] for row in rows)
    assert drawn == {"1/2": [1, 3, 5], "2/2": [2, 4]}
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert len(before) == len(prompts)
    code, _, error = run(*sizes, command=batch.command)
    assert (code, "5 pictures are drawn already" in error) == (0, True)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.png")}


@pytest.mark.exhaustive
def test_a_batch_on_two_devices_draws_what_one_draws(run, native, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    lines = [{"prompt": "a star", "seed": n, "width": 32, "height": 32} for n in range(6)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    for out, words in (("one", []), ("two", ["--devices", "0,1", "--max-vram", "1,2"])):
        given = "jobs.jsonl", "-o", out, "--model", native(MODEL), *words
        assert run(*given, command=batch.command)[0] == 0
    for path in (tmp_path / "one").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
