"""Fetching the published model from a hub, and converting it while it comes.

What is fetched is what `sources` reads of a folder in diffusers layout: configs, tokenizer, and per
component one file or the shards of an index. The headers of all shards come first, so that another
model is refused before its gigabytes are fetched.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zimage_jax.errors import DownloadError, OutputError, UsageError
from zimage_jax.files import printable
from zimage_jax.units import size
from zimage_jax.weights import formats, sources
from zimage_jax.weights.encodings import Lossless
from zimage_jax.weights.formats import Storage
from zimage_jax.weights.sources import COMPONENTS, Source
from zimage_jax.weights.tensors import Header
from zimage_jax.weights.writer import Lock

from . import checksums
from .convert import convert
from .downloads import Download, Downloads, nbytes_taken, present
from .hub import Digest, Limits, RemoteFile, Repository, open_repository

PUBLISHED = "Tongyi-MAI/Z-Image-Turbo"
_TOKENIZER = "tokenizer/tokenizer.json"
_NEEDED = (*(place for _, place in sources.CONFIGS.values()), _TOKENIZER)
_WELCOME = ("model_index.json", "tokenizer/tokenizer_config.json")  # for other programs
_LARGEST_SMALL = 64 << 20  # bytes of a config, a tokenizer, an index
_LARGEST_HEADER = 64 << 20  # bytes; that of a shard has about 0.1 MB

Unit = tuple[str, str]  # component, name


def fetch(
    repo: str,
    dst: Path,
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    limits: Limits = Limits(),
    quiet: bool = False,
) -> dict[str, Any]:
    """Fetch a repository's model into the folder `dst`, in diffusers layout. Returns a summary.

    After an interruption, call it again to resume; what is there already is verified. Raises
    UsageError, DownloadError, ConversionError for another model, OutputError.
    """
    with _arriving(repo, dst, hub, revision, limits, quiet) as arrival:
        arrival.finish()
        return arrival.summary(dst)


def fetch_and_convert(
    repo: str,
    dst: Path,
    form: str = "bfloat16",
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    limits: Limits = Limits(),
    quiet: bool = False,
) -> dict[str, Any]:
    """Fetch a repository's model shard by shard and write the native checkpoint `dst`, stored in
    `form` (see formats.parse). Returns a summary.

    The shards come into DST.fetch, and each is removed when it is converted. After an interruption,
    call it again to resume. Raises as `fetch`, and UsageError for a lossless format.
    """
    if os.path.lexists(dst):
        raise OutputError(f"{dst}: already exists; remove it or choose another name")
    folder = dst.with_name(dst.name + ".fetch")
    with _arriving(repo, folder, hub, revision, limits, quiet, form) as arrival:
        convert(arrival.source, dst, form, quiet=quiet, supply=arrival)
        summary = arrival.summary(dst)
    arrival.remove()
    return summary


# -- what is fetched -------------------------------------------------------------------------------


class Arrival:
    """A model whose shards are on their way (a convert.Supply).

    `files`: every file, by its path. `shards`: the downloads of those that are not there yet.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        storage: Storage,
        files: dict[Path, RemoteFile],
        shards: dict[Path, Download],
        downloads: Downloads,
    ):
        self.source, self.files, self.shards = source, files, shards
        self._folder, self._storage, self._downloads = folder, storage, downloads

    def finish(self) -> None:
        """Fetch all shards."""
        shards = self.shards.values()
        _refuse_full(self._folder, sum(d.remote.nbytes - d.nbytes_held for d in shards))
        self._downloads.wait(*shards)

    def summary(self, dst: Path) -> dict[str, Any]:
        """What the command prints."""
        return {
            "path": str(dst),
            "files": len(self.files),
            "bytes": sum(remote.nbytes for remote in self.files.values()),
            "downloaded": self._downloads.nbytes,
        }

    def remove(self) -> None:
        """Remove all files, and the folders if they are empty then."""
        self._drop(list(self.files))
        for folder in {file.parent for file in self.files} - {self._folder}:
            _remove_empty(folder)
        _remove_empty(self._folder)

    def identity(self) -> dict[Path, list]:
        """As convert.Supply says."""
        own = {file for c in COMPONENTS for file in self.source.components[c].files}
        return {f: [f.name, r.nbytes, str(r.digest)] for f, r in self.files.items() if f in own}

    def batches(self, needs: dict[Unit, set[Path]]) -> Iterator[list[Unit]]:
        """As convert.Supply says. The next shard comes while one is converted."""
        steps = plan(list(self.identity()), needs)
        _refuse_full(self._folder, self._peak_bytes(steps))
        for number, step in enumerate(steps):
            self._wait(step.shard)
            if step.first:
                yield step.first
            self._drop(step.dropped_first)
            if number + 1 < len(steps):
                self._want(steps[number + 1].shard)
            if step.rest:
                yield step.rest
            self._drop(step.dropped)

    def _wait(self, shard: Path) -> None:
        if shard in self.shards:
            self._downloads.wait(self.shards[shard])

    def _want(self, shard: Path) -> None:
        if shard in self.shards:
            self._downloads.want(self.shards[shard])

    def _drop(self, files: list[Path]) -> None:
        for file in files:
            if file in self.shards:
                self.shards[file].remove()
            file.unlink(missing_ok=True)

    def _peak_bytes(self, steps: list["Step"]) -> int:
        """The most bytes that `batches` takes on the disk, beyond those taken now."""

        def coming(shard: Path) -> int:
            found = self.shards.get(shard)
            return found.remote.nbytes - found.nbytes_held if found else 0

        def of(units: list[Unit]) -> int:
            return sum(self._storage.nbytes(*unit) for unit in units)

        def gone(shards: list[Path]) -> int:
            return sum(self.files[shard].nbytes for shard in shards)

        arrivals = [coming(step.shard) for step in steps] + [0]
        taken, peak = arrivals[0], 0
        for step, following in zip(steps, arrivals[1:], strict=True):
            taken += of(step.first)
            peak = max(peak, taken)
            taken += following + of(step.rest) - gone(step.dropped_first)
            peak = max(peak, taken)
            taken -= gone(step.dropped)
        return peak


