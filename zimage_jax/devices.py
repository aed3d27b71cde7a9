"""The device that a plan is for: this machine's own, or a card that need not be here."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .planning.cards import Card, MeasuredCard
    from .planning.plan import Costs
    from .planning.seconds import Rates
    from .weights.formats import Storage

SIZES = ("512x512", "768x768", "1024x1024", "1280x720", "720x1280", "1536x1536", "2048x2048")


@dataclass(frozen=True)
class Device:
    """The device to plan for: this machine's own, or a card that need not be here."""

    name: str
    budget: int  # bytes a plan may use
    rates: "Rates"
    costs: "Costs"
    compute: str  # dtype of the computation
    sizes: tuple[str, ...]  # if the user names none
    context_bytes: int  # device bytes of CUDA's context, outside the budget
    notes: dict[str, str]  # the sources of the numbers
    disk_source: str
    shares_memory: bool = False  # the device's memory is the host's


def of_card(card: "Card | MeasuredCard", storage: "Storage", compiles: bool) -> Device:
    from .model.attention import Target
    from .planning.cards import Card, of_device
    from .planning.stored import StoredCosts
    from .runtime.placement import default_dtype

    dtype = default_dtype(Target("gpu", card.capability))
    if compiles:
        from .runtime.deviceless import CardPrograms
        from .runtime.programs import CompiledCosts

        sheet = card if isinstance(card, Card) else of_device(card.device)
        if sheet is None:
            raise UsageError(f"--compile: expected a card of the table, got {card.name}")
        costs: Costs = CompiledCosts(CardPrograms(storage, dtype, sheet))
        source = "compiled for this card without one"
    else:
        costs = StoredCosts(storage, card)
        source = costs.source
    return Device(
        card.name,
        card.usable,
        card.rates,
        costs,
        dtype,
        SIZES,
        card.context_bytes,
        {"temporaries": source, "rates": card.source, "context": card.context_source},
        card.disk_source,
    )


def read_from_disk(device: Device, gbps: float | None) -> Device:
    """The device with blocks read from disk, at `gbps` if that is given."""
    if gbps is not None:
        rates = device.rates._replace(disk=gbps * 1e9)
        device = replace(device, rates=rates, disk_source="as given with --disk-gbps")
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
