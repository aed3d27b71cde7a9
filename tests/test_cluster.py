"""Ray's machines draw what one process draws, each picture once, whoever is killed. Each raylet on
this machine is a machine to Ray."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.schedules import JOB, MODEL
from zimage_jax import ZImage, batch
from zimage_jax.errors import CheckpointError, UsageError
from zimage_jax.pipeline.opened import File, open_picture
from zimage_jax.weights import checkpoint as checkpoints
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.search import Sought

# Ray forks to start its own processes, in this one
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")
ROOT = Path(batch.__file__).parent.parent
COUNT = 60


@pytest.fixture(scope="module")
def model(native):
    return native(MODEL)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, model):
    """A file of jobs, one of them from a picture, and what one process draws of it, by name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("jobs")
    Image.new("RGB", (40, 40), "red").save(folder / "in.png")
    lines = [JOB | {"prompt": "a star", "seed": n, "steps": 2 + n % 5} for n in range(COUNT)]
    lines[7] |= {"image": "in.png", "strength": 0.9}
    file = folder / "jobs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    pipe = ZImage.load(model)
    for line in batch.read(file):
        result = pipe.generate(**line.arguments())
        result.pictures[0].save(folder / f"{line.number:06}.png")
    return file, {path.name: path.read_bytes() for path in folder.glob("0*.png")}


@pytest.fixture
def cluster(cache_of_processes):
    """A head that draws nothing; a test adds machines. One for each test: a head's own raylet may
    abort after another was killed (a check in Ray 2.60's node_manager.cc)."""
    utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache_of_processes)
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        yield made
        made.shutdown()


@pytest.fixture
def machine(cluster):
    added = []

    def add():
        added.append(cluster.add_node(num_cpus=1, object_store_memory=80 << 20))
        return added[-1]

    yield add
    for node in set(added) & set(cluster.worker_nodes):
        cluster.remove_node(node)


