"""The devices that a plan is for: this machine's own, or cards that need not be here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .planning.cards import Card, MeasuredCard
    from .planning.plan import Budget, Costs
    from .planning.seconds import Rates
    from .weights.formats import Storage

SIZES = ("512x512", "768x768", "1024x1024", "1280x720", "720x1280", "1536x1536", "2048x2048")


@dataclass(frozen=True)
class Device:
    """The device to plan for: this machine's own, or cards that need not be here."""

    name: str
    budget: "Budget"  # bytes a plan may use
    rates: "Rates"
    costs: "Costs"
    compute: str  # dtype of the computation
    sizes: tuple[str, ...]  # if the user names none
    context_bytes: int  # device bytes of CUDA's context, outside the budget
    notes: dict[str, str]  # the sources of the numbers
    disk_source: str
    shares_memory: bool = False  # the device's memory is the host's
    others: "tuple[Rates, ...]" = ()  # of each further card
    names: tuple[str, ...] = ()  # of each card


def of_cards(cards: "Sequence[Card | MeasuredCard]", storage: "Storage", compiles: bool) -> Device:
    """A machine with these cards, which share the blocks of every picture out."""
    from .model.attention import Target
    from .planning.cards import ASSUMED_HOST, HOST_ASSUMED, Card, of_device
    from .planning.stored import StoredCosts
    from .runtime.placement import default_dtype

    dtype = default_dtype(Target("gpu", min(card.capability for card in cards)))
    if compiles:
        from .runtime.deviceless import CardPrograms
        from .runtime.programs import CompiledCosts

        sheets = [card if isinstance(card, Card) else of_device(card.device) for card in cards]
        for card, sheet in zip(cards, sheets, strict=True):
            if sheet is None:
                raise UsageError(f"--compile: expected a card of the table, got {card.name}")
        costs: Costs = CompiledCosts(CardPrograms(storage, dtype, *filter(None, sheets)))
        source = "compiled for this card without one"
    else:
        costs = StoredCosts(storage, *cards)
        source = costs.source
    sources = {
        "rates": [card.source for card in cards],
        "context": [card.context_source for card in cards],
    }
    notes = {name: "; ".join(dict.fromkeys(of)) for name, of in sources.items()}
    first, rates = cards[0], [card.rates for card in cards]
    if len(cards) > 1:
        rates = [of._replace(host=ASSUMED_HOST) for of in rates]
        notes["host"] = f"{ASSUMED_HOST / 1e9:.3g} GB/s for all links together, {HOST_ASSUMED}"
    counts = Counter(card.name for card in cards)
    return Device(
        ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items()),
        tuple(card.usable for card in cards) if len(cards) > 1 else first.usable,
        rates[0],
        costs,
        dtype,
        SIZES,
        max(card.context_bytes for card in cards),
        {"temporaries": source, **notes},
        first.disk_source,
        others=tuple(rates[1:]),
        names=tuple(card.name for card in cards),
    )


def with_host(device: Device, gbps: float) -> Device:
    """The cards on a host whose memory serves all links together at `gbps`."""
    first, *others = (of._replace(host=gbps * 1e9) for of in (device.rates, *device.others))
    note = {"host": f"{gbps:.3g} GB/s for all links together, as given with --host-gbps"}
    return replace(device, rates=first, others=tuple(others), notes=device.notes | note)


def read_from_disk(device: Device, gbps: float | None) -> Device:
    """The device with blocks read from disk, at `gbps` if that is given."""
    if gbps is not None:
        first, *others = (of._replace(disk=gbps * 1e9) for of in (device.rates, *device.others))
        source = "as given with --disk-gbps"
        device = replace(device, rates=first, others=tuple(others), disk_source=source)
    rate = f"{device.rates.disk / 1e9:.3g} GB/s"
    note = f"{rate}, {device.disk_source}; nothing of the checkpoint in the page cache"
    return replace(device, notes=device.notes | {"disk": note})


def own(storage: "Storage") -> Device:
    from .planning.cards import ASSUMED_DISK, DISK_ASSUMED, context_bytes
    from .runtime.placement import Placement, default_dtype
    from .runtime.programs import CompiledCosts, Programs
    from .runtime.rates import measure

    config, placement = storage.config, Placement.on()
    side, is_cpu = config.vae.sample_size, placement.shares_memory
    dtype = default_dtype(placement.target)
    sides = [n for n in (side // 2, side, 2 * side) if n % config.pixel_multiple == 0]
    largest = min(config.transformer.axes_lens[1:]) * config.pixel_multiple
    rates = measure(placement, dtype)._replace(disk=ASSUMED_DISK)
    notes = {
        "temporaries": "compiled for this device",
        "context": "none on a CPU" if is_cpu else "assumed",
        "rates": f"measured: {rates.flops / 1e12:.3g} TFLOP/s of {dtype} matrix products, "
        f"{rates.link / 1e9:.3g} GB/s to the device",
    }
    return Device(
        placement.device.device_kind,
        placement.free_bytes(),
        rates,
        CompiledCosts(Programs(storage, dtype, placement)),
        dtype,
        tuple(f"{n}x{n}" for n in sides if n <= largest) if is_cpu else SIZES,
        context_bytes(placement.target.capability) if placement.target.capability else 0,
        notes,
        DISK_ASSUMED,
        shares_memory=is_cpu,
    )
