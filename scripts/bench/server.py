"""What the server promises, shown on the tiny model: nothing accepted is lost, doubled or half-written, nothing grows,
and it answers while the device is busy.

    python -m scripts.bench.server clients|kills|soak|latency
"""

import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from PIL import Image

from scripts.bench.live_server import LiveServer

PROMPTS = ["a red circle", "a blue star above a green square", "红色圆形", "two small squares"]
SIDES = (32, 48, 64)
SEEDS = 40  # few, so that many pictures must have the same bytes
BUSY = OSError, http.client.HTTPException


@click.group()
def main() -> None:
    """Each command prints what it saw and exits with 1 if a promise was broken."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise click.ClickException(what)


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[LiveServer]:
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveServer(Path(folder) / "data", *arguments) as server,
    ):
        yield server


def random_job(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt": rng.choice(PROMPTS),
        "seed": rng.randrange(SEEDS),
        "width": rng.choice(SIDES),
        "height": rng.choice(SIDES),
        "steps": rng.randint(1, 8),
        "count": rng.choice((1, 1, 1, 2)),
    }


def check_pictures(server: LiveServer, drawn: dict[str, str]) -> dict[str, str]:
    """Every job has ended; those that are done have their pictures, whole, and the same bytes for the same arguments;
    there is no other file. Returns the states by job. `drawn`: checksums by arguments, to which these are added."""
    jobs, before = [], ""
    while found := server.get(f"/jobs?limit=200{before}")["jobs"]:
        jobs += found
        before = f"&before={found[-1]['number']}"
    expected = set()
    for job in jobs:
        check(
            job["state"] in ("done", "cancelled"),
            f"job {job['id']} is {job['state']}: {job.get('error')}",
        )
        check(
            job["state"] != "done" or len(job["pictures"]) == job["count"],
            f"job {job['id']} lacks pictures",
        )
        for picture in job["pictures"]:
            path = server.data / "pictures" / picture["url"].rpartition("/")[2]
            expected.add(path.name)
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                check(
                    image.size == (picture["width"], picture["height"]),
                    f"{path.name} has another size",
                )
            key = json.dumps([job["arguments"], picture["seed"]])
            sha = hashlib.sha256(data).hexdigest()
            check(drawn.setdefault(key, sha) == sha, f"{path.name} has other bytes than before")
    files = {path.name for path in (server.data / "pictures").iterdir()}
    check(files == expected, f"files that no job has: {files ^ expected}")
    check(not list((server.data / "inputs").iterdir()), "inputs are left")
    return {job["id"]: job["state"] for job in jobs}


def count(states: dict[str, str]) -> dict[str, int]:
    return dict(Counter(states.values()))


def until_idle(server: LiveServer) -> None:
    while server.get("/jobs?state=accepted&limit=1")["jobs"]:
        time.sleep(0.05)


def run_threads(count: int, work: Callable[[int], None]) -> None:
    faults: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=[n]) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def end_of(server: LiveServer, job: str) -> str:
    """The state in which a job ends."""
    with server.events(f"/jobs/{job}/events") as events:
        *_, (state, _) = events
    return state


def post_patiently(server: LiveServer, job: dict[str, Any], refused: Counter) -> str:
    """The id of a job; while the queue is full, come again later."""
    while True:
        status, headers, found = server.ask("POST", "/jobs", job)
        if status == 202:
            return found["id"]
        check(status == 429, f"{status}: {found}")
        refused["429"] += 1
        time.sleep(min(0.2, int(headers["retry-after"])))


@main.command()
@click.option("--jobs", default=300, show_default=True)
@click.option("--clients", default=100, show_default=True)
def clients(jobs: int, clients: int) -> None:
    """Jobs of many clients at once, some of which cancel, leave their stream, or leave the API of OpenAI."""
    with serving("--queue", 50) as server:
        seen, accepted, lock = Counter[str](), set[str](), threading.Lock()

        def client(number: int) -> None:
            rng = random.Random(number)
            for _ in range(number, jobs, clients):
                job = random_job(rng)
                way = rng.choice(("wait", "wait", "cancel", "events", "leave"))
                seen[way] += 1
                if way == "leave":  # in the middle of a request that waits for its pictures
                    leave(server, job, rng)
                    continue
                made = post_patiently(server, job, seen)
                with lock:
                    accepted.add(made)
                if way == "wait":
                    check(end_of(server, made) == "done", "a job was not done")
                elif way == "cancel":
                    time.sleep(rng.uniform(0, 0.5))
                    status, _, found = server.ask("DELETE", f"/jobs/{made}")
                    check(status in (200, 409), f"{status}: {found}")
                    if found.get("state") == "removed":  # it was done already
                        with lock:
                            accepted.remove(made)
                            seen["removed"] += 1
                else:
                    with server.events(f"/jobs/{made}/events") as events:
                        next(events)

        began = time.perf_counter()
        run_threads(clients, client)
        until_idle(server)
        seconds = time.perf_counter() - began
        states = check_pictures(server, {})
        check(accepted <= states.keys(), f"lost: {accepted - states.keys()}")
        log = server.log.read_text()
        check(not log, f"the server wrote: {log[:500]}")
        click.echo(
            f"{jobs} jobs of {clients} clients in {seconds:.0f} s: {dict(seen)}; left: {count(states)}"
        )


def leave(server: LiveServer, job: dict[str, Any], rng: random.Random) -> None:
    body = {"prompt": job["prompt"], "size": f"{job['width']}x{job['height']}", "seed": job["seed"]}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        data = json.dumps(body | {"num_inference_steps": job["steps"]})
        connection.request(
            "POST", "/v1/images/generations", data, {"Content-Type": "application/json"}
        )
        time.sleep(rng.uniform(0, 0.3))


@main.command()
@click.option("--runs", default=30, show_default=True)
@click.option("--jobs", default=8, show_default=True, help="Jobs of each run.")
def kills(runs: int, jobs: int) -> None:
    """kill -9 of the server or of its engine in the middle of runs."""
    rng, drawn, accepted = random.Random(0), dict[str, str](), set[str]()
    killed = Counter[str]()
    with serving() as server:
        for run in range(runs):
            what = rng.choice(("server", "engine"))

            def kill(what: str = what, seconds: float = rng.uniform(0, 1.5)) -> None:
                time.sleep(seconds)
                if what == "server":
                    server.process.kill()
                else:
                    os.kill(server.engine(), signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            for _ in range(jobs):
                with contextlib.suppress(*BUSY):  # killed meanwhile: who has no answer asks again
                    status, _, found = server.ask("POST", "/jobs", random_job(rng))
                    check(status == 202, f"{status}: {found}")
                    accepted.add(found["id"])
            killer.join()
            killed[what] += 1
            if what == "server":
                server.process.wait()
                server.start()
            until_idle(server)
            check_pictures(server, drawn)
            click.echo(f"run {run + 1}: {what}", err=True)
        states = check_pictures(server, drawn)
        lost = [job for job in accepted if states.get(job) != "done"]
        check(not lost, f"lost: {lost}")
    click.echo(
        f"{dict(killed)} killed: {len(accepted)} jobs accepted, {count(states)}, {len(drawn)} different pictures"
    )


def figures(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@main.command()
@click.option("--jobs", default=1000, show_default=True)
@click.option("--clients", default=8, show_default=True)
def soak(jobs: int, clients: int) -> None:
    """Memory and descriptors over many jobs."""
    with serving() as server:
        rows, left = [], iter(range(jobs + 1))
        lock = threading.Lock()

        def client(_: int) -> None:
            while True:
                with lock:
                    number = next(left, None)
                    if number is None:
                        return
                    if number % (jobs // 10) == 0:
                        rows.append(
                            (number, *figures(server.process.pid), *figures(server.engine()))
                        )
                job = random_job(random.Random(number)) | {
                    "width": 32,
                    "height": 32,
                    "steps": 1 + number % 2,
                }
                made = post_patiently(server, job, Counter())
                state = end_of(server, made)
                check(state == "done", f"job {made} is {state}")

        run_threads(clients, client)
        click.echo(
            "| jobs | server MB | descriptors | engine MB | descriptors |\n|---|---|---|---|---|"
        )
        for number, memory, files, engine_memory, engine_files in rows:
            click.echo(
                f"| {number} | {memory / 1e6:.0f} | {files} | {engine_memory / 1e6:.0f} | {engine_files} |"
            )
        early, late = rows[3], rows[-1]
        check(late[1] < early[1] + 30e6, "the server's memory grows")
        check(late[2] <= early[2] + clients and late[4] <= early[4] + clients, "descriptors grow")


@main.command()
@click.option("--requests", default=200, show_default=True, help="Of each path.")
def latency(requests: int) -> None:
    """Milliseconds of answers while the device is busy, and previews are watched."""
    with serving() as server:
        stop = threading.Event()

        def keep_busy(number: int) -> None:
            while not stop.is_set():
                made = post_patiently(
                    server, {"prompt": PROMPTS[number % 4], "steps": 60}, Counter()
                )
                with server.events(f"/jobs/{made}/events") as events:
                    for _ in events:
                        if stop.is_set():
                            break

        threads = [threading.Thread(target=keep_busy, args=[n]) for n in range(8)]
        for thread in threads:
            thread.start()
        while not server.get("/health")["running"]:
            time.sleep(0.05)
        times: dict[str, list[float]] = {"/health": [], "/jobs": [], "/memory": []}
        for _ in range(requests):
            for path, seconds in times.items():
                began = time.perf_counter()
                server.get(path)
                seconds.append(time.perf_counter() - began)
        stop.set()
        for thread in threads:
            thread.join()
    click.echo("| path | p50 ms | p99 ms | most ms |\n|---|---|---|---|")
    for path, seconds in times.items():
        p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
        click.echo(f"| {path} | {1e3 * p50:.1f} | {1e3 * p99:.1f} | {1e3 * max(seconds):.1f} |")
        check(p50 < 0.05 and p99 < 0.25, f"{path} is slow")


if __name__ == "__main__":
    main()
