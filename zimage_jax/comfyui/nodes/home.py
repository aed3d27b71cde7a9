"""Where zimage_jax is installed: its Python, and the folder from which that imports it."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "ZIMAGE_PYTHON"  # the Python of zimage_jax, should nothing else tell it
MARK = "installed.json"  # written by install
_PROGRAM = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"


@dataclass(frozen=True)
class Home:
    python: str
    path: str | None  # for PYTHONPATH; None if its Python knows

    def command(self, module: str, *arguments: str) -> list[str]:
        return [self.python, "-m", module, *arguments]

    def environment(self) -> dict[str, str]:
        """For a process of ours: without what belongs to ComfyUI's Python."""
        found = {n: v for n, v in os.environ.items() if n not in ("PYTHONHOME", "PYTHONPATH")}
        return found | ({"PYTHONPATH": self.path} if self.path else {})


def find(here: Path) -> Home:
    """The installation for the nodes' folder `here`. Raises RuntimeError, in one sentence, without."""
    if given := os.environ.get(VARIABLE):
        return Home(given, _source(here))
    mark = here / MARK
    if mark.is_file():
        found = json.loads(mark.read_text("utf-8"))
        if not Path(found["python"]).is_file():
            raise RuntimeError(
                f"{found['python']} is gone: run python -m zimage_jax.comfyui install again"
            )
        return Home(found["python"], found["path"])
    source = _source(here)
    for folder in [Path(source), *Path(source).parents] if source else []:
        for program in (folder / ".venv" / _PROGRAM, folder / _PROGRAM):
            if program.is_file():  # beside a checkout, or above its site-packages
                return Home(str(program), source)
    raise RuntimeError(
        f"zimage_jax is not found: run python -m zimage_jax.comfyui install, or set {VARIABLE} to "
        "its Python"
    )


def _source(here: Path) -> str | None:
    """The folder that has the package zimage_jax, if the nodes' folder is a link into it."""
    package = here.resolve().parent.parent
    return str(package.parent) if (package / "serve.py").is_file() else None
