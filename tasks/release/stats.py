"""What Envoy counted for each service, read from its admin page. Pure.

What its counters of a cluster mean, found by experiment (``tests/integration/test_gateway.py``):

    upstream_rq_completed   requests that ended with a status: the server's own, or the one that Envoy made up:
                            502 no HTTP, 503 reset, refused, no replica or too many, 504 too late. A cancelled
                            request is not among them. A try that was tried again is, where it had an answer
    upstream_rq_5xx         those of them with 500 or more, whoever made it up
    upstream_rq_total       tries that got a connection, so none to a dead replica: of no use to a judge
    upstream_cx_destroy_remote_with_active_rq   connections that the server cut under a request: before its answer
                            (then a 503 is counted too, or it is tried again) or within it (then its 200 was
                            counted already, and nothing else tells)
    upstream_rq_time        a histogram of the times of whole answers, in ms; what got no answer is not in it

A shadow's requests count on its own cluster in the same way.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any
from urllib.parse import quote

from pydantic import ConfigDict, Field

from tasks.spec.value import Value

COUNTERS = {
    "upstream_rq_completed": "requests",
    "upstream_rq_2xx": "ok",
    "upstream_rq_4xx": "client_errors",
    "upstream_rq_5xx": "server_errors",
    "upstream_rq_503": "unavailable",
    "upstream_cx_destroy_remote_with_active_rq": "cut",
    "upstream_rq_timeout": "timeouts",
    "upstream_rq_active": "active",
}
TIMES = "upstream_rq_time"
SERVICE = "[a-z][a-z0-9-]*"
NAME = re.compile(rf"^cluster\.({SERVICE})\.(\w+)$")

Latency = tuple[tuple[float, int], ...]


class ServiceStats(Value):
    """Counts since Envoy's start, and times folded in every quarter of a second.

    ``failures`` are the requests without a good answer, whole, below 500: ``server_errors`` and answers cut
    within. It never falls, and is short by a cut for each 503 that the server itself answered.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    requests: int = 0
    failures: int = 0
    ok: int = 0
    client_errors: int = 0
    server_errors: int = 0
    timeouts: int = 0
    active: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    # Evidence, not a figure to show: left out of dumps, for which its last edge would be no JSON either.
    latency: Latency = Field(default=(), exclude=True, description="(upper edge in ms, answers at or below it), to inf")


def percentile_ms(latency: Latency, quantile: float) -> float | None:
    """Return the time that this share of the answers took at most, evenly spread between two edges.

    None where nothing was answered yet; the last finite edge where it is above that.
    """
    wanted = quantile * (latency[-1][1] if latency else 0)
    low, before = 0.0, 0
    for edge, count in latency:
        if count >= wanted > 0:
            return low if math.isinf(edge) else low + (edge - low) * (wanted - before) / (count - before)
        low, before = edge, count
    return None


def query(services: tuple[str, ...] = ()) -> str:
    """Return the admin page's path that shows the services' counts (default: all)."""
    which = "|".join(services) or SERVICE
    counts = "|".join((*COUNTERS, TIMES))
    wanted = quote(rf"^cluster\.({which})\.({counts})$")
    return f"/stats?format=json&histogram_buckets=cumulative&filter={wanted}"


def read_stats(page: str) -> dict[str, ServiceStats]:
    """Return the statistics by service from the admin page's JSON."""
    found: dict[str, dict[str, Any]] = {}
    for entry in json.loads(page)["stats"]:
        for histogram in entry.get("histograms", ()):
            if match := NAME.match(histogram["name"]):
                found.setdefault(match[1], {})["latency"] = _latency(histogram["buckets"])
        if (match := NAME.match(entry.get("name", ""))) and match[2] in COUNTERS:
            found.setdefault(match[1], {})[COUNTERS[match[2]]] = entry["value"]
    return {name: _service(values) for name, values in sorted(found.items())}


def _service(values: dict[str, Any]) -> ServiceStats:
    unavailable, cut = values.pop("unavailable", 0), values.pop("cut", 0)
    failures = values.get("server_errors", 0) + max(cut - unavailable, 0)
    times = values.get("latency", ())
    percentiles = {"p50_ms": percentile_ms(times, 0.5), "p99_ms": percentile_ms(times, 0.99)}
    return ServiceStats(failures=failures, **percentiles, **values)


def _latency(buckets: list[dict[str, Any]]) -> Latency:
    """The last of the buckets is longer than any request may take, so nothing is above it."""
    pairs = [(float(bucket["upper_bound"]), bucket["cumulative"]) for bucket in buckets]
    return (*pairs[:-1], (math.inf, pairs[-1][1]))
