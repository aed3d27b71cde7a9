"""Downloading one file from a hub that fails in every way, and after a death at any point."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import format_datetime

import numpy as np
import pytest
from tqdm import tqdm

from checkpoints_convert import downloads, hub
from checkpoints_convert.downloads import Downloads
from checkpoints_convert.hub import Limits, Patience, TransientError
from tests.checkpoints_convert.local_hub import REPO, Handler, LocalHub, git_sha, sha
from tests.schedules import every
from zimage_jax.errors import DownloadError, OutputError, UsageError

NAME = "vae/diffusion_pytorch_model.safetensors"
DATA = np.random.default_rng(0).bytes(300_123)
LIMITS = Limits(connections=3, timeout=0.5, retries=5, backoff=0.01, block=4096, segment=32768)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No hub, token or proxy of the machine."""
    names = [n for n in os.environ if n.upper().endswith("_PROXY")]
    for name in (*names, "HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch):
    made = LocalHub({NAME: DATA, "config.json": b"{}", "empty.json": b""})
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", made.url)
    yield made
    made.close()


def download(path, name=NAME, limits=LIMITS, where="huggingface", said=None):
    """Fetch one file to `path`; returns the bytes that came."""
    said = [] if said is None else said
    repository = hub.open_repository(where, REPO, None, limits, said.append)
    bar = tqdm(total=0, disable=True)
    with Downloads(repository.web, limits, said.append, bar) as all_:
        all_.wait(all_.add(repository.file(name), path))
    return all_.nbytes


def some(count: int, answer):
    """A fault of the first `count` requests of a file."""
    left, lock = [count], threading.Lock()

    def fault(handler: Handler, name: str) -> bool:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                return False
        answer(handler, name)
        return True

    return fault


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
    server.faults = [some(2 if "stalled" in fault else 4, FAULTS[fault])]
    download(tmp_path / "file", said=said)
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
from tests.checkpoints_convert.test_downloads import LIMITS, download
print("ready", flush=True)
download(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("seed", every(range(8), [0]))
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


# -- redirects, tokens, proxies --------------------------------------------------------------------


@pytest.fixture
def storage(server):
    """Another host, where the hub's files are."""
    made = LocalHub({NAME: DATA})
    server.redirects_to = made
    yield made
    made.close()


@pytest.mark.parametrize("where", ["huggingface", "modelscope"])
def test_no_token_reaches_another_host(server, storage, tmp_path, monkeypatch, where):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password netrc-secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    storage.faults = [some(1, lambda h, n: h.refuse(403))]  # the address has expired
    download(tmp_path / "file", where=where)
    assert (tmp_path / "file").read_bytes() == DATA
    secret = {"huggingface": "Bearer hf_secret", "modelscope": "Bearer ms-secret"}[where]
    assert server.log
    assert all(headers["Authorization"] == secret for _, headers in server.log)
    assert storage.log
    assert not any({"Authorization", "Cookie"} & headers.keys() for _, headers in storage.log)
    assert not any("secret" in str(headers) for _, headers in storage.log)


def test_a_message_has_no_signature(server, storage, tmp_path):
    storage.faults = [some(10**6, lambda h, n: h.refuse(403))]
    with pytest.raises(DownloadError, match="HTTP 403") as raised:
        download(tmp_path / "file")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/somewhere", "HTTP 404"),
        (f"/{REPO}/resolve/c0ffee/{NAME}", "more than 10 redirects"),
        ("file:///etc/passwd", "no address to fetch"),
        ("http://[", "no address to fetch"),
        ("ftp://127.0.0.1/file", "no address to fetch"),
    ],
)
def test_redirects_that_lead_nowhere(server, tmp_path, target, expected):
    server.faults = [some(10**6, lambda h, n: h.refuse(302, Location=target))]
    with pytest.raises(DownloadError, match=expected):
        download(tmp_path / "file")


@pytest.mark.parametrize(("status", "hint"), [(401, "HF_TOKEN"), (403, "terms"), (404, "revision")])
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, status, hint):
    server.faults = [some(10**6, lambda h, n: h.refuse(status))]
    said = []
    with pytest.raises(DownloadError, match=f"HTTP {status}.*{hint}"):
        download(tmp_path / "file", said=said)
    assert not said


