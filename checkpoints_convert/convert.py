"""Source to native checkpoint, unit by unit.

A PyTorch source is read tensor by tensor: two matrices are in memory at a time. Of a native one,
two units are.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash
from tqdm import tqdm

from zimage_jax import interrupts
from zimage_jax.errors import ConversionError, UsageError
from zimage_jax.files import LARGEST_JSON, read_regular
from zimage_jax.weights import formats, origins
from zimage_jax.weights.checkpoint import CONTROL, MODEL, Checkpoint, stored_units
from zimage_jax.weights.encodings import Encoding, Lossless
from zimage_jax.weights.formats import Storage
from zimage_jax.weights.origins import Origins
from zimage_jax.weights.sources import COMPONENTS, Source
from zimage_jax.weights.writer import Writer, partial_folder

_WORKERS = 2  # one computes while the other waits for the disk; each has one matrix


@runtime_checkable
class Unit(Protocol):
    """One unit's parameters, by path."""

    def runs(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Consecutive rows of the native array, cast to `dtype`.

        Raises ConversionError for NaN and infinity in a PyTorch source.
        """

    def encoded(self, path: str, encoding: Encoding) -> Any | None:
        """The tree of the parameter, if it is stored in just this encoding."""


@runtime_checkable
class Supply(Protocol):
    """Files of a source that come, and go again, while it is converted."""

    def identity(self) -> dict[Path, list]:
        """File -> [name, bytes, what tells its contents from others], JSON."""

    def batches(self, needs: dict[tuple[str, str], set[Path]]) -> Iterator[list[tuple[str, str]]]:
        """The units of `needs`, which has each unit's files. The files of a batch are there until
        the next batch is asked for."""


def convert(
    source: Source,
    dst: Path,
    form: str | None = None,
    *,
    quiet: bool = False,
    supply: Supply | None = None,
) -> Path:
    """Write the native checkpoint `dst`, of a model or a ControlNet, from `source`, stored in `form`
    (see formats.parse). Returns `dst`.

    `form` None: what the source has in an int8 of ours stays so, all else is bfloat16. `supply`:
    brings the files, if they are not all there; `form` must then not be lossless, which reads every
    matrix twice. After an interruption, call it again to resume. Raises ConversionError before
    anything is written if a tensor is unknown, missing, duplicate or misshapen, and later if one
    has NaN or infinity; UsageError if a file of the source is inside DST.partial; OutputError (see Writer).
    """
    files = supply.identity() if supply else source.identity()
    tokenizers = [source.tokenizer] if source.tokenizer else []
    _refuse_inside(partial_folder(dst), [*files, *tokenizers])
    source.check()
    tokenizer, kind = source.read_tokenizer(), source.kind
    provenance = {
        "layouts": {c: of.layout for c, of in source.components.items()},
        "files": {f"{f.parent.name}/{f.name}": nbytes for f, (_, nbytes, _) in files.items()},
    }
    parts = {c: Origins(source, c) for c in source.components}
    wanted = formats.parse(source.config, form) if form else origins.storage(source, parts)
    storage = _fitted(wanted, lambda c, _: parts[c], quiet, kind)
    if kind == CONTROL:
        storage = _by_name(storage)
    with Writer(dst, storage, {"files": list(files.values())}, kind) as writer:

        def batches(units: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
            if supply is None:
                yield units
            else:
                yield from supply.batches({(c, u): parts[c].files(u) for c, u in units})

        _write_units(writer, lambda c, _: parts[c], quiet, batches)
        return writer.finish(tokenizer, provenance)


def _by_name(storage: Storage) -> Storage:
    """A ControlNet's storage with a row for each parameter that differs: patterns might match the
    model's parameters too."""
    rows = [
        (f"{component}.{path}", storage.of(component, path))
        for component, unit in stored_units(storage, CONTROL)
        for path in storage.parameters(component, unit)
        if storage.of(component, path) != storage.format
    ]
    return replace(storage, special=tuple(rows))


def reencode(source: Checkpoint, dst: Path, form: str, *, quiet: bool = False) -> Path:
    """Write the native checkpoint `dst` from another, stored in `form` (see formats.parse).
    Returns `dst`.

    Parameters that `source` already stores so are copied. After an interruption, call it again to
    resume. Raises DamagedError; ConversionError where `source` has fewer bits than `form` needs;
    UsageError if `source` is inside DST.partial; OutputError (see Writer).
    """
    manifest = source.path / "manifest" / "manifest.json"
    _refuse_inside(partial_folder(dst), [manifest])
    tokenizer = read_regular(source.tokenizer(), LARGEST_JSON, ConversionError)
    fingerprint = xxhash.xxh3_64_hexdigest(manifest.read_bytes())
    provenance = source.provenance | {"formats before": formats.describe(source.storage)}

    def unit(component: str, name: str) -> "Stored":
        return Stored(source, component, name)

    wanted = formats.parse(source.config, form)
    refuse_widening(source, wanted)
    storage = _fitted(wanted, unit, quiet)
    with Writer(dst, storage, {"manifest": fingerprint}) as writer:
        _write_units(writer, unit, quiet)
        return writer.finish(tokenizer, provenance)


def _refuse_inside(partial: Path, files: list[Path]) -> None:
    """Raises UsageError if a source file is in DST.partial, which the writer may empty."""
    for file in files:
        for place in (file.resolve(), file.parent.resolve()):
            if place.is_relative_to(partial.resolve()):
                raise UsageError(
                    f"{file}: the source is inside {partial}, where the conversion writes; "
                    "choose another DST"
                )


def refuse_widening(source: Checkpoint, wanted: Storage) -> None:
    """Raises ConversionError if a parameter in int8 is wanted in another format."""
    for component in COMPONENTS:
        for unit in wanted.units(component):
            encodings = wanted.parameters(component, unit)
            for path, own in source.storage.parameters(component, unit).items():
                if own is not None and not own.is_exact and own != encodings[path]:
                    name = source.storage.of(component, path).name
                    raise ConversionError(
                        f"{source.path}: {component} {path} is stored in {name}, which has lost "
                        "bits that another format would need; convert from the original files"
                    )


def _fitted(
    storage: Storage,
    unit_of_source: Callable[[str, str], Unit],
    quiet: bool,
    kind: str = MODEL,
) -> Storage:
    """`storage`, with bfloat16 for the matrices that lossless has no room for.

    If one block's matrix has too many exceptions, those of all blocks stay in bfloat16: blocks of
    equal shapes share slots and programs.
    """
    todo = [
        (component, unit, path, encoding)
        for component, unit in stored_units(storage, kind)
        for path, encoding in storage.parameters(component, unit).items()
        if isinstance(encoding, Lossless)
    ]
    units: dict[tuple[str, str], list[tuple[str, Lossless]]] = {}
    for component, unit, path, encoding in todo:
        units.setdefault((component, unit), []).append((path, encoding))

    def crowded(of: tuple[str, str]) -> list[str]:
        """Paths within the unit, less its name, that have no room."""
        unit = unit_of_source(*of)
        return [
            path.removeprefix(of[1])
            for path, encoding in units[of]
            if unit.encoded(path, encoding) is None
            and not encoding.has_room(_whole(unit, path, encoding))
        ]

    plain: dict[tuple[str, str], None] = {}
    with (
        tqdm(total=len(units), unit="unit", desc="measure", disable=quiet or not units) as bar,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for (component, _), found in zip(units, pool.map(crowded, units), strict=True):
            plain |= dict.fromkeys((component, name) for name in found)
            bar.update()
            interrupts.check()
    rows = tuple(
        (f"{component}.{path}", formats.FORMATS["bfloat16"])
        for component, unit, path, _ in todo
        if (component, path.removeprefix(unit)) in plain
    )
    return replace(storage, special=(*storage.special, *rows))


def _write_units(
    writer: Writer,
    unit_of_source: Callable[[str, str], Unit],
    quiet: bool,
    batches: Callable[[list[tuple[str, str]]], Iterable[list[tuple[str, str]]]] = lambda u: [u],
) -> None:
    """Write the units that an earlier writer has not, in the batches that `batches` makes of
    them."""
    storage = writer.storage
    units = writer.units
    total = sum(storage.nbytes(*unit) for unit in units)
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="convert", disable=quiet
        ) as bar,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):

        def counted(runs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for run in runs:
                bar.update(run.nbytes)
                yield run

        def write(component: str, unit: str) -> None:
            pieces = _pieces(storage, component, unit, unit_of_source(component, unit))
            writer.write(component, unit, ((path, counted(runs)) for path, runs in pieces))

        def is_done(component: str, unit: str) -> bool:
            found = writer.resumed and writer.done(component, unit)
            bar.update(storage.nbytes(component, unit) if found else 0)
            return found

        def each(function: Callable[[str, str], Any], batch: list[tuple[str, str]]) -> list:
            results = []
            for job in [pool.submit(function, *unit) for unit in batch]:
                results.append(job.result())
                interrupts.check()  # Python drops a KeyboardInterrupt raised in a destructor
            return results

        try:
            done = each(is_done, units)
            for batch in batches([u for u, is_ in zip(units, done, strict=True) if not is_]):
                each(write, batch)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pieces(
    storage: Storage, component: str, unit: str, source: Unit
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    """(path, runs) of each leaf of a unit, in order."""
    leaves = storage.leaves(component, unit)
    for path, encoding in storage.parameters(component, unit).items():
        if encoding is None:
            yield path, source.runs(path, leaves[path].dtype)
            continue
        tree = source.encoded(path, encoding)
        if tree is None:
            tree = encoding.encode(_whole(source, path, encoding))
        yield from ((name, iter([array])) for name, array in formats.leaves_of(path, tree))


def _whole(source: Unit, path: str, encoding: Encoding) -> np.ndarray:
    return np.concatenate(list(source.runs(path, encoding.takes)))


# -- native sources --------------------------------------------------------------------------------


class Stored:
    """A unit of a native checkpoint."""

    def __init__(self, checkpoint: Checkpoint, component: str, unit: str):
        self._arrays = checkpoint.read(component, unit)
        self._encoded = checkpoint.storage.encoded(component, unit, self._arrays)

    def encoded(self, path: str, encoding: Encoding) -> Any | None:
        own, tree = self._encoded.get(path, (None, None))
        return tree if own == encoding else None

    def runs(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        array = self._arrays.get(path)
        if array is None:
            encoding, tree = self._encoded[path]
            array = encoding.decode(tree)
        yield array.astype(dtype, copy=False)
