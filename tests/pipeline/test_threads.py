"""One model shared by threads, and asked from within its own callbacks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.schedules import BLOCK, JOB, MODEL
from zimage_jax import Memory, ZImage
from zimage_jax.errors import UsageError

SMALL = JOB | {"width": 32, "height": 32}  # the others have the size that other tests compile for
JOBS = [
    (Memory(schedule="resident"), JOB),
    (Memory(schedule="ring"), SMALL | {"guidance": 2.0, "negative_prompt": "blue"}),
    (Memory(schedule="ring"), JOB | {"steps": 5}),
    (Memory(schedule="hybrid", resident_chunks=2), JOB),
    (Memory(schedule="swap"), JOB | {"steps": 2}),
    (Memory(schedule="ring", host_bytes=4 * BLOCK), JOB),
    (Memory(schedule="scan"), JOB),
    (Memory(low_vram=True), JOB),
]


def draw(pipe: ZImage, number: int) -> str:
    memory, job = JOBS[number]
    job = job | {"seed": number, "memory": memory}
    return pipe.generate(f"picture {number}", **job).report["latents_sha256"]


def test_eight_threads_draw_what_each_draws_alone(native):
    alone = [draw(ZImage.load(native(MODEL)), number) for number in range(len(JOBS))]
    assert len(set(alone)) == len(JOBS)
    pipe, begin = ZImage.load(native(MODEL)), threading.Barrier(8)

    def draw_all(first: int) -> dict[int, str]:
        begin.wait(60)
        numbers = [(first + n) % len(JOBS) for n in range(len(JOBS))]
        return {number: draw(pipe, number) for number in numbers}

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(draw_all, range(8)))
    assert found == [dict(enumerate(alone))] * 8


@pytest.mark.parametrize("schedule", ["ring", "scan"])
@pytest.mark.parametrize("callback", ["on_step", "on_plan"])
def test_a_callback_gets_no_picture_of_its_own_model(callback, schedule, under):
    pipe = under(schedule)
    job, faults = JOB, []

    def ask(*_):
        with pytest.raises(UsageError, match="a callback asked its own model") as fault:
            pipe.generate("b", **job)
        faults.append(fault)

    expected = pipe.generate("a", **job).report["latents_sha256"]
    result = pipe.generate("a", **job, **{callback: ask})
    assert len(faults) == {"on_step": JOB["steps"], "on_plan": 1}[callback]
    assert result.report["latents_sha256"] == expected
    assert pipe.generate("a", **job).report["latents_sha256"] == expected, "and the next one may"
