"""What a hub may answer, whom a token reaches, and how long is waited."""

import os
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from checkpoints_convert import hub
from checkpoints_convert.hub import Limits, Patience, TransientError
from tests.checkpoints_convert.local_hub import (
    DATA,
    LIMITS,
    NAME,
    REPO,
    Handler,
    LocalHub,
    download,
    git_sha,
    some,
)
from zimage_jax.errors import DownloadError, UsageError

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
