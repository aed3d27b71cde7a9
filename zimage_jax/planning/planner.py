"""Chooses the plan of a job: the fastest whose predicted peak is within the budget. Pure.

The planner chooses only among options that give the same picture: resident chunks, the size of
chunks, a staged text encoder, the VAE in strips of rows. It never chooses one that changes the
picture (K and V, `vae_tile`).
"""

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from ..errors import OutOfMemoryError, UsageError
from ..units import size
from ..weights import components
from ..weights.formats import Storage
from . import schedule
from .plan import (
    Choice,
    Costs,
    Memory,
    Option,
    Plan,
    Sizes,
    Stage,
    StreamPlan,
    chunked,
    stream_plan,
)
from .work import Work


class Planner:
    """Makes plans for one model. `compute_bytes`: bytes per number in the compute dtype."""

    def __init__(self, stages: Sequence[Stage], storage: Storage, compute_bytes: int, costs: Costs):
        self._stages, self._costs = stages, costs
        self._all = stages  # also those that a job of some stages leaves out
        self._sizes = Sizes(storage, compute_bytes)

    def of(self, stages: Sequence[Stage]) -> "Planner":
        """A planner of these stages alone, for the same model."""
        made = copy.copy(self)
        made._stages = stages
        return made

    def plan(self, work: Work, memory: Memory, budget: int) -> Plan:
        """The fastest plan whose predicted peak is within `budget` bytes; with `low_vram` the
        smallest.

        Raises OutOfMemoryError, with the bytes of the smallest plan, if that is over the budget
        too.
        """
        return self._plan([work], self._candidates([work], memory), memory, budget)[0]

    def together(
        self, works: Sequence[Work], alone: Sequence[Plan], memory: Memory, budget: int
    ) -> tuple[Plan, ...]:
        """The plans of several jobs that share every sweep; their peaks and arrays are those of all.

        `alone`: the plan that each has alone. What moves no blocks runs one job at a time, as it
        does alone: the VAE's strips change last bits, which must not follow from a job's company.

        Raises OutOfMemoryError if they do not fit together.
        """
        return self._plan(works, self._candidates(works, memory, alone), memory, budget)

    def most_together(
        self, work: Work, alone: Plan, memory: Memory, budget: int, most: int
    ) -> tuple[Plan, ...]:
        """The plans of as many jobs of one kind as fit together, at most `most`."""
        found: tuple[Plan, ...] = (alone,)
        least = 1
        while least < most:
            count = (least + most + 1) // 2
            try:
                plans = self.together([work] * count, [alone] * count, memory, budget)
            except OutOfMemoryError:
                plans = ()
            if plans and plans[0].kept == alone.kept:
                found, least = plans, count
            else:
                most = count - 1
        return found

    def _plan(
        self,
        works: Sequence[Work],
        candidates: dict[str, list["_Candidate"]],
        memory: Memory,
        budget: int,
    ) -> tuple[Plan, ...]:
        others = self._left_out(works[0].whole, memory, candidates.keys())
        if not memory.low_vram and (found := self._kept(candidates, others, budget)):
            first = {name: of_stage[0] for name, of_stage in candidates.items()}
            arrays, units = found
            return self._filled(works, memory, first, arrays, kept=units)
        candidates, staying = self._beside_what_stays(candidates)
        # a GPU's compiler takes seconds per stage: one thread each
        with ThreadPoolExecutor(len(candidates)) as pool:
            fits = {
                name: pool.submit(_first_that_fits, found, budget, memory.low_vram)
                for name, found in candidates.items()
            }
            chosen = {name: future.result() for name, future in fits.items()}
        peaks = {name: candidate.peak for name, candidate in chosen.items()}
        worst = max(peaks, key=peaks.__getitem__)
        if peaks[worst] > budget:
            raise OutOfMemoryError(
                f"the smallest plan needs {size(peaks[worst])} of device memory (stage {worst}), "
                f"the budget is {size(budget)}",
                peaks[worst],
            )
        arrays = {name: candidate.arrays for name, candidate in chosen.items()}
        return self._filled(works, memory, chosen, arrays, kept=staying)

    def _candidates(
        self, works: Sequence[Work], memory: Memory, alone: Sequence[Plan] | None = None
    ) -> dict[str, list["_Candidate"]]:
        """The options of each stage, for all works together."""
        found = {}
        for stage in self._stages:
            of = {w: list(stage.options(self._sizes, w, memory)) for w in dict.fromkeys(works)}
            if not any(of.values()):
                continue
            combined: list[tuple[Option | None, ...]]
            if alone is None:
                combined = [(option,) for option in of[works[0]]]
            elif any(option.choice.stream for options in of.values() for option in options):
                combined = _of_one_stream([of[work] for work in works])
            else:
                chosen = [plan.choices.get(stage.name) for plan in alone]
                combined = [
                    tuple(
                        next((o for o in of[work] if o.choice == choice), None)
                        for work, choice in zip(works, chosen, strict=True)
                    )
                ]
            found[stage.name] = [self._candidate(stage, works, options) for options in combined]
        return found

    def _candidate(
        self, stage: Stage, works: Sequence[Work], options: tuple[Option | None, ...]
    ) -> "_Candidate":
        taken = {
            (work, id(option)): option
            for work, option in zip(works, options, strict=True)
            if option is not None
        }
        activations: Counter[str] = Counter()
        for option in options:
            if option is None:
                continue
            if option.choice.stream is None:  # one job at a time
                activations |= Counter(option.activations)
            else:
                activations.update(option.activations)
        first = next(iter(taken.values()))

        def scratch() -> int:
            return max(self._costs.scratch(stage, w, o.choice) for (w, _), o in taken.items())

        choices = tuple(option and option.choice for option in options)
        return _Candidate(choices, first.weights, activations, first.stays, first.always, scratch)

    def _left_out(
        self, whole: Work, memory: Memory, names: Container[str]
    ) -> list[frozenset[tuple[str, str]] | None]:
        """What stays of the stages that a job leaves out: what it keeps on the device is the same
        as for a whole job, so that jobs of one part each do not take turns there."""
        options = (
            next(stage.options(self._sizes, whole, memory), None)
            for stage in self._all
            if stage.name not in names
        )
        return [option.stays for option in options if option is not None]

    def _kept(
        self,
        candidates: dict[str, list["_Candidate"]],
        others: Sequence[frozenset[tuple[str, str]] | None],
        budget: int,
    ) -> tuple[dict[str, dict[str, int]], frozenset[tuple[str, str]]] | None:
        """Arrays by stage if every parameter stays on the device, also those of `others`, and the
        parameters' units; None if that does not fit."""
        largest = {name: found[0] for name, found in candidates.items()}
        stays = [*(candidate.stays for candidate in largest.values()), *others]
        units = frozenset[tuple[str, str]]().union(*(names for names in stays if names is not None))
        weights: Counter[str] = Counter()
        for component, unit in units:
            weights[f"{component}, resident"] += self._sizes.storage.nbytes(component, unit)
        if None in stays or weights.total() > budget:
            return None
        arrays = {name: c.with_weights(weights) for name, c in largest.items()}
        peak = max(sum(of.values()) for of in arrays.values())
        return (arrays, units) if peak <= budget else None

    def _beside_what_stays(
        self, candidates: dict[str, list["_Candidate"]]
    ) -> tuple[dict[str, list["_Candidate"]], frozenset[tuple[str, str]]]:
        """The candidates with the parameters of other stages that always stay, and their units."""
        units: frozenset[tuple[str, str]] = frozenset()
        for name, found in candidates.items():
            stays = found[0].stays
            if not found[0].always or stays is None:
                continue
            units |= stays
            nbytes = sum(self._sizes.storage.nbytes(*unit) for unit in stays)
            more = {f"{name}, always resident": nbytes}
            for other in candidates.keys() - {name}:
                candidates = candidates | {other: [of.beside(more) for of in candidates[other]]}
        return candidates, units

    def _filled(
        self,
        works: Sequence[Work],
        memory: Memory,
        chosen: dict[str, "_Candidate"],
        arrays: dict[str, dict[str, int]],
        *,
        kept: frozenset[tuple[str, str]],
    ) -> tuple[Plan, ...]:
        def plan(index: int, work: Work) -> Plan:
            choices: dict[str, Choice] = {
                name: candidate.choices[index]
                for name, candidate in chosen.items()
                if candidate.choices[index] is not None
            }
            return Plan(
                nfes=work.steps,
                choices=choices,
                kept=kept,
                host_window=memory.host_bytes,
                arrays_by_stage=arrays,
            )

        return tuple(plan(index, work) for index, work in enumerate(works))


