"""Modules of scripts as processes of their own: cells as JSON on standard input, a JSON line for each
on standard output."""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress


def answers(
    module: str, cells: list[dict], *words: str, seconds: float = math.inf, **environment: str
) -> Iterator[dict]:
    """An answer per cell, as soon as it is there.

    Where a process dies, the cell it was at has its last words as `error`, and the cells after that
    get another process. After `seconds` the process is killed, and cells not begun get no answer.
    """
    left, deadline = list(cells), time.monotonic() + seconds
    while left:
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=os.environ | environment,
            )
            assert process.stdout is not None
            timer = threading.Timer(min(deadline - time.monotonic(), 1e6), process.kill)
            timer.start()
            try:
                yield from _answers(process, left)
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                process.stdout.close()
            if not left:
                return
            left.pop(0)
            if time.monotonic() >= deadline:
                yield {"error": f"not done within {seconds:.0f} s"}
                return
            said.seek(0)
            lines = said.read().strip().splitlines()
        code = process.returncode
        yield {"error": lines[-1] if lines else f"the process ended with code {code}"}


def _answers(process: subprocess.Popen, left: list[dict]) -> Iterator[dict]:
    """Takes each answered cell from `left`."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError), process.stdin as cells:
        cells.write(json.dumps(left))
    for line in process.stdout:
        if line.startswith("{") and left:
            left.pop(0)
            yield json.loads(line)
    process.wait()
