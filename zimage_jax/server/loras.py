"""LoRAs that clients may choose: the files of a folder, by name.

A client's name is looked up in the listing of the folder; no path is made of it.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..errors import UsageError, ZImageError
from ..files import printable
from ..model.config import ModelConfig
from ..pipeline.loras import LARGEST_WEIGHT, MOST_LORAS
from ..weights.lora import Lora, open_lora
from .body import Body

_ENDING = ".safetensors"
_FEW = 8  # trigger words that are shown


class Choice(Body):
    """One LoRA of a job."""

    name: Annotated[str, Field(max_length=255, description="as GET /loras has it")]
    weight: Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)] = 1.0


Choices = Annotated[list[Choice], Field(max_length=MOST_LORAS)]


class LoraFolder:
    """`folder`: None if the server has no LoRAs. A LoRA's name is its file's, without the ending.

    The folder is listed anew each time, and a file's header is read again if the file has changed.
    Threads may share it.
    """

    def __init__(self, folder: Path | None, config: ModelConfig):
        """Raises UsageError if the folder cannot be read."""
        self.folder, self._config = None if folder is None else folder.absolute(), config
        self._opened: dict[Path, tuple[tuple[int, int], Lora]] = {}
        self._lock = threading.Lock()
        self.files()

    def files(self) -> dict[str, Path]:
        """The files by name. Raises UsageError."""
        if self.folder is None:
            return {}
        try:
            with os.scandir(self.folder) as entries:
                names = [e.name for e in entries if e.name.endswith(_ENDING) and e.is_file()]
        except OSError as fault:
            raise UsageError(f"--loras: the folder cannot be read ({fault.strerror})") from None
        # a name that is no text can be no client's
        named = sorted(name for name in names if name.isprintable())
        return {name.removesuffix(_ENDING): self.folder / name for name in named}

    def chosen(self, choices: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
        """The argument `lora` of ZImage.generate for Choices. Raises UsageError for another name."""
        files = self.files()
        return [(str(self._find(files, of["name"])), of.get("weight", 1.0)) for of in choices]

    def check(self, choices: Sequence[Mapping[str, Any]]) -> None:
        """Raises UsageError for a name that is not there, or a file that is no LoRA of the model."""
        files = self.files()
        for choice in choices:
            try:
                self._open(self._find(files, choice["name"]))
            except ZImageError as fault:
                raise UsageError(self.without_folder(fault)) from None

    def describe(self) -> list[dict[str, Any]]:
        """What a client sees of each file; of one that is no LoRA of the model, the `error`."""
        found = []
        for name, path in self.files().items():
            row: dict[str, Any] = {"name": name, "file": path.name}
            try:
                of = self._open(path).describe()
                row |= {key: of[key] for key in ("kinds", "ranks", "spelling")}
                row["trigger_words"] = [printable(w, 80) for w in of["trigger_words"][:_FEW]]
            except ZImageError as fault:
                row["error"] = self.without_folder(fault)
            found.append(row)
        return found

    def without_folder(self, fault: Exception) -> str:
        """A message for a client: without the folder's path."""
        return str(fault).replace(f"{self.folder}/", "")

    def _find(self, files: Mapping[str, Path], name: str) -> Path:
        if self.folder is None:
            raise UsageError("lora: this server has none; start it with --loras FOLDER")
        if name not in files:
            raise UsageError(
                f"lora: no such name: {printable(name, 80)}; GET /loras has those that are there"
            )
        return files[name]

    def _open(self, path: Path) -> Lora:
        """Raises ZImageError for a file that is no LoRA of this model."""
        try:
            of = os.stat(path)
        except OSError:  # gone since it was listed: what follows says so
            return open_lora(path, self._config)
        state = of.st_mtime_ns, of.st_size
        with self._lock:
            known = self._opened.get(path)
            if known is None or known[0] != state:
                known = self._opened[path] = state, open_lora(path, self._config)
            return known[1]