@dataclass(frozen=True)
class Step:
    """A shard has come: the units to convert then, and the shards that no unit needs after them."""

    shard: Path
    first: list[Unit]  # those with tensors in earlier shards too, which wait on the disk for them
    dropped_first: list[Path]
    rest: list[Unit]
    dropped: list[Path]


def plan(shards: list[Path], needs: dict[Unit, set[Path]]) -> list[Step]:
    """The order in which the shards come, are converted and are removed. `needs`: a unit's shards.

    A shard that no unit needs does not come.
    """
    left, steps = dict(needs), []
    here: list[Path] = []

    def take(units: list[Unit]) -> list[Path]:
        for unit in units:
            del left[unit]
        free = [s for s in here if not any(s in files for files in left.values())]
        here[:] = [s for s in here if s not in free]
        return free

    for shard in shards:
        if not any(shard in files for files in needs.values()):
            continue
        here.append(shard)
        ready = [unit for unit, files in left.items() if files <= set(here)]
        first = [unit for unit in ready if len(left[unit]) > 1]
        rest = [unit for unit in ready if len(left[unit]) == 1]
        steps.append(Step(shard, first, take(first), rest, take(rest)))
    return steps


@contextmanager
def _arriving(
    repo: str,
    folder: Path,
    hub: str,
    revision: str | None,
    limits: Limits,
    quiet: bool,
    form: str | None = None,
) -> Iterator[Arrival]:
    """The model with its small files and the headers of its shards there, and its downloads open.

    `form`: the format of a conversion, which must not be lossless.
    """

    def say(line: str) -> None:
        if not quiet:
            tqdm.write(f"warning: {printable(line, 300)}", file=sys.stderr)

    repository = open_repository(hub, repo, revision, limits, say)
    published = checksums.published_md5() if repo == PUBLISHED and revision is None else {}
    with ExitStack() as stack:
        stack.enter_context(_locked(folder))
        bar = stack.enter_context(_bar("fetch", quiet, 0))
        downloads = stack.enter_context(Downloads(repository.web, limits, say, bar))
        remotes = _remotes(repository, folder, _small_names(repository), published)
        for remote in remotes.values():
            if remote.nbytes > _LARGEST_SMALL:
                raise DownloadError(
                    f"{repo}: {remote.name}: expected {size(_LARGEST_SMALL)} at most, the hub "
                    f"lists {size(remote.nbytes)}"
                )
        small = _opened(downloads, folder, remotes, quiet)
        downloads.wait(*small.values())
        config = sources.read_configs(folder)
        storage = formats.parse(config, form or "bfloat16")
        _refuse_lossless(storage)
        by_component = {c: _weight_names(repository, folder, c) for c in COMPONENTS}
        names = [name for own in by_component.values() for name in own]
        weights = _remotes(repository, folder, names, published)
        shards = _opened(downloads, folder, weights, quiet)
        downloads.want(*shards.values(), nbytes=1)  # all first blocks at once
        read = _header_reader(downloads, shards)
        parts = {
            c: sources.open_files(c, [folder / name for name in names], read)
            for c, names in by_component.items()
        }
        source = Source(parts, config, folder / _TOKENIZER)
        source.check()
        yield Arrival(folder, source, storage, remotes | weights, shards, downloads)


