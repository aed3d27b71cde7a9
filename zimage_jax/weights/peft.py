"""PEFT's settings beside a LoRA's tensors: the alphas of its layers.

Patterns of layers' names are regular expressions from an untrusted file. The regex package matches
them as `re` does, and can be stopped.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from ..errors import ConversionError
from ..files import parse_json, printable, read_json

LARGEST_ALPHA = 1e9
_DEFAULT = 8  # LoraConfig's lora_alpha
_LARGEST_CONFIG = 1 << 20  # bytes
_LONGEST_PATTERN = 500  # characters
_OWN_OF_REGEX = regex.compile(r"\(\?(?![:=!]|<[=!])")  # recursion among them
_PATIENCE = 10.0  # seconds for all patterns of a file: a hostile one may take for ever


def checked_alpha(value: object, where: str) -> float | int:
    """An alpha that is a number. Raises ConversionError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_ALPHA:  # type: ignore[arg-type] # NaN is not
        raise ConversionError(
            f"{where}: expected a number, finite and at most {LARGEST_ALPHA:g}, got "
            f"{printable(value, 40)}"
        )
    return value  # type: ignore[return-value]


class PeftConfig:
    """PEFT's settings of alpha. `component`: None for a file of one model.

    rank_pattern needs no look: the factors' shapes say each rank.
    """

    def __init__(self, where: str, component: str | None, given: Mapping[str, Any]):
        """Raises ConversionError for what PEFT would not read."""
        self.component, self._where = component, where
        self.root = given.get("use_rslora") is True
        self._default = checked_alpha(given.get("lora_alpha", _DEFAULT), f"{where}: lora_alpha")
        self._ends = time.monotonic() + _PATIENCE
        self._patterns: list[tuple[regex.Pattern, float | int]] = []
        patterns = given.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ConversionError(f"{where}: alpha_pattern: expected an object")
        for text, value in patterns.items():
            self._check_time()
            self._patterns.append(
                (self._compiled(text), checked_alpha(value, f"{where}: {printable(text, 80)}"))
            )

    def _compiled(self, text: str) -> regex.Pattern:
        try:
            if len(text) <= _LONGEST_PATTERN and not _OWN_OF_REGEX.search(text):
                return regex.compile(rf"(?:.*\.)?(?:{text})$", cache_pattern=False)
            fault: object = (
                f"beyond {_LONGEST_PATTERN} characters, or a group that re does not have"
            )
        except (regex.error, RecursionError, OverflowError) as raised:
            fault = raised
        raise ConversionError(
            f"{self._where}: alpha_pattern: {printable(text, 80)} is no pattern "
            f"({printable(fault, 80)})"
        )

    def alpha(self, name: str) -> float | int:
        """Of a layer: the first pattern that matches the end of its name counts, as in PEFT's
        get_pattern_key."""
        for pattern, value in self._patterns:
            self._check_time()
            try:
                if pattern.match(name, timeout=max(0.01, self._ends - time.monotonic())):
                    return value
            except TimeoutError:
                self._check_time(is_over=True)
        return self._default

    def _check_time(self, is_over: bool = False) -> None:
        if is_over or time.monotonic() > self._ends:
            raise ConversionError(
                f"{self._where}: alpha_pattern: its patterns take more than {_PATIENCE:g} seconds"
            )


def read_peft(file: Path, metadata: Mapping[str, str]) -> list[PeftConfig]:
    """PEFT's settings: in diffusers' metadata, by component, or in adapter_config.json beside a
    file that PEFT wrote."""
    found, where = [], f"{file}: lora_adapter_metadata"
    in_header = parse_json(metadata.get("lora_adapter_metadata", "{}"), where, ConversionError)
    for component in ("transformer", "text_encoder"):
        own = {
            key.removeprefix(f"{component}."): value
            for key, value in in_header.items()
            if key.startswith(f"{component}.")
        }
        if own:
            found.append(PeftConfig(where, component, own))
    beside = file.with_name("adapter_config.json")
    if not found and file.name == "adapter_model.safetensors" and beside.is_file():
        given = read_json(beside, _LARGEST_CONFIG, ConversionError)
        found.append(PeftConfig(str(beside), None, given))
    return found
