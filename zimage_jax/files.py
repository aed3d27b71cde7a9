"""Files of others are opened only if they are regular, and read up to a limit; ours appear whole or not at all.

`fault` is the exception class that a refusal raises, with one line that names the file.
"""

import errno
import functools
import json
import os
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import OutputError, UsageError, ZImageError

LARGEST_JSON = 64 << 20  # a shard index has some MB, Qwen's tokenizer.json 11
LARGEST_TOML = 1 << 20
LONGEST_PATH = 4096  # Linux's own limit: a path is named whole, with its end

Fault = type[ZImageError]


def printable(text: object, longest: int = 120) -> str:
    """Text of a stranger, for a message: control characters escaped, cut to `longest` characters."""
    words = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(text)[: longest + 1]
    )
    return words if len(words) <= longest else words[: longest - 1] + "…"


# -- reading ----------------------------------------------------------------------------------------------------------


def kind_of(path: Path, fault: Fault = UsageError) -> str:
    """What a path names: "file", "folder", "other", or "" for nothing. Raises `fault` where that cannot be found out."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        _refuse(path, error, fault)
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def open_regular(path: Path, fault: Fault = UsageError, *, buffering: int = 0) -> BinaryIO:
    """Open a file for reading, unbuffered unless `buffering` is -1. A FIFO or a device is refused and never waited for."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        _refuse(path, error, fault)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(kind) else "a device, a pipe or a socket"
        raise fault(f"{printable(path, LONGEST_PATH)}: expected a file, found {what}")
    return os.fdopen(handle, "rb", buffering=buffering)


def read_regular(path: Path, limit: int, fault: Fault = UsageError) -> bytes:
    """A whole file of at most `limit` bytes."""
    with open_regular(path, fault, buffering=-1) as f:  # which reads on after a short read
        try:
            nbytes = os.fstat(f.fileno()).st_size
            # what /proc has says 0; so does a file that grows while it is read
            data = b"" if nbytes > limit else f.read(limit + 1)
        except OSError as error:
            _refuse(path, error, fault)
    if nbytes > limit or len(data) > limit:
        raise fault(
            f"{printable(path, LONGEST_PATH)}: larger than the {limit} bytes that a file of this kind may have"
        )
    return data


def read_text(path: Path, limit: int, fault: Fault = UsageError) -> str:
    """A whole UTF-8 file of at most `limit` bytes."""
    try:
        return read_regular(path, limit, fault).decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            f"{printable(path, LONGEST_PATH)}: not UTF-8 text (byte {error.start})"
        ) from None


def read_json(path: Path, limit: int = LARGEST_JSON, fault: Fault = UsageError) -> dict[str, Any]:
    """A JSON object from a file."""
    return parse_json(read_regular(path, limit, fault), str(path), fault)


def parse_json(data: bytes | str, where: str, fault: Fault = UsageError) -> dict[str, Any]:
    """A JSON object. Nesting is bounded by the interpreter's own limit; NaN and infinities are refused."""

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        found = json.loads(data, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise fault(f"{printable(where, LONGEST_PATH)}: not JSON ({reason})") from None
    if not isinstance(found, dict):
        raise fault(
            f"{printable(where, LONGEST_PATH)}: expected a JSON object, found {type(found).__name__}"
        )
    return found


def read_toml(path: Path, fault: Fault = UsageError) -> dict[str, Any]:
    """A TOML file's table."""
    try:
        return tomllib.loads(read_text(path, LARGEST_TOML, fault))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise fault(f"{printable(path, LONGEST_PATH)}: not TOML ({reason})") from None


def _refuse(path: Path, error: Exception, fault: Fault) -> NoReturn:
    if isinstance(error, OSError):
        reason = error.strerror or printable(error)
    else:  # what the operating system's calls take for no name at all
        reason = "the name has a NUL character" if "\0" in str(path) else "the name is not UTF-8"
    raise fault(f"{printable(path, LONGEST_PATH)}: cannot be read ({reason})") from None


# -- writing ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes, *, overwrite: bool = False) -> Path:
    """Write a file whole or not at all, on disk before it has its name. Returns the path used.

    A name in use gets "-2", "-3", … unless `overwrite`, which writes through a link, a device or a pipe and replaces
    none of them. Raises OutputError.
    """
    try:
        if overwrite and path.exists() and not path.is_file():
            _write_through(path, data)
            return path
        if overwrite and path.is_symlink():
            path = path.resolve()  # the link stays, what it names is replaced
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
    # O_NONBLOCK: a pipe that nobody reads is an error, not a wait
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb", buffering=0) as f:
        while data:
            data = data[f.write(data) :]


def _place(temporary: Path, path: Path, overwrite: bool) -> Path:
    if overwrite:
        os.replace(temporary, path)
        return path
    for number in range(1, 1 << 20):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(
                temporary, candidate
            )  # fails when the name is taken, even by another process just now
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if not candidate.exists():  # a filesystem without links
                os.replace(temporary, candidate)
                return candidate
    raise OutputError(f"{path}: every name up to -{1 << 20} is taken")


@functools.cache  # asking sets it for a moment, for all threads
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
