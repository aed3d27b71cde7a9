"""Finds a checkpoint by its checksum, on a machine that may have it under another path."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import printable
from .checkpoint import MODEL, Checkpoint

PLACES = "ZIMAGE_MODELS"  # environment variable: checkpoints, or folders of them
TINY = Path(__file__).parent.parent / "assets" / "tiny"
_MOST = 1000  # entries of a folder that are looked at


@dataclass(frozen=True)
class Sought:
    """A checkpoint as another machine has it."""

    path: Path  # absolute
    name: str
    kind: str
    checksum: str

    @classmethod
    def of(cls, path: str | Path | None, kind: str = MODEL) -> "Sought":
        """None: the tiny model. `kind`: as of Checkpoint. `manifest/` is enough there. Raises CheckpointError."""
        found = Path(TINY if path is None else path).resolve()
        return cls(found, found.name, kind, Checkpoint(found, kind).checksum)

    def find(self) -> Path:
        """The same path, the tiny model, a place of ZIMAGE_MODELS, or a folder in one.

        Raises CheckpointError if none of them is the checkpoint.
        """
        given = os.environ.get(PLACES, "")
        others = 0
        for place in (self.path, TINY, *map(Path, filter(None, given.split(os.pathsep)))):
            for folder in (place, *_folders(place)):
                try:
                    if Checkpoint(folder, self.kind).checksum == self.checksum:
                        return folder
                    others += 1
                except CheckpointError:
                    continue
        raise CheckpointError(
            f"no checkpoint with the checksum {self.checksum} of {printable(self.name)} is at "
            f"{printable(self.path)} or in {PLACES}={printable(given)} ({others} others are); copy "
            f"it there, and set {PLACES} before ray start"
        )


def _folders(place: Path) -> Iterator[Path]:
    try:
        with os.scandir(place) as entries:
            for _, entry in zip(range(_MOST), entries, strict=False):
                if entry.is_dir():
                    yield Path(entry.path)
    except OSError:
        return
