"""One model shared by threads, and asked from within its own callbacks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.schedules import BLOCK, JOB, MODEL, every
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


@pytest.mark.parametrize("threads", every([len(JOBS), 3], [3]))
def test_threads_draw_what_each_draws_alone(threads, native):
    """A thread for each of the first jobs."""
    alone = [draw(ZImage.load(native(MODEL)), number) for number in range(threads)]
    assert len(set(alone)) == threads
    pipe, begin = ZImage.load(native(MODEL)), threading.Barrier(threads)

    def draw_all(first: int) -> dict[int, str]:
        begin.wait(60)
        numbers = [(first + n) % threads for n in range(threads)]
        return {number: draw(pipe, number) for number in numbers}

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(draw_all, range(threads)))
    assert found == [dict(enumerate(alone))] * threads


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
