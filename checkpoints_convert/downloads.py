"""Files on their way from a hub: over several connections, resumable after a kill at any byte.

    NAME.partial       the file, at its full size, with holes
    NAME.partial.map   what of it is there: a header, then a byte per block, 1 if the block is there

A block's byte is written after the block. Both survive the process; after a power failure the map
may be ahead of the disk, which the checksum at the end finds. The map is the mark that NAME.partial
is ours: without it the name is in the way and nothing is touched. NAME appears when its checksum is
right, by a rename.
"""

import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zimage_jax.errors import DownloadError, OutputError, ZImageError
from zimage_jax.files import kind_of, parse_json

from .hub import Limits, Patience, RemoteFile, TransientError, Web

_MARK = b'{"format": "zimage_jax download"'
_HEADER = 4096  # bytes of the map's header, padded with spaces
_LONGEST_ETAG = 1024
_MOST_CHANGES = 4  # of a file while it is fetched
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", re.ASCII)


class _SupersededError(Exception):
    """The file began anew, or its download ended, while a connection was at it."""


class Download:
    """One file on its way to `path`. Its methods may be called by several threads.

    Opening it resumes what an earlier process left. Raises OutputError if NAME.partial is not ours,
    or cannot be written.
    """

    def __init__(self, remote: RemoteFile, path: Path, block: int):
        self.remote, self.path, self._block = remote, path, block
        self.partial = _partial(path)
        self._map = path.with_name(path.name + ".partial.map")
        self.blocks = -(-remote.nbytes // block)
        self.goal = 0  # blocks wanted so far, from the first on
        self.is_wanted = self.is_finishing = self.is_finished = False
        self._lock = threading.RLock()
        self._held, self._claimed = bytearray(self.blocks), bytearray(self.blocks)
        self._etag: str | None = None
        self._version = 0  # of the contents: one more each time the file begins anew
        self._is_met = False  # whether a response came: whether parts can be asked for is known
        self._is_whole = False  # whether the server sends the whole file whatever is asked for
        self._file = self._map_file = -1
        try:
            self._open()
        except OSError as fault:
            self.close()
            raise OutputError(
                f"{self.partial}: cannot be written ({fault.strerror}); choose another place"
            ) from None
        except BaseException:
            self.close()
            raise

    # -- on disk -----------------------------------------------------------------------------------

    def _open(self) -> None:
        found = self._found()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._map_file = os.open(self._map, flags, 0o666)  # first: it is the mark
        resumed = found is not None and self.partial.exists()
        if not resumed:
            self._begin()
        self._file = os.open(self.partial, flags, 0o666)
        if os.fstat(self._file).st_size != self.remote.nbytes:
            if resumed:
                self._begin()
            os.ftruncate(self._file, self.remote.nbytes)
        elif found is not None and resumed:
            self._etag, self._held = found

    def _found(self) -> tuple[str | None, bytearray] | None:
        """ETag and map of an earlier process; None if it had another file or there was none.

        Raises OutputError if what is there is not ours.
        """
        data = b""
        if os.path.lexists(self._map):
            kind = os.lstat(self._map).st_mode
            data = self._map.read_bytes() if stat.S_ISREG(kind) else b"?"
        is_ours = data.startswith(_MARK)
        for file in (self.partial, self._map):
            # an empty map is ours too: the process was killed before it wrote the mark
            if os.path.lexists(file) and not is_ours and (data or file is self.partial):
                raise OutputError(
                    f"{file}: is in the way and not an unfinished download; move it away"
                )
        if os.path.lexists(self.partial) and not stat.S_ISREG(os.lstat(self.partial).st_mode):
            raise OutputError(f"{self.partial}: expected a file, found something else; move it")
        try:
            header = parse_json(data[:_HEADER], str(self._map), OutputError)
        except ZImageError:
            return None
        etag, held = header.pop("etag", None), bytearray(data[_HEADER:])
        if header != self._identity() or len(held) != self.blocks or set(held) - {0, 1}:
            return None
        return etag if isinstance(etag, str) else None, held

    def _identity(self) -> dict[str, Any]:
        return {
            "format": "zimage_jax download",
            "bytes": self.remote.nbytes,
            "block": self._block,
            "checksum": str(self.remote.digest),
        }

    def _begin(self) -> None:
        """Nothing of the file is there."""
        self._held, self._etag = bytearray(self.blocks), None
        # first the blocks, so that none counts for the file that the header is of
        if os.fstat(self._map_file).st_size > _HEADER:
            os.ftruncate(self._map_file, _HEADER)
        self._put_header()
        os.pwrite(self._map_file, self._held, _HEADER)

    def _put_header(self) -> None:
        text = json.dumps(self._identity() | {"etag": self._etag})
        os.pwrite(self._map_file, text.encode().ljust(_HEADER), 0)

    def close(self) -> None:
        """Write no more. What is there remains."""
        with self._lock:
            self._version += 1
            for handle in (self._file, self._map_file):
                if handle >= 0:
                    os.close(handle)
            self._file = self._map_file = -1

    def remove(self) -> None:
        """Remove the file and what there is of it."""
        self.close()
        for file in (self.partial, self._map, self.path):
            file.unlink(missing_ok=True)

    def finish(self, seen: Callable[[int], Any] = id) -> None:
        """Give the whole file its name. Raises DownloadError if its checksum is wrong: then it
        begins anew; OutputError."""
        found = self.remote.digest.of(self.partial, self.remote.nbytes, seen)
        if found != self.remote.digest:
            with self._lock:
                self._begin()
            newer = ""
            if found.kind == "md5":  # the published sums are this package's, not the hub's
                newer = ", or with --revision if the hub has a newer version"
            raise DownloadError(
                f"{self.path}: expected {self.remote.digest}, got {found}; what came was dropped: "
                f"run the same command again{newer}"
            )
        if os.path.lexists(self.path):
            raise OutputError(f"{self.path}: has appeared meanwhile; move it away")
        os.fsync(self._file)
        os.replace(self.partial, self.path)
        self._map.unlink()
        self.is_finished = True
        self.close()

    # -- blocks ------------------------------------------------------------------------------------

    def want(self, nbytes: int | None = None) -> None:
        """Let connections fetch at least the first `nbytes` bytes; without it, the whole file."""
        self.is_wanted |= nbytes is None
        wanted = self.blocks if nbytes is None else -(-nbytes // self._block)
        self.goal = min(self.blocks, max(self.goal, wanted))

    @property
    def is_complete(self) -> bool:
        """Whether the whole file is wanted and there."""
        return self.is_wanted and 0 not in self._held

    def has(self, nbytes: int) -> bool:
        """Whether the first `nbytes` bytes are there."""
        return self._held.find(0, 0, -(-nbytes // self._block)) < 0

    @property
    def nbytes_held(self) -> int:
        """Bytes that are there."""
        if not self.blocks:
            return 0
        last = self.remote.nbytes - (self.blocks - 1) * self._block
        return (self._held.count(1) - self._held[-1]) * self._block + self._held[-1] * last

    def claim(self, most: int) -> tuple[int, int] | None:
        """The first blocks to fetch, (first, last), last exclusive: nobody else gets them until
        `release`. None if there are none for now."""
        with self._lock:
            if (not self._is_met or self._is_whole) and 1 in self._claimed:
                return None
            missing = bytes(h | c for h, c in zip(self._held, self._claimed, strict=True))
            first = missing.find(0, 0, self.goal)
            if first < 0:
                return None
            ends = (missing.find(1, first, self.goal), self.goal, first + most)
            last = min(end for end in ends if end >= 0)
            self._claimed[first:last] = b"\1" * (last - first)
            return first, last

    def release(self, first: int, last: int) -> None:
        """The blocks claimed are claimed no more."""
        self._claimed[first:last] = bytes(last - first)

    def fetch(self, web: Web, first: int, last: int) -> Iterator[int]:
        """Fetch claimed blocks, and yield the bytes of each that came. Raises TransientError,
        DownloadError."""
        begin, end = first * self._block, min(last * self._block, self.remote.nbytes)
        headers = {} if self._is_whole else {"Range": f"bytes={begin}-{end - 1}"}
        if headers and self._etag is not None and not self._etag.startswith("W/"):
            headers["If-Range"] = self._etag  # a weak one is not allowed there
        where = self.remote.name
        with web.get(self.remote.url, headers) as response:
            if response.status_code == 416:
                raise TransientError(f"{where}: the hub has fewer bytes than it listed")
            index = self._start(response, begin)
            version = self._meet(response.headers.get("ETag"), response.status_code == 200)
            for data in _pieces(response, self._block):
                if index >= (self.goal if self._is_whole else last):
                    return
                nbytes = min(self._block, self.remote.nbytes - index * self._block)
                if len(data) < nbytes:
                    break
                yield self._write(index, data[:nbytes], version)
                index += 1
        if index < last:
            raise TransientError(f"{where}: the connection ended early")

    def _start(self, response: Any, begin: int) -> int:
        """The block with which a response begins. Raises TransientError if it is not what was asked
        for."""
        where, nbytes = self.remote.name, self.remote.nbytes
        if response.status_code == 200:
            length = response.headers.get("Content-Length", str(nbytes))
            if length != str(nbytes):
                raise TransientError(
                    f"{where}: listed with {nbytes} bytes, sent with {length[:20]}"
                )
            return 0
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != begin or found[2] not in ("*", str(nbytes)):
            got = response.headers.get("Content-Range", "none")[:60]
            raise TransientError(f"{where}: expected bytes from {begin} of {nbytes}, got {got!r}")
        return begin // self._block

    def _meet(self, etag: str | None, is_whole: bool) -> int:
        """Take note of a response. Returns the version of the contents, which an ETag other than
        before makes a new one: what came of the old is dropped.

        Raises TransientError if it must be asked for again, DownloadError if it changes too often.
        """
        if etag is not None and len(etag) > _LONGEST_ETAG:
            etag = None
        with self._lock:
            if self._file < 0:
                raise _SupersededError
            # a part without an ETag is of the version that If-Range named
            is_other = etag != self._etag and (etag is not None or is_whole)
            if self._etag is not None and is_other:
                self._version += 1
                if self._version > _MOST_CHANGES:
                    raise DownloadError(
                        f"{self.remote.name}: the hub sends another version (ETag) again and again"
                    )
                self._begin()
                self._etag = etag
                self._put_header()
                if is_whole:  # not that parts are not served, but that this one is of another file
                    raise TransientError(
                        f"{self.remote.name}: has changed on the hub; it begins anew"
                    )
            elif self._etag is None and etag is not None:
                self._etag = etag
                self._put_header()
            self._is_met, self._is_whole = True, is_whole
            return self._version

    def _write(self, index: int, data: bytes, version: int) -> int:
        """Write a block, if it is not there, and return the bytes written."""
        with self._lock:
            if version != self._version:
                raise _SupersededError
            if self._held[index]:
                return 0
            view, place = memoryview(data), index * self._block
            while view:
                count = os.pwrite(self._file, view, place)
                view, place = view[count:], place + count
            os.pwrite(self._map_file, b"\1", _HEADER + index)
            self._held[index] = 1
            return len(data)


def _pieces(response: Any, block: int) -> Iterator[bytes]:
    """The body in blocks; the last may be shorter."""
    held = bytearray()
    for run in response.iter_content(block):
        held += run
        while len(held) >= block:
            yield bytes(held[:block])
            del held[:block]
    if held:
        yield bytes(held)


class Downloads:
    """Fetches what is wanted of its downloads, over several connections. Use it in a `with`.

    `say` is called with what failed and is tried again; `bar` is a tqdm of bytes.
    """

    def __init__(self, web: Web, limits: Limits, say: Callable[[str], None], bar: Any):
        self._web, self._limits, self._say, self._bar = web, limits, say, bar
        self._all: list[Download] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._fault: BaseException | None = None
        self.nbytes = 0  # that came

    def __enter__(self) -> "Downloads":
        for number in range(self._limits.connections):
            # daemons: a stalled connection does not hold back the end of the process
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for download in self._all:
            download.close()

    def add(self, remote: RemoteFile, path: Path) -> Download:
        """A download of which nothing is wanted yet. Raises OutputError."""
        download = Download(remote, path, self._limits.block)
        with self._changed:
            self._all.append(download)
            self._bar.total += remote.nbytes
            if not self._bar.disable:
                self._bar.initial += download.nbytes_held  # it has no part in the rate
            self._bar.update(download.nbytes_held)
        return download

    def want(self, *downloads: Download, nbytes: int | None = None) -> None:
        """Fetch these, or at least their first `nbytes` bytes, and do not wait for it."""
        with self._changed:
            for download in downloads:
                download.want(nbytes)
            self._changed.notify_all()

    def wait(self, *downloads: Download) -> None:
        """Until these have their names. Raises DownloadError, OutputError."""
        self.want(*downloads)
        self._wait(lambda: all(d.is_finished for d in downloads))

    def wait_for_start(self, download: Download, nbytes: int) -> None:
        """Until the first bytes of one are there. Raises DownloadError, OutputError."""
        nbytes = min(nbytes, download.remote.nbytes)
        self.want(download, nbytes=nbytes)
        self._wait(lambda: download.has(nbytes))

    def _wait(self, is_reached: Callable[[], bool]) -> None:
        with self._changed:
            while not is_reached():
                if self._fault is not None:
                    raise self._fault
                self._changed.wait(0.5)  # a limit, so that Ctrl-C is seen

    # -- a connection's thread ---------------------------------------------------------------------

    def _work(self) -> None:
        patience = Patience(self._limits, self._stop, self._say)
        try:
            while (task := self._next()) is not None:
                try:
                    self._do(*task, patience)
                except _SupersededError:
                    pass
                except TransientError as trouble:
                    patience.after(trouble)
                except OSError as fault:
                    raise OutputError(
                        f"{task[0].path}: cannot be written ({fault.strerror or fault}); "
                        "run the same command again to resume"
                    ) from None
        except BaseException as fault:
            self._end(fault)

    def _next(self) -> tuple[Download, int, int] | None:
        """A download and blocks to fetch, none of them if all are there and it is to be finished;
        None at the end."""
        most = max(1, self._limits.segment // self._limits.block)
        with self._changed:
            while not self._stop.is_set():
                for download in self._all:
                    if claimed := download.claim(most):
                        return download, *claimed
                    if download.is_complete and not download.is_finishing:
                        download.is_finishing = True
                        return download, 0, 0
                self._changed.wait()
        return None

    def _do(self, download: Download, first: int, last: int, patience: Patience) -> None:
        try:
            if first == last:
                download.finish()
                return
            for nbytes in download.fetch(self._web, first, last):
                if nbytes:
                    patience.progressed()
                with self._changed:
                    if self._stop.is_set():
                        return
                    self.nbytes += nbytes
                    self._bar.update(nbytes)
        finally:
            with self._changed:
                download.release(first, last)
                # less than counted, if a file began anew
                self._bar.update(sum(d.nbytes_held for d in self._all) - self._bar.n)
                self._changed.notify_all()

    def _end(self, fault: BaseException) -> None:
        """Stop all threads; `wait` raises the fault."""
        with self._changed:
            if not self._stop.is_set():
                self._fault = fault
            self._stop.set()
            self._changed.notify_all()


def present(path: Path, remote: RemoteFile, seen: Callable[[int], Any] = id) -> bool:
    """Whether the file is there under its own name, with the right checksum.

    Raises OutputError if something else is there.
    """
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or kind_of(path, OutputError) != "file":
        raise OutputError(f"{path}: expected a file, found something else; move it away")
    nbytes = path.stat().st_size
    if nbytes != remote.nbytes:
        raise OutputError(
            f"{path}: has {nbytes} bytes, the hub's has {remote.nbytes}; move it away"
        )
    found = remote.digest.of(path, nbytes, seen)
    if found != remote.digest:
        raise OutputError(f"{path}: has {found}, the hub's has {remote.digest}; move it away")
    path.with_name(path.name + ".partial.map").unlink(missing_ok=True)
    return True


def nbytes_taken(path: Path) -> int:
    """Bytes of the disk that an unfinished download to `path` takes; it has holes."""
    try:
        return os.lstat(_partial(path)).st_blocks * 512
    except FileNotFoundError:
        return 0


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
