"""Predicts the seconds of a plan, and what bounds it, from the rates of the device, its link and
the disk. Pure."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UsageError
from ..model.kv import UNUSED_WHEN_REUSED, Nfe
from ..model.ops import RUN_TOKENS
from ..units import size, tree_bytes
from ..weights import components
from ..weights.formats import Storage
from .plan import Plan, Sizes, Stage, StreamPlan
from .schedule import Free, Load, Pin, Visit, actions, loads
from .work import Work


class Rates(NamedTuple):
    """The rates that a device, its link and the disk achieve."""

    flops: float  # FLOP/s
    link: float  # bytes/s from host to device
    overlaps: bool = True  # whether it copies while it computes; a CPU's cores do both in turn
    dispatch: float = 0.0  # seconds to start and await a chunk's program, where they are not hidden
    disk: float = math.inf  # bytes/s from file to host memory, for plans with a host window
    memory: float = math.inf  # bytes/s of the device's own memory, for decoding matrices


# over how many programs of a visit the next chunk's copy is spread. With four, a quarter of a block
# is copied under each: 4 ms of a PCIe 4 link, as long as a block computes for a picture of 512x512
# on an rtx-4090. Each part is a program more
SPREAD = 4


def read_ahead(window: int, chunk: int) -> int:
    """How many chunks of at most `chunk` bytes fit into a host window of `window` bytes.

    One of them is in use, the others are read ahead. Raises UsageError if none fits.
    """
    if window < chunk:
        raise UsageError(
            f"--host-memory {size(window)} is smaller than a chunk of {size(chunk)}: "
            "use more chunks or a larger window"
        )
    return window // max(chunk, 1)


@dataclass(frozen=True)
class Timing:
    """Predicts the seconds of a stage, for the first picture with all programs compiled.

    Parameters are in host memory; with a host window they are read from disk at every visit, and
    nothing is in the page cache. The model of time: the stream waits after every program. A copy
    during a visit is spread over at most SPREAD micro-batches, and costs only the time by which its
    parts exceed their runs; every other copy costs all its time. `jobs` like `work` are in flight
    together: the seconds are those of all.
    """

    plan: Plan
    work: Work
    sizes: Sizes
    rates: Rates
    jobs: int = 1

    def read(self, component: str, *units: str) -> float:
        """Seconds to read units from disk to host memory."""
        if self.plan.host_window is None:
            return 0.0
        return self.sizes.storage.nbytes(component, *units) / self.rates.disk

    def copy(self, component: str, *units: str, without_kv: bool = False) -> float:
        """Seconds to copy units from host memory to the device."""
        storage = self.sizes.storage
        leaves = [storage.specs(component, unit) for unit in units]
        if without_kv:
            leaves = [
                storage.without_kv(component, u, of) for u, of in zip(units, leaves, strict=True)
            ]
        return tree_bytes(leaves) / self.rates.link

    def unit(self, component: str, unit: str) -> float:
        """Seconds for a unit that is not a block: it is read, then copied."""
        return self.read(component, unit) + self.copy(component, unit)

    def block(
        self,
        component: str,
        unit: str,
        batch: int,
        tokens: int,
        *,
        width: int,
        keys: int | None = None,
        reuses: bool = False,
    ) -> float:
        """Seconds of a block, or of half a block, over `batch` x `tokens`.

        It takes two operations per parameter and token, and four per token, key and channel of
        `width` (attention). `keys` is by default `tokens`; `reuses`: K and V are reused. Encoded
        matrices are decoded for every run of tokens (ops.in_runs).
        """
        of_block = components.units(self.sizes.config, component)[components.unit_of(unit)]
        stored = self.sizes.storage.leaves(component, unit)
        leaves = components.of_half(unit, of_block)
        leaves = leaves | {
            path: leaf for path, leaf in stored.items() if ".side." in path
        }  # of LoRAs
        # modulation: once per picture, not per token
        without = ("modulation", *(UNUSED_WHEN_REUSED if reuses else ()))
        parameters = sum(leaf.size for path, leaf in leaves.items() if not _is_of(path, without))
        decoding = math.ceil(tokens / RUN_TOKENS) * self.decode(component, unit, reuses=reuses)
        scores = 4 * (keys or tokens) * width if components.has_attention(unit) else 0
        operations = batch * tokens * (2 * parameters + scores)
        return operations / self.rates.flops + decoding

    def decode(self, component: str, unit: str, *, reuses: bool = False) -> float:
        """Seconds to decode a unit's encoded matrices once: the stored bytes are read, and 16 bits
        per weight are written."""
        of = _decoding_bytes(self.sizes.storage, component, unit, reuses)
        return of / self.rates.memory

    def kv_cache(self) -> float:
        """Seconds to copy K and V to the host and back, as if nothing computed at the same time."""
        config, nfes = self.sizes.config.transformer, self.work.nfes
        of_block = zip(nfes, self.work.kv_bytes_by_nfe(config), strict=True)
        moved = sum(nbytes for nfe, nbytes in of_block if nfe.keeps or nfe.reuses)
        blocks = config.n_layers + self.work.control_layers
        return self.jobs * blocks * moved / self.rates.link

    def stream(
        self,
        stream: StreamPlan,
        run: Callable[[str, Nfe | None], float],
        nfes: Sequence[Nfe | None] = (None,),
        groups: int = 1,
    ) -> float:
        """Seconds of all visits of a stage.

        `run(unit, nfe)`: seconds of one block; `nfe` is None in all runs but the last. `groups`: micro-batches of a job that each visit
        computes.
        Resident chunks are read and copied in the order of use while others compute; streamed
        chunks use the link first.
        """
        now, runs, rates = 0.0, 0, self.rates
        component, chunks, groups = stream.component, stream.chunks, groups * self.jobs
        spread = min(SPREAD, groups)
        reader = self._reader(stream, len(nfes))
        # seconds that the link copies resident chunks, and streamed ones
        resident, streamed = 0.0, 0.0
        # resident chunk -> seconds of resident copies up to its own, and when it is read
        arrives: dict[int, tuple[float, float]] = {}
        for action in actions(stream.schedule, stream.kinds, len(nfes)):
            if isinstance(action, Free):
                continue
            load = action.then if isinstance(action, Visit) else action
            copied = 0.0
            if load is not None:
                without_kv = isinstance(load, Load) and stream.without_kv(
                    load.chunk, nfes[load.sweep]
                )
                copied = self.copy(component, *chunks[load.chunk], without_kv=without_kv)
            if isinstance(action, Pin):
                from_disk = self.read(component, *chunks[action.chunk])
                if rates.overlaps:
                    resident += copied
                    arrives[action.chunk] = resident, reader.read(from_disk)
                else:
                    now += from_disk + copied
                continue
            if isinstance(action, Visit) and action.chunk in arrives:
                is_copied, is_read = arrives.pop(action.chunk)
                now = max(now, is_copied + streamed, is_read)
            if load is not None:  # neither the program nor the copy starts before it is read
                now = max(now, reader.arrival())
            if isinstance(action, Visit):
                is_main = stream.is_main(action.chunk)
                nfe = nfes[runs // len(chunks)] if is_main else None
                computed = sum(run(unit, nfe) for unit in chunks[action.chunk])
                if rates.overlaps:
                    now += spread * max(computed, copied / spread) + (groups - spread) * computed
                else:
                    now += copied + groups * computed
                if load is not None:
                    reader.read_next(now)
                now += groups * rates.dispatch
                runs += 1
            else:
                now += copied + rates.dispatch
                reader.read_next(now)
            streamed += copied
        return now

    def _reader(self, stream: StreamPlan, sweeps: int) -> "_Reader":
        """The disk for a stream's loads: all read ahead, or as many as the host window holds."""
        component, chunks = stream.component, stream.chunks
        order = loads(stream.schedule, stream.kinds, sweeps)
        reads = [self.read(component, *chunks[load.chunk]) for load in order]
        ahead = len(reads)
        if self.plan.host_window is not None and stream.streamed:
            nbytes = self.sizes.storage.nbytes
            largest = max(nbytes(component, *chunks[chunk]) for chunk in stream.streamed)
            ahead = read_ahead(self.plan.host_window, largest)
        return _Reader(reads, ahead)


