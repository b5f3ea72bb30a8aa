"""What the server counts: plain numbers on the way of a request, Prometheus' text format when it is asked for."""

from __future__ import annotations

import bisect
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by bucket, the last one without a bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """One server's metrics. ``facts`` say what is served; ``classes`` are counted from zero."""

    def __init__(
        self, facts: Mapping[str, str], classes: tuple[str, ...], depth: Callable[[], int] = lambda: 0
    ) -> None:
        self._facts, self._depth = facts, depth
        self.codes: Counter[int] = Counter()
        # Of live requests and of replayed ones: what is replayed is distributed as the holdout, not as the traffic.
        self.labels, self.replayed_labels = (Counter(dict.fromkeys(classes, 0)) for _ in range(2))
        self.seconds, self.batch_rows = Histogram(SECONDS), Histogram(BATCH_ROWS)
        self.rows = self.unlogged = self.cache_hits = self.cache_misses = 0

    def count_unlogged(self) -> None:
        self.unlogged += 1

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return ("\n".join(self._lines()) + "\n").encode()

    def _lines(self) -> Iterator[str]:
        yield from family("drydock_requests", "counter", "Inference requests by answer code")
        yield from (f'drydock_requests_total{{code="{code}"}} {n}.0' for code, n in sorted(self.codes.items()))
        yield from family("drydock_answers", "counter", "Rows answered by class")
        for replayed, counted in (("false", self.labels), ("true", self.replayed_labels)):
            for name, count in counted.items():
                yield f"drydock_answers_total{labels({'label': name, 'replayed': replayed})} {count}.0"
        yield from histogram(
            "drydock_request_seconds",
            "Time from the request's head to its answer, successful inference only",
            self.seconds,
        )
        yield from histogram("drydock_batch_rows", "Rows of a batch", self.batch_rows)
        yield from single("drydock_rows_total", "counter", "Rows answered", self.rows)
        yield from single(
            "drydock_unlogged_answers_total", "counter", "Answers that the prediction log left out", self.unlogged
        )
        yield from single("drydock_cache_hits_total", "counter", "Answers from the cache", self.cache_hits)
        yield from single(
            "drydock_cache_misses_total", "counter", "Requests that the cache did not hold", self.cache_misses
        )
        yield from single("drydock_queue_depth", "gauge", "Requests that wait or run", self._depth())
        yield from family("drydock_package_info", "gauge", "What is served")
        yield f"drydock_package_info{labels(self._facts)} 1.0"
        yield from process()


def family(name: str, kind: str, text: str) -> Iterator[str]:
    name = f"{name}_total" if kind == "counter" and not name.endswith("_total") else name
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def single(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield from family(name, kind, text)
    yield f"{name} {float(value)}"


def histogram(name: str, text: str, found: Histogram) -> Iterator[str]:
    yield from family(name, "histogram", text)
    total = 0
    for bound, count in zip((*found.bounds, float("inf")), found.counts, strict=True):
        total += count
        yield f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else float(bound)}"}} {total}.0'
    yield f"{name}_count {total}.0"
    yield f"{name}_sum {found.total}"


def labels(pairs: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in sorted(pairs.items())) + "}"


def escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def process() -> Iterator[str]:
    """The names that Prometheus' own clients use; read from /proc where there is one."""
    yield from single("process_cpu_seconds_total", "counter", "Processor time, user and system", time.process_time())
    if Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield from single("process_resident_memory_bytes", "gauge", "Memory", pages * os.sysconf("SC_PAGE_SIZE"))
        yield from single("process_open_fds", "gauge", "Open files", len(os.listdir("/proc/self/fd")))
