"""Requests in flight together: the bits of each are those of its single run, and the weights are copied once for all."""

import functools
import random
import threading
import time
from concurrent.futures import CancelledError

import jax
import numpy as np
import pytest

from tests.schedules import JOB, MODEL, SCHEDULES, every
from zimage_jax import KVPolicy, Memory, ZImage, ZImageWarning
from zimage_jax.errors import NonFiniteError, OutOfMemoryError, UsageError
from zimage_jax.pipeline.request import Planned, Started
from zimage_jax.runtime.placement import EXHAUSTED
from zimage_jax.runtime.program import Program
from zimage_jax.runtime.recorder import Recorder

SMALL = JOB | {"width": 32, "height": 32}
PICTURE = np.full((40, 40, 3), 200, np.uint8)
JOBS = [
    JOB | {"prompt": "a red fox"},
    JOB | {"prompt": "a star", "seed": 4, "steps": 2},
    SMALL | {"prompt": "two stars", "seed": 5, "guidance": 2.0, "negative_prompt": "blue"},
    SMALL | {"prompt": "a", "seed": [6, 7], "steps": 4, "sampler": "dpmpp_2m"},
    SMALL | {"prompt": "a fox", "kv": KVPolicy(reuse=2), "steps": 5},
    SMALL | {"prompt": "b", "image": PICTURE, "strength": 0.7, "steps": 3},
]


# of those under which tests/pipeline/test_memory.py asks the bits of single runs
COMPANY = [
    "ring",
    "resident",
    "hybrid",
    "swap",
    "disk",
    "low_vram",
    "half a block, two copied ahead",
    "one chunk streamed",
    "text on the host",
]


@pytest.fixture(scope="module")
def alone(under):
    """Number of a job, and a schedule -> its latents when it is alone on the device."""

    @functools.cache
    def latents(number: int, name: str = "resident") -> np.ndarray:
        return under(name).generate(**JOBS[number]).latents

    return latents


def together(pipe: ZImage, jobs: list[dict]) -> list:
    return [request.result() for request in pipe.submit_all(jobs)]


@pytest.mark.parametrize(
    "name", every(COMPANY, ["ring"], ["swap", "disk", "half a block, two copied ahead"])
)
def test_every_job_has_the_same_bits_in_company(name, under, alone):
    """Of other sizes, steps, guidance, samplers, K/V policies, and from a picture."""
    pipe, rng = under(name), random.Random(name)
    order = rng.sample(range(len(JOBS)), len(JOBS))
    first, later = order[:3], order[3:]
    requests = pipe.submit_all([JOBS[number] for number in first])
    for number in later:
        time.sleep(rng.uniform(0, 0.05))
        requests.append(pipe.submit(**JOBS[number]))
    results = [request.result() for request in requests]
    for number, result in zip(order, results, strict=True):
        # the VAE's strips change last bits of what a picture begins from
        expected = alone(number, name) if "image" in JOBS[number] else alone(number)
        np.testing.assert_array_equal(result.latents, expected, err_msg=JOBS[number]["prompt"])
    assert max(result.ledger.most_jobs for result in results) > 1
    if pipe.memory.schedule != "resident" and name not in ("auto", "text staged"):
        assert not pipe.held, "nothing stays"


QUICK = ("ring", 4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(*case, marks=() if case == QUICK else pytest.mark.exhaustive)
        for case in (QUICK, ("ring", 16), ("hybrid", 8), ("swap", 2))
    ],
)
def test_the_weights_are_copied_once_for_all(name, count, under):
    pipe = under(name)
    (single,) = together(pipe, [JOB | {"prompt": "a"}])
    results = together(pipe, [JOB | {"prompt": "a", "seed": n} for n in range(count)])
    copied = single.report["copied_bytes"]
    for result in results:
        events = len([e for e in result.ledger.events if e.lane == "copy"])
        assert copied / count - events <= result.report["copied_bytes"] <= copied / count
        assert result.ledger.peak == result.plan.peak_bytes, "as planned for all"
        assert result.report["most_jobs_in_flight"] == count


