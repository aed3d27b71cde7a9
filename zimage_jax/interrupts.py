"""Ctrl-C is one line and exit code 130, whenever it comes.

While modules are imported nothing has begun, numpy turns an exception into an ImportError and C++ aborts on one: the
process leaves at once. While a command runs, Ctrl-C raises KeyboardInterrupt and is remembered, because Python drops
what is raised in a destructor and libraries turn it into errors of their own. Once the command is done it is ignored.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 130
_remembered: list[int] = []
_installed = False


def install() -> None:
    """First thing in a process that is a command. A shell's background job, whose Ctrl-C is ignored, stays so."""
    global _installed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        _installed = True


@contextmanager
def at_once() -> Iterator[None]:
    """Around imports within a command: Ctrl-C leaves without an exception."""
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
    """Around a command: Ctrl-C raises KeyboardInterrupt, and `check` raises it again where it was dropped."""
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
        check()  # libraries turn an interrupt into errors of their own
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if _installed else signal.default_int_handler)
        sys.unraisablehook = unraisable
        _remembered.clear()


def check() -> None:
    """Raises KeyboardInterrupt when there was one."""
    if _remembered:
        raise KeyboardInterrupt


def _remember(number, frame) -> None:
    _remembered.append(number)
    raise KeyboardInterrupt


def _leave(number, frame) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
