"""python -m checkpoints_convert"""

import os
import signal
import sys


def _leave_at_once(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def main() -> None:
    # raised while modules load, Ctrl-C breaks numpy's import and aborts in C++; nothing is begun yet
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _leave_at_once)
    from zimage_jax.cli import run

    from .commands import convert, inspect

    inspects = sys.argv[1:2] == ["inspect"]
    if not inspects:
        import orbax.checkpoint  # noqa: F401  which the end of a conversion needs
    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if inspects:
        run(inspect, sys.argv[2:], "python -m checkpoints_convert inspect")
    else:
        run(convert, sys.argv[1:], "python -m checkpoints_convert")


if __name__ == "__main__":
    main()