def _of_one_stream(of: Sequence[Sequence[Option]]) -> list[tuple[Option | None, ...]]:
    """One option of each work, all of the same stream, in the order of the work with most options.

    `of`: the options of each work, or none. Works have the same streams, and of a stream some have
    several options: there the n-th of one goes with the n-th, or the last, of the others.
    """
    by_stream: dict[int, dict[StreamPlan | None, list[Option]]] = {}
    for options in of:
        if id(options) not in by_stream:
            own = by_stream[id(options)] = {}
            for option in options:
                own.setdefault(option.choice.stream, []).append(option)
    found, counts = [], Counter[StreamPlan | None]()
    for option in max(of, key=len):
        stream = option.choice.stream
        same = [by_stream[id(options)].get(stream) for options in of]
        n, counts[stream] = counts[stream], counts[stream] + 1
        found.append(tuple(o[min(n, len(o) - 1)] if o else None for o in same))
    return found


class _Candidate(NamedTuple):
    """One way to run a stage for all works: an Option of each, added up."""

    choices: tuple[Any, ...]  # of each work; None if it lacks the stage
    weights: Mapping[str, int]
    activations: Mapping[str, int]
    stays: frozenset[tuple[str, str]] | None
    always: bool
    scratch: Callable[[], int]  # may compile for seconds: called only if `held` is in the budget

    def beside(self, more: Mapping[str, int]) -> "_Candidate":
        return self._replace(weights={**self.weights, **more})

    @property
    def held(self) -> int:
        return sum(self.weights.values()) + sum(self.activations.values())

    @property
    def peak(self) -> int:
        return self.held + self.scratch()

    @property
    def arrays(self) -> dict[str, int]:
        return self.with_weights(self.weights)

    def with_weights(self, weights: Mapping[str, int]) -> dict[str, int]:
        return {**weights, **self.activations, "temporaries": self.scratch()}


