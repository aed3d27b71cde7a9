"""Checksums of files: those of the published model, and of any file."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zimage_jax.errors import ConversionError
from zimage_jax.files import kind_of, open_regular


def published_md5() -> dict[str, str]:
    """File name -> MD5 of the published Z-Image-Turbo folder."""
    lines = Path(__file__).with_name("published.md5").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def hash_file(file: Path, digest: Any, seen: Callable[[int], Any] = id) -> str:
    """The hex digest of a file's bytes, added to `digest` (hashlib's). `seen` is called with every
    number of bytes read. Raises UsageError for anything but a regular file."""
    with open_regular(file) as f:
        while run := f.read(1 << 22):
            digest.update(run)
            seen(len(run))
    return digest.hexdigest()


def verify(folder: Path, *, quiet: bool = False) -> None:
    """Compare a folder's files with the published MD5 sums. Raises ConversionError, which lists all
    files that differ or are missing."""
    published = published_md5()
    present = [name for name in published if kind_of(folder / name) == "file"]
    wrong = [f"{name} is missing" for name in published if name not in present]
    total = sum((folder / name).stat().st_size for name in present)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet) as bar:
        for name in present:
            digest = hashlib.md5(usedforsecurity=False)
            found = hash_file(folder / name, digest, bar.update)
            if found != published[name]:
                wrong.append(f"{name} has MD5 {found}, published is {published[name]}")
    if wrong:
        raise ConversionError(
            f"{folder}: not the published files:\n" + "\n".join(f"  {w}" for w in wrong)
        )
