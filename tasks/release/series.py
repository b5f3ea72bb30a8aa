"""The gateway's counts over time: what the page's curves are drawn from.

    <home>/gateway/series/<tier>.jsonl      one line a sample: the cumulative counts of every service
    <home>/gateway/series/<tier>.1.jsonl    the period before

Counts are cumulative, so a coarser tier is the same line written less often and nothing is aggregated. A tier
keeps one to two of its periods, each file at most ``MAX_BYTES``.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tasks.release.evidence import Counts, plus, since
from tasks.release.stats import ServiceStats, percentile_ms
from tasks.spec.value import Value

MAX_BYTES = 8 << 20
HOUR = 3600


class Tier(NamedTuple):
    """Samples at least ``every_seconds`` apart, kept for ``kept_seconds`` or more."""

    name: str
    every_seconds: float
    kept_seconds: float


TIERS = (
    Tier("fine", 0, HOUR),
    Tier("minute", 60, 12 * HOUR),
    Tier("coarse", 300, 7 * 24 * HOUR),
)


class Served(NamedTuple):
    """One service in one sample: its counts since its start, and its share of the traffic then."""

    counts: Counts
    traffic_ratio: float


class Sample(NamedTuple):
    """What was counted at a time (seconds since 1970)."""

    at: float
    services: Mapping[str, Served]


class Rates(Value):
    """One service over one window; a value is None where nothing was answered in it."""

    requests_per_second: float
    error_ratio: float | None
    p50_ms: float | None
    p99_ms: float | None
    traffic_ratio: float


class Point(Value):
    """All services of a workload over the window that ends at ``at`` (seconds since 1970)."""

    at: float
    services: dict[str, Rates]


class Series:
    """The time series of one home: one process records, any number read."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "gateway" / "series"
        self._written: dict[str, float] = {}
        self._shares: dict[str, float] = {}

    def record(self, stats: Mapping[str, ServiceStats], shares: Mapping[str, float], at: dt.datetime) -> None:
        """Append one sample; a change of the shares goes into every tier at once, so that no step is lost.

        Raises:
            OSError: the disk is full, say; the sample is lost, the files stay readable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        now, changed = at.timestamp(), dict(shares) != self._shares
        line = _line(now, stats, shares)
        for tier in TIERS:
            if changed or not 0 <= now - self._written.get(tier.name, -1.0) < tier.every_seconds:
                self._append(tier, line, now)
                self._written[tier.name] = now
        self._shares = dict(shares)

    def read(self, workload: str, seconds: float, points: int = 180, until: dt.datetime | None = None) -> list[Point]:
        """Return at most about ``points`` points of the last ``seconds``, oldest first."""
        end = (until or dt.datetime.now(dt.UTC)).timestamp()
        tier = next((tier for tier in TIERS if tier.kept_seconds >= seconds), TIERS[-1])
        width = seconds / points
        # One more window before the first: its last sample is what the first is counted from.
        start = end - seconds - max(width, tier.every_seconds)
        return windows((sample for sample in self._samples(tier, workload) if start <= sample.at <= end), width)

    def _samples(self, tier: Tier, workload: str) -> Iterator[Sample]:
        for path in (self._path(tier, ".1"), self._path(tier)):
            try:
                lines = path.read_bytes().split(b"\n")
            except FileNotFoundError:
                continue
            yield from (sample for line in lines if (sample := parse(line, workload)))

    def _append(self, tier: Tier, line: bytes, now: float) -> None:
        path = self._path(tier)
        if path.exists() and _is_full(path, len(line), now - tier.kept_seconds):
            path.replace(self._path(tier, ".1"))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A line that a crash cut short must not swallow this one.
            cut = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * bool(cut) + line)
        finally:
            os.close(descriptor)

    def _path(self, tier: Tier, period: str = "") -> Path:
        return self.folder / f"{tier.name}{period}.jsonl"


def parse(line: bytes, workload: str) -> Sample | None:
    """Return a line's sample with the services of one workload; None for a line that a crash cut."""
    try:
        data = json.loads(line)
        own = {name: each for name, each in data["services"].items() if name.rpartition("-")[0] == workload}
        return Sample(float(data["at"]), {name: _served(each) for name, each in own.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def windows(samples: Iterable[Sample], width: float) -> list[Point]:
    """Return one point for each ``width`` seconds that hold a sample. Pure.

    The growth from sample to sample is summed, so that a counter that went back (Envoy was started again)
    counts from 0 and hides nothing.
    """
    ordered, points = sorted(samples, key=lambda sample: sample.at), []
    window: list[tuple[Sample, Sample]] = []
    for before, after in pairwise(ordered):
        if window and after.at // width != window[-1][1].at // width:
            points.append(_point(window))
            window = []
        window.append((before, after))
    return [*points, _point(window)] if window else points


def _point(window: list[tuple[Sample, Sample]]) -> Point:
    first, last = window[0][0], window[-1][1]
    done: dict[str, Served] = {}
    for before, after in window:
        for name, now in after.services.items():
            # A service that is new counts from 0.
            known = before.services.get(name)
            grown = since(now.counts, known.counts if known else Counts())
            done[name] = Served(plus(done[name].counts, grown) if name in done else grown, now.traffic_ratio)
    seconds = max(last.at - first.at, 1e-3)
    return Point(at=last.at, services={name: _rates(done[name], seconds) for name in sorted(done)})


def _rates(done: Served, seconds: float) -> Rates:
    counts = done.counts
    return Rates(
        requests_per_second=counts.requests / seconds,
        error_ratio=min(1.0, counts.failures / counts.requests) if counts.requests else None,
        p50_ms=percentile_ms(counts.latency, 0.5),
        p99_ms=percentile_ms(counts.latency, 0.99),
        traffic_ratio=done.traffic_ratio,
    )


def _line(at: float, stats: Mapping[str, ServiceStats], shares: Mapping[str, float]) -> bytes:
    services = {
        name: [
            found.requests,
            found.failures,
            round(shares.get(name, 0.0), 6),
            # JSON knows no infinity, the last edge.
            [[None if math.isinf(edge) else edge, count] for edge, count in found.latency],
        ]
        for name, found in stats.items()
    }
    return json.dumps({"at": round(at, 3), "services": services}, separators=(",", ":")).encode() + b"\n"


def _served(data: Any) -> Served:
    requests, failures, traffic_ratio, latency = data
    buckets = tuple((math.inf if edge is None else edge, count) for edge, count in latency)
    # Our own line: its types are known, and checking each of a week's samples takes a second.
    counts = Counts.model_construct(requests=requests, failures=failures, latency=buckets, answers={})
    return Served(counts, float(traffic_ratio))


def _is_full(path: Path, more_bytes: int, oldest: float) -> bool:
    if path.stat().st_size + more_bytes > MAX_BYTES:
        return True
    with path.open("rb") as stream:
        first = parse(stream.readline(), "")
    # A first line that can't be read says nothing about the file's age: its bytes still bound it.
    return first is not None and first.at < oldest