def _first_that_fits(candidates: list[_Candidate], budget: int, smallest: bool) -> _Candidate:
    """The first candidate whose peak is within the budget, else the one with the smallest `held`.

    `smallest`: take the one with the smallest `held` at once.
    """
    if not smallest:
        for candidate in candidates:
            if candidate.held <= budget and candidate.peak <= budget:
                return candidate
    return min(reversed(candidates), key=lambda candidate: candidate.held)


# -- streams of blocks -----------------------------------------------------------------------------


def streams(
    sizes: Sizes,
    component: str,
    early: Sequence[tuple[str, ...]],
    main: tuple[str, ...],
    memory: Memory,
) -> Iterator[StreamPlan]:
    """Partitions and schedules that `memory` allows, the fastest first.

    Streams that never wait for a copy come first, then those of whole blocks, then those that copy
    the fewest bytes.
    The runs of `early` blocks form chunks of their own before the `main` chunks, and no larger than
    these.

    Raises UsageError for a number of chunks, a number of resident chunks, or a pin that does not
    exist.
    """
    found: dict[tuple, StreamPlan] = {}
    counts = _chunk_counts(sizes, component, main, memory)
    for count in counts:
        # what stays on the device is not halved: the next job may keep it, whatever its chunks
        mains = [chunked(component, main, n) for n in (count, min(count, len(main)))]
        # their kinds and bytes, whatever the schedule
        plans = []
        for of_main in mains:
            of_runs = (*(_early(component, run, of_main) for run in early), of_main)
            cut, swap = tuple(chain(*of_runs)), schedule.make("swap", count)
            runs = tuple(map(len, of_runs))
            plans.append(stream_plan(sizes.storage, component, cut, swap, runs))
        for row, resident in _rows(memory, count):
            plan = plans[row.keeps_all]
            before = sum(plan.runs[:-1])
            chunks = plan.chunks
            made = schedule.make(
                row.name, len(chunks) if row.keeps_all else count, resident, memory.prefetch
            )
            made = made if row.keeps_all else made.after(before)
            made = made.with_pins(_pins(memory, chunks, before), before, len(chunks))
            found.setdefault((chunks, made.slots, made.resident), replace(plan, schedule=made))
    if not found and memory.chunks_on_device is not None:
        raise UsageError(
            f"chunks on device: {memory.chunks_on_device} are too few for schedule {memory.schedule}"
        )
    if not found or (memory.resident_chunks or 0) > counts[-1]:
        raise UsageError(
            f"--resident-chunks {memory.resident_chunks}: expected 0 to {counts[-1] - 1}, "
            "fewer than the chunks"
        )

    # Halves come last: where the link is the slower for one half alone, they take longer than their
    # blocks. Where two copy the same bytes, the one with fewer chunks is faster
    def rank(stream: StreamPlan) -> tuple:
        return stream.waits, stream.is_halved, stream.copied_bytes, len(stream.chunks)

    return iter(sorted(found.values(), key=rank))


