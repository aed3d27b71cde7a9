"""A model hub over HTTP: the files of a repository, with sizes and checksums, and their bytes.

Hugging Face's API (HF_ENDPOINT may name a mirror, HF_TOKEN is sent to it) and ModelScope's
(MODELSCOPE_DOMAIN, MODELSCOPE_API_TOKEN). Proxies and certificates are taken from the environment,
as the requests library does. What a hub answers is not trusted: JSON is limited in size and checked
key by key, a token is sent to the hub's own origin only, and names are data until `fetch` has
chosen among them.
"""

import email.utils
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import requests

from zimage_jax.errors import DownloadError, UsageError
from zimage_jax.files import LARGEST_JSON, parse_json, printable
from zimage_jax.units import size as in_units

from .checksums import hash_file

_REDIRECTS = 10
_LONGEST_WAIT = 60.0  # seconds between two tries
_LONGEST_ASKED = 600.0  # seconds; if a hub asks for a longer wait, the user decides
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HEX = {40: "git", 64: "sha256"}  # digits -> the checksum they are
_DENIED = "set HF_TOKEN (on ModelScope MODELSCOPE_API_TOKEN) to a token that may read it"


@dataclass(frozen=True)
class Limits:
    """How a hub is asked. Times are in seconds."""

    connections: int = 4
    timeout: float = 30.0  # to connect, and between two pieces
    retries: int = 8  # failures in a row, without a byte between them
    backoff: float = 1.0  # before the second try; doubled before each further one
    block: int = 256 << 10  # bytes: what a connection may lose when the process is killed
    segment: int = 32 << 20  # bytes asked for in one request


@dataclass(frozen=True)
class Digest:
    """A file's published checksum. `kind`: "md5", "sha256", or "git", the SHA-1 of the file after
    a header with its size."""

    kind: str
    value: str

    def of(self, file: Path, nbytes: int, seen: Callable[[int], Any]) -> "Digest":
        """The digest of this kind that a file of `nbytes` bytes has; `seen` as in hash_file."""
        if self.kind == "git":
            start = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
        else:
            start = hashlib.new(self.kind, usedforsecurity=False)
        return Digest(self.kind, hash_file(file, start, seen))

    def __str__(self) -> str:
        return f"{'git SHA-1' if self.kind == 'git' else self.kind.upper()} {self.value}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    nbytes: int
    digest: Digest
    url: str


