"""Cards: a table from public data sheets, and JSON files of measured cards.

A card has its memory, its rates, and the bytes that CUDA's own context takes.

Sources of the table: NVIDIA's data sheets, architecture white papers and comparison pages of
laptops. A laptop's clock depends on the power limit that its maker sets: the table has the middle
of the published range, and for the RTX 3060 the clock at 80 W. PCIe lanes are the chip's; a maker
may wire fewer.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..units import GIB
from .seconds import Rates

# Assumed, not measured: large bf16 matrix products reach 60 % of the data sheet's dense tensor
# FLOP/s, copies from page-locked memory 80 % of the link's, decoding 80 % of the memory's bandwidth;
# and JAX gives a process three quarters of the memory (XLA_CLIENT_MEM_FRACTION)
ACHIEVED_FLOPS, ACHIEVED_LINK, ACHIEVED_MEMORY, ALLOWED = 0.6, 0.8, 0.8, 0.75
ASSUMED = (
    f"assumed, not measured: {ACHIEVED_FLOPS:.0%} of the data sheet's FLOP/s, "
    f"{ACHIEVED_LINK:.0%} of the link's"
)
ASSUMED_DISK, DISK_ASSUMED = 3.0e9, "assumed: an NVMe drive"  # bytes/s, files not cached
# bytes/s at which the host's memory serves all links together: two thirds of two channels of
# DDR5-5600. It counts where several cards copy at once
ASSUMED_HOST, HOST_ASSUMED = 60e9, "assumed: two channels of DDR5-5600"

# MiB by capability, assumed: a process's CUDA context, its kernels, and the handles of cuBLAS and
# cuDNN, all outside JAX's allocator. PyTorch's users report 300 and more; larger chips reserve more
# local memory
_CONTEXT: dict[tuple[int, ...], int] = {
    (7, 5): 300,
    (8, 0): 450,
    (8, 6): 350,
    (8, 9): 400,
    (9, 0): 500,
    (12, 0): 500,
}
_MIB = 2**20


def context_bytes(capability: tuple[int, ...]) -> int:
    """Device bytes that CUDA's context is assumed to take beside JAX's allocator."""
    return _CONTEXT.get(capability, max(_CONTEXT.values())) * _MIB


@dataclass(frozen=True)
class Card:
    """An NVIDIA card, from its public data sheet."""

    name: str
    devices: tuple[str, ...]  # its names in JAX's device_kind; the driver chooses them
    capability: tuple[int, int]
    cycle_flops: int  # per multiprocessor and cycle: dense 16-bit products summed in float32
    multiprocessors: int
    clock: float  # GHz, boost
    l2_bytes: int
    bandwidth: float  # bytes/s of its own memory
    memory: int  # bytes
    pcie: float  # bytes/s, one way
    lanes: int  # of PCIe

    # the sources of its rates and other figures, as the plan command prints them
    source, context_source, disk_source = ASSUMED, "assumed", DISK_ASSUMED

    @property
    def usable(self) -> int:
        """Bytes that JAX's allocator gives a process."""
        return int(ALLOWED * self.memory)

    @property
    def peak_flops(self) -> float:
        """Dense 16-bit FLOP/s of the data sheet."""
        return self.multiprocessors * self.clock * 1e9 * self.cycle_flops

    @property
    def rates(self) -> Rates:
        return Rates(
            ACHIEVED_FLOPS * self.peak_flops,
            ACHIEVED_LINK * self.pcie,
            disk=ASSUMED_DISK,
            memory=ACHIEVED_MEMORY * self.bandwidth,
        )

    @property
    def context_bytes(self) -> int:
        return context_bytes(self.capability)


# Capability, and FLOPs per multiprocessor and cycle. GeForce cards sum products in float32 at half
# the rate. Turing's tensor cores have no bfloat16: jobs compute in float16 there
_CHIPS = {
    "Turing": ((7, 5), 512),
    "Turing-pro": ((7, 5), 1024),
    "GA100": ((8, 0), 2048),
    "Ampere": ((8, 6), 512),
    "Ampere-pro": ((8, 6), 1024),
    "Ada": ((8, 9), 512),
    "Ada-pro": ((8, 9), 1024),
    "Hopper": ((9, 0), 4096),
    "Blackwell": ((12, 0), 512),
}
_LANE = {3: 63e9 / 64, 4: 63e9 / 32, 5: 63e9 / 16}  # bytes/s of one lane, one way, by generation

