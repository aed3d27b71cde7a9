"""Who may talk to the server: the Host, the Origin and the key of every request, before its body is
read. Plain ASGI, so that event streams are not held back."""

import functools
import hashlib
import hmac
import ipaddress
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import RefusedError
from .order import LARGEST_BODY

COOKIE = "zimage_session"
MOST_BYTES = 8 * LARGEST_BODY  # of all bodies that are in memory at once
_FOR_PEOPLE = ("/", "/docs")  # who come without the key are asked for it
OPEN = ("/health", "/sign-in")  # paths that need no key


class Guard:
    """`key`: None if none is needed. `hosts`: names by which the server may be called, beside
    localhost and addresses."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str] = ()):
        self._app, self._key, self._bytes = app, key, 0
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":  # there are no web sockets here
            return
        headers = Headers(scope=scope)
        nbytes = _size(headers)
        try:
            self._check(scope["path"], headers)
            if self._bytes + nbytes > MOST_BYTES:
                raise RefusedError(503, "too many large requests at once", "busy", retry_after=5)
        except RefusedError as refusal:
            if refusal.status == 401 and scope["path"] in _FOR_PEOPLE and scope["method"] == "GET":
                await HTMLResponse(_sign_in(), 401)(scope, receive, send)
                return
            await refusal.response(scope["path"])(scope, receive, send)
            return
        self._bytes += nbytes
        try:
            await self._app(scope, receive, send)
        finally:
            self._bytes -= nbytes

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        # a page whose name was bound to our address (DNS rebinding) calls us by that name
        if not self._is_ours(host):
            raise RefusedError(403, "this Host is not ours: see --allow-host", "bad_host")
        # a page of another site may send forms here (CSRF), but not without its Origin
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RefusedError(
                403, "requests from pages of another origin are refused", "bad_origin"
            )
        if self._key is not None and path not in OPEN and not self._has_key(headers):
            raise RefusedError(
                401, "expected the API key, as Authorization: Bearer KEY", "invalid_api_key"
            )

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return same(given.strip(), self._key)
        if kind.lower() == "basic":  # A1111's clients: user:password, whose password is the key
            try:
                return same(b64decode(given).decode().partition(":")[2], self._key)
            except (NotBase64, UnicodeDecodeError, ValueError):
                return False
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same(cookie.value, session_of(self._key))


@functools.cache
def _sign_in() -> str:
    """The page that asks a person for the key."""
    return (files(__package__) / "page" / "sign_in.html").read_text("utf-8")


def _size(headers: Headers) -> int:
    """The most bytes that a body can have: it is refused beyond LARGEST_BODY."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or len(length) > 18:
        return LARGEST_BODY
    return min(int(length), LARGEST_BODY) if length.isdecimal() else 0


def same(given: str, key: str) -> bool:
    """Compared in constant time, whatever their lengths."""
    digests = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, key))
    return hmac.compare_digest(*digests)


def session_of(key: str) -> str:
    """The cookie of those who know the key: it does not tell the key."""
    return hmac.new(key.encode(), b"zimage session", hashlib.sha256).hexdigest()
