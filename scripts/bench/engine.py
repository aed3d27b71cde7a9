"""What the engine promises, shown on the tiny model: bytes per picture, bits in company, throughput, and that
nothing is lost or grows.

    python -m scripts.bench.engine bytes|mix|throughput|soak|kills|batch [--json]
"""

import gc
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from scripts.bench.memory import resident_bytes
from zimage_jax import KVPolicy, Memory, ZImage, ZImageError, ZImageProcess, cli
from zimage_jax.planning import schedule
from zimage_jax.runtime.placement import EXHAUSTED
from zimage_jax.runtime.recorder import Recorder

PROMPTS = ["a red circle", "a blue star above a green square", "红色圆形", "two small squares"]
SIDES = (32, 48, 64, 80, 96)


@click.group()
def main() -> None:
    """Each command prints a table and exits with 1 if a promise was broken."""
    cli.start_jax()


def random_job(rng: random.Random) -> dict[str, Any]:
    """A job of any kind: from text or a picture, guided or not, of one or two pictures."""
    job: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS),
        "seed": rng.randrange(2**32),
        "width": rng.choice(SIDES[:4]),
        "height": rng.choice(SIDES[:4]),
        "steps": rng.randint(1, 8),
    }
    kind = rng.randrange(5)
    if kind == 1:
        job |= {"guidance": 2.0, "negative_prompt": "blue"}
    elif kind == 2:
        job["image"] = np.full((job["height"], job["width"], 3), rng.randrange(256), np.uint8)
        job["strength"] = 0.6
    elif kind == 3:
        job["sampler"] = "dpmpp_2m"
    elif kind == 4:
        job["kv"] = KVPolicy(reuse=2)
    return job


def sha(result) -> str:
    return result.report["latents_sha256"]


def check(holds: bool, what: str) -> None:
    if not holds:
        raise click.ClickException(what)


@main.command("bytes")
def of_bytes() -> None:
    """Bytes copied per picture with 1 to 16 in flight, 8 NFEs of 128x128."""
    click.echo("| schedule | in flight | MB copied per picture | of one alone |\n|---|---|---|---|")
    for name in ("ring", "hybrid", "swap"):
        pipe, alone = ZImage.load(memory=Memory(schedule=name)), 0.0
        for count in (1, 2, 4, 8, 16):
            jobs = [{"prompt": PROMPTS[0], "seed": n} for n in range(count)]
            results = [request.result() for request in pipe.submit_all(jobs)]
            copied = sum(result.report["copied_bytes"] for result in results) / count
            alone = alone or copied
            click.echo(
                f"| {name} | {count} | {copied / 1e6:.3f} | {copied / alone:.4f} = 1/{alone / copied:.2f} |"
            )
            check(abs(alone / copied / count - 1) < 1e-3, "bytes fall as 1/N")


@main.command()
@click.option("--requests", default=40)
def mix(requests: int) -> None:
    """Random requests at random times, under every schedule but scan: the bits of each alone."""
    rng = random.Random(16)
    jobs = [random_job(rng) for _ in range(requests)]
    alone = ZImage.load(memory=Memory(schedule="resident"))
    expected = [sha(alone.generate(**job)) for job in jobs]
    for name in schedule.names():
        if schedule.row(name).is_one_program:
            continue
        pipe = ZImage.load(memory=Memory(schedule=name))
        handles = []
        for job in jobs:
            handles.append(pipe.submit(**job))
            time.sleep(rng.expovariate(20))
        results = [handle.result() for handle in handles]
        most = max(result.ledger.most_jobs for result in results)
        same = sum(map(str.__eq__, map(sha, results), expected))
        click.echo(
            f"{name}: {same} of {requests} have the bits of their single run; up to {most} in flight"
        )
        check(same == requests, "company changed the bits")


@main.command()
@click.option("--pictures", default=8)
@click.option("--runs", default=5)
def throughput(pictures: int, runs: int) -> None:
    """Pictures together against one after the other, in turn; medians."""
    jobs = [{"prompt": PROMPTS[0], "seed": n} for n in range(pictures)]
    click.echo("| schedule | one at a time, s | together, s | ratio |\n|---|---|---|---|")
    for name in ("ring", "resident"):
        pipe, times = ZImage.load(memory=Memory(schedule=name)), {1: [], pictures: []}

        def draw(count: int, pipe=pipe) -> float:
            began = time.perf_counter()
            for first in range(0, pictures, count):
                for request in pipe.submit_all(jobs[first : first + count]):
                    request.result()
            return time.perf_counter() - began

        for count in times:
            draw(count)
        for _ in range(runs):
            for count, found in times.items():
                found.append(draw(count))
        single, together = (statistics.median(found) for found in times.values())
        click.echo(f"| {name} | {single:.2f} | {together:.2f} | {single / together:.2f} |")


