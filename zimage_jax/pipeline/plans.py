"""The plans of one model on its own devices: the planner, its advice, and predicted seconds."""

from collections.abc import Sequence
from dataclasses import replace

from ..errors import OutOfMemoryError
from ..planning import cards
from ..planning.plan import Budget, Memory, Plan, Sizes, Stage
from ..planning.planner import Planner
from ..planning.seconds import seconds
from ..planning.stored import StoredCosts, has_published_widths
from ..planning.work import Work
from ..runtime.programs import CompiledCosts, Programs
from ..runtime.rates import measure
from .stages import STAGES


class Plans:
    """Makes the plans of jobs. The compiler tells the scratch bytes of `programs`."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._sizes = Sizes(programs.storage, programs.dtype.itemsize)
        kinds = (placement.device.device_kind for placement in programs.placement.each)
        self._cards = list(map(cards.of_device, kinds))
        known = [card.rates for card in self._cards if card is not None]
        # of cards in the table, computing in 16 bits; others are known once they are measured
        has_all = len(known) == len(self._cards) and programs.dtype.itemsize == 2
        self.rates = known if has_all else None
        self.planner = self._planner(CompiledCosts(programs))

    def of(self, programs: Programs) -> "Plans":
        """The plans of the same model stored otherwise, on the same devices."""
        found = Plans(programs)
        found.rates = self.rates
        found.planner = found._planner(CompiledCosts(programs))
        return found

    def _planner(self, costs) -> Planner:
        programs = self._programs
        return Planner(STAGES, programs.storage, programs.dtype.itemsize, costs, self.rates)

    def plan(
        self, work: Work, memory: Memory, budget: Budget, stages: Sequence[Stage] = STAGES
    ) -> Plan:
        """The fastest plan within the budget, with its seconds where they can be predicted.

        Raises OutOfMemoryError, which names the largest square picture that would fit.
        """
        try:
            plan = self.planner.of(stages).plan(work, memory, budget)
            return replace(plan, seconds_by_stage=self._seconds(plan, work, memory))
        except OutOfMemoryError as fault:
            side = self._largest_side(work, memory, budget)
            advice = (
                f"the largest square picture that fits is {side} x {side}"
                if side
                else "no smaller picture fits"
            )
            message = f"{fault}; raise --max-vram; {advice}"
            raise OutOfMemoryError(message, fault.needed, side) from None

    def measure(self) -> None:
        """Measure the devices, unless their rates are known: plans have seconds then."""
        if self.rates is None:
            dtype = self._programs.dtype.name
            self.rates = [measure(of, dtype) for of in self._programs.placement.each]
            self.planner = self._planner(CompiledCosts(self._programs))

    def together(
        self,
        works: Sequence[Work],
        alone: Sequence[Plan],
        memory: Memory,
        budget: Budget,
        stages: Sequence[Stage] = STAGES,
    ) -> tuple[Plan, ...]:
        """The plans of jobs in flight together; their seconds are those that each takes alone.

        Raises OutOfMemoryError if they do not fit.
        """
        plans = self.planner.of(stages).together(works, alone, memory, budget)
        return tuple(
            replace(plan, seconds_by_stage=own.seconds_by_stage)
            for plan, own in zip(plans, alone, strict=True)
        )

    def _seconds(self, plan: Plan, work: Work, memory: Memory) -> dict[str, float] | None:
        """Predicted seconds by stage, with parameters in host memory; None if a rate is unknown.

        Those of the CPU (text encoder on the host) and of the disk (a host window) are not known.
        """
        text = plan.choices.get("text")
        on_host = text is not None and text.stream is None
        if self.rates is None or on_host or memory.host_bytes:
            return None
        first, *others = self.rates
        return seconds(STAGES, plan, work, self._sizes, first, others=others)

    def _largest_side(self, work: Work, memory: Memory, budget: Budget) -> int:
        """The largest square that fits: its side in pixels, from 2048 down to 64; 0 if none fits.

        It uses stored figures where a card has them, because a GPU's compiler takes minutes for all
        these sizes.
        """
        planner, known = self.planner, [card for card in self._cards if card is not None]
        if len(known) == len(self._cards) and has_published_widths(self._programs.config):
            planner = self._planner(StoredCosts(self._programs.storage, *known))
        scale = self._programs.config.vae.scale
        for side in (2048, 1536, 1024, 768, 512, 384, 256, 128, 64):
            if (side // scale) ** 2 < work.h * work.w:
                try:
                    planner.plan(replace(work, h=side // scale, w=side // scale), memory, budget)
                    return side
                except OutOfMemoryError:
                    continue
        return 0
