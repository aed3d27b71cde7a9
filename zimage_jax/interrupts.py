"""Ctrl-C at any time gives one line and exit code 130.

During imports Ctrl-C ends the process at once: there is no work to clean up, and an exception would
become an ImportError in numpy and an abort in C++. While a command runs, Ctrl-C raises
KeyboardInterrupt and is remembered, because Python drops exceptions raised in destructors and
libraries turn them into others. After the command it is ignored.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import UsageError

EXIT_CODE = 130
_remembered: list[int] = []
_installed = False


def install() -> None:
    """Handle Ctrl-C in a command's process; call this before the imports.

    Nothing changes if SIGINT is ignored, as in a shell's background job.
    """
    global _installed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        _installed = True


@contextmanager
def at_once() -> Iterator[None]:
    """Around imports within a command: Ctrl-C ends the process without an exception."""
    before = signal.getsignal(signal.SIGINT)
    if before is not _remember:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def remembered() -> Iterator[None]:
    """Around a command: Ctrl-C raises KeyboardInterrupt, if not at once then at the end."""
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _leave):
        yield
        return
    unraisable = sys.unraisablehook

    def show(dropped) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            unraisable(dropped)

    sys.unraisablehook = show
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
        check()
    except Exception:
        check()  # the exception may be what a library made of the interrupt
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if _installed else signal.default_int_handler)
        sys.unraisablehook = unraisable
        _remembered.clear()


def end_with(pid: int) -> None:
    """Send this process SIGTERM when another has ended. Raises UsageError if there is none."""
    try:
        os.kill(pid, 0)
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError as fault:
        raise UsageError(f"process {pid}: {fault.strerror}") from None

    def watch() -> None:
        if handle is not None:  # Linux: the number may name another process later
            select.select([handle], [], [])
        else:
            with suppress(OSError):
                while True:
                    os.kill(pid, 0)
                    time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="zimage parent", daemon=True).start()


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed within `remembered`."""
    if _remembered:
        raise KeyboardInterrupt


def _remember(number, frame) -> None:
    _remembered.append(number)
    raise KeyboardInterrupt


def _leave(number, frame) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
