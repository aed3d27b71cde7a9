"""How long a plan takes, and what bounds it: from the rates that a device, its link and the disk achieve. Pure."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..model.kv import UNUSED_WHEN_REUSED, Nfe
from ..units import size, tree_bytes
from ..weights import components
from .plan import Plan, Sizes, Stage, StreamPlan
from .schedule import Free, Load, Pin, Visit, actions, loads
from .work import Work


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
            f"--host-memory {size(window)} is smaller than a chunk of {size(chunk)}: use more chunks or a larger window"
        )
    return window // max(chunk, 1)


@dataclass(frozen=True)
class Timing:
    """What a stage needs to say how long it takes: the plan of the first picture, with programs compiled.

    Parameters are in host memory, or, where the plan has a host window, read from disk at every visit; nothing is
    assumed to be in the page cache. The driver waits after every program. A copy beside a run therefore costs what it
    takes longer than the run over the first micro-batch, and every other copy all it takes.
    """

    plan: Plan
    work: Work
    sizes: Sizes
    rates: Rates

    def read(self, component: str, *units: str) -> float:
        """From disk to host memory."""
        if self.plan.host_window is None:
            return 0.0
        return self.sizes.storage.nbytes(component, *units) / self.rates.disk

    def copy(self, component: str, *units: str, without_kv: bool = False) -> float:
        """From host memory to the device."""
        storage = self.sizes.storage
        leaves = [storage.specs(component, unit) for unit in units]
        if without_kv:
            leaves = [
                storage.without_kv(component, u, of) for u, of in zip(units, leaves, strict=True)
            ]
        return tree_bytes(leaves) / self.rates.link

    def unit(self, component: str, unit: str) -> float:
        """A unit that is no block: read whole, then copied."""
        return self.read(component, unit) + self.copy(component, unit)

    def block(
        self,
        component: str,
        batch: int,
        tokens: int,
        *,
        width: int,
        keys: int | None = None,
        reuses: bool = False,
    ) -> float:
        """One block over batch x tokens: two operations per parameter and token, four per pair of token and key and
        channel of `width`."""
        leaves = components.units(self.sizes.config, component)["layers.0"]
        # modulation runs once per picture, not per token
        without = ("modulation.kernel", "modulation.bias", *(UNUSED_WHEN_REUSED if reuses else ()))
        parameters = sum(leaf.size for path, leaf in leaves.items() if not path.endswith(without))
        return batch * tokens * (2 * parameters + 4 * (keys or tokens) * width) / self.rates.flops

    def kv_cache(self) -> float:
        """K and V that are kept on the host, on their way there and back: nothing computes meanwhile."""
        config, moves = (
            self.sizes.config.transformer,
            [nfe.keeps or nfe.reuses for nfe in self.work.nfes],
        )
        of_block = self.work.kv_bytes_by_nfe(config)
        return config.n_layers * sum(np.multiply(moves, of_block)) / self.rates.link

    def stream(
        self,
        stream: StreamPlan,
        run: Callable[[str, Nfe | None], float],
        nfes: Sequence[Nfe | None] = (None,),
        groups: int = 1,
    ) -> float:
        """The visits of a stage. `run(unit, nfe)` is the seconds of one block; every chunk serves `groups` micro-batches.

        What is resident is read and copied in the order of use while others compute, and gives way to what is streamed.
        """
        now, runs, rates = 0.0, 0, self.rates
        component, chunks, of = (
            stream.component,
            stream.chunks,
            (stream.schedule, stream.kinds, len(nfes)),
        )
        ahead = None
        if self.plan.host_window is not None and stream.streamed:
            nbytes = self.sizes.storage.nbytes
            largest = max(nbytes(component, *chunks[chunk]) for chunk in stream.streamed)
            ahead = read_ahead(self.plan.host_window, largest)
        reads = [self.read(component, *chunks[load.chunk]) for load in loads(*of)]
        reader = _Reader(reads, len(reads) if ahead is None else ahead)
        # seconds of the link: of what is resident, and of what is streamed; of a resident chunk, those until it is copied,
        # and when it is read
        resident, streamed, arrives = 0.0, 0.0, dict[int, tuple[float, float]]()
        for action in actions(*of):
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
            if load is not None:  # neither its program nor its copy starts before it is read
                now = max(now, reader.arrival())
            if isinstance(action, Visit):
                nfe = nfes[runs // len(chunks)]
                computed = sum(run(unit, nfe) for unit in chunks[action.chunk])
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


def seconds(
    stages: Sequence[Stage], plan: Plan, work: Work, sizes: Sizes, rates: Rates
) -> dict[str, float]:
    """Seconds by stage of the first picture; a stage that cannot be predicted is left out.

    Raises UsageError for a host window that is smaller than a chunk.
    """
    timing = Timing(plan, work, sizes, rates)
    found = {
        s.name: s.seconds(timing, plan.choices[s.name]) for s in stages if s.name in plan.choices
    }
    return {name: value for name, value in found.items() if value is not None}


def bound_by(stages: Sequence[Stage], plan: Plan, work: Work, sizes: Sizes, rates: Rates) -> str:
    """ "compute", "link" or "disk": which of them, were it twice as fast, would make the picture fastest."""
    faster = {
        "compute": rates._replace(flops=2 * rates.flops),
        "link": rates._replace(link=2 * rates.link),
        "disk": rates._replace(disk=2 * rates.disk),
    }
    return min(
        faster, key=lambda name: sum(seconds(stages, plan, work, sizes, faster[name]).values())
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