def seconds(
    stages: Sequence[Stage], plan: Plan, work: Work, sizes: Sizes, rates: Rates, jobs: int = 1
) -> dict[str, float]:
    """Predicted seconds of the first picture by stage, without stages whose rates are unknown; of
    the first `jobs` pictures in flight together.

    Raises UsageError for a host window that is smaller than a chunk.
    """
    timing = Timing(plan, work, sizes, rates, jobs)
    found = {
        s.name: s.seconds(timing, plan.choices[s.name]) for s in stages if s.name in plan.choices
    }
    return {name: value for name, value in found.items() if value is not None}


def bound_by(stages: Sequence[Stage], plan: Plan, work: Work, sizes: Sizes, rates: Rates) -> str:
    """What bounds the picture: doubling the rate of "compute", "link" or "disk" helps most."""
    faster = {
        "compute": rates._replace(flops=2 * rates.flops),
        "link": rates._replace(link=2 * rates.link),
        "disk": rates._replace(disk=2 * rates.disk),
    }
    return min(
        faster, key=lambda name: sum(seconds(stages, plan, work, sizes, faster[name]).values())
    )


def _is_of(path: str, layers: Sequence[str]) -> bool:
    """Whether a parameter is one of these layers of a block."""
    return any(f".{layer}." in path for layer in layers)


@functools.cache
def _decoding_bytes(storage: Storage, component: str, unit: str, reuses: bool) -> int:
    leaves = components.units(storage.config, component)[components.unit_of(unit)]
    return sum(
        tree_bytes(encoding.stored(leaves[path])) + 2 * leaves[path].size
        for path, encoding in storage.parameters(component, unit).items()
        if encoding is not None and not (reuses and _is_of(path, UNUSED_WHEN_REUSED))
    )


class _Reader:
    """When chunks are in host memory: a disk that reads one chunk at a time, through a window."""

    def __init__(self, reads: Iterable[float], ahead: int):
        """`reads`: seconds to read each chunk, in order. `ahead`: chunks that fit in the window."""
        self._reads, self._disk_is_free, self._arrivals = iter(reads), 0.0, deque[float]()
        for _ in range(ahead):
            self.read_next(0.0)

    def read_next(self, now: float) -> None:
        """Read the next chunk: the window has room for it from `now` on."""
        chunk = next(self._reads, None)
        if chunk is not None:
            self._arrivals.append(self.read(chunk, now))

    def read(self, seconds: float, now: float = 0.0) -> float:
        """When a read that is requested at `now` and takes `seconds` is done."""
        self._disk_is_free = max(self._disk_is_free, now) + seconds
        return self._disk_is_free

    def arrival(self) -> float:
        """When the next chunk is in host memory."""
        return self._arrivals.popleft()
