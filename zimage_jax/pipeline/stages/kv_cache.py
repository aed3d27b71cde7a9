"""Keeps K and V that later NFEs reuse, by chunk: on the device, or on the host between visits."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ...model import kv
from ...model.kv import KV, KVFormat, Phase
from ...runtime.placement import HOST, Placement
from ...runtime.recorder import Recorder
from ...units import tree_bytes
from ..attempt import Attempt

Held = list[tuple[KV, ...]]  # a chunk's K and V: for each micro-batch, one KV per block


class KVCache:
    def __init__(
        self,
        name: str,
        kv_format: KVFormat,
        shape: tuple[int, int, int, int],
        groups: int,
        attending: tuple[tuple[int, int], ...],
        placement: Placement,
        on_host: bool,
        recorder: Recorder,
    ):
        """`name`: in the recorder. `shape`: contexts of a micro-batch, tokens, heads, head width.

        `groups`: number of micro-batches. `attending`: attentions of each chunk that has any, and its
        device; chunks without are not counted. On the host are those of one device alone.
        """
        self._kv_format, self._shape, self._groups = kv_format, shape, groups
        self._attending = attending
        self._name, self._placement, self._on_host = name, placement, on_host
        self._recorder = recorder
        self._held: dict[int, Held] = {}
        self._coming: dict[int, Held] = {}
        # the K and V that are being copied to the host: the device's arrays, and the host's
        self._leaving: tuple[Held, Held] | None = None
        if not on_host:
            self._held = {chunk: self._room(chunk) for chunk in range(len(attending))}
        for device, of in enumerate(recorder.each):
            of.hold(name, [self._held[c] for c in self._held if attending[c][1] == device])

    def _room(self, chunk: int) -> Held:
        blocks, device = self._attending[chunk]
        with jax.default_device(self._placement.each[device].device):
            return [
                tuple(kv.empty(self._kv_format, *self._shape) for _ in range(blocks))
                for _ in range(self._groups)
            ]

    def take(self, chunk: int, *, reads: bool) -> Held:
        """A chunk's K and V, or empty arrays if the NFE does not read them; both may be donated.

        If K and V are on the host, the next chunk's are copied while this one computes.
        """
        if not self._on_host:
            return self._held.pop(chunk)
        if chunk == 0:
            self._leave()
        self._recorder.arrived()  # copied during the last visit; the caller may donate it
        held = self._coming.pop(chunk, None)
        if held is None and reads:
            held = self._bring(chunk)
            self._recorder.arrived()
        elif held is None:
            held = self._room(chunk)
        if reads and chunk + 1 in self._held:
            self._coming[chunk + 1] = self._bring(chunk + 1)
        self._account(held)
        return held

    def put(self, chunk: int, held: Held, *, made: bool) -> None:
        """Keep a chunk's K and V after its visit. `made`: the visit made them anew.

        If K and V are on the host, new ones are copied there while the next chunk computes.
        """
        if not self._on_host:
            self._held[chunk] = held
            return
        if made:
            self._leave()
            self._held[chunk] = self._placement.send(held, HOST)
            self._leaving = held, self._held[chunk]
        self._account()

    def _bring(self, chunk: int) -> Held:
        held: Held = self._placement.send(self._held[chunk])
        self._recorder.sent(held, f"kv cache chunk {chunk}", tree_bytes(held))
        return held

    def _leave(self) -> None:
        """Wait until the last chunk's K and V are on the host."""
        if self._leaving is not None:
            jax.block_until_ready(self._leaving[1])
            self._leaving = None

    def _account(self, *held: Held) -> None:
        leaving = () if self._leaving is None else self._leaving[0]
        self._recorder.hold(self._name, (held, self._coming, leaving))

    def clear(self) -> None:
        try:
            self._leave()
            self._recorder.arrived()
        finally:
            self._held.clear()
            self._coming.clear()
            for recorder in self._recorder.each:
                recorder.drop(self._name)


@contextmanager
def kv_cache(attempt: Attempt, phase: Phase, groups: int) -> Iterator[KVCache | None]:
    """The cache of a phase that reuses K and V; None for other phases."""
    if not phase.caches:
        yield None
        return
    config, work, choice = attempt.config.transformer, attempt.work, attempt.plan.denoise
    shape = work.contexts // groups, work.tokens, config.n_heads, config.head_dim
    cache = KVCache(
        attempt.name("kv cache"),
        phase.kv_format,
        shape,
        groups,
        choice.attending,
        attempt.placement,
        choice.kv_on_host,
        attempt.recorder,
    )
    try:
        yield cache
    finally:
        cache.clear()