def _remotes(
    repository: Repository, folder: Path, names: list[str], published: dict[str, str]
) -> dict[Path, RemoteFile]:
    """The files of these names, by their paths. `published`: MD5 sums that this package has."""
    found = {}
    for name in names:
        remote = repository.file(name)
        if name in published:
            remote = replace(remote, digest=Digest("md5", published[name]))
        found[_place(folder, name)] = remote
    return found


def _opened(
    downloads: Downloads, folder: Path, remotes: dict[Path, RemoteFile], quiet: bool
) -> dict[Path, Download]:
    """The downloads of those that are not there; those that are, are verified."""
    there = sum(r.nbytes for path, r in remotes.items() if os.path.lexists(path))
    with _bar("verify", quiet or not there, there) as bar:
        missing = {path: r for path, r in remotes.items() if not present(path, r, bar.update)}
    for path, remote in missing.items():  # before: a map has a byte for each block
        _refuse_full(folder, remote.nbytes - nbytes_taken(path))
    return {path: downloads.add(remote, path) for path, remote in missing.items()}


def _small_names(repository: Repository) -> list[str]:
    indexes = [name for c in COMPONENTS if (name := _index(c)) in repository]
    return [*_NEEDED, *(name for name in _WELCOME if name in repository), *indexes]


def _index(component: str) -> str:
    return f"{component}/{sources.WEIGHTS[component]}.safetensors.index.json"


def _weight_names(repository: Repository, folder: Path, component: str) -> list[str]:
    """The files of a component's parameters."""
    if _index(component) in repository:
        shards = sources.shard_names(folder / _index(component))
        return [f"{component}/{shard}" for shard in shards]
    return [f"{component}/{sources.WEIGHTS[component]}.safetensors"]


def _header_reader(downloads: Downloads, shards: dict[Path, Download]) -> Callable[[Path], Header]:
    """Like sources.read_header, also for shards of which nothing is there yet."""

    def read(file: Path) -> Header:
        download = shards.get(file)
        if download is None:
            return sources.read_header(file)
        downloads.wait_for_start(download, 8)
        with download.partial.open("rb") as f:
            nbytes = int.from_bytes(f.read(8), "little")
        if download.remote.nbytes < 8 or nbytes > min(_LARGEST_HEADER, download.remote.nbytes):
            raise DownloadError(f"{download.remote.name}: not a safetensors file")
        downloads.wait_for_start(download, 8 + nbytes)
        # the file has its size already, and holes where nothing came yet
        found = sources.read_header(download.partial)
        return found._replace(tensors=[replace(tensor, file=file) for tensor in found.tensors])

    return read


def _refuse_lossless(storage: Storage) -> None:
    for component in COMPONENTS:
        for unit in storage.units(component):
            if any(isinstance(e, Lossless) for e in storage.parameters(component, unit).values()):
                raise UsageError(
                    "--format lossless measures every matrix before it writes one, and the shards "
                    "are not there together: fetch with --convert in bfloat16, then convert the "
                    "result to lossless (the same bytes)"
                )


# -- the folder ------------------------------------------------------------------------------------


def _bar(what: str, is_off: bool, total: int) -> tqdm:
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=what,
        disable=is_off,
        leave=False,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if it is missing, for this process alone."""
    folder = Path(os.path.abspath(folder))  # "." has no name for a lock beside it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
    except OSError as fault:
        raise OutputError(
            f"{folder}: cannot be written ({fault.strerror}); choose another place"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _place(folder: Path, name: str) -> Path:
    """The path of a repository's file in the folder, whose own folder is made.

    Raises OutputError if that is a link, which could lead out of the folder. `name` has one folder
    at most, and no "..": see _small_names and sources.shard_names.
    """
    path = folder / name
    if path.parent != folder:
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as fault:
            raise OutputError(f"{path.parent}: cannot be made ({fault.strerror})") from None
        if path.parent.is_symlink():
            raise OutputError(f"{path.parent}: is a link; expected a folder")
    return path


def _refuse_full(folder: Path, nbytes: int) -> None:
    """Raises OutputError if the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(f"{folder}: needs {size(nbytes)} of disk, {size(free)} are free")


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something of the user's is in it
