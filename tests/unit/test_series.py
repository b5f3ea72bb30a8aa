"""The gateway's counts over time: recorded, bounded, read back as rates."""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path

import pytest

from tasks.orchestrate.same_origin import is_foreign
from tasks.release import series as module
from tasks.release.series import TIERS, Series, parse, windows
from tasks.release.stats import ServiceStats

pytestmark = pytest.mark.timeout(20)
START = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)
SERVICE = "digits-0123456789ab"
OTHER = "sms-spam-0123456789ab"


def stats(requests: int, failures: int = 0, slow: int = 0) -> ServiceStats:
    answered = requests - failures
    latency = ((1.0, 0), (10.0, answered - slow), (100.0, answered), (math.inf, answered))
    return ServiceStats(requests=requests, failures=failures, latency=latency)


def after(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def record(series: Series, counts: list[tuple[float, int, int]], share: float = 1.0) -> None:
    for seconds, requests, failures in counts:
        series.record({SERVICE: stats(requests, failures)}, {SERVICE: share}, after(seconds))


def test_cumulative_counts_become_rates(tmp_path: Path) -> None:
    series = Series(tmp_path)
    record(series, [(0, 0, 0), (5, 100, 10), (10, 300, 10)], share=0.25)
    points = series.read("digits", 900, until=after(10))
    rates = [point.services[SERVICE] for point in points]
    assert [(r.requests_per_second, r.error_ratio, r.traffic_ratio) for r in rates] == [(20, 0.1, 0.25), (40, 0, 0.25)]
    assert [point.at for point in points] == [after(5).timestamp(), after(10).timestamp()]


def test_the_percentiles_are_of_the_window_alone(tmp_path: Path) -> None:
    series = Series(tmp_path)
    for seconds, found in ((0, stats(0)), (5, stats(1000)), (10, stats(1100, slow=100))):
        series.record({SERVICE: found}, {}, after(seconds))
    fast, slow = (point.services[SERVICE] for point in series.read("digits", 900, until=after(10)))
    assert fast.p50_ms == pytest.approx(5.5)
    assert slow.p50_ms == pytest.approx(55)


def test_answers_beyond_the_last_edge_keep_its_finite_neighbour(tmp_path: Path) -> None:
    series = Series(tmp_path)
    for seconds, count in ((0, 0), (5, 10)):
        found = ServiceStats(requests=count, latency=((1.0, 0), (math.inf, count)))
        series.record({SERVICE: found}, {}, after(seconds))
    assert series.read("digits", 900, until=after(5))[0].services[SERVICE].p99_ms == 1.0


def test_a_counter_that_went_back_counts_from_zero(tmp_path: Path) -> None:
    series = Series(tmp_path)
    record(series, [(0, 1000, 5), (5, 1100, 5), (10, 50, 0), (15, 150, 0)])
    rates = [point.services[SERVICE].requests_per_second for point in series.read("digits", 900, until=after(15))]
    assert rates == [20, 10, 20]


def test_a_reset_inside_one_window_hides_nothing(tmp_path: Path) -> None:
    series = Series(tmp_path)
    record(series, [(0, 1000, 0), (5, 1100, 0), (10, 50, 0), (15, 150, 0)])
    (point,) = series.read("digits", 900, points=1, until=after(15))
    assert point.services[SERVICE].requests_per_second == pytest.approx((100 + 50 + 100) / 15)


def test_nothing_answered_is_no_error_ratio_and_one_sample_is_no_point(tmp_path: Path) -> None:
    series = Series(tmp_path)
    record(series, [(0, 7, 7)])
    assert series.read("digits", 900, until=after(0)) == []
    record(series, [(5, 7, 7)])
    rates = series.read("digits", 900, until=after(5))[0].services[SERVICE]
    assert (rates.requests_per_second, rates.error_ratio, rates.p99_ms) == (0, None, None)


def test_a_new_service_counts_from_zero_and_another_workload_is_not_told(tmp_path: Path) -> None:
    series = Series(tmp_path)
    series.record({OTHER: stats(5)}, {}, after(0))
    series.record({OTHER: stats(5), SERVICE: stats(10)}, {}, after(5))
    assert set(series.read("digits", 900, until=after(5))[0].services) == {SERVICE}
    assert set(series.read("sms-spam", 900, until=after(5))[0].services) == {OTHER}
    assert series.read("sms", 900, until=after(5))[0].services == {}


def test_no_series_is_no_points(tmp_path: Path) -> None:
    assert Series(tmp_path).read("digits", 900) == []


def test_every_range_is_covered_and_bounded(tmp_path: Path) -> None:
    """A sample a minute for nine days: each range is there from its first to its last moment."""
    series, end = Series(tmp_path), 9 * 86400
    for second in range(0, end, 60):
        series.record({SERVICE: stats(second)}, {}, after(second))
    for seconds in (900, 6 * 3600, 7 * 86400):
        points = series.read("digits", seconds, until=after(end))
        assert len(points) <= 182
        assert points[0].at <= after(end - seconds * 0.9).timestamp()
        assert points[-1].at >= after(end - 300).timestamp()
        assert {round(point.services[SERVICE].requests_per_second, 1) for point in points} == {1.0}
    for tier in TIERS:
        lines = sum(path.read_bytes().count(b"\n") for path in series.folder.glob(f"{tier.name}*"))
        assert lines <= 2 * tier.kept_seconds / max(60, tier.every_seconds) + 4, tier


def test_a_file_never_grows_beyond_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    series = Series(tmp_path)
    record(series, [(second, second, 0) for second in range(100)])
    assert {path.name for path in series.folder.glob("fine*")} == {"fine.jsonl", "fine.1.jsonl"}
    assert all(path.stat().st_size <= 1000 for path in series.folder.iterdir())


def test_a_change_of_the_shares_is_in_every_tier(tmp_path: Path) -> None:
    series = Series(tmp_path)
    for seconds, share in ((0, 0.0), (5, 0.05), (10, 0.05), (15, 0.25)):
        record(series, [(seconds, 0, 0)], share)
    lines = (series.folder / "coarse.jsonl").read_bytes().splitlines()
    shares = [sample.services[SERVICE].traffic_ratio for line in lines if (sample := parse(line, "digits"))]
    assert shares == [0.0, 0.05, 0.25]


def test_a_line_that_a_crash_cut_costs_only_itself(tmp_path: Path) -> None:
    series = Series(tmp_path)
    record(series, [(0, 0, 0), (5, 100, 0)])
    path = series.folder / "fine.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    record(Series(tmp_path), [(10, 300, 0)])
    (point,) = series.read("digits", 900, until=after(10))
    assert point.services[SERVICE].requests_per_second == 30


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b'{"at": 1}', b'{"at": "x", "services": {}}', b'{"at":1,"services":3}', b"\xff"]
)
def test_a_line_that_is_no_sample_is_none(line: bytes) -> None:
    assert parse(line, "digits") is None