# SMs: multiprocessors; GiB: as the driver reports it, with ECC where that is the default
_SHEETS = """
name                chip       SMs  GHz    L2-MiB GB/s  GiB   PCIe device names
rtx-2060            Turing     30   1.680  3      336   6     3x16 NVIDIA GeForce RTX 2060
rtx-2070            Turing     36   1.620  4      448   8     3x16 NVIDIA GeForce RTX 2070
t4                  Turing-pro 40   1.590  4      320   15    3x16 Tesla T4
rtx-3050-ti-laptop  Ampere     20   1.365  2      192   4     4x8  NVIDIA GeForce RTX 3050 Ti Laptop GPU
rtx-3060-laptop     Ampere     30   1.425  3      336   6     4x8  NVIDIA GeForce RTX 3060 Laptop GPU
rtx-3060            Ampere     28   1.777  3      360   12    4x16 NVIDIA GeForce RTX 3060
a10                 Ampere-pro 72   1.695  6      600   22.5  4x16 NVIDIA A10
a100-40gb           GA100      108  1.410  40     1555  40    4x16 NVIDIA A100-SXM4-40GB, NVIDIA A100-PCIE-40GB
a100-80gb           GA100      108  1.410  40     2039  80    4x16 NVIDIA A100-SXM4-80GB, NVIDIA A100 80GB PCIe
rtx-4050-laptop     Ada        20   1.988  12     192   6     4x8  NVIDIA GeForce RTX 4050 Laptop GPU
rtx-4060-laptop     Ada        24   1.920  32     256   8     4x8  NVIDIA GeForce RTX 4060 Laptop GPU
rtx-4070-laptop     Ada        36   1.703  32     256   8     4x8  NVIDIA GeForce RTX 4070 Laptop GPU
rtx-4080-laptop     Ada        58   1.815  48     432   12    4x16 NVIDIA GeForce RTX 4080 Laptop GPU
rtx-4090-laptop     Ada        76   1.748  64     576   16    4x16 NVIDIA GeForce RTX 4090 Laptop GPU
rtx-4060            Ada        24   2.460  24     272   8     4x8  NVIDIA GeForce RTX 4060
rtx-4070            Ada        46   2.475  36     504   12    4x16 NVIDIA GeForce RTX 4070
rtx-4080            Ada        76   2.505  64     717   16    4x16 NVIDIA GeForce RTX 4080
rtx-4090            Ada        128  2.520  72     1008  24    4x16 NVIDIA GeForce RTX 4090
l4                  Ada-pro    58   2.040  48     300   22.5  4x16 NVIDIA L4
rtx-6000-ada        Ada-pro    142  2.505  96     960   48    4x16 NVIDIA RTX 6000 Ada Generation
h100                Hopper     132  1.830  50     3350  80    5x16 NVIDIA H100 80GB HBM3
h200                Hopper     132  1.830  50     4800  140   5x16 NVIDIA H200
rtx-5070-laptop     Blackwell  36   1.886  32     384   8     5x8  NVIDIA GeForce RTX 5070 Laptop GPU
rtx-5090-laptop     Blackwell  82   1.875  64     896   24    5x16 NVIDIA GeForce RTX 5090 Laptop GPU
rtx-5060-ti         Blackwell  36   2.572  32     448   16    5x8  NVIDIA GeForce RTX 5060 Ti
rtx-5070            Blackwell  48   2.512  48     672   12    5x16 NVIDIA GeForce RTX 5070
rtx-5080            Blackwell  84   2.617  64     960   16    5x16 NVIDIA GeForce RTX 5080
rtx-5090            Blackwell  170  2.407  96     1792  32    5x16 NVIDIA GeForce RTX 5090
"""


def _card(row: str) -> Card:
    name, chip, multiprocessors, clock, l2, bandwidth, memory, pcie, devices = row.split(maxsplit=8)
    generation, lanes = map(int, pcie.split("x"))
    return Card(
        name,
        tuple(devices.split(", ")),
        *_CHIPS[chip],
        multiprocessors=int(multiprocessors),
        clock=float(clock),
        l2_bytes=int(l2) * _MIB,
        bandwidth=float(bandwidth) * 1e9,
        memory=int(float(memory) * GIB),
        pcie=lanes * _LANE[generation],
        lanes=lanes,
    )


CARDS = {card.name: card for card in map(_card, _SHEETS.strip().splitlines()[1:])}


def of_device(kind: str) -> Card | None:
    """The card of the device kind `kind` (JAX's `device_kind`), matched exactly, or None."""
    return next((card for card in CARDS.values() if kind in card.devices), None)


def sheet(name: str) -> Card:
    """The card called `name` in the table; rtx-4090@x8 is one in a slot with 8 lanes.

    Raises UsageError for a name that is not in the table, or more lanes than the card has.
    """
    own, at, lanes = name.partition("@x")
    if own not in CARDS:
        raise UsageError(f"card {name!r}: expected one of {', '.join(CARDS)}")
    card = CARDS[own]
    if not at:
        return card
    fewer = [str(n) for n in (1, 2, 4, 8, 16) if n <= card.lanes]
    if lanes not in fewer:
        raise UsageError(f"card {name!r}: expected {own}@x and one of {', '.join(fewer)} lanes")
    return replace(card, name=name, pcie=card.pcie * int(lanes) / card.lanes, lanes=int(lanes))