@pytest.mark.exhaustive
def test_copies_are_spread_over_the_programs_of_a_visit(under, native, as_on_a_gpu):
    pipe = ZImage.load(native(MODEL), memory=SCHEDULES["ring"])
    jobs = [JOB | {"prompt": "a", "seed": n} for n in range(5)]
    expected = [under("resident").generate(**job).latents for job in jobs]
    results = together(pipe, jobs)
    for result, latents in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.latents, latents)
        assert result.ledger.peak <= result.plan.peak_bytes
    copies = [
        event
        for event in results[0].ledger.events
        if event.stage == "denoise" and event.lane == "copy" and event.name.endswith("chunk 2")
    ]
    assert len(copies) == 4 * JOB["steps"], "a quarter under each of four programs"
    whole = pipe._checkpoint.storage.nbytes("transformer", "layers.2")
    assert sum(copy.nbytes for copy in copies) == JOB["steps"] * whole
    assert max(copy.nbytes for copy in copies) < whole / 2


def test_a_request_joins_between_two_sweeps(under, alone):
    pipe, joined = under("ring"), []

    def join(event):
        if event is not None and not joined:
            joined.append(threading.Thread(target=lambda: requests.append(pipe.submit(**JOBS[1]))))
            joined[0].start()

    requests: list = []
    first = pipe.submit(**JOBS[0] | {"steps": 200}, on_event=join)
    while not requests:
        time.sleep(0.01)
    second = requests[0].result()
    assert not first.done(), "it leaves when it is done"
    first.cancel()
    np.testing.assert_array_equal(second.latents, alone(1))
    assert second.ledger.most_jobs == 2
    with pytest.raises(CancelledError):
        first.result()


def test_a_cancelled_request_ends_within_a_chunk(under, alone):
    pipe, ran, call = under("ring"), [], Program.__call__
    victim: list = []

    def counted(self, recorder, *args, name="", **words):
        if "chunk" in name and victim:
            ran.append(victim[0].is_cancelled)
            if len(ran) == 10:
                victim[0].cancel()
        return call(self, recorder, *args, name=name, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__call__", counted)
        requests = pipe.submit_all([JOBS[0], JOBS[0] | {"steps": 3, "seed": 9}])
        victim.append(requests[1])
        np.testing.assert_array_equal(requests[0].result().latents, alone(0))
    with pytest.raises(CancelledError):
        requests[1].result()
    assert sum(ran) > 0
    assert not pipe.held


def test_a_waiting_request_that_is_cancelled_never_runs(under):
    pipe = under("ring")
    first, second = pipe.submit_all(
        [JOBS[0], JOBS[0] | {"memory": Memory(schedule="swap"), "seed": 1}]
    )
    second.cancel()
    events = list(second.events())
    assert first.result().ledger.most_jobs == 1
    assert not any(isinstance(event, Started) for event in events)
    with pytest.raises(CancelledError):
        second.result()


def test_a_fault_ends_its_own_request_alone(under, alone, monkeypatch):
    """In a program, and in what is seen of the latents."""
    pipe, call = under("ring"), Program.__call__

    def faulty(self, recorder, chunk, *args, name="", **words):
        if name == "transformer chunk 3" and any(
            getattr(leaf, "shape", ())[:1] == (2,) for leaf in jax.tree.leaves(args[-1:])
        ):
            raise RuntimeError("a program's own fault")
        return call(self, recorder, chunk, *args, name=name, **words)

    monkeypatch.setattr(Program, "__call__", faulty)
    good, bad, other = pipe.submit_all([JOBS[0], JOBS[3], JOBS[1]])
    with pytest.raises(RuntimeError, match="own fault"):
        bad.result()
    np.testing.assert_array_equal(good.result().latents, alone(0))
    np.testing.assert_array_equal(other.result().latents, alone(1))
    monkeypatch.undo()
    isfinite = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda x: isfinite(x) & (np.shape(x)[0] != 2))
    good, bad = pipe.submit_all([JOBS[0], JOBS[3]])
    with pytest.raises(NonFiniteError):
        bad.result()
    np.testing.assert_array_equal(good.result().latents, alone(0))
    assert not pipe.held


@pytest.mark.parametrize("name", every(["ring", "hybrid"], ["ring"]))
def test_out_of_memory_loses_no_request(name, native, alone, monkeypatch):
    """The device has less than the plan says: fewer are in flight, each from its last whole NFE."""
    expected = {number: alone(number) for number in (0, 1)}
    pipe = ZImage.load(native(MODEL), memory=SCHEDULES[name])
    (single,) = together(pipe, [JOB | {"prompt": "a"}])
    level, mark, refused = single.ledger.peak, Recorder.mark, []

    def strict(self, more=0):
        mark(self, more)
        if sum(self.held.values()) + more > level:
            refused.append(self._stage)
            raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr(Recorder, "mark", strict)
    seen: list[list] = [[] for _ in range(4)]
    numbers = [0, 1, 0, 1]
    requests = pipe.submit_all(
        [JOBS[number] | {"on_event": seen[n].append} for n, number in enumerate(numbers)]
    )
    for number, request in zip(numbers, requests, strict=True):
        np.testing.assert_array_equal(request.result().latents, expected[number])
    assert refused
    assert any(isinstance(event, Planned) for events in seen for event in events)
    for number, events in zip(numbers, seen, strict=True):
        steps = [event.index for event in events if hasattr(event, "latents")]
        assert steps == list(range(JOBS[number]["steps"])), "each once, though some ran again"


