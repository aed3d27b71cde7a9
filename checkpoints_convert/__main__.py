"""python -m checkpoints_convert"""

import os
import sys

from zimage_jax import interrupts

SCRIPT = "zimage-convert"  # as pyproject.toml installs it


def main() -> None:
    """Run the command that the first argument names, or `convert` if it names none."""
    interrupts.install()  # first: the imports below take a second
    from zimage_jax.cli import program, run

    from . import commands

    prog = program(SCRIPT, "checkpoints_convert")
    if "_ZIMAGE_CONVERT_COMPLETE" in os.environ:
        run(commands.completed(), [], prog)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in commands.NAMED:
        run(commands.NAMED[word], sys.argv[2:], f"{prog} {word}")
    import orbax.checkpoint  # noqa: F401  now, and not at the end of a conversion, which needs it

    run(commands.convert, sys.argv[1:], prog)


if __name__ == "__main__":
    main()
