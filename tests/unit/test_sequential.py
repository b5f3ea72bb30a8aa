"""Bounds that hold at every look, and the evidence made of them: how soon it decides, and how seldom wrongly."""

from __future__ import annotations

import math
import random
import statistics
import timeit
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.release.evidence import REPLAYED, Counts, answer_shift, measurements, plus, since, verdict_on
from tasks.release.sequential import bounds
from tasks.spec.workload import Rollout

pytestmark = pytest.mark.timeout(60)
PLAN = Rollout()
EDGES = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, math.inf)


# --- bounds -------------------------------------------------------------------------------------------------


@given(num_trials=st.integers(0, 5000), data=st.data())
def test_the_share_lies_within_its_bounds(num_trials, data):
    num_events = data.draw(st.integers(0, num_trials))
    low, high = bounds(num_events, num_trials)
    assert 0 <= low <= high <= 1
    if num_trials:
        assert low <= num_events / num_trials <= high


@given(num_trials=st.integers(1, 2000), data=st.data())
def test_one_more_event_never_lowers_them(num_trials, data):
    num_events = data.draw(st.integers(0, num_trials - 1))
    (low, high), (more_low, more_high) = bounds(num_events, num_trials), bounds(num_events + 1, num_trials)
    assert low <= more_low
    assert high <= more_high


@given(num_trials=st.integers(0, 500), data=st.data())
def test_events_and_the_rest_are_mirrored(num_trials, data):
    num_events = data.draw(st.integers(0, num_trials))
    low, high = bounds(num_events, num_trials)
    assert bounds(num_trials - num_events, num_trials) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_nothing_seen_says_nothing():
    assert bounds(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="num_events = 3"):
        bounds(3, 2)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_a_look_after_each_trial_hardly_ever_leaves_the_true_share_out(share):
    """300 series of 1000 looks each: the bounds allow 5 % of series to leave it out, here at a level of 0.05."""
    draw, num_series = random.Random(1), 300
    left_out = 0
    for _ in range(num_series):
        num_events = 0
        for num_trials in range(1, 1001):
            num_events += draw.random() < share
            if _is_out(num_events, num_trials, share):
                left_out += 1
                break
    assert left_out / num_series <= 0.05


def _is_out(num_events: int, num_trials: int, share: float) -> bool:
    # A cheap look first: far from the edge the bounds need not be computed.
    if abs(num_events / num_trials - share) < 1.5 * math.sqrt(share * (1 - share) / num_trials):
        return False
    low, high = bounds(num_events, num_trials, alpha=0.05)
    return not low <= share <= high


def test_they_are_quick():
    seconds = min(timeit.repeat(lambda: bounds.__wrapped__(20, 400), number=200, repeat=5)) / 200
    assert seconds < 200e-6


# --- counts -------------------------------------------------------------------------------------------------


def test_a_window_is_what_came_since():
    before = Counts(requests=10, failures=1, latency=((5, 8), (math.inf, 9)), answers={"a": 9})
    now = Counts(requests=15, failures=2, latency=((5, 12), (math.inf, 13)), answers={"a": 10, "b": 3})
    done = since(now, before)
    assert done == Counts(requests=5, failures=1, latency=((5, 4), (math.inf, 4)), answers={"a": 1, "b": 3})
    assert plus(before, done) == now
    assert since(now, now).requests == 0


def test_a_counter_that_went_back_counts_from_nothing_and_the_others_go_on():
    before = Counts(requests=100, failures=1, latency=((5, 99), (math.inf, 99)), answers={"a": 90})
    envoy = since(Counts(requests=7, latency=((5, 7), (math.inf, 7)), answers={"a": 97}), before)
    assert (envoy.requests, envoy.answered, envoy.answers) == (7, 7, {"a": 7})
    server = since(before.model_copy(update={"requests": 110, "answers": {"a": 4}}), before)
    assert (server.requests, server.answers) == (10, {"a": 4})


def test_counts_outlive_the_file():
    counts = Counts(requests=1, latency=((5.0, 1), (math.inf, 1)))
    assert Counts.model_validate_json(counts.model_dump_json()) == counts


def test_the_shift_of_answers_is_what_chance_does_not_explain():
    even = {str(k): 100 for k in range(10)}
    assert answer_shift(even, even) == 0
    assert answer_shift(even, {"0": 1000}) > 0.8
    assert answer_shift(even, {}) == 0
    draw = random.Random(0)
    shifts = []
    for _ in range(200):
        one, other = ([str(draw.randrange(10)) for _ in range(100)] for _ in range(2))
        shifts.append(answer_shift(*({x: s.count(x) for x in set(s)} for s in (one, other))))
    assert statistics.mean(shifts) < 0.03
    assert max(shifts) < 0.2