def test_a_large_request_is_not_overtaken(under):
    """It waits until the small ones before it are done; those behind it wait for it."""
    pipe = under("swap")
    large, small = JOB | {"prompt": "b", "steps": 2}, SMALL | {"prompt": "a", "steps": 2}
    least = pipe.plan(**large).plan.peak_bytes
    memory = Memory(schedule="swap", max_vram_bytes=least)
    order: list[str] = []

    def noted(name: str):
        return lambda event: order.append(name) if isinstance(event, Started) else None

    jobs = {"small": small, "large": large, "late": small}
    requests = [pipe.submit(**job, memory=memory, on_event=noted(n)) for n, job in jobs.items()]
    results = [request.result() for request in requests]
    assert order == ["small", "large", "late"]
    assert all(result.ledger.peak <= least for result in results)
    with pytest.raises(OutOfMemoryError):
        pipe.submit(**large, memory=Memory(max_vram_bytes=least // 2))


def test_one_program_for_all_nfes_runs_alone(under, alone):
    first, second = together(under("scan"), [JOBS[0], JOBS[1]])
    np.testing.assert_array_equal(first.latents, alone(0))
    np.testing.assert_array_equal(second.latents, alone(1))
    assert first.ledger.most_jobs == second.ledger.most_jobs == 1


def test_parameters_that_make_k_and_v_are_copied_if_anyone_needs_them(under):
    pipe, reusing = under("ring"), JOB | {"prompt": "a", "kv": KVPolicy(reuse=2), "steps": 4}
    both = together(pipe, [reusing, reusing | {"seed": 9}])
    assert all(result.report["copied_bytes_saved_by_reuse"] > 0 for result in both)
    mixed = together(pipe, [reusing, JOB | {"prompt": "a", "steps": 4}])
    assert all(result.report["copied_bytes_saved_by_reuse"] == 0 for result in mixed)
    np.testing.assert_array_equal(mixed[0].latents, both[0].latents)


def test_threads_share_the_weights(under, alone):
    """Those that come while others are in flight; and a text's features beside pictures."""
    pipe, begin = under("ring"), threading.Barrier(3)
    found: dict[int, np.ndarray] = {}

    def draw(number: int) -> None:
        begin.wait(60)
        found[number] = pipe.generate(**JOBS[number]).latents

    threads = [threading.Thread(target=draw, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    (features,) = pipe.encode(["a red fox"])
    for thread in threads:
        thread.join()
    for number, latents in found.items():
        np.testing.assert_array_equal(latents, alone(number))
    np.testing.assert_array_equal(features, pipe.encode(["a red fox"])[0])


def test_what_stays_is_not_copied_again_when_another_joins(under, native, alone):
    """Resident chunks stay on the device while others' text is encoded, as far as the plan's peak allows."""
    pipe = ZImage.load(native(MODEL), memory=SCHEDULES["hybrid"])
    joined: list = []

    def join(event):
        if hasattr(event, "latents") and event.index == 1 and not joined:
            joined.append(threading.Thread(target=lambda: joined.append(pipe.submit(**JOBS[1]))))
            joined[0].start()

    first = pipe.submit(**JOBS[0] | {"steps": 60}, on_event=join)
    result = first.result()
    joined[0].join()
    np.testing.assert_array_equal(joined[1].result().latents, alone(1))
    pinned = [
        e
        for e in result.ledger.events
        if e.lane == "copy" and e.name.startswith("transformer layers")
    ]
    # two chunks in each of three runs of sweeps: before the other joins, with it, after it has left
    assert 2 <= len(pinned) < 3 * 2
    assert result.ledger.peak <= max(result.plan.peak_bytes, joined[1].result().plan.peak_bytes)
    assert not pipe.held


@pytest.mark.exhaustive
def test_whoever_is_in_flight_gets_a_sweep_while_others_keep_coming(under, alone):
    """Also one that reuses K and V, and so cannot leave the device after every NFE."""
    pipe, coming, drawn = under("ring"), threading.Event(), []

    def feed(event):
        if event is None and not coming.is_set():
            drawn.append(threading.Thread(target=lambda: pipe.submit(**JOBS[1], on_event=feed)))
            drawn[-1].start()

    for _ in range(3):
        pipe.submit(**JOBS[1], on_event=feed)
    long = [pipe.submit(**JOBS[0] | {"steps": 12}), pipe.submit(**JOBS[4])]
    results = [request.result(120) for request in long]
    coming.set()
    np.testing.assert_array_equal(results[1].latents, alone(4))
    assert results[0].ledger.most_jobs > 1
    assert len(drawn) > 3, "others were drawn meanwhile"
    for thread in drawn:
        thread.join()
    pipe.generate(**SMALL | {"prompt": "a"})
    assert not pipe.held


def test_a_listener_that_raises_ends_its_own_request(under, alone):
    def fails(event):
        raise ValueError("a listener's own fault")

    bad, good = under("ring").submit_all([JOBS[1] | {"on_event": fails}, JOBS[0]])
    with pytest.raises(CancelledError) as raised:
        bad.result(60)
    assert "a listener's own fault" in str(raised.value.__cause__)
    np.testing.assert_array_equal(good.result(60).latents, alone(0))


def test_jobs_without_nfes_do_not_hold_back_those_with(native):
    pipe = ZImage.load(native(MODEL), memory=SCHEDULES["ring"], in_flight=2)
    order: list[str] = []

    def noted(name: str):
        return lambda event: order.append(name) if event is None else None

    plain = SMALL | {"prompt": "b", "image": PICTURE, "strength": 0.0}
    jobs = [JOBS[1] | {"on_event": noted("drawn")}]
    jobs += [plain | {"on_event": noted("encoded")} for _ in range(6)]
    for request in pipe.submit_all(jobs):
        request.result(120)
    assert order.index("drawn") <= 3, "a sweep after each round of other stages"


def test_a_listener_may_not_ask_the_engine_that_calls_it(under):
    pipe, faults = under("ring"), []

    def ask(event):
        if event is None:
            with pytest.raises(UsageError, match="a callback asked its own model") as fault:
                pipe.submit(**JOBS[1])
            faults.append(fault)

    first, waiting = pipe.submit_all(
        [JOBS[1], JOBS[1] | {"memory": Memory(schedule="swap"), "on_event": ask}]
    )
    waiting.cancel()
    first.result(60)
    waiting.wait()
    assert faults


def test_warnings_are_events(under):
    pipe, events = under("ring"), []
    job = SMALL | {"prompt": "a", "steps": 1, "negative_prompt": "blue"}
    result = pipe.submit(**job, on_event=events.append).result(60)
    (text,) = result.report["warnings"]
    assert "no effect" in text
    assert events[0] == text
    with pytest.warns(ZImageWarning, match="no effect"):
        pipe.generate(**job)
    request = pipe.submit(**job)
    assert text in list(request.events())
    assert list(request.events()) == [], "given once"
    with pytest.raises(UsageError, match="go to on_event"):
        next(pipe.submit(**job, on_event=events.append).events())


def test_who_has_left_shares_no_more_copies(under):
    pipe, alone = under("ring"), under("ring").generate(**JOBS[0]).report["copied_bytes"]

    def leave(event):
        if hasattr(event, "latents") and requests:
            requests[1].cancel()

    requests: list = []
    requests += pipe.submit_all([JOBS[0] | {"on_event": leave}, JOBS[0] | {"seed": 9, "steps": 9}])
    copied = requests[0].result(60).report["copied_bytes"]
    assert copied > 0.55 * alone, "the other had a share of the first steps only"


def test_latents_in_a_callback_are_for_reading(under, alone):
    def write(step):
        with pytest.raises(ValueError, match="read-only"):
            step.latents[:] = 0

    np.testing.assert_array_equal(
        under("ring").generate(**JOBS[0], on_step=write).latents, alone(0)
    )


def test_what_stays_on_the_device_is_counted_after_a_fault(native, monkeypatch):
    pipe, call = ZImage.load(native(MODEL)), Program.__call__
    pipe.generate(**JOBS[1])
    before = pipe.held

    def faulty(self, recorder, *args, name="", **words):
        if name == "transformer chunk 1":
            raise RuntimeError("a program's own fault")
        return call(self, recorder, *args, name=name, **words)

    monkeypatch.setattr(Program, "__call__", faulty)
    with pytest.raises(RuntimeError, match="own fault"):
        pipe.generate(**JOBS[1])
    assert pipe.held == before
    assert before
