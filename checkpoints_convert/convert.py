"""Source to native checkpoint, tensor by tensor: at most two matrices are in memory at a time."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from zimage_jax import interrupts
from zimage_jax.errors import ConversionError, UsageError
from zimage_jax.files import LARGEST_JSON, read_regular
from zimage_jax.model.prompt import Prompts
from zimage_jax.units import DTYPES
from zimage_jax.weights import formats
from zimage_jax.weights import names as rules
from zimage_jax.weights.formats import Storage
from zimage_jax.weights.writer import Writer, partial_folder

from .sources import COMPONENTS, Source, Tensor

_RUN_BYTES = 32 << 20  # of the result, written at a time
_WORKERS = 2  # one computes while the other waits for the disk; each has one matrix
# item size -> (integer type, exponent bits) of bfloat16 and float32; all ones is infinity or NaN
_EXPONENT = {2: (np.uint16, 0x7F80), 4: (np.uint32, 0x7F800000)}


@dataclass(frozen=True)
class _Origin:
    """The part of a source tensor that becomes one native array: part `part` of `parts`."""

    tensor: Tensor
    transform: str
    part: int
    parts: int


def convert(source: Source, dst: Path, dtype: str = "bfloat16", *, quiet: bool = False) -> Path:
    """Write the native checkpoint `dst` from `source`, stored in `dtype`. Returns `dst`.

    After an interruption, call it again to resume. Raises ConversionError before anything is
    written if a tensor is unknown, missing, duplicate or misshapen, and later if one has NaN or
    infinity; UsageError if a file of the source is inside DST.partial; OutputError (see Writer).
    """
    files = {f: f.stat() for c in COMPONENTS for f in source.components[c].files}
    _refuse_inside(partial_folder(dst), [*files, source.tokenizer])
    source.check()
    tokenizer = read_regular(source.tokenizer, LARGEST_JSON, ConversionError)
    vocabulary = Prompts.parse(tokenizer, str(source.tokenizer)).vocab_size
    if vocabulary > source.config.text_encoder.vocab_size:
        raise ConversionError(
            f"{source.tokenizer}: has {vocabulary} tokens, the text encoder "
            f"{source.config.text_encoder.vocab_size}; it belongs to another model"
        )
    fingerprint = [[f.name, s.st_size, s.st_mtime_ns] for f, s in files.items()]
    storage = Storage(source.config, formats.named(dtype))
    provenance = {
        "layouts": {c: source.components[c].layout for c in COMPONENTS},
        "files": {f"{f.parent.name}/{f.name}": s.st_size for f, s in files.items()},
    }
    with Writer(dst, storage, {"files": fingerprint}) as writer:
        _write_units(source, writer, dtype, quiet)
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


def _write_units(source: Source, writer: Writer, dtype: str, quiet: bool) -> None:
    storage = writer.storage
    units = [(c, unit) for c in COMPONENTS for unit in storage.units(c)]
    total = sum(storage.nbytes(*unit) for unit in units)
    origins = {c: _origins(source, c) for c in COMPONENTS}
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="convert", disable=quiet
        ) as bar,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):

        def write(component: str, unit: str) -> None:
            if writer.resumed and writer.done(component, unit):
                bar.update(storage.nbytes(component, unit))
                return
            paths = storage.leaves(component, unit)
            pieces = ((path, _runs(origins[component][path], path, dtype, bar)) for path in paths)
            writer.write(component, unit, pieces)

        try:
            for job in [pool.submit(write, *unit) for unit in units]:
                job.result()
                interrupts.check()  # Python drops a KeyboardInterrupt raised in a destructor
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _origins(source: Source, component: str) -> dict[str, _Origin]:
    tensors = source.components[component].tensors
    return {
        path: _Origin(tensors[name], entry.transform, part, len(entry.paths))
        for name, entry in source.entries(component).items()
        for part, path in enumerate(entry.paths)
    }


def _runs(origin: _Origin, path: str, dtype: str, bar) -> Iterator[np.ndarray]:
    """The native array in runs of rows, cast to `dtype`; `path` is for the message.

    Raises ConversionError for NaN and infinity.
    """
    rows = origin.tensor.shape[0] // origin.parts
    first = origin.part * rows
    target = DTYPES[dtype]
    if origin.transform == rules.SAME:
        step = max(1, _RUN_BYTES // max(1, target.itemsize * math.prod(origin.tensor.shape[1:])))
        parts = (
            origin.tensor.rows(first + a, first + min(a + step, rows)).astype(target, copy=False)
            for a in range(0, rows, step)
        )
    else:
        # cast the whole matrix first, then transpose it in slabs that fit the cache
        matrix = origin.tensor.rows(first, first + rows).astype(target, copy=False)
        native = rules.to_native(matrix, origin.transform)
        step = 256 if native.ndim == 2 else len(native)
        parts = (np.ascontiguousarray(native[a : a + step]) for a in range(0, len(native), step))
    for run in parts:
        bits, ones = _EXPONENT[target.itemsize]
        if bool(((run.view(bits) & ones) == ones).any()):
            raise ConversionError(
                f"{origin.tensor.file}: {origin.tensor.name} has NaN or infinity in {dtype}; "
                f"the file is damaged or was cast badly ({path} was not written)"
            )
        bar.update(run.nbytes)
        yield run