def test_a_token_that_no_header_may_have(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a\nb")
    with pytest.raises(DownloadError, match="token has characters"):
        download(tmp_path / "file")


def test_proxies_of_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", server.url)
    download(tmp_path / "file")  # the name is resolved by the proxy alone
    assert all(headers["Host"] == "hub.invalid" for _, headers in server.log)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="the proxy does not answer"):
        download(tmp_path / "other")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    download(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == DATA


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://x:y", "http://["])
def test_an_endpoint_that_is_none(server, tmp_path, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        download(tmp_path / "file")


# -- waiting ---------------------------------------------------------------------------------------


class Clock(threading.Event):
    """Notes how long it was waited for, and does not."""

    def __init__(self):
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout=None) -> bool:
        self.waits.append(timeout)
        return False


def test_the_wait_doubles_and_is_reset():
    clock = Clock()
    patience = Patience(Limits(retries=8, backoff=1.0), clock, lambda line: None)
    for _ in range(8):
        patience.after(TransientError("x"))
    for number, wait in enumerate(clock.waits):
        assert min(60, 2**number) / 2 <= wait <= min(60, 2**number)
    with pytest.raises(DownloadError):
        patience.after(TransientError("x"))
    patience.progressed()
    patience.after(TransientError("x"))
    assert clock.waits[-1] <= 1


def test_retry_after_is_honoured(server):
    clock = Clock()
    patience = Patience(Limits(), clock, lambda line: None)
    patience.after(TransientError("x", 7.0))
    assert clock.waits == [7]
    with pytest.raises(DownloadError, match="asks to wait 4000 s"):
        patience.after(TransientError("x", 4000.0))


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("date", 80, 100),
        ("0", 0, 0),
        ("9" * 40, 1e8, 1e9),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(server, tmp_path, value, low, high):
    if value == "date":
        from datetime import UTC, datetime, timedelta

        value = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.faults = [some(1, lambda h, n: h.refuse(429, Retry_After=value))]
    repository = hub.open_repository("huggingface", REPO, None, LIMITS, print)
    with (
        pytest.raises(TransientError, match="429") as raised,
        repository.web.get(repository.file(NAME).url),
    ):
        pass
    assert low <= raised.value.wait <= high


# -- what a hub says -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.pop("siblings"), "no list of files"),
        (lambda a: a.update(siblings={"a": 1}), "no list of files"),
        (lambda a: a.update(siblings=[1]), "no list of files"),
        (lambda a: a.update(siblings=[{"rfilename": 5}]), "has no vae"),
        (lambda a: a.update(sha=None), "no commit"),
        (lambda a: a["siblings"][0].update(size=-1), "expected a size in bytes, got -1"),
        (lambda a: a["siblings"][0].update(size="5"), "expected a size in bytes, got '5'"),
        (lambda a: a["siblings"][0].update(size=True), "expected a size in bytes, got True"),
        (lambda a: a["siblings"][0].update(size=10**30), "expected a size in bytes, got 10+"),
        (lambda a: a["siblings"][0].update(size=float("nan")), "NaN is not JSON"),
        (lambda a: a["siblings"][0].update(lfs={}), "expected a checksum, got None"),
        (lambda a: a["siblings"][0].update(lfs={"sha256": "\x1b[31m"}), r"expected a checksum"),
        (lambda a: a["siblings"][0].update(lfs={"sha256": "ab"}), "expected a checksum, got 'ab'"),
    ],
)
def test_a_list_of_files_that_is_none(server, tmp_path, change, expected):
    server.listed = change
    with pytest.raises(DownloadError, match=expected) as raised:
        download(tmp_path / "file")
    assert str(raised.value).isprintable()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_json_that_is_none(server, tmp_path, monkeypatch, body):
    monkeypatch.setattr(Handler, "_json", lambda self, answer: self.respond(200, body))
    with pytest.raises(DownloadError):
        download(tmp_path / "file")


def test_json_without_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_JSON", 100)
    with pytest.raises(DownloadError, match="more than"):
        download(tmp_path / "file")


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "../x", "a/..", "a/b?c", "a/b\n", "/a/b"])
def test_a_repository_is_owner_and_name(name):
    with pytest.raises(UsageError, match="OWNER/NAME"):
        hub.open_repository("huggingface", name, None, LIMITS, print)


def test_a_git_checksum(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    digest = hub.Digest("git", git_sha(DATA))
    assert digest.of(tmp_path / "file", len(DATA), id) == digest