def find(name: str) -> "Card | MeasuredCard":
    """The card called `name` in the table, or the measured card in the file `name` (*.json).

    Raises UsageError for a name that is not in the table, or a file that is not a measured card.
    """
    return load_card(Path(name)) if name.endswith(".json") else sheet(name)


# -- measured cards --------------------------------------------------------------------------------

FORMAT, _LARGEST = "zimage_jax card 1", 2**16  # bytes of a file


@dataclass(frozen=True)
class MeasuredCard:
    """A measured card, and the disk of its machine. Its file is a JSON object:

    format         "zimage_jax card 1"
    name           what plans call it
    device         its name in JAX's device_kind
    capability     [major, minor]
    memory_bytes   the card's whole memory
    context_bytes  device memory that CUDA's context took, outside JAX's allocator
    rates          flops: FLOP/s of large bf16 products, summed in float32;
                   link: bytes/s from page-locked host memory to the card;
                   disk: bytes/s of reading files that are not cached, or null;
                   host_read: bytes/s of reading cached files into page-locked memory, or null;
                   dispatch_seconds: seconds to start and await a chunk's program
    date, by       when it was measured, as 2026-11-25, and by which command
    versions       of jax, of the driver and others, by name
    """

    name: str
    device: str
    capability: tuple[int, int]
    memory: int  # bytes
    context_bytes: int
    flops: float
    link: float
    disk: float | None
    host_read: float | None
    dispatch_seconds: float
    date: str
    by: str
    versions: dict[str, str]

    context_source = "measured"

    @property
    def source(self) -> str:
        """The source of its rates."""
        return f"measured on {self.device}, {self.date}, by {self.by}"

    @property
    def disk_source(self) -> str:
        return "measured" if self.disk else DISK_ASSUMED

    @property
    def usable(self) -> int:
        """Bytes that JAX's allocator gives a process."""
        return int(ALLOWED * self.memory)

    @property
    def rates(self) -> Rates:
        """A block from disk passes through host memory: `disk` is the slower of the two rates. The
        rate of the card's own memory is the data sheet's, as of cards that nobody measured."""
        disk = min(self.disk or ASSUMED_DISK, self.host_read or math.inf)
        card = of_device(self.device)
        memory = card.rates.memory if card else math.inf
        return Rates(
            self.flops, self.link, dispatch=self.dispatch_seconds, disk=disk, memory=memory
        )

    def as_json(self) -> dict[str, Any]:
        """The object that `load_card` reads."""
        own = asdict(self)
        own["memory_bytes"] = own.pop("memory")
        rates = {name: own.pop(name) for name in _RATES}
        return {"format": FORMAT, **own, "rates": rates}


_LINE = "a line of text", lambda v: isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable()
_WHOLE = "a whole number from 1", lambda v: type(v) is int and 0 < v < 2**63
_SPEED = "a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e30  # no NaN
_SPEED_OR_NULL = "a number above 0, or null", lambda v: v is None or _SPEED[1](v)
# field -> what it must be, as an error says it, and the check
_RATES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "flops": _SPEED,
    "link": _SPEED,
    "disk": _SPEED_OR_NULL,
    "host_read": _SPEED_OR_NULL,
    "dispatch_seconds": ("a number from 0", lambda v: v == 0 or _SPEED[1](v)),
}
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (f'"{FORMAT}"', lambda v: v == FORMAT),
    **dict.fromkeys(("name", "device", "date", "by"), _LINE),
    "capability": (
        "[major, minor]",
        lambda v: isinstance(v, list) and [type(n) for n in v] == [int, int],
    ),
    **dict.fromkeys(("memory_bytes", "context_bytes"), _WHOLE),
    "rates": ("an object", lambda v: isinstance(v, dict)),
    "versions": (
        "lines of text by name",
        lambda v: isinstance(v, dict) and all(map(_LINE[1], [*v, *v.values()])),
    ),
}


def load_card(path: Path) -> MeasuredCard:
    """Read a measured card. Raises UsageError unless the file is exactly `MeasuredCard.as_json`."""
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise UsageError(f"card {path}: expected a file of at most 64 KiB")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UsageError(f"card {path}: cannot be read as JSON ({fault})") from None
    _check(path, "", found, _FIELDS)
    _check(path, "rates.", found["rates"], _RATES)
    found |= {name: rate and float(rate) for name, rate in found.pop("rates").items()}
    del found["format"]
    return MeasuredCard(
        memory=found.pop("memory_bytes"), **found | {"capability": tuple(found["capability"])}
    )


def _check(path: Path, where: str, found: Any, fields: dict) -> None:
    """Raises UsageError unless `found` has exactly these fields, each with a valid value."""
    if not isinstance(found, dict) or found.keys() != fields.keys():
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else "no object"
        raise UsageError(f"card {path}: expected the keys {', '.join(fields)}, got {keys[:200]!r}")
    for name, (expected, is_valid) in fields.items():
        if not is_valid(found[name]):
            got = json.dumps(found[name])[:60]
            raise UsageError(f"card {path}: {where}{name}: expected {expected}, got {got}")