def test_no_samples_are_no_windows() -> None:
    assert windows([], 5) == []


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        ("GET", {"origin": "http://evil.test"}, False),
        ("POST", {}, False),
        ("POST", {"host": "a:8080", "origin": "http://a:8080"}, False),
        ("POST", {"host": "a:8080", "origin": "https://a:8080"}, False),
        ("POST", {"host": "a:8080", "origin": "http://a:5000"}, True),
        ("POST", {"host": "a:8080", "origin": "null"}, True),
        ("DELETE", {"host": "a:8080", "origin": "http://evil.test"}, True),
        ("POST", {"host": "a:8080", "origin": "http://evil.test", "authorization": "Bearer x"}, False),
        ("POST", {"host": "a:8080", "origin": "http://evil.test", "authorization": "Basic x"}, True),
        # Behind a proxy that changes the host, the browser's own word holds.
        ("POST", {"host": "inner:8080", "origin": "https://outer", "sec-fetch-site": "same-origin"}, False),
        ("POST", {"host": "a:8080", "sec-fetch-site": "same-site"}, True),
        ("POST", {"host": "a:8080", "origin": "http://a:8080", "sec-fetch-site": "cross-site"}, True),
    ],
)
def test_a_request_of_another_origin_is_known(method: str, headers: dict[str, str], foreign: bool) -> None:
    assert is_foreign(method, headers) is foreign
