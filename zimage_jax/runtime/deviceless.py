"""Compiles our programs for a card without having one: the GPU compiler needs no GPU.

It needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt, or those of CUDA 13 (jax[cuda12] and
jax[cuda13] install them), but no driver and no CUDA library. The compile options come from
`jax._src`; this works with jax 0.10.2 and 0.11.2.

Attention uses the kernel that the card itself would choose: our flash kernel where the card can run
it. Its Triton code is compiled here too.
"""

import importlib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax

from ..errors import UsageError
from ..model.attention import Target
from ..planning.cards import Card
from ..weights.formats import Storage
from .placement import Placement
from .program import OPTIONS, scratch_bytes
from .programs import Programs

PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
# by capability: bytes of shared memory per multiprocessor and per thread block, and threads per
# multiprocessor
_MULTIPROCESSOR = {
    (7, 5): (65536, 65536, 1024),
    (8, 0): (167936, 166912, 2048),
    (9, 0): (233472, 232448, 2048),
}
_OTHERWISE = (102400, 101376, 1536)


class CardPrograms(Programs):
    """Programs for named cards, one for each device. `compiled` gives the executable, which cannot
    run here, and its scratch bytes."""

    def __init__(self, storage: Storage, dtype, *cards: Card):
        # the compiler first: JAX looks for its plugin once, when the first device is requested
        self._cards, self._compilers = cards, {card: compiler(card) for card in cards}
        host = Placement.on_host()
        super().__init__(storage, dtype, replace(host, others=(host,) * (len(cards) - 1)))
        self.observer = None  # a callback cannot be compiled without a device
        self._by_card: dict[tuple, CardProgram] = {}

    def _make(self, function: Callable, donate: tuple[int, ...], device: int, static: dict) -> Any:
        card = self._cards[device]
        key = (card, function, donate, *sorted(static.items()))
        if key not in self._by_card:  # equal cards have equal programs
            compile_for_card = self._compilers[card]
            self._by_card[key] = CardProgram(card, compile_for_card, function, donate, static)
        return self._by_card[key]

    @property
    def target(self) -> Target:
        return Target("gpu", min(card.capability for card in self._cards))

    def executables(self, function: Callable) -> list:
        """The executables of `function` that were compiled so far."""
        programs: Any = (
            program for (_, compiled, *_), program in self._by_card.items() if compiled is function
        )
        return [executable for program in programs for executable in program.compiled_already]


class CardProgram:
    """Like program.Program, but it only compiles."""

    def __init__(
        self,
        card: Card,
        compile_for_card: Callable,
        function: Callable,
        donate: tuple[int, ...],
        static: dict,
    ):
        self._card, self._compile = card, compile_for_card
        self._jitted = jax.jit(
            lambda *args: function(*args, **static), donate_argnums=donate, keep_unused=True
        )
        self._compiled: dict = {}

    def compiled(self, *args):
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            # lowered on the CPU for CUDA, because a topology's devices have no memory kinds
            with pallas_for(self._card):
                lowered = self._jitted.trace(*args).lower(lowering_platforms=("cuda",))
            executable = self._compile(lowered)
            self._compiled[key] = executable, scratch_bytes(executable.get_compiled_memory_stats())
        return self._compiled[key]

    @property
    def compiled_already(self) -> list:
        return [executable for executable, _ in self._compiled.values()]


def order(executable) -> list[tuple[str, int]]:
    """The order in which a compiled program starts copies, awaits them and computes.

    Each pair is a kind ("start", "done" or "compute") and how often it repeats. Copies of vectors,
    at most some KiB, are left out.
    """
    (module,) = executable.hlo_modules()
    text = module.to_string()
    kinds = []
    for line in text[text.index("\nENTRY") :].splitlines():
        found = re.search(
            r"= \(?\w+\[([\d,]*)\].* (?:(?:copy|async)-(start|done)|custom-call|fusion|while)\(",
            line,
        )
        if found and not (found[2] and "," not in found[1]):
            kinds.append(found[2] or "compute")
    return [(kind, len(list(same))) for kind, same in itertools.groupby(kinds)]


@contextmanager
def pallas_for(card: Card) -> Iterator[None]:
    """Register the CPU's device kind as the card: JAX 0.11 lowers Pallas-Triton only for known
    devices.

    JAX 0.10 has no such list.
    """
    try:
        gpu_info: Any = importlib.import_module("jax._src.pallas.triton.gpu_info")
    except ImportError:
        yield
        return
    kind, (major, minor) = Placement.on_host().device.device_kind, card.capability
    info = gpu_info.GpuInfo(
        gpu_version=None, arch_name=f"{major}.{minor}", compute_capability=10 * major + minor
    )
    gpu_info.registry[kind] = lambda: info
    gpu_info.get_gpu_info.cache_clear()
    try:
        yield
    finally:
        del gpu_info.registry[kind]
        gpu_info.get_gpu_info.cache_clear()


def compiler(card: Card) -> Callable:
    """A function from a lowered program to its executable for the card.

    Raises UsageError if the GPU compiler is not installed.
    """
    if not any(map(importlib.util.find_spec, PLUGINS)):
        raise UsageError(
            "compiling for a card needs the GPU compiler: "
            "pip install zimage_jax[cuda12] or [cuda13]"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax._src.compiler import get_compile_options
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target(card), topology="1x1x1"
    )
    options = {name: str(value) for name, value in OPTIONS.items()}
    devices: Any = tuple(topology.devices)

    def compile_lowered(lowered):
        return devices[0].client.compile(
            lowered.compiler_ir("stablehlo"),
            executable_devices=xla_client.DeviceList(devices),
            compile_options=get_compile_options(
                num_replicas=1, num_partitions=1, env_options_overrides=options
            ),
        )

    return compile_lowered


def target(card: Card) -> str:
    """The card as the text of XLA's GpuTargetConfigProto."""
    (major, minor), limit = card.capability, 2**31 - 1
    shared, shared_by_one, threads = _MULTIPROCESSOR.get(card.capability, _OTHERWISE)
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": threads,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared_by_one,
        "core_count": card.multiprocessors,
        "fpus_per_core": 128,
        "clock_rate_ghz": card.clock,
        "block_dim_limit_x": limit,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(card.bandwidth),
        "l2_cache_size": card.l2_bytes,
        "device_memory_size": card.memory,
    }
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    fields = "\n".join(f"{name}: {value}" for name, value in device.items())
    return f"""gpu_device_info {{
{fields}
cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
dnn_version: "9.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{card.name}"
"""
