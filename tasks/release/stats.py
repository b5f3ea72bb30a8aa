"""What Envoy counted for each service, read from its admin page. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from tasks.spec.value import Value

QUERY = r"/stats?format=json&filter=^cluster\..*\.upstream_rq"
COUNTERS = {
    "upstream_rq_total": "requests",
    "upstream_rq_2xx": "ok",
    "upstream_rq_4xx": "client_errors",
    "upstream_rq_5xx": "server_errors",
    "upstream_rq_timeout": "timeouts",
    "upstream_rq_active": "active",
}
NAME = re.compile(r"^cluster\.([a-z][a-z0-9-]*)\.(upstream_rq_\w+)$")
PERCENTILES = {50.0: "p50_ms", 99.0: "p99_ms"}


class ServiceStats(Value):
    """Counts since Envoy's start (of tries, where one was tried again) and percentiles of the answer times.

    A percentile is None where nothing was answered yet; Envoy folds new answers in every five seconds.
    """

    requests: int = 0
    ok: int = 0
    client_errors: int = 0
    server_errors: int = 0
    timeouts: int = 0
    active: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None


def read_stats(page: str) -> dict[str, ServiceStats]:
    """Return the statistics by service from the admin page's JSON."""
    found: dict[str, dict[str, Any]] = {}
    for entry in json.loads(page)["stats"]:
        if "histograms" in entry:
            for name, values in _percentiles(entry["histograms"]):
                found.setdefault(name, {}).update(values)
        elif (match := NAME.match(entry["name"])) and match[2] in COUNTERS:
            found.setdefault(match[1], {})[COUNTERS[match[2]]] = entry["value"]
    return {name: ServiceStats(**values) for name, values in sorted(found.items())}


def _percentiles(histograms: dict[str, Any]) -> list[tuple[str, dict[str, float | None]]]:
    quantiles = histograms.get("supported_quantiles", [])
    times = []
    for entry in histograms.get("computed_quantiles", []):
        match = NAME.match(entry["name"])
        if match and match[2] == "upstream_rq_time":
            values = dict(zip(quantiles, (value["cumulative"] for value in entry["values"]), strict=True))
            times.append((match[1], {field: values.get(q) for q, field in PERCENTILES.items()}))
    return times
