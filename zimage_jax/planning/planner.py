"""Chooses the plan of a job: the fastest whose predicted peak is within the budget. Pure.

The planner chooses only among options that give the same picture: resident chunks, the size of
chunks, a staged text encoder, the VAE in strips of rows. It never chooses one that changes the
picture (K and V, `vae_tile`).
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..errors import OutOfMemoryError, UsageError
from ..units import size
from ..weights.formats import Storage
from .plan import Budget, Choice, Costs, Held, Memory, Option, Plan, Sizes, Stage, each
from .seconds import Rates, Timing, shares
from .stream_plan import Place, StreamPlan, mixed
from .work import Work


class Planner:
    """Makes plans for one model. `compute_bytes`: bytes per number in the compute dtype.

    `rates`: of each device, where there are several; None if they are unknown.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        storage: Storage,
        compute_bytes: int,
        costs: Costs,
        rates: Sequence[Rates] | None = None,
    ):
        self._stages, self._costs, self._rates = stages, costs, rates
        self._all = stages  # also those that a job of some stages leaves out
        self._sizes = Sizes(storage, compute_bytes)

    def of(self, stages: Sequence[Stage]) -> "Planner":
        """A planner of these stages alone, for the same model."""
        made = copy.copy(self)
        made._stages = stages
        return made

    def plan(self, work: Work, memory: Memory, budget: Budget) -> Plan:
        """The fastest plan whose predicted peak is within `budget` bytes; with `low_vram` the
        smallest.

        Raises OutOfMemoryError, with the bytes of the smallest plan, if that is over the budget
        too.
        """
        return self._plan([work], self._candidates([work], memory, budget), memory, budget)[0]

    def together(
        self, works: Sequence[Work], alone: Sequence[Plan], memory: Memory, budget: Budget
    ) -> tuple[Plan, ...]:
        """The plans of several jobs that share every sweep; their peaks and arrays are those of all.

        `alone`: the plan that each has alone. What moves no blocks runs one job at a time, as it
        does alone: the VAE's strips change last bits, which must not follow from a job's company.

        Raises OutOfMemoryError if they do not fit together.
        """
        candidates = self._candidates(works, memory, budget, alone)
        return self._plan(works, candidates, memory, budget)

    def most_together(
        self, work: Work, alone: Plan, memory: Memory, budget: Budget, most: int
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
        budget: Budget,
    ) -> tuple[Plan, ...]:
        budgets = each(budget)
        if not memory.low_vram:
            wholes = [work.whole for work in works]
            others = self._left_out(wholes[0], memory, budget, candidates)
            for first in self._staying(candidates | others, wholes, memory):
                if found := self._kept(first, candidates, budgets):
                    arrays, units = found
                    own = {name: first[name] for name in candidates}
                    return self._filled(works, memory, own, arrays, kept=units)
        candidates, staying = self._beside_what_stays(candidates)
        # a GPU's compiler takes seconds per stage: one thread each
        with ThreadPoolExecutor(len(candidates)) as pool:
            fits = {
                name: pool.submit(self._best, name, found, works, memory, budgets)
                for name, found in candidates.items()
            }
            chosen = {name: future.result() for name, future in fits.items()}
        for device, most in enumerate(budgets):
            peaks = {name: candidate.peak(device) for name, candidate in chosen.items()}
            worst = max(peaks, key=peaks.__getitem__)
            if peaks[worst] > most:
                where = f" {device}" if len(budgets) > 1 else ""
                raise OutOfMemoryError(
                    f"the smallest plan needs {size(peaks[worst])} of device memory{where} "
                    f"(stage {worst}), the budget is {size(most)}",
                    peaks[worst],
                )
        arrays = [
            {name: candidate.arrays(device) for name, candidate in chosen.items()}
            for device in range(len(budgets))
        ]
        return self._filled(works, memory, chosen, arrays, kept=staying)

    def _best(
        self,
        name: str,
        candidates: list["_Candidate"],
        works: Sequence[Work],
        memory: Memory,
        budgets: tuple[int, ...],
    ) -> "_Candidate":
        """The fastest candidate that fits, or the one nearest to it.

        One device's candidates are in order. Several devices' are of families, in which each device
        picks its own resident chunks; the families are in the order of their predicted seconds.
        """
        families = _families(candidates)
        if len(families) > 1:

            def seconds(family: list[_Candidate]) -> float:
                likely = _fitted(family, budgets, memory.low_vram, _Candidate.held)
                return self._seconds(name, likely, works, memory)

            if memory.low_vram:
                families.sort(key=lambda f: max(f[-1].held(d) for d in range(len(budgets))))
            elif self._rates is not None:
                families.sort(key=seconds)
        found: list[tuple[int, int, _Candidate]] = []
        for family in families:
            fitted = _fitted(family, budgets, memory.low_vram, _Candidate.peak)
            over = max(fitted.peak(d) - most for d, most in enumerate(budgets))
            if over <= 0:
                return fitted
            found.append((over, len(found), fitted))
        return min(found, key=lambda of: of[:2])[2]

    def _seconds(
        self, name: str, candidate: "_Candidate", works: Sequence[Work], memory: Memory
    ) -> float:
        """Predicted seconds of a stage, for the first job that has it."""
        assert self._rates is not None
        stage = next(stage for stage in self._all if stage.name == name)
        plan = Plan(nfes=0, choices={}, host_window=memory.host_bytes, arrays_by_stage={})
        first, *others = self._rates
        # of a stage that the jobs leave out the candidate is the first job's
        for work, choice in zip(works, candidate.choices, strict=False):
            if choice is not None:
                timing = Timing(plan, work, self._sizes, first, others=tuple(others))
                try:
                    return stage.seconds(timing, choice) or 0.0
                except UsageError:  # a chunk is larger than a device's part of the host window
                    return math.inf
        return 0.0

    def _candidates(
        self,
        works: Sequence[Work],
        memory: Memory,
        budget: Budget,
        alone: Sequence[Plan] | None = None,
    ) -> dict[str, list["_Candidate"]]:
        """The options of each stage, for all works together."""
        found = {}
        # the same for all works, which share their streams
        sizes = replace(self._sizes, shares=shares(each(budget), self._rates))
        for stage in self._stages:
            of = {w: list(stage.options(sizes, w, memory)) for w in dict.fromkeys(works)}
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
            found[stage.name] = [
                self._candidate(stage, works, options, sizes.devices) for options in combined
            ]
        return found

    def _candidate(
        self,
        stage: Stage,
        works: Sequence[Work],
        options: tuple[Option | None, ...],
        devices: int,
    ) -> "_Candidate":
        taken = {
            (work, id(option)): option
            for work, option in zip(works, options, strict=True)
            if option is not None
        }
        first = next(iter(taken.values()))
        choices = tuple(option and option.choice for option in options)
        of_each = tuple(_held(options, device) for device in range(devices))
        scratch = partial(self._scratch, stage, taken)
        return _Candidate(choices, of_each, first.stays, first.always, scratch)

    def _scratch(self, stage: Stage, taken: Mapping[tuple[Work, int], Option], device: int) -> int:
        """Bytes of a stage on a device, the most of the options `taken`."""
        if device > len(next(iter(taken.values())).others):  # it is on the first device alone
            return 0
        return max(self._costs.scratch(stage, w, o.choice, device) for (w, _), o in taken.items())

    def _staying(
        self, candidates: dict[str, list["_Candidate"]], works: Sequence[Work], memory: Memory
    ) -> list[dict[str, "_Candidate"]]:
        """A candidate of each stage whose parameters all stay: one set of these, or one for each way
        in which several devices share them out, the fastest first."""
        largest = {name: found[0] for name, found in candidates.items()}
        if any(candidate.stays is None for candidate in largest.values()):
            return []

        def ways_of(name: str) -> list[_Candidate]:
            first, found = largest[name], candidates[name]
            if first.stream is None or first.stream.devices == 1:
                return [first]
            return [of for of in found if of.stays and of.chunks == first.chunks]

        ways = {name: ways_of(name) for name in largest}
        sets = [
            {name: of[min(way, len(of) - 1)] for name, of in ways.items()}
            for way in range(max(map(len, ways.values())))
        ]
        if len(sets) > 1 and self._rates is not None:
            sets.sort(
                key=lambda of: sum(self._seconds(name, c, works, memory) for name, c in of.items())
            )
        return sets

    def _left_out(
        self,
        whole: Work,
        memory: Memory,
        budget: Budget,
        names: Container[str],
    ) -> dict[str, list["_Candidate"]]:
        """The candidates of the stages that jobs leave out: what a job keeps on the device is the
        same as for a whole job, so that jobs of one part each do not take turns there."""
        stages = [stage for stage in self._all if stage.name not in names]
        return self.of(stages)._candidates([whole], memory, budget)

    def _kept(
        self,
        staying: dict[str, "_Candidate"],
        names: Iterable[str],
        budgets: tuple[int, ...],
    ) -> tuple[list[dict[str, dict[str, int]]], frozenset[Place]] | None:
        """Arrays by device and stage, of the stages `names`, if every parameter stays on its device,
        and the parameters' places; None if that does not fit."""
        stays = (candidate.stays for candidate in staying.values())
        places = frozenset[Place]().union(*(of for of in stays if of is not None))
        weights: list[Counter[str]] = [Counter() for _ in budgets]
        for component, unit, device in places:
            nbytes = self._sizes.storage.nbytes(component, unit)
            weights[device][f"{component}, resident"] += nbytes
        if any(of.total() > most for of, most in zip(weights, budgets, strict=True)):
            return None
        arrays = [
            {name: staying[name].with_weights(device, own) for name in names}
            for device, own in enumerate(weights)
        ]
        peaks = (max(sum(of.values()) for of in stages.values()) for stages in arrays)
        fits = all(peak <= most for peak, most in zip(peaks, budgets, strict=True))
        return (arrays, places) if fits else None

    def _beside_what_stays(
        self, candidates: dict[str, list["_Candidate"]]
    ) -> tuple[dict[str, list["_Candidate"]], frozenset[Place]]:
        """The candidates with the parameters of other stages that always stay, and their units."""
        units: frozenset[Place] = frozenset()
        for name, found in candidates.items():
            stays = found[0].stays
            if not found[0].always or stays is None:
                continue
            units |= stays
            more: list[dict[str, int]] = [{} for _ in found[0].of_each]
            for component, unit, device in stays:
                nbytes = self._sizes.storage.nbytes(component, unit)
                array = f"{name}, always resident"
                more[device][array] = more[device].get(array, 0) + nbytes
            for other in candidates.keys() - {name}:
                candidates = candidates | {other: [of.beside(more) for of in candidates[other]]}
        return candidates, units

    def _filled(
        self,
        works: Sequence[Work],
        memory: Memory,
        chosen: dict[str, "_Candidate"],
        arrays: list[dict[str, dict[str, int]]],
        *,
        kept: frozenset[Place],
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
                arrays_by_stage=arrays[0],
                others=tuple(arrays[1:]),
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


def _on(option: Option, device: int) -> Held:
    """What an option holds on a device."""
    of_each = Held(option.weights, option.activations), *option.others
    return of_each[device] if device < len(of_each) else Held({}, {})


def _held(options: Sequence[Option | None], device: int) -> Held:
    """The parameters of the first option, and the activations of all: of one job at a time if there
    is no stream."""
    taken = [option for option in options if option is not None]
    activations: Counter[str] = Counter()
    for option in taken:
        own = Counter(_on(option, device).activations)
        if taken[0].choice.stream is None:
            activations |= own
        else:
            activations.update(own)
    return Held(_on(taken[0], device).weights, activations)


class _Candidate(NamedTuple):
    """One way to run a stage for all works: an Option of each, added up."""

    choices: tuple[Any, ...]  # of each work; None if it lacks the stage
    of_each: tuple[Held, ...]  # device's
    stays: frozenset[Place] | None
    always: bool
    # may compile for seconds: called only if `held` is in the budget
    scratch: Callable[[int], int]

    @property
    def stream(self) -> StreamPlan | None:
        """The one of all works."""
        return next(choice for choice in self.choices if choice is not None).stream

    @property
    def chunks(self) -> tuple[tuple[str, ...], ...]:
        return () if self.stream is None else self.stream.chunks

    @property
    def is_split(self) -> bool:
        """Whether several devices have a share of it."""
        return self.stream is not None and self.stream.devices > 1

    def beside(self, more: Sequence[Mapping[str, int]]) -> "_Candidate":
        """The candidate with further parameters on each device."""
        of_each = tuple(
            own._replace(weights={**own.weights, **added})
            for own, added in zip(self.of_each, more, strict=True)
        )
        return self._replace(of_each=of_each)

    def held(self, device: int) -> int:
        return sum(map(sum, (of.values() for of in self.of_each[device])))

    def peak(self, device: int) -> int:
        return self.held(device) + self.scratch(device)

    def arrays(self, device: int) -> dict[str, int]:
        return self.with_weights(device, self.of_each[device].weights)

    def with_weights(self, device: int, weights: Mapping[str, int]) -> dict[str, int]:
        """The arrays on a device, with these parameters."""
        activations = self.of_each[device].activations
        return {**weights, **activations, "temporaries": self.scratch(device)}


def _families(candidates: list[_Candidate]) -> list[list[_Candidate]]:
    """Candidates of several devices that differ in their resident chunks alone; one device's are
    one family."""
    found: dict[Hashable, list[_Candidate]] = {}
    for candidate in candidates:
        key: Hashable = None
        if candidate.is_split and (stream := candidate.stream):
            key = stream.chunks, stream.owners, stream.schedule.takes_turns
        found.setdefault(key, []).append(candidate)
    return list(found.values())


def _fitted(
    family: list[_Candidate],
    budgets: tuple[int, ...],
    smallest: bool,
    peak: Callable[[_Candidate, int], int],
) -> _Candidate:
    """What each device picks: the first candidate whose `peak` is within its budget, else the one
    with the smallest `held`.

    `smallest`: take the one with the smallest `held` at once.
    """

    def pick(device: int) -> _Candidate:
        if not smallest:
            for candidate in family:
                fits = candidate.held(device) <= budgets[device]
                if fits and peak(candidate, device) <= budgets[device]:
                    return candidate
        return min(reversed(family), key=lambda candidate: candidate.held(device))

    if not family[0].is_split:
        return pick(0)
    picks = list(map(pick, range(len(budgets))))
    if all(found is picks[0] for found in picks):
        return picks[0]
    choices = tuple(
        choice and replace(choice, stream=mixed([of.choices[i].stream for of in picks]))
        for i, choice in enumerate(picks[0].choices)
    )
    return picks[0]._replace(
        choices=choices,
        of_each=tuple(of.of_each[device] for device, of in enumerate(picks)),
        stays=None,
        scratch=lambda device: picks[device].scratch(device),
    )
