"""python -m checkpoints_convert"""

import sys

from zimage_jax import interrupts


def main() -> None:
    """Run the command that the first argument names, or `convert` if it names none."""
    interrupts.install()  # first: the imports below take a second
    from zimage_jax.cli import run

    from . import commands

    named = {"inspect": commands.inspect, "fetch": commands.fetch, "export": commands.export}
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in named:
        run(named[word], sys.argv[2:], f"python -m checkpoints_convert {word}")
    import orbax.checkpoint  # noqa: F401  now, and not at the end of a conversion, which needs it

    run(commands.convert, sys.argv[1:], "python -m checkpoints_convert")


if __name__ == "__main__":
    main()