@main.command()
@click.option("--requests", default=1000)
@click.option("--width", default=24, help="Requests that are submitted and not done.")
def soak(requests: int, width: int) -> None:
    """Requests of changing sizes in one engine, with random cancels, faults and lack of memory."""
    rng, pipe = random.Random(1), ZImage.load(memory=Memory(schedule="ring"))
    jobs = [
        random_job(rng) | {"width": rng.choice(SIDES), "height": rng.choice(SIDES)}
        for _ in range(requests)
    ]
    for job in jobs:
        if "image" in job:
            job["image"] = np.full((job["height"], job["width"], 3), 128, np.uint8)
    alone = {n: sha(pipe.generate(**jobs[n])) for n in rng.sample(range(requests), 12)}
    mark, level = Recorder.mark, [0]

    def scarce(self, more=0):
        mark(self, more)
        if level[0] and sum(self.held.values()) + more > level[0]:
            level[0] = 0
            raise jax.errors.JaxRuntimeError(f"{EXHAUSTED}: injected")

    Recorder.mark = scarce  # type: ignore[method-assign]
    ends: dict[str, int] = {}
    left, going, rows, shas = list(enumerate(jobs)), [], [], {}
    gate = threading.Semaphore(width)
    while left or going:
        while left and len(going) < width:
            number, job = left.pop(0)
            if (
                rng.random() < 0.05
            ):  # its own fault: no noise levels, so latents that are not finite
                job = job | {"shift": 1e-30, "guidance": 100.0}
            handle = pipe.submit(
                **job, on_event=lambda event: gate.release() if event is None else None
            )
            going.append((number, handle))
            if rng.random() < 0.1:
                threading.Timer(rng.uniform(0, 1), handle.cancel).start()
            if rng.random() < 0.03:
                level[0] = rng.randint(4_000_000, 12_000_000)
        gate.acquire()
        for number, handle in [of for of in going if of[1].done()]:
            going.remove((number, handle))
            try:
                shas[number] = sha(handle.result())
                end = "drawn"
            except CancelledError:
                end = "cancelled"
            except (ZImageError, jax.errors.JaxRuntimeError) as fault:
                end = type(fault).__name__
            ends[end] = ends.get(end, 0) + 1
            done = sum(ends.values())
            if done % (requests // 10) == 0:
                gc.collect()
                files = len(os.listdir("/proc/self/fd"))
                rows.append(
                    (
                        done,
                        resident_bytes() / 2**20,
                        len(pipe._programs._recent),
                        files,
                        threading.active_count(),
                    )
                )
                click.echo(
                    f"{done}: {rows[-1][1]:.0f} MiB, {rows[-1][2]} executables, {files} descriptors, {rows[-1][4]} threads"
                )
    Recorder.mark = mark  # type: ignore[method-assign]
    click.echo(", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    check(sum(ends.values()) == requests, "a request was lost")
    for number, expected in alone.items():
        check(shas.get(number, expected) == expected, f"request {number} has other bits")
    check(not pipe.held, f"left on the device: {pipe.held}")
    half = [row[1] for row in rows[len(rows) // 2 :]]
    click.echo(f"the second half grew by {half[-1] - half[0]:.0f} MiB")


@main.command()
@click.option("--kills", default=20)
@click.option("--requests", default=60)
def kills(kills: int, requests: int) -> None:
    """The engine's process killed at random moments: every picture drawn once, with the same bytes."""
    rng = random.Random(2)
    jobs = [random_job(rng) for _ in range(requests)]
    alone = ZImage.load(memory=Memory(schedule="ring"))
    expected = [sha(alone.generate(**job)) for job in jobs]
    with ZImageProcess(memory=Memory(schedule="ring")) as engine:
        ended: list[int] = []
        handles = [
            engine.submit(
                **job, on_event=lambda event, n=n: ended.append(n) if event is None else None
            )
            for n, job in enumerate(jobs)
        ]
        killed = 0
        while killed < kills and not all(handle.done() for handle in handles):
            starts = engine.starts
            time.sleep(rng.uniform(0.1, 4.0))
            os.kill(engine.pid, signal.SIGKILL)
            killed += 1
            while engine.starts == starts:
                time.sleep(0.01)
        found = [sha(handle.result(600)) for handle in handles]
        same = sum(map(str.__eq__, found, expected))
        click.echo(
            f"{killed} kills, {engine.starts} starts, {same} of {requests} pictures as undisturbed"
        )
        check(same == requests, "a picture has other bits")
        check(sorted(ended) == list(range(requests)), "each job ends once")
        click.echo("last start: " + ", ".join(f"{k} {v:.2f} s" for k, v in engine.seconds.items()))


@main.command()
@click.option("--kills", default=30)
@click.option("--jobs", default=60)
def batch(kills: int, jobs: int) -> None:
    """`python -m zimage_jax.batch` killed at random moments and run again: the same folder."""
    rng, folder = random.Random(3), Path(tempfile.mkdtemp())
    lines = []
    for _ in range(jobs):
        job = random_job(rng)
        if job.pop("image", None) is not None:
            job.pop("strength")
        job.pop("kv", None)
        lines.append(json.dumps(job))
    (folder / "jobs.jsonl").write_text("\n".join(lines) + "\n")

    def start(name: str) -> subprocess.Popen:
        words = [
            str(folder / "jobs.jsonl"),
            "-o",
            str(folder / name),
            "--schedule",
            "ring",
            "--quiet",
        ]
        return subprocess.Popen([sys.executable, "-m", "zimage_jax.batch", *words])

    check(start("whole").wait() == 0, "the undisturbed run failed")
    done = 0
    for _ in range(kills):
        process = start("killed")
        time.sleep(rng.uniform(2.0, 5.0))
        done += process.poll() is not None
        process.kill()
        process.wait()
    check(start("killed").wait() == 0, "the last run failed")
    rows = [
        json.loads(line) for line in (folder / "killed" / "results.jsonl").read_text().splitlines()
    ]
    check(
        sorted(row["line"] for row in rows) == list(range(1, jobs + 1)),
        "a job is missing, or there twice",
    )

    def digest(name: str) -> dict[str, str]:
        return {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in (folder / name).glob("*.png")
        }

    check(digest("whole") == digest("killed"), "a picture has other bytes")
    left = [p.name for p in (folder / "killed").iterdir() if p.suffix not in (".png", ".jsonl")]
    click.echo(
        f"{kills} kills ({done} found it done), {jobs} pictures as undisturbed, other files left: {left or 'none'}"
    )


if __name__ == "__main__":
    main()
