"""Names of the files that a command writes: the -o template, and a check that none coincide."""

import os
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import UsageError
from .files import printable

FIELDS = ("date", "seed", "index")
_SPEC = re.compile(r"([<>^]?0?[0-9]{1,2})?[dxX]?")  # {index:04}, {seed:>20}, {seed:x}
_ANY = "\ue000"  # stands for any field; Unicode reserves it for private use
_LONGEST = 255  # bytes of a file name on common filesystems


def check_template(template: str, seeds: Sequence[int], pictures: int) -> None:
    """Raises UsageError if the -o template has an unknown field or format, does not end in .png, or
    gives a name of more than 255 bytes."""
    shown = f"-o {printable(template)}"
    for field, spec, conversion in fields(template):
        if field not in FIELDS or conversion is not None:
            raise UsageError(f"{shown}: only {', '.join(f'{{{f}}}' for f in FIELDS)} are filled in")
        if not _SPEC.fullmatch(spec) or (spec and field == "date"):
            raise UsageError(
                f"{shown}: {{{field}:{printable(spec, 20)}}} is not known; "
                "give a number's width as in {index:04}"
            )
    if not template.lower().endswith(".png"):
        raise UsageError(f"{shown}: pictures are PNG files, so the name must end in .png")
    seed = max(2**32 - 1 if seed == -1 else seed for seed in seeds)
    for part in Path(_filled(template, seed, pictures - 1)).parts:
        if len(os.fsencode(part)) > _LONGEST:
            raise UsageError(f"{shown}: gives a name of more than {_LONGEST} bytes; shorten it")


def fields(template: str) -> Iterable[tuple[str, str, str | None]]:
    """(name, format, conversion) of each field. Raises UsageError if the braces do not match."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as fault:
        raise UsageError(f"-o {printable(template)}: {fault}") from None
    return [(name, spec or "", how) for _, name, spec, how in parsed if name is not None]


def are_distinct(template: str, prompts: int, seeds: Sequence[int]) -> bool:
    """Whether all pictures get different names: one per seed for each of `prompts` prompts."""
    if prompts * len(seeds) == 1:
        return True
    names = {name for name, _, _ in fields(template)}
    are_random = all(seed == -1 for seed in seeds)
    by_seed = are_random or (prompts == 1 and len(set(seeds)) == len(seeds))
    return "index" in names or ("seed" in names and by_seed)


def check_outputs(
    template: str,
    preview: Path | None,
    outputs: dict[str, Path | None],
    inputs: Sequence[Path | None],
) -> None:
    """Raises UsageError if a file to write is a folder, is named by two flags, or is an input.

    `outputs`: flag -> file. Devices and pipes may be named twice.
    """
    written = {"-o": template}
    if preview is not None:
        # braces in a folder's name are literal
        folder = str(preview).replace("{", "{{").replace("}", "}}")
        written["--preview"] = f"{folder}/{{index}}-step{{seed:02}}.png"
    pairs: list[tuple[str, Path]] = []
    for flag, path in outputs.items():
        if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
            continue
        if path.is_dir() or (preview is not None and _real(path) == _real(preview)):
            raise UsageError(f"{flag} {printable(path)}: expected a file, this is a folder")
        pairs.append((flag, path))
    read = [("an input", _real(path)) for path in inputs if path is not None]
    for index, (flag, path) in enumerate(pairs):
        others = [(f, _real(p)) for f, p in pairs[:index]] + read
        clash = next((f for f, p in others if p == _real(path)), None)
        clash = clash or next((f for f, t in written.items() if _matches(t, str(path))), None)
        if clash:
            raise UsageError(f"{clash} and {flag} name the same file, {printable(path)}")
    if preview is not None and (
        _matches(template, _filled(written["--preview"], 1, 0))
        or _matches(written["--preview"], _filled(template, 1, 0))
    ):
        raise UsageError("-o and --preview name the same files")


def _filled(template: str, seed: int, index: int) -> str:
    return template.format(date="20260101-000000", seed=seed, index=index)


def _real(path: str | Path) -> str:
    return os.path.realpath(path)


def _matches(template: str, path: str) -> bool:
    """Whether the template can give this path."""
    parsed = string.Formatter().parse(template)
    filled = "".join(text + ("" if field is None else _ANY) for text, field, _, _ in parsed)
    pattern = re.escape(_real(filled)).replace(_ANY, "[-0-9a-fA-FxX ]*")
    return re.fullmatch(pattern, _real(path), re.DOTALL) is not None