class TransientError(Exception):
    """A fault that may pass. `wait`: seconds that the hub asks to wait, if it does."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Patience:
    """Counts failures in a row, and waits longer after each (exponential backoff with jitter)."""

    def __init__(self, limits: Limits, stop: threading.Event, say: Callable[[str], None]):
        self._limits, self._stop, self._say, self._failures = limits, stop, say, 0

    def progressed(self) -> None:
        """A byte came: what failed before does not count."""
        self._failures = 0

    def after(self, trouble: TransientError) -> None:
        """Wait before the next try. Raises DownloadError if this was the last."""
        self._failures += 1
        if self._failures > self._limits.retries:
            raise DownloadError(
                f"{trouble}, {self._failures} times in a row; run the same command again to resume"
            )
        if (trouble.wait or 0) > _LONGEST_ASKED:
            raise DownloadError(
                f"{trouble}; the hub asks to wait {trouble.wait:.0f} s: run it again then"
            )
        delay = min(_LONGEST_WAIT, self._limits.backoff * 2 ** (self._failures - 1))
        delay = max(delay * random.uniform(0.5, 1), trouble.wait or 0)
        self._say(f"{trouble}; trying again in {delay:.0f} s")
        self._stop.wait(delay)


class Web:
    """HTTP GET with redirects, and a token for one origin. Threads may share it."""

    def __init__(self, endpoint: str, secret: Mapping[str, str], timeout: float):
        self._origin, self._secret, self._timeout = _origin(endpoint), secret, timeout
        self._local = threading.local()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The response of status 200, 206 or 416, its body not read yet.

        Raises DownloadError, or TransientError for what may pass: also where the body is read, in the
        `with`.
        """
        with _troubles(url):
            response = self._follow(url, headers or {})
            try:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise TransientError(f"{_shown(url)}: came compressed, which was not asked for")
                yield response
            finally:
                response.close()

    def _follow(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        asked = url
        for _ in range(_REDIRECTS):
            # a token leaves for its own origin only, whatever a redirect says
            secret = self._secret if _origin(url) == self._origin else {}
            response = self._session().get(
                url,
                headers={"Accept-Encoding": "identity", **headers, **secret},
                allow_redirects=False,
                stream=True,
                timeout=self._timeout,
            )
            if response.status_code in (200, 206, 416):
                return response
            response.close()
            target = response.headers.get("Location")
            if not response.is_redirect or target is None:
                raise _refusal(response, asked, is_hub=_origin(url) == self._origin)
            before, url = url, urljoin(url, target)
            if urlsplit(before).scheme == "https" != urlsplit(url).scheme:
                raise DownloadError(f"{_shown(asked)}: redirected from https to {_shown(url)}")
        raise DownloadError(f"{_shown(asked)}: more than {_REDIRECTS} redirects")

    def _session(self) -> requests.Session:
        """This thread's session: a session is not safe to share."""
        if not hasattr(self._local, "session"):
            session = self._local.session = requests.Session()
            session.headers["User-Agent"] = "zimage_jax"
            # without this, requests would send what ~/.netrc has for a host
            session.auth = lambda request: request
        return self._local.session

    def json(self, url: str) -> dict[str, Any]:
        """The JSON object at an URL, of at most LARGEST_JSON bytes."""
        with self.get(url) as response:
            data = bytearray()
            for piece in response.iter_content(1 << 16):
                data += piece
                if len(data) > LARGEST_JSON:
                    raise DownloadError(f"{_shown(url)}: more than {in_units(LARGEST_JSON)}")
        return parse_json(bytes(data), _shown(url), DownloadError)


@contextmanager
def _troubles(url: str) -> Iterator[None]:
    """Turns requests' exceptions into TransientError, or DownloadError for those that will not pass."""
    where = _shown(url)
    try:
        yield
    except requests.exceptions.InvalidHeader:
        raise DownloadError(f"{where}: the token has characters that no header may have") from None
    except requests.exceptions.InvalidProxyURL:
        raise DownloadError(f"{where}: a proxy of the environment has no valid address") from None
    except requests.exceptions.SSLError as fault:
        if "CERTIFICATE_VERIFY_FAILED" in str(fault):
            raise DownloadError(
                f"{where}: the certificate cannot be verified; REQUESTS_CA_BUNDLE may name a file "
                "with that of a proxy"
            ) from None
        raise TransientError(f"{where}: TLS failed") from None
    except requests.exceptions.ProxyError:
        raise TransientError(f"{where}: the proxy does not answer, or refuses") from None
    except requests.exceptions.ConnectTimeout:
        raise TransientError(f"{where}: no connection") from None
    except requests.exceptions.Timeout:
        raise TransientError(f"{where}: nothing came any more") from None
    except ValueError:  # requests' own for URLs and schemes are ValueErrors too
        raise DownloadError(f"{where}: leads to what is no address to fetch") from None
    except requests.exceptions.RequestException as fault:
        raise TransientError(f"{where}: the connection failed ({type(fault).__name__})") from None


def _refusal(response: requests.Response, asked: str, *, is_hub: bool) -> Exception:
    """The exception for a status that is neither a success nor a redirect."""
    status, where = response.status_code, _shown(asked)
    what = f"{where}: HTTP {status} {printable(response.reason or '', 40)}".rstrip()
    # a storage host refuses an address that has expired: the hub gives a new one
    if status in (408, 425, 429) or status >= 500 or (not is_hub and status in (401, 403)):
        return TransientError(what, _retry_after(response.headers.get("Retry-After")))
    if status in (401, 403):
        return DownloadError(f"{what}; {_DENIED}, or the repository's terms are not accepted")
    if status == 404:
        return DownloadError(f"{what}; is the name of the repository or the revision right?")
    return DownloadError(what)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port. Raises ValueError for what is no URL."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, parts.hostname, default if parts.port is None else parts.port


def _shown(url: str) -> str:
    """An URL for a message: without a query, which may be a signature, and without a password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return printable(f"{parts.scheme}://{host}{parts.path}", 200)


# -- repositories ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What a hub says of a file: any JSON, until `Repository.file` has checked it."""

    nbytes: object
    checksum: object  # its SHA-256 or git SHA-1 in hex
    url: str


class Repository:
    """One revision of a repository: which files it has."""

    def __init__(self, web: Web, name: str, revision: str, entries: dict[str, _Entry]):
        self.web, self.name, self.revision, self._entries = web, name, revision, entries

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def file(self, name: str) -> RemoteFile:
        """Raises DownloadError if the repository does not have the file, or if the hub's size or
        checksum is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise DownloadError(f"{self.name}: has no {name}; expected Z-Image in diffusers layout")
        nbytes, checksum = entry.nbytes, entry.checksum
        if not isinstance(nbytes, int) or isinstance(nbytes, bool) or not 0 <= nbytes < 1 << 50:
            got = printable(repr(nbytes), 40)
            raise DownloadError(f"{self.name}: {name}: expected a size in bytes, got {got}")
        digits = checksum if isinstance(checksum, str) else ""
        if not re.fullmatch(r"[0-9a-f]+", digits) or len(digits) not in _HEX:
            got = printable(repr(checksum), 80)
            raise DownloadError(f"{self.name}: {name}: expected a checksum, got {got}")
        return RemoteFile(name, nbytes, Digest(_HEX[len(digits)], digits), entry.url)


def open_repository(
    hub: str, name: str, revision: str | None, limits: Limits, say: Callable[[str], None]
) -> Repository:
    """The state of a revision now. `hub`: a key of HUBS; `say` is called with what failed and is
    tried again. Raises UsageError, DownloadError."""
    if not _REPO.fullmatch(name):
        raise UsageError(f"{printable(name)}: expected a repository as OWNER/NAME")
    # a hub that cannot be reached at all is soon said
    patience = Patience(replace(limits, retries=min(3, limits.retries)), threading.Event(), say)
    while True:
        try:
            return HUBS[hub](name, revision, limits)
        except TransientError as trouble:
            patience.after(trouble)


def _huggingface(name: str, revision: str | None, limits: Limits) -> Repository:
    """On Hugging Face or a mirror of it. A branch is pinned to the commit that it is at now."""
    endpoint = _endpoint("HF_ENDPOINT", "https://huggingface.co")
    token = os.environ.get("HF_TOKEN", "").strip()
    web = Web(endpoint, {"Authorization": f"Bearer {token}"} if token else {}, limits.timeout)
    wanted = quote(revision or "main", safe="")
    found = web.json(f"{endpoint}/api/models/{name}/revision/{wanted}?blobs=true")
    commit = found.get("sha")
    if not isinstance(commit, str):
        raise DownloadError(f"{name}: the hub's answer has no commit")
    base = f"{endpoint}/{name}/resolve/{quote(commit, safe='')}"

    def entry(found: dict, file: str) -> _Entry:
        lfs = found.get("lfs")
        checksum = lfs.get("sha256") if isinstance(lfs, dict) else found.get("blobId")
        return _Entry(found.get("size"), checksum, f"{base}/{quote(file)}")

    entries = _entries(name, found.get("siblings"), "rfilename", entry)
    return Repository(web, name, commit, entries)


def _modelscope(name: str, revision: str | None, limits: Limits) -> Repository:
    """On ModelScope, which does not pin a branch: a file that changes later fails its checksum."""
    endpoint = _endpoint("MODELSCOPE_DOMAIN", "https://www.modelscope.cn")
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    # older servers read the cookie, newer ones the header
    secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    web = Web(endpoint, secret if token else {}, limits.timeout)
    revision = revision or "master"
    base = f"{endpoint}/api/v1/models/{name}/repo"
    found = web.json(f"{base}/files?Revision={quote(revision, safe='')}&Recursive=true").get("Data")

    def entry(found: dict, file: str) -> _Entry:
        url = f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(file, safe='')}"
        return _Entry(found.get("Size"), found.get("Sha256"), url)

    files = found.get("Files") if isinstance(found, dict) else None
    return Repository(web, name, revision, _entries(name, files, "Path", entry))


HUBS = {"huggingface": _huggingface, "modelscope": _modelscope}


def _endpoint(variable: str, default: str) -> str:
    """The address in an environment variable, or the default. Raises UsageError."""
    given = os.environ.get(variable, "").strip() or default
    found = given if "://" in given else f"https://{given}"
    try:
        scheme, host, _ = _origin(found)
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise UsageError(f"{variable}={printable(given)}: expected an address such as {default}")
    return found.rstrip("/")


def _entries(
    repo: str, found: object, key: str, entry: Callable[[dict, str], _Entry]
) -> dict[str, _Entry]:
    """File -> entry, from a hub's list of files. Raises DownloadError if it is no such list."""
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise DownloadError(f"{repo}: the hub's answer has no list of files")
    return {each[key]: entry(each, each[key]) for each in found if isinstance(each.get(key), str)}