def test_live_and_replayed_answers_are_compared_apart():
    """Clients ask one thing over and over, and a canary of 5 % has mostly the holdout in its mix."""
    holdout = {f"{REPLAYED}{k}": 20 for k in range(10)}
    champion = Counts(requests=2200, answers={"7": 2000} | holdout)
    for candidate, shifted in (({"7": 100} | holdout, False), (holdout, False), ({"3": 100} | holdout, True)):
        found = {m.metric: m for m in measurements(PLAN, Counts(requests=300, answers=candidate), champion)}
        assert (found["answer_shift"].low > 0.3) is shifted
    few = {name: count // 4 for name, count in holdout.items()}
    found = {m.metric: m for m in measurements(PLAN, Counts(requests=90, answers={"7": 40} | few), champion)}
    assert (found["answer_shift"].low, found["answer_shift"].high) == (0, 1), "neither kind is known yet"


# --- evidence: how soon, and how seldom wrongly ---------------------------------------------------------------

Answer = tuple[bool, float, str]  # failed, milliseconds, label


class Arm:
    """One service's counters, fed answer by answer."""

    def __init__(self) -> None:
        self.requests = self.failures = self.slow = 0
        self.buckets = [0] * len(EDGES)
        self.answers: dict[str, int] = {}

    def add(self, answer: Answer) -> None:
        failed, ms, label = answer
        self.requests += 1
        self.failures += failed
        if not failed:
            self.slow += ms > 150
            self.buckets[next(i for i, edge in enumerate(EDGES) if ms <= edge)] += 1
            self.answers[label] = self.answers.get(label, 0) + 1

    @property
    def counts(self) -> Counts:
        total, latency = 0, []
        for edge, count in zip(EDGES, self.buckets, strict=True):
            total += count
            latency.append((edge, total))
        return Counts.model_construct(
            requests=self.requests, failures=self.failures, refused=0, latency=tuple(latency), answers=self.answers
        )


def healthy(draw: random.Random) -> Answer:
    """About 3 ms, and now and then a stall of up to 80 ms, as on a laptop with other work."""
    ms = draw.lognormvariate(1.1, 0.35) + (draw.uniform(5, 80) if draw.random() < 0.02 else 0)
    return False, ms, str(draw.randrange(10))


def failing(draw: random.Random) -> Answer:
    return True, 1.0, ""


def slow_at_times(draw: random.Random) -> Answer:
    failed, ms, label = healthy(draw)
    return failed, ms + (200 if draw.random() < 0.05 else 0), label


def constant(draw: random.Random) -> Answer:
    return (*healthy(draw)[:2], "0")


def play(
    candidate: Callable[[random.Random], Answer], share: float, seed: int, most: int, every: int = 1
) -> tuple[str, Arm]:
    """Feed both arms by ``share`` until something is decided; return it with the candidate's counters."""
    draw, ours, theirs = random.Random(seed), Arm(), Arm()
    for arm in _turns(draw, share, ours, theirs):
        arm.add((candidate if arm is ours else healthy)(draw))
        if arm is ours and ours.requests % every == 0:
            verdict = verdict_on(PLAN, ours.counts, theirs.counts).verdict
            if verdict != "inconclusive" or ours.requests >= most:
                return verdict, ours
    raise AssertionError("unreachable")


def _turns(draw: random.Random, share: float, ours: Arm, theirs: Arm) -> Iterator[Arm]:
    while True:
        yield ours if draw.random() < share else theirs


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_candidate_as_good_as_the_champion_passes_soon(share, record_property):
    found = [play(healthy, share, seed, 3000, every=20) for seed in range(15)]
    needed = [arm.requests for _, arm in found]
    record_property("requests_until_pass", sorted(needed))
    assert {verdict for verdict, _ in found} == {"pass"}
    assert statistics.median(needed) <= 420


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_candidate_that_always_fails_is_found_at_once(share, record_property):
    found = [play(failing, share, seed, 500) for seed in range(50)]
    record_property("failures_until_fail", sorted(arm.failures for _, arm in found))
    assert {verdict for verdict, _ in found} == {"fail"}
    assert statistics.median(arm.failures for _, arm in found) <= (5 if share < 0.1 else 10)


def test_two_hundred_ms_in_every_twentieth_request_are_found(record_property):
    found = [play(slow_at_times, 0.05, seed, 3000, every=5) for seed in range(20)]
    record_property("slow_answers_until_fail", sorted(arm.slow for _, arm in found))
    assert {verdict for verdict, _ in found} == {"fail"}
    assert statistics.median(arm.slow for _, arm in found) <= 20


def test_in_a_shadow_slow_answers_are_found_before_it_passes():
    assert {play(slow_at_times, 0.5, seed, 5000, every=20)[0] for seed in range(15)} == {"fail"}


def test_constant_answers_are_found(record_property):
    found = [play(constant, 0.5, seed, 1000, every=10) for seed in range(10)]
    assert {verdict for verdict, _ in found} == {"fail"}
    assert max(arm.requests for _, arm in found) <= 150


def test_an_identical_candidate_is_hardly_ever_failed_however_long_it_is_judged(record_property):
    """Judging goes on until the promotion, so passing is no end here: 20 000 requests, a look every 20."""
    failed = 0
    for seed in range(10):
        draw, ours, theirs = random.Random(seed), Arm(), Arm()
        for _ in range(500):
            for _ in range(20):
                ours.add(healthy(draw))
                theirs.add(healthy(draw))
            if verdict_on(PLAN, ours.counts, theirs.counts).verdict == "fail":
                failed += 1
                break
    assert failed == 0


def test_a_first_version_is_judged_by_its_errors_alone():
    good = Counts(requests=405, latency=((5000, 405), (math.inf, 405)))
    assert verdict_on(PLAN, good, None).verdict == "pass"
    assert verdict_on(PLAN, good.model_copy(update={"requests": 300}), None).verdict == "inconclusive"
    assert verdict_on(PLAN, Counts(requests=2, failures=2), None).verdict == "fail"
    assert verdict_on(PLAN, Counts(requests=2, refused=2), None).verdict == "fail"
    assert verdict_on(PLAN, Counts(requests=1, failures=1), None).verdict == "inconclusive"
    assert verdict_on(PLAN, Counts(), None).verdict == "inconclusive"


def test_a_candidate_that_refuses_what_the_champion_takes_fails_and_clients_errors_do_not():
    champion = _counts(requests=500, refused=0)
    assert verdict_on(PLAN, _counts(requests=30, refused=20), champion).verdict == "fail"
    both = _counts(requests=2000, refused=400)
    assert verdict_on(PLAN, both, both).verdict == "pass"


def test_nothing_passes_without_enough_from_both_sides():
    plan = PLAN.model_copy(update={"min_requests": 1000})
    few, many = _counts(requests=900), _counts(requests=5000)
    assert verdict_on(plan, few, many).verdict == "inconclusive"
    assert verdict_on(plan, many, few).verdict == "inconclusive"
    assert verdict_on(plan, many, many).verdict == "pass"


def test_a_candidate_that_mends_a_failing_champion_passes():
    champion = _counts(requests=1000, failures=600)
    assert verdict_on(PLAN, _counts(requests=1000), champion).verdict == "pass"


def test_a_champion_whose_failures_are_counted_before_its_requests_is_still_judged_against():
    champion = _counts(requests=50).model_copy(update={"failures": 60, "refused": 55})
    assert verdict_on(PLAN, _counts(requests=1000), champion).verdict in ("pass", "inconclusive")


def test_a_rise_of_errors_that_the_plan_allows_does_not_fail():
    champion = _counts(requests=50_000)
    assert verdict_on(PLAN, _counts(requests=5000, failures=50), champion).verdict == "pass"
    assert verdict_on(PLAN, _counts(requests=5000, failures=200), champion).verdict == "fail"


def test_a_fail_says_what_a_person_needs():
    text = verdict_on(PLAN, _counts(requests=26, failures=8), _counts(requests=500)).summary
    assert text == "error_ratio = 0.3077, must be at most 0.02 (n = 26)"
    slow = Counts(requests=400, latency=((5, 340), (10, 340), (500, 400), (math.inf, 400)), answers={"a": 400})
    text = verdict_on(PLAN, slow, _counts(requests=4000)).summary
    assert text == "slower_than_p99 (over 10 ms) = 0.15, must be at most 0.01 (n = 400)"


def _counts(requests: int, failures: int = 0, refused: int = 0) -> Counts:
    good = requests - failures
    latency = ((5, good), (10, good), (500, good), (math.inf, good))
    return Counts(requests=requests, failures=failures, refused=refused, latency=latency, answers={"a": good})


@settings(max_examples=50)
@given(requests=st.integers(0, 300), failures=st.integers(0, 300), slow=st.integers(0, 300))
def test_every_measurement_is_finite_and_within_its_interval(requests, failures, slow):
    candidate = Counts(requests=requests, failures=failures, latency=((5, 0), (500, slow), (math.inf, slow)))
    for found in measurements(PLAN, candidate, _counts(requests=50)):
        assert math.isfinite(found.value)
        assert found.low is None or found.low <= found.value <= found.high
