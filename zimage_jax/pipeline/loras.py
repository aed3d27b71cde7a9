"""A model's LoRAs: files are opened once, and what jobs draw with is made once per set of them."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import checks
from ..errors import UsageError
from ..model.choices import LARGEST_LORA_WEIGHT, MOST_LORAS
from ..runtime.placement import Placement
from ..runtime.programs import Programs
from ..runtime.sides import Sides
from ..runtime.store import Loras
from ..weights.adapters import Adapters
from ..weights.checkpoint import ModelFiles
from ..weights.lora import Lora, open_lora
from .plans import Plans

_KEPT = 8  # files, and sets of them
_KEPT_BYTES = 2 << 30  # of sets that are beside the model; the one in use may be larger

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Fitted:
    """The model as a job draws with it: with LoRAs, or as it is."""

    programs: Programs
    plans: Plans
    loras: Loras | None = None

    @property
    def adapters(self) -> Adapters | None:
        return None if self.loras is None else self.loras.adapters

    @property
    def is_merged(self) -> bool:
        return self.adapters is not None and self.adapters.is_merged

    @property
    def host_bytes(self) -> int:
        """Bytes of what is beside the model."""
        sides = None if self.loras is None else self.loras.sides
        return 0 if sides is None else sides.host_bytes

    @property
    def key(self) -> tuple:
        """Jobs fly together if they have the same."""
        return () if self.adapters is None else self.adapters.key

    @property
    def remarks(self) -> list[str]:
        """One line for each file with keys that are not used."""
        found = () if self.adapters is None else self.adapters.loras
        return [lora.remark for lora, _ in found if lora.remark is not None]


class Fittings:
    """Makes what jobs draw with. Threads may share it."""

    def __init__(self, checkpoint: ModelFiles, plain: Fitted, placement: Placement):
        self._checkpoint, self._plain, self._placement = checkpoint, plain, placement
        self._files: OrderedDict[Any, Lora] = OrderedDict()
        self._made: OrderedDict[Any, Fitted] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, lora: object, *, merge: object = False) -> Fitted:
        """`lora`: pairs of a path and a weight. Those of weight 0 change nothing and are left out.

        Raises UsageError for anything else, ConversionError and ForeignError for a file that is no
        LoRA of this model.
        """
        is_merged = checks.instance("lora_merge", merge, bool)
        pairs = [(path, weight) for path, weight in _pairs(lora) if weight]
        if not pairs:
            return self._plain
        with self._lock:
            loras = tuple((self._open(path), weight) for path, weight in pairs)
            adapters = Adapters(self._checkpoint, loras, is_merged)
            fitted = _kept(self._made, adapters.key, lambda: self._fit(adapters))
            while (
                len(self._made) > 1 and sum(f.host_bytes for f in self._made.values()) > _KEPT_BYTES
            ):
                self._made.popitem(last=False)
            return fitted

    def _open(self, path: Path) -> Lora:
        try:
            of = os.stat(path)
            key = path.absolute(), of.st_mtime_ns, of.st_size
        except (OSError, ValueError):
            return open_lora(path, self._checkpoint.config)  # says what is wrong
        return _kept(self._files, key, lambda: open_lora(path, self._checkpoint.config))

    def _fit(self, adapters: Adapters) -> Fitted:
        programs = self._plain.programs.of(adapters.storage)
        sides = None if adapters.is_merged else Sides(adapters, self._placement)
        return Fitted(programs, self._plain.plans.of(programs), Loras(adapters, sides))


def _kept(of: OrderedDict[Any, Made], key: Any, make: Any) -> Made:
    """The value of a key, made if it is new. The `_KEPT` last used are kept."""
    if key not in of:
        of[key] = make()
    of.move_to_end(key)
    while len(of) > _KEPT:
        of.popitem(last=False)
    return of[key]


def _pairs(lora: object) -> list[tuple[Path, float]]:
    """Raises UsageError."""
    expected = "a list of pairs (path, weight)"
    if isinstance(lora, str | bytes | os.PathLike) or not isinstance(lora, Sequence):
        checks.refuse("lora", expected, lora)
    found = []
    for pair in lora:
        is_pair = (
            isinstance(pair, Sequence) and not isinstance(pair, str | bytes) and len(pair) == 2
        )
        if not is_pair or not isinstance(pair[0], str | os.PathLike):
            checks.refuse("lora", expected, pair)
        weight = checks.real(
            "the weight of a LoRA", pair[1], -LARGEST_LORA_WEIGHT, LARGEST_LORA_WEIGHT
        )
        assert math.isfinite(weight)
        found.append((Path(pair[0]), weight))
    if len(found) > MOST_LORAS:
        raise UsageError(f"lora: expected at most {MOST_LORAS}, got {len(found)}")
    return found
