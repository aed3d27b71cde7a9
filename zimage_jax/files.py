"""Reading files we did not write, safely, and writing ours whole or not at all.

Only regular files are opened, and read up to a limit. `fault` is the class of the exception that a
function raises for a file it refuses; the message is one line and names the file.
"""

import errno
import functools
import json
import os
import stat
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import OutputError, UsageError, ZImageError

LARGEST_JSON = 64 << 20  # bytes; a shard index has a few MB, Qwen's tokenizer.json 11 MB
LARGEST_TOML = 1 << 20  # bytes
LONGEST_PATH = 4096  # characters of a path in a message: Linux's limit, so that no path is cut

Fault = type[ZImageError]


def printable(text: object, longest: int = 120) -> str:
    """Untrusted text for a message: control characters escaped, at most `longest` characters."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(text)[: longest + 1]
    )
    return escaped if len(escaped) <= longest else escaped[: longest - 1] + "…"


# -- reading ---------------------------------------------------------------------------------------


def kind_of(path: Path, fault: Fault = UsageError) -> str:
    """What a path names: "file" (a regular one), "folder", "other", or "" if nothing.

    Raises `fault` if the operating system refuses to say.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        _refuse(path, error, fault)
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def open_regular(path: Path, fault: Fault = UsageError, *, buffering: int = 0) -> BinaryIO:
    """Open a regular file for reading. `buffering`: 0 for none, -1 for the default size.

    Raises `fault` for anything else, without waiting for a FIFO or a device.
    """
    try:
        # without O_NONBLOCK, opening a FIFO waits for its writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        _refuse(path, error, fault)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(kind) else "a device, a pipe or a socket"
        raise fault(f"{printable(path, LONGEST_PATH)}: expected a file, found {what}")
    return os.fdopen(handle, "rb", buffering=buffering)


def fill(buffer: Any, file: BinaryIO) -> int:
    """Read until `buffer`, an array of bytes, is full or the file ends. Returns the bytes read."""
    count = 0
    # typeshed's BinaryIO lacks readinto, which every file opened in binary mode has
    while run := file.readinto(buffer.data[count:]):  # type: ignore[attr-defined]
        count += run
    return count


def read_regular(path: Path, limit: int, fault: Fault = UsageError) -> bytes:
    """The bytes of a regular file. Raises `fault` if there are more than `limit`."""
    with open_regular(path, fault, buffering=-1) as f:  # buffered: read() continues short reads
        try:
            nbytes = os.fstat(f.fileno()).st_size
            # one byte over the limit: a file in /proc has st_size 0, and another may be growing
            data = b"" if nbytes > limit else f.read(limit + 1)
        except OSError as error:
            _refuse(path, error, fault)
    if nbytes > limit or len(data) > limit:
        raise fault(
            f"{printable(path, LONGEST_PATH)}: larger than the {limit} bytes allowed for this kind "
            "of file"
        )
    return data


def read_text(path: Path, limit: int, fault: Fault = UsageError) -> str:
    """The text of a UTF-8 file. Raises `fault` if it is larger than `limit` bytes or not UTF-8."""
    try:
        return read_regular(path, limit, fault).decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            f"{printable(path, LONGEST_PATH)}: not UTF-8 text (byte {error.start})"
        ) from None


def read_json(path: Path, limit: int = LARGEST_JSON, fault: Fault = UsageError) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises `fault`."""
    return parse_json(read_regular(path, limit, fault), str(path), fault)


def parse_json(data: bytes | str, where: str, fault: Fault = UsageError) -> dict[str, Any]:
    """The JSON object in `data`; `where` begins each message. Raises `fault`.

    NaN and infinities are refused. Python's recursion limit bounds the nesting.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(data, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise fault(f"{printable(where, LONGEST_PATH)}: not JSON ({reason})") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise fault(f"{printable(where, LONGEST_PATH)}: expected a JSON object, found {kind}")
    return found


def read_toml(path: Path, fault: Fault = UsageError) -> dict[str, Any]:
    """The table in a TOML file of at most LARGEST_TOML bytes. Raises `fault`."""
    try:
        return tomllib.loads(read_text(path, LARGEST_TOML, fault))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise fault(f"{printable(path, LONGEST_PATH)}: not TOML ({reason})") from None


def _refuse(path: Path, error: Exception, fault: Fault) -> NoReturn:
    if isinstance(error, OSError):
        reason = error.strerror or printable(error)
    else:  # ValueError or UnicodeEncodeError: Python cannot pass the name to the operating system
        reason = "the name has a NUL character" if "\0" in str(path) else "the name is not UTF-8"
    raise fault(f"{printable(path, LONGEST_PATH)}: cannot be read ({reason})") from None


# -- writing ---------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes, *, overwrite: bool = False) -> Path:
    """Write a file whole or not at all: the bytes are on disk before the file has its name.

    Returns the path written. If it exists, "-2", "-3", … is appended to the stem. With `overwrite`
    a regular file is replaced instead; a link, device or pipe remains, and its target is written.
    Raises OutputError.
    """
    try:
        if overwrite and path.exists() and not path.is_file():
            _write_through(path, data)
            return path
        if overwrite and path.is_symlink():
            path = path.resolve()  # the link remains, its target is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp"
        )
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            return _place(Path(temporary), path, overwrite)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(
            f"{printable(path, LONGEST_PATH)}: cannot be written ({reason}); choose another place"
        ) from None


def _write_through(path: Path, data: bytes) -> None:
    """Write to a device or a pipe. A pipe without a reader raises OSError (O_NONBLOCK) at once."""
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb", buffering=0) as f:
        while data:
            data = data[f.write(data) :]


def _place(temporary: Path, path: Path, overwrite: bool) -> Path:
    """Give the temporary file the name `path`, or the first free name. Returns the name."""
    if overwrite:
        os.replace(temporary, path)
        return path
    for number in range(1, 1 << 20):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            # unlike a rename, this fails if another process has just taken the name
            os.link(temporary, candidate)
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if not candidate.exists():  # a filesystem without hard links
                os.replace(temporary, candidate)
                return candidate
    raise OutputError(f"{path}: every name up to -{1 << 20} is taken")


def lock(file: BinaryIO) -> bool:
    """Lock a file against other processes until it is closed; False if another has it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache  # reading the umask sets it briefly, for all threads
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
