"""python -m zimage_jax.batch: each job is drawn once, however often the command is stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from zimage_jax import batch
from zimage_jax.runtime.program import Program

JOBS = [
    {"prompt": "a red circle", "seed": 7, "width": 32, "height": 32},
    {"prompt": "a star", "width": 48, "height": 32, "steps": 1},
    {"prompt": "红色", "seed": 3, "width": 32, "height": 32, "sampler": "heun", "kv": {"reuse": 2}},
    {"prompt": "a", "width": 32, "height": 32, "image": "in.png", "strength": 0.5},
]


@pytest.fixture
def draw(run, native, tmp_path):
    """Run batch on lines in the folder of the test."""
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "in.png")

    def call(lines: list, *words):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "jobs.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
        model = "--model", native("plain")
        return run("jobs.jsonl", "-o", "out", *model, *words, command=batch.command)

    return call


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_jobs_become_pictures_and_are_not_drawn_again(draw, tmp_path):
    code, _, err = draw(JOBS)
    assert code == 0, err
    found = rows(tmp_path / "out")
    found.sort(key=lambda row: row["line"])  # they are there in the order in which they are done
    assert [(row["line"], row["file"]) for row in found] == [
        (n, f"{n:06}.png") for n in range(1, 5)
    ]
    assert (found[0]["seed"], found[2]["sampler"], found[3]["image"]["image"]) == (
        7,
        "heun",
        "in.png",
    )
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    code, _, err = draw(JOBS)
    assert (code, "4 pictures are drawn already" in err) == (0, True)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    assert after == before


def test_a_seed_that_is_not_given_follows_from_the_line(draw, tmp_path):
    draw([JOBS[1], JOBS[1]])
    first, second = rows(tmp_path / "out")
    assert first["seed"] != second["seed"]
    (tmp_path / "out" / "results.jsonl").unlink()
    draw([JOBS[1], JOBS[1]])
    assert [row["seed"] for row in rows(tmp_path / "out")] == [first["seed"], second["seed"]]


def test_a_line_that_was_cut_off_is_drawn_again(draw, tmp_path):
    draw(JOBS[:2])
    log = tmp_path / "out" / "results.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert draw(JOBS[:2])[0] == 0
    first, second = (
        [json.loads(line) for line in data.splitlines()] for data in (whole, log.read_bytes())
    )
    assert [row["latents_sha256"] for row in first] == [row["latents_sha256"] for row in second]


def test_bad_lines_are_named_and_the_rest_is_drawn(draw, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    lines = ["{", '{"prompt": "a", "colour": 3}', '{"seed": 3}', '{"prompt": 3}', "", "[]", JOBS[0]]
    lines += [JOBS[0] | {"steps": 0}, JOBS[0] | {"image": "no.png"}, JOBS[0] | {"image": "fifo"}]
    lines += [JOBS[0] | {"kv": {"colour": 3}}, JOBS[0] | {"kv": {"reuse": "x"}}]
    code, _, err = draw(lines, "--strict")
    assert (code, "7 of 11 lines are no jobs" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    code, _, err = draw(lines)
    assert code == 1
    for message in (
        "line 1: not JSON",
        "line 2: no such key: colour",
        "line 3: prompt is missing",
        "line 4: prompt must be text",
        "line 6: expected a JSON object",
        "line 8: steps must be from 1 to 1000, got 0",
        "line 9: ",
        "line 10: ",
        "line 11: kv has an unknown key",
        "line 12: kv reuse must be a whole number",
        "10 of 11 jobs were not drawn",
    ):
        assert message in err
    assert [row["line"] for row in rows(tmp_path / "out")] == [7]


def test_warnings_and_faults_that_nobody_expected_are_of_their_line(draw, tmp_path, monkeypatch):
    call = Program.__call__

    def faulty(self, recorder, *args, name="", **words):
        if any(getattr(leaf, "shape", ())[:2] == (1, 6) for leaf in jax.tree.leaves(args)):
            raise RuntimeError("a program's own fault")
        return call(self, recorder, *args, name=name, **words)

    monkeypatch.setattr(Program, "__call__", faulty)
    lines = [JOBS[0] | {"negative_prompt": "blue"}, JOBS[0] | {"width": 48, "height": 48}]
    code, _, err = draw(lines)
    assert code == 1
    assert "warning: jobs.jsonl: line 1: the negative prompt has no effect" in err
    assert "error: jobs.jsonl: line 2: a program's own fault" in err
    assert [row["line"] for row in rows(tmp_path / "out")] == [1]


def test_text_has_a_prompt_per_line(run, tmp_path):
    (tmp_path / "jobs.txt").write_text("a star\n\n红色\n", "utf-8")
    assert run("jobs.txt", "-o", "out", "--max-vram", 4, command=batch.command)[0] == 0
    assert [(row["line"], row["prompt"]) for row in rows(tmp_path / "out")] == [
        (1, "a star"),
        (3, "红色"),
    ]


def test_results_that_are_no_file_are_refused(draw, tmp_path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "results.jsonl")
    code, _, err = draw(JOBS[:1])
    assert (code, "expected a file, found a device, pipe or socket" in err) == (1, True)


def test_a_folder_of_other_jobs_is_refused(draw, tmp_path):
    draw(JOBS[:1])
    code, _, err = draw([JOBS[0] | {"seed": 8}])
    assert (code, "line 1 was another job" in err) == (2, True)
    with batch.Results.open(tmp_path / "out"):
        code, _, err = draw(JOBS[:1])
    assert (code, "another batch draws into this folder" in err) == (1, True)


@pytest.mark.parametrize("kills", [pytest.param(4, marks=pytest.mark.long)])
def test_what_is_killed_is_completed_with_the_same_bytes(kills, native, tmp_path):
    lines = [JOBS[n % 3] | {"prompt": f"a star {n}", "seed": n} for n in range(12)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    root = Path(batch.__file__).parent.parent

    def start(folder: str) -> subprocess.Popen:
        words = ["jobs.jsonl", "-o", folder, "--model", str(native("plain")), "--quiet"]
        return subprocess.Popen(
            [sys.executable, "-m", "zimage_jax.batch", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
        )

    began = time.monotonic()
    assert start("whole").wait() == 0
    took, rng = time.monotonic() - began, random.Random(0)
    for _ in range(kills):
        process = start("killed")
        time.sleep(rng.uniform(0.3, 0.9) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    assert sorted(row["line"] for row in rows(tmp_path / "killed")) == list(range(1, 13))
    for path in (tmp_path / "whole").glob("*.png"):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
