"""One job at a time, whichever thread it comes from."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError


class Turn:
    """Runs one job at a time. A job that a callback of a running job starts could never run."""

    def __init__(self) -> None:
        self._lock, self._here = threading.Lock(), threading.local()

    @contextmanager
    def of_job(self) -> Iterator[None]:
        """Raises UsageError inside a callback of the running job."""
        if getattr(self._here, "in_callback", False):
            raise UsageError(
                "a callback asked its own model for another picture: "
                "call generate after the first one has returned"
            )
        with self._lock:
            yield

    @contextmanager
    def of_callback(self) -> Iterator[None]:
        self._here.in_callback = True
        try:
            yield
        finally:
            self._here.in_callback = False
