"""LoRAs that clients may choose: the files in folders and below them, by name.

A client's name is looked up in the listing of the folders; no path is made of it.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..errors import UsageError, ZImageError
from ..files import printable
from ..model.choices import LARGEST_LORA_WEIGHT, MOST_LORAS
from ..model.config import ModelConfig
from ..weights.lora import Lora, open_lora
from .body import Body

_ENDING = ".safetensors"
_FEW = 8  # trigger words that are shown
_DEEPEST = 8  # folders below the one given, within each other
_MOST_FILES = 100_000  # below one folder, of any kind: it is listed for each request


class Choice(Body):
    """One LoRA of a job."""

    name: Annotated[str, Field(max_length=1024, description="as GET /loras has it")]
    weight: Annotated[float, Field(ge=-LARGEST_LORA_WEIGHT, le=LARGEST_LORA_WEIGHT)] = 1.0


Choices = Annotated[list[Choice], Field(max_length=MOST_LORAS)]


class LoraFolders:
    """`folders`: none if the server has no LoRAs. A LoRA's name is its file's path in its folder, with
    "/" and without the ending; the first folder that has a name counts.

    The folders are listed anew each time, and a file's header is read again if the file has changed.
    Threads may share it.
    """

    def __init__(self, folders: Sequence[Path], config: ModelConfig):
        """Raises UsageError if a folder cannot be read."""
        self.folders, self._config = tuple(folder.absolute() for folder in folders), config
        self._opened: dict[Path, tuple[tuple[int, int], Lora]] = {}
        self._lock = threading.Lock()
        self.files()

    def files(self) -> dict[str, Path]:
        """The files by name. Raises UsageError."""
        found: dict[str, Path] = {}
        for folder in reversed(self.folders):
            found |= _listed(folder)
        return dict(sorted(found.items()))

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
            row: dict[str, Any] = {"name": name, "file": f"{name}{_ENDING}"}
            try:
                of = self._open(path).describe()
                row |= {key: of[key] for key in ("kinds", "ranks", "spelling")}
                row["trigger_words"] = [printable(w, 80) for w in of["trigger_words"][:_FEW]]
            except ZImageError as fault:
                row["error"] = self.without_folder(fault)
            found.append(row)
        return found

    def without_folder(self, fault: Exception) -> str:
        """A message for a client: without the folders' paths."""
        message = str(fault)
        for folder in self.folders:
            message = message.replace(f"{folder}/", "")
        return message

    def _find(self, files: Mapping[str, Path], name: str) -> Path:
        if not self.folders:
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


def _listed(folder: Path) -> dict[str, Path]:
    """The LoRA files in a folder and below it by name. Links are followed, as ComfyUI follows them,
    but not to a folder that one is in already. Raises UsageError."""

    def fail(fault: OSError) -> None:
        if fault.filename == str(folder):  # what cannot be read below it is left out
            raise UsageError(f"--loras: the folder cannot be read ({fault.strerror})") from None

    found, seen = {}, 0
    for place, below, files in os.walk(folder, followlinks=True, onerror=fail):
        seen += len(below) + len(files)
        if seen > _MOST_FILES:
            raise UsageError(
                f"--loras: over {_MOST_FILES} files are in {printable(folder.name)}: name a folder "
                "that has the LoRAs alone"
            )
        inside = Path(place).relative_to(folder)
        above = {os.path.realpath(folder / each) for each in (inside, *inside.parents)}
        if len(inside.parts) == _DEEPEST:
            below.clear()
        below[:] = [n for n in below if os.path.realpath(os.path.join(place, n)) not in above]
        for file in files:
            path, name = Path(place) / file, (inside / file).as_posix()
            # a name that is no text can be no client's
            if name.endswith(_ENDING) and name.isprintable() and path.is_file():
                found[name.removesuffix(_ENDING)] = path
    return found
