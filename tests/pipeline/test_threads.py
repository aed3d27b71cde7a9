"""One model shared by threads, and asked from within its own callbacks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.schedules import BLOCK, MODEL
from zimage_jax import Memory, ZImage
from zimage_jax.errors import UsageError

SQUARE, WIDE = ({"width": width, "height": 32, "steps": 2} for width in (32, 64))
JOBS = [
    (Memory(schedule="resident"), SQUARE),
    (Memory(schedule="ring"), SQUARE | {"guidance": 2.0, "negative_prompt": "blue"}),
    (Memory(schedule="ring"), WIDE | {"steps": 3}),
    (Memory(schedule="hybrid", resident_chunks=2), SQUARE),
    (Memory(schedule="swap"), SQUARE | {"steps": 4}),
    (Memory(schedule="ring", host_bytes=4 * BLOCK), SQUARE | {"seed": 11}),
    (Memory(schedule="scan"), SQUARE),
    (Memory(low_vram=True), SQUARE),
]


def draw(pipe: ZImage, number: int) -> str:
    memory, job = JOBS[number]
    job = {"seed": number, "memory": memory} | job
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
    job, faults = {"seed": 1} | SQUARE, []

    def ask(*_):
        with pytest.raises(UsageError, match="a callback asked its own model") as fault:
            pipe.generate("b", **job)
        faults.append(fault)

    expected = pipe.generate("a", **job).report["latents_sha256"]
    result = pipe.generate("a", **job, **{callback: ask})
    assert len(faults) == {"on_step": 2, "on_plan": 1}[callback]
    assert result.report["latents_sha256"] == expected
    assert pipe.generate("a", **job).report["latents_sha256"] == expected, "and the next one may"
