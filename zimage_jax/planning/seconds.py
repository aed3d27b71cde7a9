"""How long a plan takes, and what bounds it: from the rates that a device, its link and the disk
achieve."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.kv import UNUSED_WHEN_REUSED, Nfe
from ..model.vae_strips import layer_costs
from ..weights import components
from ..weights.components import tree_bytes
from .planner import Plan, StreamPlan, Work
from .schedule import Free, Load, Pin, Run, loads, steps


class Rates(NamedTuple):
    """What a device achieves: FLOP/s, bytes/s from host to device, whether it copies beside
    computing (a CPU, whose cores do both, does not), and the seconds that starting and awaiting a
    chunk's program takes, where they are not hidden. `disk`: bytes/s from file to host memory, for
    plans with a window on the checkpoint."""

    flops: float
    link: float
    overlaps: bool = True
    dispatch: float = 0.0
    disk: float = math.inf


def read_ahead(window: int, chunk: int) -> int:
    """Chunks of at most `chunk` bytes that a host window of `window` bytes holds: the one in use
    and those read ahead.

    Raises UsageError when it holds none."""
    if window < chunk:
        raise UsageError(
            f"the host window of {window / 2**30:.2f} GiB is smaller than a chunk of {chunk / 2**30:.2f} GiB: "
            "use more chunks or a larger window (--host-memory)"
        )
    return window // max(chunk, 1)


def seconds(
    plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates
) -> dict[str, float]:
    """Seconds of each stage of the first picture, programs compiled: parameters of `dtype` in host
    memory, or, where the plan has a host window, read from disk at every visit. Nothing is assumed
    to be in the page cache.

    The driver waits after every program. A copy beside a run therefore costs what it takes longer
    than the run over the first micro-batch, and every other copy all it takes. A text encoder on
    the host is not predicted.

    Raises UsageError for a host window that is smaller than a chunk."""
    text, dit = config.text_encoder, config.transformer
    groups = work.batch // work.micro_batch
    once = partial(_block_seconds, config, "transformer", width=dit.dim, rates=rates)
    at_once = work.contexts // groups

    def nbytes(component: str, unit: str) -> int:
        return components.nbytes(config, component, unit, dtype)

    def read(component: str, unit: str) -> float:
        return 0.0 if plan.host_window is None else nbytes(component, unit) / rates.disk

    def single(component: str, unit: str) -> float:
        """A unit that is no block: read whole, then copied."""
        return read(component, unit) + nbytes(component, unit) / rates.link

    def stage(
        stream: StreamPlan, component: str, run: Callable[[str, Nfe | None], float], **repeated
    ) -> float:
        ahead = None
        streamed = [c for i, c in enumerate(stream.chunks) if i not in stream.schedule.pinned]
        if plan.host_window is not None and streamed:
            largest = max(sum(nbytes(component, unit) for unit in chunk) for chunk in streamed)
            ahead = read_ahead(plan.host_window, largest)
        copy = cache(partial(_copy_seconds, config, component, dtype, rates))
        return _timeline(
            stream, copy, run, rates, read=cache(partial(read, component)), ahead=ahead, **repeated
        )

    def of_denoise(unit: str, nfe: Nfe | None) -> float:
        if not unit.startswith("layers."):
            return once(at_once, work.image_tokens)
        keys = nfe.hold.keys(work.tokens) if nfe else work.tokens
        return once(at_once, work.tokens, keys=keys, reuses=nfe is not None and nfe.reuses)

    found = {}
    if plan.text is not None:
        width = text.num_attention_heads * text.head_dim
        layer = _block_seconds(
            config, "text_encoder", work.prompts, work.bucket, width=width, rates=rates
        )
        found["text"] = stage(plan.text, "text_encoder", lambda unit, nfe: layer)
    stem = single("transformer", "stem")
    found["context"] = stem + stage(
        plan.context, "transformer", lambda unit, nfe: once(work.contexts, work.bucket)
    )
    denoise = stage(plan.denoise, "transformer", of_denoise, nfes=work.nfes, groups=groups)
    cached = _cache_seconds(work, config, rates) if plan.kv_on_host else 0.0
    found["denoise"] = (0 if plan.kept else stem) + denoise + cached
    decode = _decode_seconds(plan, work, config, dtype, rates)
    found["decode"] = single("vae", "decoder") + work.batch * decode
    return found


def bound_by(plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates) -> str:
    """ "compute", "link" or "disk": which of them, were it twice as fast, would make the picture
    fastest."""
    faster = {
        "compute": rates._replace(flops=2 * rates.flops),
        "link": rates._replace(link=2 * rates.link),
        "disk": rates._replace(disk=2 * rates.disk),
    }
    return min(
        faster, key=lambda name: sum(seconds(plan, work, config, dtype, faster[name]).values())
    )


class _Reader:
    """The disk, which reads one thing after the other: when chunks read through a window are in
    host memory."""

    def __init__(self, reads: Iterable[float], ahead: int):
        """`reads`: seconds of each chunk in order; `ahead` of them fit in the window."""
        self._reads, self._disk_is_free, self._there = iter(reads), 0.0, deque[float]()
        for _ in range(ahead):
            self.read_next(0.0)

    def read_next(self, now: float) -> None:
        """A place in the window is free from `now` on."""
        chunk = next(self._reads, None)
        if chunk is not None:
            self._there.append(self.read(chunk, now))

    def read(self, seconds: float, now: float = 0.0) -> float:
        """When what takes `seconds` and is asked for `now` is read."""
        self._disk_is_free = max(self._disk_is_free, now) + seconds
        return self._disk_is_free

    def arrival(self) -> float:
        """Of the next chunk."""
        return self._there.popleft()


def _timeline(
    stream: StreamPlan,
    copy: Callable[[str, bool], float],
    run: Callable[[str, Nfe | None], float],
    rates: Rates,
    nfes: Sequence[Nfe | None] = (None,),
    groups: int = 1,
    read: Callable[[str], float] = lambda unit: 0.0,
    ahead: int | None = None,
) -> float:
    """`read(unit)`, `copy(unit, lightly)` and `run(unit, nfe)` are seconds of one block; `ahead`
    chunks fit in the host window (None: all). What stays is read and copied in the order of use
    while others compute, and gives way to what is streamed."""
    now, runs, chunks = 0.0, 0, stream.chunks

    def read_chunk(chunk: int) -> float:
        return sum(read(unit) for unit in chunks[chunk])

    reads = [read_chunk(load.chunk) for load in loads(stream.schedule, len(chunks), len(nfes))]
    reader = _Reader(reads, len(reads) if ahead is None else ahead)
    # seconds of the link: of what stays, and of what is streamed; of a pinned chunk, those before it
    # was copied and the time it is read
    pinned, streamed, arrives = 0.0, 0.0, dict[int, tuple[float, float]]()
    for step in steps(stream.schedule, len(chunks), len(nfes)):
        if isinstance(step, Free):
            continue
        load = step.then if isinstance(step, Run) else step
        copied = 0.0
        if load is not None:
            lightly = isinstance(load, Load) and stream.lightly(load.chunk, nfes[load.sweep])
            copied = sum(copy(unit, lightly) for unit in chunks[load.chunk])
        if isinstance(step, Pin):
            from_disk = read_chunk(step.chunk)
            if rates.overlaps:
                pinned += copied
                arrives[step.chunk] = pinned, reader.read(from_disk)
            else:
                now += from_disk + copied
            continue
        if isinstance(step, Run) and step.chunk in arrives:
            before, is_read = arrives.pop(step.chunk)
            now = max(now, before + streamed, is_read)
        if load is not None:  # neither its program nor its copy starts before it is read
            now = max(now, reader.arrival())
        if isinstance(step, Run):
            nfe = nfes[runs // len(chunks)]
            computed = sum(run(unit, nfe) for unit in chunks[step.chunk])
            now += max(computed, copied) if rates.overlaps else computed + copied
            if load is not None:
                reader.read_next(now)
            now += (groups - 1) * computed + groups * rates.dispatch
            runs += 1
        else:
            now += copied + rates.dispatch
            reader.read_next(now)
        streamed += copied
    return now


def _copy_seconds(
    config: ModelConfig, component: str, dtype: str, rates: Rates, unit: str, lightly: bool
) -> float:
    leaves = components.leaves(config, component, unit, dtype)
    if lightly:
        leaves = components.without_keys_values(config, unit, leaves)
    return tree_bytes(leaves) / rates.link


def _cache_seconds(work: Work, config: ModelConfig, rates: Rates) -> float:
    """K and V on their way to the host and back: nothing computes meanwhile."""
    moves = [nfe.keeps or nfe.reuses for nfe in work.nfes]
    of_block = work.kv_bytes_by_nfe(config.transformer)
    return config.transformer.n_layers * sum(np.multiply(moves, of_block)) / rates.link


def _block_seconds(
    config: ModelConfig,
    component: str,
    batch: int,
    tokens: int,
    *,
    width: int,
    rates: Rates,
    keys: int | None = None,
    reuses: bool = False,
) -> float:
    """One block over batch x tokens: two operations per parameter and token, four per pair of token
    and key and channel."""
    parameters = _block_parameters(config, component, reuses)
    return batch * tokens * (2 * parameters + 4 * (keys or tokens) * width) / rates.flops


@cache
def _block_parameters(config: ModelConfig, component: str, reuses: bool) -> int:
    """Of a block, those that every token meets: all but the modulation's."""
    leaves = components.units(config, component)["layers.0"]
    once_a_picture = ("modulation.kernel", "modulation.bias")
    without = (*once_a_picture, *(UNUSED_WHEN_REUSED if reuses else ()))
    return sum(leaf.size for path, leaf in leaves.items() if not path.endswith(without))


def _decode_seconds(plan: Plan, work: Work, config: ModelConfig, dtype: str, rates: Rates) -> float:
    decoder = components.unit_spec(config, "vae", "decoder")
    shape = (1, work.h, work.w, config.vae.latent_channels)
    products, elements = (sum(column) for column in zip(*layer_costs(decoder, shape), strict=True))
    crossing = 0 if plan.vae_rows is None else elements * components.DTYPES[dtype].itemsize
    return 2 * products / rates.flops + crossing / rates.link
