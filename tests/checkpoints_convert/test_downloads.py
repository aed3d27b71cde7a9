"""Downloading one file from a hub that fails in every way, and after a death at any point."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from checkpoints_convert import downloads, hub
from tests.checkpoints_convert.local_hub import (
    DATA,
    LIMITS,
    NAME,
    REPO,
    Handler,
    download,
    sha,
    some,
)
from tests.schedules import every
from zimage_jax.errors import DownloadError, OutputError

FAULTS = {
    "dropped": lambda h, n: h.send_file(n, 9_000),
    "dropped at once": lambda h, n: h.hang_up(),
    "stalled": lambda h, n: h.stall(1),
    "stalled in the middle": lambda h, n: (h.send_response(206), h.stall(1)),
    "says more than it sends": lambda h, n: h.send_file(n, 5_000, **{"Content-Length": "999999"}),
    "another place": lambda h, n: h.send_file(n, **{"Content-Range": "bytes 4096-8191/300123"}),
    "another size": lambda h, n: h.send_file(n, **{"Content-Range": "bytes 0-4095/5"}),
    "a range of words": lambda h, n: h.send_file(n, **{"Content-Range": "bytes all"}),
    "compressed": lambda h, n: h.send_file(n, **{"Content-Encoding": "gzip"}),
    "416": lambda h, n: h.refuse(416),
    "429": lambda h, n: h.refuse(429, Retry_After="0"),
    "500": lambda h, n: h.refuse(500),
    "503": lambda h, n: h.refuse(503, Retry_After="soon"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes(server, tmp_path, fault):
    said = []
    stalls = "stalled" in fault
    server.faults = [some(2 if stalls else 4, FAULTS[fault])]
    limits = replace(LIMITS, timeout=0.5) if stalls else LIMITS
    download(tmp_path / "file", limits=limits, said=said)
    assert (tmp_path / "file").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["file"]
    assert said
    assert all("trying again" in line for line in said)


@pytest.mark.parametrize("fault", ["dropped at once", "416", "503", "another size"])
def test_a_fault_that_stays_ends_in_one_line(server, tmp_path, fault):
    server.faults = [some(10**6, FAULTS[fault])]
    with pytest.raises(DownloadError, match=r"6 times in a row; run the same command") as raised:
        download(tmp_path / "file")
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["file.partial", "file.partial.map"]
    server.faults = []
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_the_hub_is_soon_given_up_if_it_is_not_there(server, tmp_path):
    server.close()
    said = []
    with pytest.raises(DownloadError, match="4 times in a row"):
        download(tmp_path / "file", said=said)
    assert len(said) == 3


def test_progress_makes_up_for_failures(server, tmp_path):
    """Every connection ends after two blocks: many more failures than `retries`, none in a row."""
    server.faults = [some(10**6, lambda h, n: h.send_file(n, 2 * 4096))]
    download(tmp_path / "file", limits=replace(LIMITS, connections=2, retries=2, backoff=1e-4))
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.sent[NAME] == len(DATA)


def test_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.faults = [some(2, lambda h, n: h.send_file(n, 50_000))]
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.sent[NAME] == 100_000 + len(DATA)


def test_a_server_that_sends_chunks_and_no_length(server, tmp_path):
    def chunked(handler: Handler, name: str) -> bool:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(DATA), 7001):
            run = DATA[start : start + 7001]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(run), run))
        handler.wfile.write(b"0\r\n\r\n")
        return True

    server.faults = [chunked]
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("name", ["config.json", "empty.json"])
def test_small_and_empty_files(server, tmp_path, name):
    download(tmp_path / "file", name)
    assert (tmp_path / "file").read_bytes() == server.files[name]


def test_modelscope(server, tmp_path):
    download(tmp_path / "file", where="modelscope")
    assert (tmp_path / "file").read_bytes() == DATA


# -- another version -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "W/"])
def test_parts_are_of_the_version_that_came_first(server, tmp_path, prefix):
    """If-Range names its ETag, after a death too; HTTP allows no weak one there."""
    etag = f'{prefix}"{sha(DATA)}"'
    server.etag = lambda name: etag
    deaths = die_at(30, ("pwrite",))
    with pytest.raises(Death):
        download(tmp_path / "file", limits=replace(LIMITS, connections=1))
    deaths.undo()
    download(tmp_path / "file")
    conditions = [h.get("If-Range") for path, h in server.log if path.endswith(NAME)]
    assert conditions[0] is None
    assert set(conditions[1:]) == {None if prefix else etag}


@pytest.mark.parametrize("is_weak", [False, True])
def test_another_version_on_the_way(server, tmp_path, is_weak):
    """The first parts are of the version before: they are dropped with its ETag."""
    old, prefix = DATA[::-1], "W/" * is_weak
    server.etag = lambda name: f'{prefix}"{sha(server.files[name])}"'

    def of_before(handler: Handler, name: str) -> None:
        server.files[name] = old
        handler.send_file(name)
        server.files[name] = DATA

    server.faults = [some(1, of_before)]
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_another_version_between_two_processes(server, tmp_path):
    server.files[NAME] = DATA[::-1]
    server.faults = [lambda h, n: len(server.log) > 3 and (h.refuse(403), True)[1]]
    with pytest.raises(DownloadError, match="403"):
        download(tmp_path / "file", limits=replace(LIMITS, connections=1))
    server.faults, server.files[NAME] = [], DATA
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_version_that_is_not_the_listed_one(server, tmp_path):
    server.listed = lambda answer: answer["siblings"][0]["lfs"].update(sha256="0" * 64)
    with pytest.raises(DownloadError, match=f"expected SHA256 0+, got SHA256 {sha(DATA)}"):
        download(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_versions_without_end(server, tmp_path):
    server.etag = lambda name: f'"{len(server.log)}"'
    with pytest.raises(DownloadError, match="again and again"):
        download(tmp_path / "file", limits=replace(LIMITS, connections=1))


# -- a death at any point --------------------------------------------------------------------------


class Death(BaseException):
    """The process is killed: nothing after this system call happens."""


def die_at(at: int, calls: tuple[str, ...]) -> pytest.MonkeyPatch:
    """After `at` of these calls each raises Death, in every thread."""
    count, lock, patch = [0], threading.Lock(), pytest.MonkeyPatch()

    def deadly(call):
        def dying(*args):
            with lock:
                count[0] += 1
                if count[0] > at:
                    raise Death
                return call(*args)

        return dying

    for call in calls:
        patch.setattr(os, call, deadly(getattr(os, call)))
    return patch


@pytest.mark.parametrize("at", [*range(12), 30, 61, 100, 149, 150])
def test_a_death_at_any_write(server, tmp_path, at):
    """After it the rest is fetched, and nothing that is there."""
    limits = replace(LIMITS, connections=3 if at % 2 else 1)
    deaths = die_at(at, ("pwrite",))
    with pytest.raises(Death):
        download(tmp_path / "file", limits=limits)
    deaths.undo()
    assert "file" not in os.listdir(tmp_path)
    held = (tmp_path / "file.partial.map").read_bytes()[4096:].count(1)
    server.forget()
    came = download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["file"]
    blocks = -(-len(DATA) // 4096)
    assert -(-came // 4096) == blocks - held
    if limits.connections == 1:  # else the first client's last requests may count here
        assert server.sent[NAME] == came


@pytest.mark.parametrize("at", range(18, 28))
def test_a_death_while_another_version_begins(server, tmp_path, at):
    """Its map never counts a block of the version before."""

    def of_before(handler: Handler, name: str) -> None:
        server.files[name] = DATA[::-1]
        handler.send_file(name)
        server.files[name] = DATA

    server.faults = [some(1, of_before)]
    deaths = die_at(at, ("pwrite", "ftruncate"))
    with pytest.raises(Death):
        download(tmp_path / "file", limits=replace(LIMITS, connections=1))
    deaths.undo()
    server.faults = []
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("call", ["ftruncate", "fsync", "replace"])
def test_a_death_around_the_writes(server, tmp_path, monkeypatch, call):
    def deadly(*args):
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(os, call, deadly)
        with pytest.raises(Death):
            download(tmp_path / "file")
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.checkpoints_convert.local_hub import LIMITS, download
print("ready", flush=True)
download(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("seed", every(range(3), [0]))
def test_killed_processes(server, tmp_path, seed):
    """SIGKILL whenever some more bytes came, over and over."""
    rng, path = np.random.default_rng(seed), tmp_path / "file"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    slow = some(10**6, lambda h, n: (time.sleep(0.01), h.send_file(n)))
    server.faults, deaths = [slow], 0
    while deaths < 1 + min(seed, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, root, str(path)],
            env=os.environ | {"HF_ENDPOINT": server.url},
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout.readline() == b"ready\n"
            enough = server.sent.get(NAME, 0) + rng.integers(1, len(DATA) // 3)
            while server.sent.get(NAME, 0) < enough and process.poll() is None:
                time.sleep(0.001)
            process.kill()
        deaths += 1
    download(path)
    assert path.read_bytes() == DATA
    # what a death loses: the parts that were asked for and not read yet
    assert server.sent[NAME] <= len(DATA) + deaths * 3 * 32768


# -- what is in the way ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file.partial", "file.partial.map", "file"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_strangers_file_is_kept(server, tmp_path, name, kind):
    target = tmp_path / "theirs"
    target.write_bytes(b"theirs")
    place = tmp_path / "here" / name
    place.parent.mkdir()
    if kind == "file":
        place.write_bytes(b"theirs")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(target)
    remote = hub.open_repository("huggingface", REPO, None, LIMITS, print).file(NAME)
    with pytest.raises(OutputError, match="move it"):
        downloads.present(tmp_path / "here" / "file", remote) or downloads.Download(
            remote, tmp_path / "here" / "file", 4096
        )
    assert os.listdir(place.parent) == [name]
    assert target.read_bytes() == b"theirs"
    assert place.is_symlink() == (kind == "link")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:4100],
        lambda d: d + b"\1",
        lambda d: d[:100] + d[4096:],
        lambda d: d[:4096] + b"\7" * len(d[4096:]),
        lambda d: d.replace(b'"block": 4096', b'"block": 8192'),
        lambda d: d[:4096].replace(b'", "bytes"', b'"  "bytes"') + d[4096:],
    ],
)
def test_a_damaged_map_begins_anew(server, tmp_path, damage):
    server.faults = [lambda h, n: len(server.log) > 4 and (h.refuse(404), True)[1]]
    with pytest.raises(DownloadError):
        download(tmp_path / "file")
    mapped = tmp_path / "file.partial.map"
    assert 1 in mapped.read_bytes()[4096:]
    mapped.write_bytes(damage(mapped.read_bytes()))
    server.faults = []
    assert download(tmp_path / "file") == len(DATA)
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_full_disk(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"No space left on device"):
            download(tmp_path / "file")
    download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
