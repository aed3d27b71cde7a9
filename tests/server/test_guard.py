"""Who may talk to the server, and how much they may say."""

import base64
import contextlib
import socket
import time
import zlib

import numpy as np
import pytest

from tests.server.conftest import png
from zimage_jax.server.guard import MOST_BYTES, session_of
from zimage_jax.server.order import LARGEST_BODY

pytestmark = pytest.mark.exhaustive  # a server of its own

KEY = "a key of some length"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    data = tmp_path_factory.mktemp("guard") / "data"
    with start(data, "--allow-host", "pictures.example", ZIMAGE_API_KEY=KEY) as made:
        yield made


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("127.0.0.1", 200), ("localhost:7860", 200), ("[::1]:7860", 200), ("192.168.1.5", 200)),
        *(("pictures.example", 200), ("PICTURES.EXAMPLE:80", 200)),
        *(("evil.example", 403), ("localhost.evil.example", 403), ("", 403), ("[", 403)),
        *(("127.0.0.1.evil.example", 403), ("user@evil.example", 403)),
    ],
)
def test_names_that_are_not_ours_are_refused(server, host, status):
    assert server.ask("GET", "/jobs", headers={"Host": host})[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        *(("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), ("", 403)),
        *((None, 200),),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_another_origin_are_refused(server, origin, status, method):
    headers = {} if origin is None else {"Origin": origin}
    path, body = ("/jobs", None) if method == "GET" else ("/sdapi/v1/interrupt", b"")
    assert server.ask(method, path, body, headers)[0] == status
    ours = {"Origin": server.url}
    assert server.ask(method, path, body, ours)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer  {KEY}"}, 200),
        ({"Authorization": "Basic dXNlcjphIGtleSBvZiBzb21lIGxlbmd0aA=="}, 200),
        ({"Cookie": f"zimage_session={session_of(KEY)}"}, 200),
        ({"Authorization": ""}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
        ({"Authorization": "Basic !"}, 401),
        ({"Authorization": "Basic /w=="}, 401),
        ({"Authorization": "", "Cookie": f"zimage_session={KEY}"}, 401),
        ({"Authorization": "", "Cookie": 'zimage_session="; ='}, 401),
    ],
)
def test_a_key_is_needed(server, headers, status, monkeypatch):
    monkeypatch.setattr(server, "key", None)
    found, answer, _ = server.ask("GET", "/jobs", headers=headers)
    assert found == status
    assert ("www-authenticate" in answer) == (status == 401)
    assert server.ask("GET", "/health", headers=headers)[0] == 200
    for path in ("/", "/docs", "/openapi.json", "/memory", "/metrics", "/nothing"):
        assert server.ask("GET", path)[0] == 401


def test_a_browser_signs_in_for_a_cookie(server, monkeypatch):
    monkeypatch.setattr(server, "key", None)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    status, headers, _ = server.ask("POST", "/sign-in", b"key=wrong", form)
    assert (status, "set-cookie" in headers) == (401, False)
    body = b"key=" + KEY.replace(" ", "+").encode()
    status, headers, _ = server.ask("POST", "/sign-in", body, form)
    assert status == 204
    cookie, *attributes = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(attributes)
    assert KEY not in cookie
    assert server.ask("GET", "/jobs", headers={"Cookie": cookie})[0] == 200


def head(*lines: str) -> bytes:
    own = "POST /jobs HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}"
    return "".join(
        f"{line}\r\n" for line in (*own, "Content-Type: application/json", *lines, "")
    ).encode()


def test_a_body_that_says_that_it_is_too_large_is_not_read(server):
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        raw.sendall(head(f"Content-Length: {LARGEST_BODY + 1}"))
        assert b" 413 " in raw.recv(4096).partition(b"\r\n")[0]


def test_a_body_that_grows_too_large_is_not_read_on(server):
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        raw.sendall(head("Transfer-Encoding: chunked"))
        with contextlib.suppress(OSError):  # it answers and closes
            for _ in range((LARGEST_BODY >> 20) + 1):
                raw.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert b" 413 " in raw.recv(4096).partition(b"\r\n")[0]


def test_bodies_that_are_read_at_once_have_a_limit(server):
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_BYTES // LARGEST_BODY):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            raw.sendall(head(f"Content-Length: {LARGEST_BODY}"))
        deadline = time.monotonic() + 30
        while (found := server.ask("POST", "/jobs", {"prompt": ""}))[0] == 400:
            assert time.monotonic() < deadline
        status, headers, _ = found
        assert (status, headers["retry-after"]) == (503, "5")
        assert server.ask("GET", "/jobs")[0] == 200
    while server.ask("POST", "/jobs", {"prompt": ""})[0] == 503:
        assert time.monotonic() < deadline


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""
    small = png(np.zeros((1, 1, 3), np.uint8))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


def test_pictures_have_a_limit_before_they_are_decoded(server):
    image = base64.b64encode(bomb(5000)).decode()
    message = server.refused("/jobs", {"prompt": "a fox", "image": image})
    assert "5000x5000 pixels are too many" in message
    assert "damaged" in server.refused(
        "/jobs", {"prompt": "a fox", "image": base64.b64encode(bomb(64)).decode()}
    )


def test_no_path_of_a_client_is_opened(server):
    for name in ("image", "mask"):
        for path in (
            "/etc/passwd",
            "file:///etc/passwd",
            "../jobs.db",
            str(server.data / "jobs.db"),
        ):
            message = server.refused("/jobs", {"prompt": "a fox", "image": path, name: path})
            assert "base64" in message or "expected a PNG" in message


def test_what_is_wrong_is_said_without_a_trace(server):
    assert server.ask("GET", "/nothing")[2]["error"]["message"] == "Not Found"
    assert server.ask("PUT", "/jobs")[0] == 405
    assert server.ask("GET", "/jobs/" + "x" * 3000)[0] == 404
    assert server.ask("GET", "/jobs?limit=0")[2]["error"]["param"] == "limit"
    assert server.get("/health")["status"] == "ok"
    assert not server.log.read_text(), "the server wrote of an error"