@pytest.fixture
def start(cluster, tmp_path):
    """Start the batch command; gives the process."""
    started = []

    def call(file, *words, address=None, program=("-m", "zimage_jax.batch")) -> subprocess.Popen:
        address = ["--cluster", address or cluster.address]
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, *program, str(file), "-o", "out"),
                    *("--in-flight", "2", "--json", *address, *map(str, words)),
                ],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def workers(above: int) -> list[int]:
    """The engine's processes that descend from a process, by id."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
    for pid in parents:
        at = pid
        while at in parents and at != above:
            at = parents[at]
        try:
            if at == above and b"zimage_jax.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def drawn(process: subprocess.Popen, count: int) -> list[int]:
    """Wait until so many more pictures are there. Gives their lines."""
    found = []
    while len(found) < count and (row := process.stdout.readline()):
        found.append(json.loads(row)["line"])
    return found


def check(folder: Path, lines: list[int], expected: dict[str, bytes]) -> None:
    assert Counter(lines) == Counter(range(1, COUNT + 1)), "each once"
    rows = (folder / "results.jsonl").read_text("utf-8").splitlines()
    assert sorted(json.loads(row)["line"] for row in rows) == list(range(1, COUNT + 1))
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected


@pytest.mark.long
def test_a_machine_that_is_lost_and_one_that_joins(cluster, machine, start, jobs, model, tmp_path):
    first = machine()
    process = start(jobs[0], "--model", model)
    lines = drawn(process, 5)
    machine()
    lines += drawn(process, 10)
    os.kill(raylet(first), signal.SIGKILL)
    third = machine()
    lines += drawn(process, COUNT)
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert not workers(raylet(third)), "they end with the command"
    assert "others draw its jobs" in error
    check(tmp_path / "out", lines, jobs[1])


@pytest.mark.long
def test_worker_processes_that_are_killed(cluster, machine, start, jobs, model, tmp_path):
    nodes = [machine(), machine()]
    process = start(jobs[0], "--model", model)
    lines, killed = [], 0
    while len(lines) < COUNT and (found := drawn(process, 10)):
        lines += found
        victims = workers(raylet(nodes[killed % 2])) if killed < 4 else []
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        killed += len(victims)
    assert killed >= 2
    assert process.wait() == 0, process.stderr.read()
    check(tmp_path / "out", lines, jobs[1])


ELSEWHERE = """
from pathlib import Path
from zimage_jax import batch, cluster
cluster.Sought.of = lambda path: cluster.Sought(Path("/nowhere"), "mine", "zimage_jax checkpoint", "0123456789abcdef")
batch.main()
"""


@pytest.mark.long
def test_a_cluster_that_cannot_draw_says_why_in_a_line(cluster, machine, start, jobs):
    process = start(jobs[0])
    _, error = process.communicate(timeout=120)
    assert (process.returncode, "no machine has a CPU" in error.splitlines()[-1]) == (2, True)
    machine()
    process = start(jobs[0], program=["-c", ELSEWHERE])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    last = error.splitlines()[-1]
    assert "#0: no checkpoint with the checksum 0123456789abcdef of mine" in last
    process = start(jobs[0], address="127.0.0.1:1")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("error: --cluster 127.0.0.1:1: nothing answers there")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "local", "--devices", "0"], "leave out --devices"),
        (["--cluster", "local", "--max-vram", "1,2"], "2 sizes need --devices"),
        (["--cluster", "127.0.0.1:1"], "nothing answers there"),
        (["--cluster", "127.0.0.1:99999"], "nothing answers there"),
        (["--cluster", "no..host:1"], "nothing answers there"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said_in_a_line(run, tmp_path, words, message):
    (tmp_path / "jobs.txt").write_text("a star\n", "utf-8")
    code, _, error = run("jobs.txt", "-o", "out", *words, command=batch.command)
    assert (code, message in error.splitlines()[-1]) == (2, True)


def test_a_model_is_found_by_its_checksum(native, tmp_path, monkeypatch):
    model = native(MODEL)
    sought = Sought(tmp_path / "not here", "mine", checkpoints.MODEL, Checkpoint(model).checksum)
    monkeypatch.setenv("ZIMAGE_MODELS", "")
    with pytest.raises(
        CheckpointError, match=r"checksum .* of mine is at .*not here or in ZIMAGE_"
    ):
        sought.find()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other").symlink_to(native("plain"))
    monkeypatch.setenv("ZIMAGE_MODELS", f"/nowhere{os.pathsep}{tmp_path / 'models'}")
    with pytest.raises(CheckpointError, match=r"\(2 others are\)"):  # the tiny model is one
        sought.find()
    (tmp_path / "models" / "another name").symlink_to(model)
    assert sought.find() == tmp_path / "models" / "another name"
    assert Sought.of(model).find() == model.resolve()


def test_where_a_model_came_from_does_not_count(native, tmp_path):
    from zimage_jax.weights.checkpoint import manifest_checksum

    model = native(MODEL)
    manifest = json.loads((model / "manifest" / "manifest.json").read_text("utf-8"))
    before = Checkpoint(model).checksum
    (tmp_path / "manifest").mkdir()
    for key, is_same in (("provenance", True), ("tokenizer", False)):
        other = manifest | {key: {"made by": "others"} if key == "provenance" else "0" * 16}
        other["checksum"] = manifest_checksum(other)
        (tmp_path / "manifest" / "manifest.json").write_text(json.dumps(other), "utf-8")
        assert (Checkpoint(tmp_path).checksum == before) is is_same


def test_a_picture_that_is_sent_is_the_file(tmp_path):
    from PIL import Image

    path = tmp_path / "in.png"
    Image.new("RGB", (40, 30), "red").save(path)
    sent = File.read(path, "image")
    assert (open_picture(sent, "image").pixels == open_picture(path, "image").pixels).all()
    path.write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"image in\.png: expected a PNG"):
        open_picture(File.read(path, "image"), "image")
