"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, facts: dict[str, str], queue_depth: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "drydock_requests", "Inference requests by answer code", ["code"], registry=self._registry
        )
        self._seconds = Histogram(
            "drydock_request_seconds",
            "Time from the request's head to its answer, successful inference only",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._rows = Counter("drydock_rows", "Rows answered", registry=self._registry)
        self._unlogged = Counter(
            "drydock_unlogged_answers", "Answers that the prediction log dropped", registry=self._registry
        )
        Gauge("drydock_queue_depth", "Requests that wait or run", registry=self._registry).set_function(
            queue_depth
        )
        Info("drydock_package", "What is served", registry=self._registry).info(facts)
        ProcessCollector(registry=self._registry)

    def observe(self, code: int, seconds: float) -> None:
        self._requests.labels(str(code)).inc()
        if code == 200:
            self._seconds.observe(seconds)

    def count_rows(self, num_rows: int) -> None:
        self._rows.inc(num_rows)

    def count_unlogged(self) -> None:
        self._unlogged.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
