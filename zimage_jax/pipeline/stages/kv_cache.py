"""K and V that later NFEs reuse, by chunk: on the device, or on the host between visits."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ...model import kv
from ...model.kv import KV, KVFormat, Phase
from ...runtime.ledger import Ledger
from ...runtime.placement import HOST, Placement
from ...units import tree_bytes
from ..attempt import Attempt

Held = list[tuple[KV, ...]]  # of a chunk: for each micro-batch the K and V of its blocks

NAME = "kv cache"


class KVCache:
    def __init__(
        self,
        kv_format: KVFormat,
        shape: tuple[int, int, int, int],
        groups: int,
        sizes: tuple[int, ...],
        placement: Placement,
        on_host: bool,
        ledger: Ledger,
    ):
        """`shape`: contexts of a micro-batch, tokens, heads, head width. `sizes`: blocks of each chunk."""
        self._hold, self._shape, self._groups, self._sizes = kv_format, shape, groups, sizes
        self._placement, self._on_host, self._ledger = placement, on_host, ledger
        self._held: dict[int, Held] = {}
        if not on_host:
            self._held = {chunk: self._room(chunk) for chunk in range(len(sizes))}
        ledger.hold(NAME, self._held)

    def _room(self, chunk: int) -> Held:
        blocks = range(self._sizes[chunk])
        return [
            tuple(kv.empty(self._hold, *self._shape) for _ in blocks) for _ in range(self._groups)
        ]

    def take(self, chunk: int) -> Held:
        """What is held for a chunk, or room for it; the caller may donate it."""
        if not self._on_host:
            return self._held.pop(chunk)
        if chunk not in self._held:
            held = self._room(chunk)
        else:
            with self._ledger.event("copy", f"{NAME} chunk {chunk}", tree_bytes(self._held[chunk])):
                held = self._placement.put(self._held[chunk])
        self._ledger.hold(NAME, held)
        return held

    def put(self, chunk: int, held: Held, *, made: bool) -> None:
        """`held` after the chunk ran, `made` anew or as it was taken."""
        if not self._on_host:
            self._held[chunk] = held
            return
        if made:
            self._held[chunk] = jax.block_until_ready(
                jax.device_put(held, self._placement.sharding(HOST))
            )
        self._ledger.drop(NAME)

    def clear(self) -> None:
        self._held.clear()
        self._ledger.drop(NAME)


@contextmanager
def kv_cache(attempt: Attempt, phase: Phase, groups: int) -> Iterator[KVCache | None]:
    """Room for the K and V of a phase that reuses them; None for one that does not."""
    if not phase.caches:
        yield None
        return
    config, work, choice = attempt.config.transformer, attempt.work, attempt.plan.denoise
    shape = work.contexts // groups, work.tokens, config.n_heads, config.head_dim
    cache = KVCache(
        phase.kv_format,
        shape,
        groups,
        choice.main_sizes,
        attempt.placement,
        choice.kv_on_host,
        attempt.ledger,
    )
    try:
        yield cache
    finally:
        cache.clear()