def _early(
    component: str, early: tuple[str, ...], main: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], ...]:
    """`early` blocks in chunks no larger than the largest of `main`."""
    if not early:
        return ()
    if all(len(units) == 1 and components.half_of(units[0]) for units in main):
        return chunked(component, early, 2 * len(early))
    return chunked(component, early, -(-len(early) // max(map(len, main))))


def _chunk_counts(sizes: Sizes, component: str, main: tuple[str, ...], memory: Memory) -> list[int]:
    blocks, nbytes = len(main), sizes.storage.nbytes
    halves = [half for unit in main for half in components.halves(component, unit)]
    if memory.chunks:
        most = len(halves) or blocks
        if memory.chunks > most:
            what = "two to a block" if halves else "the number of blocks"
            raise UsageError(f"--chunks {memory.chunks}: expected 1 to {most}, {what}")
        return [memory.chunks]
    if memory.max_chunk_bytes:
        block = max(nbytes(component, unit) for unit in main)
        half = max((nbytes(component, half) for half in halves), default=None)
        return [schedule.chunks_under(blocks, block, half, memory.max_chunk_bytes)]
    # the default number, then each about half as many again, up to one chunk per block; then halves
    counts = [min(schedule.CHUNKS, blocks)]
    while counts[-1] < blocks:
        counts.append(min(blocks, counts[-1] * 3 // 2 + 1))
    return [*counts, len(halves)] if halves else counts


def _rows(memory: Memory, count: int) -> Iterator[tuple[schedule.Row, int]]:
    """(schedule, resident chunks) that `memory` allows for a partition of `count` chunks."""
    for row in schedule.ROWS:
        is_tried = memory.schedule == "auto" and row.is_automatic and row.admits(memory.prefetch)
        if row.name != memory.schedule and not is_tried:
            continue
        allowed = row.resident(count)
        if memory.chunks_on_device is not None:
            slots = 0 if row.keeps_all else row.slots(memory.prefetch)
            most = memory.chunks_on_device - slots
            allowed = [resident for resident in allowed if resident <= most]
        if memory.resident_chunks is None:
            yield from ((row, resident) for resident in allowed)
        elif row.keeps_all:
            continue
        elif memory.resident_chunks in allowed:
            yield row, memory.resident_chunks


def _pins(memory: Memory, chunks: tuple[tuple[str, ...], ...], first: int) -> dict[int, str]:
    """`memory.pins` by the number of a main chunk; `first` is the index of the first main chunk.

    Raises UsageError for a block that is in no chunk.
    """
    found: dict[int, str] = {}
    blocks = [[components.unit_of(name) for name in chunk] for chunk in chunks[first:]]
    for which, how in memory.pins:
        if isinstance(which, str):
            numbers = [c for c, units in enumerate(blocks) if which in units]
            if not numbers:
                raise UsageError(
                    f"{which}: no such block; expected {blocks[0][0]} to {blocks[-1][-1]}"
                )
            found |= dict.fromkeys(numbers, how)
        else:
            found[which] = how
    return found
