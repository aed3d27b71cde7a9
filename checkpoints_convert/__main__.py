"""python -m checkpoints_convert"""

import sys

from zimage_jax import interrupts


def main() -> None:
    """Run `convert`, or `inspect` if that is the first argument."""
    interrupts.install()  # first: the imports below take a second
    from zimage_jax.cli import run

    from .commands import convert, inspect

    if sys.argv[1:2] == ["inspect"]:
        run(inspect, sys.argv[2:], "python -m checkpoints_convert inspect")
    import orbax.checkpoint  # noqa: F401  now, and not at the end of a conversion, which needs it

    run(convert, sys.argv[1:], "python -m checkpoints_convert")


if __name__ == "__main__":
    main()
