"""Job, budget and costs to a plan, its peak of device bytes included. Pure.

Levers that leave the picture as it is are used freely: which chunks are resident, the size of chunks, the text encoder
staged, the VAE in strips of rows. Nothing that changes the picture is touched.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..errors import OutOfMemoryError, UsageError
from ..units import size
from ..weights.formats import Storage
from . import schedule
from .plan import Choice, Costs, Memory, Option, Plan, Sizes, Stage, StreamPlan, cut, stream_plan
from .work import Work


class Planner:
    """Plans for one model. `compute_bytes` is the size of a number in the dtype that is computed in."""

    def __init__(self, stages: Sequence[Stage], storage: Storage, compute_bytes: int, costs: Costs):
        self._stages, self._costs = stages, costs
        self._sizes = Sizes(storage, compute_bytes)

    def plan(self, work: Work, memory: Memory, budget: int) -> Plan:
        """The fastest plan whose predicted peak is within `budget` bytes; with `low_vram` the smallest.

        Raises OutOfMemoryError with the smallest budget that would do when none is.
        """
        candidates = {
            stage.name: [
                _Candidate(option, self._scratch(stage, work, option)) for option in options
            ]
            for stage in self._stages
            if (options := list(stage.options(self._sizes, work, memory)))
        }
        if not memory.low_vram and (kept := self._kept(candidates, budget)):
            first = {name: found[0] for name, found in candidates.items()}
            return self._filled(work, memory, first, kept, kept=True)
        with ThreadPoolExecutor(
            len(candidates)
        ) as pool:  # a GPU's compiler takes seconds for each stage
            fits = {
                name: pool.submit(_first_that_fits, found, budget, memory.low_vram)
                for name, found in candidates.items()
            }
            chosen = {name: future.result() for name, future in fits.items()}
        peaks = {name: candidate.peak for name, candidate in chosen.items()}
        worst = max(peaks, key=peaks.__getitem__)
        if peaks[worst] > budget:
            raise OutOfMemoryError(
                f"the smallest plan needs {size(peaks[worst])} of device memory (stage {worst}), the budget is "
                f"{size(budget)}",
                peaks[worst],
            )
        return self._filled(work, memory, chosen, peaks, kept=False)

    def _scratch(self, stage: Stage, work: Work, option: Option) -> Callable[[], int]:
        return lambda: self._costs.scratch(stage, work, option.choice)

    def _kept(
        self, candidates: dict[str, list["_Candidate"]], budget: int
    ) -> dict[str, int] | None:
        """Peaks by stage where every parameter stays on the device; None where that does not fit."""
        largest = {name: found[0] for name, found in candidates.items()}
        stays = [candidate.option.stays for candidate in largest.values()]
        units = frozenset[tuple[str, str]]().union(*(names for names in stays if names is not None))
        together = sum(self._sizes.storage.nbytes(component, unit) for component, unit in units)
        if None in stays or together > budget:
            return None
        peaks = {name: together + c.option.activations + c.scratch() for name, c in largest.items()}
        return peaks if max(peaks.values()) <= budget else None

    def _filled(
        self,
        work: Work,
        memory: Memory,
        chosen: dict[str, "_Candidate"],
        peaks: dict[str, int],
        *,
        kept: bool,
    ) -> Plan:
        choices: dict[str, Choice] = {
            name: candidate.option.choice for name, candidate in chosen.items()
        }
        return Plan(
            nfes=work.steps,
            choices=choices,
            kept=kept,
            host_window=memory.host_bytes,
            peak_bytes_by_stage=peaks,
        )


class _Candidate(NamedTuple):
    option: Option
    scratch: Callable[[], int]  # asks the compiler: called for options that may fit, and no others

    @property
    def held(self) -> int:
        return self.option.weights + self.option.activations

    @property
    def peak(self) -> int:
        return self.held + self.scratch()


def _first_that_fits(candidates: list[_Candidate], budget: int, smallest: bool) -> _Candidate:
    """The first candidate within the budget, or else the one that holds least."""
    if not smallest:
        for candidate in candidates:
            if candidate.held <= budget and candidate.peak <= budget:
                return candidate
    return min(reversed(candidates), key=lambda candidate: candidate.held)


# -- the ways to stream blocks ----------------------------------------------------------------------------------------


def streams(
    sizes: Sizes, component: str, early: tuple[str, ...], main: tuple[str, ...], memory: Memory
) -> Iterator[StreamPlan]:
    """Partitions and schedules that `memory` allows, the fastest first: those that wait for no copy, and of these the
    ones that copy least.

    `early` blocks are chunks of their own, before the `main` ones and no longer than they are. Raises UsageError for
    numbers of chunks, resident chunks or pins that the blocks do not have.
    """
    found: dict[tuple, StreamPlan] = {}
    counts = _chunk_counts(sizes, component, main, memory)
    for count in counts:
        lengths = schedule.partition(len(main), count)
        before = schedule.partition(len(early), -(-len(early) // lengths[0])) if early else ()
        chunks = cut(early, before) + cut(main, lengths)
        for row, resident in _rows(memory, count):
            made = schedule.make(
                row.name, len(chunks) if row.keeps_all else count, resident, memory.prefetch
            )
            made = made if row.keeps_all else made.after(len(before))
            made = made.with_pins(_pins(memory, chunks, len(before)), len(before), len(chunks))
            plan = stream_plan(sizes.storage, component, chunks, made)
            found.setdefault((chunks, made.slots, made.resident), plan)
    if not found or (memory.resident_chunks or 0) > counts[-1]:
        raise UsageError(
            f"--resident-chunks {memory.resident_chunks}: expected 0 to {counts[-1] - 1}, fewer than the chunks"
        )
    # of two that copy the same, the one with fewer chunks
    return iter(sorted(found.values(), key=lambda s: (s.waits, s.copied_blocks, len(s.chunks))))


def _chunk_counts(sizes: Sizes, component: str, main: tuple[str, ...], memory: Memory) -> list[int]:
    blocks = len(main)
    if memory.chunks:
        if memory.chunks > blocks:
            raise UsageError(
                f"--chunks {memory.chunks}: expected 1 to {blocks}, the number of blocks"
            )
        return [memory.chunks]
    if memory.max_chunk_bytes:
        block = sizes.storage.nbytes(component, main[0])
        return [schedule.chunks_under(blocks, block, memory.max_chunk_bytes)]
    # the default, and finer ones down to a chunk per block, each half as long or so
    counts = [min(schedule.CHUNKS, blocks)]
    while counts[-1] < blocks:
        counts.append(min(blocks, counts[-1] * 3 // 2 + 1))
    return counts


def _rows(memory: Memory, count: int) -> Iterator[tuple[schedule.Row, int]]:
    """(schedule, resident chunks) that `memory` allows for a partition of `count` chunks."""
    for row in schedule.ROWS:
        named = row.name == memory.schedule
        if not (
            named
            or (memory.schedule == "auto" and row.is_automatic and row.admits(memory.prefetch))
        ):
            continue
        allowed = row.resident(count)
        if memory.resident_chunks is None or len(allowed) == 1:
            yield from ((row, resident) for resident in allowed)
        elif memory.resident_chunks in allowed:
            yield row, memory.resident_chunks


def _pins(memory: Memory, chunks: tuple[tuple[str, ...], ...], first: int) -> dict[int, str]:
    """Pins by the number of a main chunk."""
    found = {}
    for which, how in memory.pins:
        if isinstance(which, str):
            number = next((c for c, units in enumerate(chunks[first:]) if which in units), None)
            if number is None:
                raise UsageError(
                    f"{which}: no such block; expected {chunks[first][0]} to {chunks[-1][-1]}"
                )
            found[number] = how
        else:
            found[which] = how
    return found
