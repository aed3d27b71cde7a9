"""Predicts the seconds of a plan, and what bounds it, from the rates of the device, its link and
the disk. Pure."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import UsageError
from ..model.kv import UNUSED_WHEN_REUSED, Nfe
from ..model.ops import RUN_TOKENS
from ..units import size, tree_bytes
from ..weights import components
from ..weights.formats import Storage
from .plan import Plan, Sizes, Stage
from .schedule import Load, Pin, Visit, actions, loads
from .stream_plan import StreamPlan
from .work import Work


class Rates(NamedTuple):
    """The rates that a device, its link and the disk achieve."""

    flops: float  # FLOP/s
    link: float  # bytes/s from host to device
    overlaps: bool = True  # whether it copies while it computes; a CPU's cores do both in turn
    dispatch: float = 0.0  # seconds to start and await a chunk's program, where they are not hidden
    disk: float = math.inf  # bytes/s from file to host memory, for plans with a host window
    memory: float = math.inf  # bytes/s of the device's own memory, for decoding matrices
    # bytes/s at which the host's memory serves the links of several devices together
    host: float = math.inf


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


def shares(budgets: Sequence[int], rates: Sequence[Rates] | None) -> tuple[tuple[float, ...], ...]:
    """Ways to share out chunks among devices: a weight of each device.

    Evenly; as fast as their links are, for what is streamed; as fast as they compute, and as much as
    they hold, for what stays.
    """
    # free bytes vary a little, and a chunk that changes its device is read and copied again
    room = tuple(float(max(1, budget >> 30)) for budget in budgets)
    ways = [(1.0,) * len(budgets), room]
    if rates is not None and all(math.isfinite(r.link) and math.isfinite(r.flops) for r in rates):
        ways += [tuple(r.link for r in rates), tuple(r.flops for r in rates)]
    scaled = (tuple(weight / sum(way) for weight in way) for way in ways)
    return tuple(dict.fromkeys(tuple(round(weight, 3) for weight in way) for way in scaled))


@dataclass(frozen=True)
class Timing:
    """Predicts the seconds of a stage, for the first picture with all programs compiled.

    Parameters are in host memory; with a host window they are read from disk at every visit, and
    nothing is in the page cache. The model of time: the stream waits after every program. A copy
    during a visit is spread over at most SPREAD micro-batches, and costs only the time by which its
    parts exceed their runs; every other copy costs all its time. `jobs` like `work` are in flight
    together: the seconds are those of all.

    `rates` are the first device's, `others` those of each further one. Several devices take turns:
    a device copies its next chunk after its visit, while the others compute, and only its own next
    visit waits for that. All links read the host's memory at once, at no more than `rates.host`
    together. Between devices tokens pass through host memory.
    """

    plan: Plan
    work: Work
    sizes: Sizes
    rates: Rates
    jobs: int = 1
    others: tuple[Rates, ...] = ()

    def on(self, device: int) -> "Timing":
        """The timing of what a device does alone."""
        return replace(self, rates=self.others[device - 1]) if device else self

    def read(self, component: str, *units: str) -> float:
        """Seconds to read units from disk to host memory."""
        if self.plan.host_window is None:
            return 0.0
        return self.sizes.storage.nbytes(component, *units) / self.rates.disk

    def copy(self, component: str, *units: str, without_kv: bool = False) -> float:
        """Seconds to copy units from host memory to the device."""
        return self.moved(component, *units, without_kv=without_kv) / self.rates.link

    def moved(self, component: str, *units: str, without_kv: bool = False) -> int:
        """Bytes of units that are copied."""
        storage = self.sizes.storage
        leaves = [storage.specs(component, unit) for unit in units]
        if without_kv:
            leaves = [
                storage.without_kv(component, u, of) for u, of in zip(units, leaves, strict=True)
            ]
        return tree_bytes(leaves)

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
        run: Callable[[int, str, Nfe | None], float],
        nfes: Sequence[Nfe | None] = (None,),
        groups: int = 1,
        tokens: int = 0,
    ) -> float:
        """Seconds of all visits of a stage.

        `run(device, unit, nfe)`: seconds of one block; `nfe` is None in all runs but the last.
        `groups`: micro-batches of a job that each visit computes. `tokens`: bytes that pass on to
        the next chunk's device.

        Resident chunks are read and copied in the order of use while others compute; streamed
        chunks use the link first.
        """
        groups, host = groups * self.jobs, _Link()
        lanes = [
            _Lane(self.on(device), device, lane, run, nfes, groups, host)
            for device, lane in enumerate(stream.lanes)
        ]
        now, before = 0.0, 0
        for _ in nfes:
            for chunk in range(len(stream.chunks)):
                device = stream.owner(chunk)
                if device != before:
                    links = (self.on(of).rates.link for of in (before, device))
                    now += sum(tokens * self.jobs / link for link in links)
                now, before = lanes[device].visit(now), device
        return now

    def reader(self, stream: StreamPlan, sweeps: int) -> "_Reader":
        """The disk for a device's loads: all read ahead, or as many as its part of the host window
        holds. Several devices have equal parts of the window and of the disk."""
        component, chunks, devices = stream.component, stream.chunks, 1 + len(self.others)
        order = loads(stream.schedule, stream.kinds, sweeps)
        reads = [devices * self.read(component, *chunks[load.chunk]) for load in order]
        ahead = len(reads)
        if self.plan.host_window is not None and stream.streamed:
            nbytes = self.sizes.storage.nbytes
            largest = max(nbytes(component, *chunks[chunk]) for chunk in stream.streamed)
            ahead = read_ahead(self.plan.host_window // devices, largest)
        return _Reader(reads, ahead)


class _Link:
    """The host's memory, from which all devices' links copy: it serves one copy after the other."""

    def __init__(self) -> None:
        self._is_free = 0.0

    def copied(self, begin: float, seconds: float) -> float:
        """When a copy that begins at `begin`, and takes the memory `seconds`, has left it."""
        self._is_free = max(self._is_free, begin) + seconds
        return self._is_free


class _Lane:
    """The time of one device: `visit` after `visit`, it is free again at `_free`."""

    def __init__(
        self,
        timing: Timing,
        device: int,
        stream: StreamPlan,
        run: Callable[[int, str, Nfe | None], float],
        nfes: Sequence[Nfe | None],
        groups: int,
        host: _Link,
    ):
        self._timing, self._device, self._stream = timing, device, stream
        self._run, self._nfes, self._groups, self._host = run, nfes, groups, host
        self._actions = actions(stream.schedule, stream.kinds, len(nfes))
        self._reader = timing.reader(stream, len(nfes))
        self._free, self._visits, self._next = 0.0, 0, None  # type: float, int, Visit | None
        # seconds that the link copies resident chunks, and streamed ones
        self._resident, self._streamed = 0.0, 0.0
        # resident chunk -> seconds of resident copies up to its own, and when it is read
        self._arrives: dict[int, tuple[float, float]] = {}
        if stream.schedule.takes_turns:
            self._prepare(0.0)

    def visit(self, now: float) -> float:
        """When the next visit is done, whose tokens are there `now`."""
        rates, stream, groups = self._timing.rates, self._stream, self._groups
        self._prepare(now)
        action, self._next = self._next, None
        assert action is not None
        now = max(now, self._free)
        if action.chunk in self._arrives:
            is_copied, is_read = self._arrives.pop(action.chunk)
            now = max(now, is_copied + self._streamed, is_read)
        copied = 0.0
        if action.then is not None:  # neither the program nor the copy starts before it is read
            copied = self._moved(action.then) / rates.link
            now = max(now, self._reader.arrival())
        is_main = stream.is_main(action.chunk)
        nfe = self._nfes[self._visits // len(stream.chunks)] if is_main else None
        computed = sum(self._run(self._device, unit, nfe) for unit in stream.chunks[action.chunk])
        if rates.overlaps:
            spread = min(SPREAD, groups)
            now += spread * max(computed, copied / spread) + (groups - spread) * computed
        else:
            now += copied + groups * computed
        if action.then is not None:
            self._reader.read_next(now)
        self._free = now + groups * rates.dispatch
        self._streamed += copied
        self._visits += 1
        if stream.schedule.takes_turns:
            self._prepare(self._free)
        return now + groups * rates.dispatch

    def _prepare(self, now: float) -> None:
        """Do what comes before the next visit, from `now` on."""
        if self._next is not None:
            return
        rates = self._timing.rates
        for action in self._actions:
            if isinstance(action, Visit):
                self._next = action
                return
            if isinstance(action, Pin):
                component, units = self._stream.component, self._stream.chunks[action.chunk]
                moved = self._timing.moved(component, *units)
                copied, from_disk = moved / rates.link, self._timing.read(component, *units)
                if rates.overlaps:
                    self._resident += copied
                    arrives = max(self._resident, self._host.copied(0.0, moved / rates.host))
                    self._arrives[action.chunk] = arrives, self._reader.read(from_disk)
                else:
                    self._free += from_disk + copied
            elif isinstance(action, Load):
                moved = self._moved(action)
                copied, begin = moved / rates.link, max(now, self._free, self._reader.arrival())
                served = self._host.copied(begin, moved / rates.host)
                self._free = max(begin + copied, served) + rates.dispatch
                self._reader.read_next(self._free)
                self._streamed += copied

    def _moved(self, load: Load) -> int:
        """Bytes of a load."""
        stream = self._stream
        without_kv = stream.without_kv(load.chunk, self._nfes[load.sweep])
        units = stream.chunks[load.chunk]
        return self._timing.moved(stream.component, *units, without_kv=without_kv)


def seconds(
    stages: Sequence[Stage],
    plan: Plan,
    work: Work,
    sizes: Sizes,
    rates: Rates,
    jobs: int = 1,
    others: Sequence[Rates] = (),
) -> dict[str, float]:
    """Predicted seconds of the first picture by stage, without stages whose rates are unknown; of
    the first `jobs` pictures in flight together. `others`: rates of each further device.

    Raises UsageError for a host window that is smaller than a chunk.
    """
    timing = Timing(plan, work, sizes, rates, jobs, tuple(others))
    found = {
        s.name: s.seconds(timing, plan.choices[s.name]) for s in stages if s.name in plan.choices
    }
    return {name: value for name, value in found.items() if value is not None}


def bound_by(
    stages: Sequence[Stage],
    plan: Plan,
    work: Work,
    sizes: Sizes,
    rates: Rates,
    others: Sequence[Rates] = (),
) -> str:
    """What bounds the picture: doubling the rate of "compute", "link", "disk" or "host memory", on
    all devices, helps most."""
    faster = {"compute": "flops", "link": "link", "disk": "disk", "host memory": "host"}

    def doubled(rate: str) -> float:
        first, *more = (r._replace(**{rate: 2 * getattr(r, rate)}) for r in (rates, *others))
        return sum(seconds(stages, plan, work, sizes, first, others=more).values())

    return min(faster, key=lambda name: doubled(faster[name]))


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
