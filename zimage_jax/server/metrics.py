"""Figures for Prometheus."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .store import STATES

_SECONDS = (1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """`gauges`: by name, what they are and how they are read."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]):
        self._registry = CollectorRegistry()
        self._ended = Counter(
            "zimage_jobs", "Jobs that have ended", ["state"], registry=self._registry
        )
        for state in STATES[1:]:
            self._ended.labels(state)
        self._seconds = Histogram(
            *("zimage_picture_seconds", "Seconds that a picture took"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self._registry).set_function(value)

    def ended(self, state: str) -> None:
        self._ended.labels(state).inc()

    def drawn(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
