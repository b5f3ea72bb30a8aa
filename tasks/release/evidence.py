"""What two services did, side by side, and what it says about the candidate. Pure.

Measurements of the candidate beside the champion's, each judged by ``tasks.gate.judge``:

    error_ratio       requests without a good answer, of all
    refused_ratio     requests that were answered with 4xx: clients err with both alike, unless one wants other inputs
    slower_than_p50   answers slower than a limit made of the champion's median: more than half is a slower median
    slower_than_p99   the same of its 99th percentile: more than 1 % is a slower 99th percentile
    answer_shift      the distance between the two distributions of answers, live and replayed requests apart

Shares rather than percentiles, because a share has bounds that hold at every look (``sequential``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import ConfigDict, Field

from tasks.gate.judge import judge
from tasks.release.sequential import bounds
from tasks.spec.rules import Evidence, Measurement, Rule, Verdict
from tasks.spec.value import Value
from tasks.spec.workload import Rollout

Histogram = tuple[tuple[float, int], ...]
# What the name of an answer to a replayed request begins with. The holdout's answers are distributed otherwise than
# the traffic's, and a canary has more of them in its mix than the champion: compared together, equals would differ.
REPLAYED = "replayed/"
# One failure can be anybody's.
MIN_FAILURES = 2
# The first answers of a service that just started may all be slow.
MIN_SLOW = 10
# What passes is above what fails, or a candidate as good as the champion would wait for ever for its pass.
P50_SHARE, P50_PASS = 0.5, 0.6
P99_SHARE, P99_PASS = 0.01, 0.04
REFUSED_PASS = 0.1


class Counts(Value):
    """What one service did: since its start, or in a window."""

    model_config = ConfigDict(allow_inf_nan=True)

    requests: int = Field(default=0, ge=0, description="answered or failed")
    failures: int = Field(default=0, ge=0, description="those without a good answer")
    refused: int = Field(default=0, ge=0, description="those answered with 4xx")
    latency: Histogram = Field(default=(), description="(upper edge in ms, answers at or below it); the last is inf")
    answers: dict[str, int] = Field(default={}, description="label, or REPLAYED + label -> how often")

    @property
    def answered(self) -> int:
        """The answers whose time is known."""
        return self.latency[-1][1] if self.latency else 0

    @property
    def counters(self) -> tuple[int, ...]:
        """The gateway's counters, which rise until they are all reset."""
        return (self.requests, self.failures, self.refused, self.answered)


def since(now: Counts, before: Counts) -> Counts:
    """Return what was done between two looks. A counter that went back was reset, and counts from 0.

    The gateway's counters and the servers' are reset apart from one another.
    """
    counted = before
    if any(new < old for new, old in zip(now.counters, before.counters, strict=True)):
        counted = Counts(answers=before.answers)
    if any(now.answers.get(label, 0) < count for label, count in before.answers.items()):
        counted = counted.model_copy(update={"answers": {}})
    return _combined(now, counted, -1)


def plus(one: Counts, other: Counts) -> Counts:
    return _combined(one, other, 1)


def _combined(one: Counts, other: Counts, sign: int) -> Counts:
    times = dict(other.latency)
    return Counts(
        requests=one.requests + sign * other.requests,
        failures=one.failures + sign * other.failures,
        refused=one.refused + sign * other.refused,
        # Edges are the gateway's, the same for all; a side that saw nothing yet has none.
        latency=tuple((edge, max(count + sign * times.get(edge, 0), 0)) for edge, count in one.latency)
        or (other.latency if sign > 0 else ()),
        answers={
            label: one.answers.get(label, 0) + sign * other.answers.get(label, 0)
            for label in sorted({*one.answers, *(other.answers if sign > 0 else {})})
        },
    )


def verdict_on(plan: Rollout, candidate: Counts, champion: Counts | None) -> Verdict:
    """Return what the evidence says by now: pass, fail, or inconclusive, which is not yet."""
    evidence = Evidence(subject=measurements(plan, candidate, champion))
    return judge(rules(plan, candidate, champion), evidence)


def measurements(plan: Rollout, candidate: Counts, champion: Counts | None) -> tuple[Measurement, ...]:
    """Return the measurements; without a champion there are errors to count and nothing to compare with."""
    errors = (
        _share("error_ratio", candidate.failures, candidate.requests, MIN_FAILURES),
        _share("refused_ratio", candidate.refused, candidate.requests, MIN_FAILURES),
    )
    if champion is None:
        return errors
    slower = (_slower(name, limit, candidate) for name, limit in _time_limits(plan, champion).items())
    asked = Measurement(metric="champion_requests", value=champion.requests, samples=champion.requests)
    return (*errors, *slower, _answer_shift(plan, candidate, champion), asked)


def rules(plan: Rollout, candidate: Counts, champion: Counts | None) -> tuple[Rule, ...]:
    """Return the rules: fail where the candidate is surely worse than the limit and than the champion may be,
    pass where it is surely within."""
    errors = (
        _error_rule(plan, "error_ratio", champion.failures if champion else 0, champion, plan.max_error_rise),
        _error_rule(plan, "refused_ratio", champion.refused if champion else 0, champion, REFUSED_PASS),
    )
    if champion is None:
        return errors
    slower = []
    shares = {"slower_than_p50": (P50_SHARE, P50_PASS), "slower_than_p99": (P99_SHARE, P99_PASS)}
    for name, limit in _time_limits(plan, champion).items():
        share, passing = shares[name]
        may_be = _may_be(_slower_than(champion, limit), champion.answered)
        slower.append(_rule(plan, name, passing, share, may_be))
    shift = _rule(plan, "answer_shift", plan.max_answer_shift, plan.max_answer_shift, 0.0)
    asked = Rule(metric="champion_requests", min=0, min_samples=plan.min_requests)
    return (*errors, *slower, shift, asked)


def _error_rule(plan: Rollout, metric: str, num_events: int, champion: Counts | None, rise: float) -> Rule:
    """Without a champion every request is our own replay, and none may fail."""
    asked = champion.requests if champion else 0
    ratio = num_events / asked if asked else 0.0
    passing = ratio + (max(rise, plan.max_error_rise) if champion else plan.max_error_rise)
    may_be = _may_be(num_events, asked) if champion else 0.0
    return _rule(plan, metric, min(passing, 1.0), min(ratio + plan.max_error_rise, 1.0), may_be)


def _rule(plan: Rollout, metric: str, passing: float, failing: float, champion_may_be: float) -> Rule:
    return Rule(
        metric=metric,
        slice="*",
        bound="interval",
        max=passing,
        # While little is known of the champion, it may be as bad as the candidate.
        fail_above=max(failing, champion_may_be),
        min_samples=plan.min_requests,
    )


def _may_be(num_events: int, num_trials: int) -> float:
    # As below: one look may see more failures than requests.
    return bounds(num_events, max(num_events, num_trials))[1]


def _share(metric: str, num_events: int, num_trials: int, least: int, where: str = "overall") -> Measurement:
    # A request fails before it is counted as answered, so one look may see more failures than requests.
    num_trials = max(num_events, num_trials)
    low, high = bounds(num_events, num_trials)
    return Measurement(
        metric=metric,
        slice=where,
        value=num_events / num_trials if num_trials else 0.0,
        samples=num_trials,
        low=low if num_events >= least else 0.0,
        high=high,
    )


def _slower(metric: str, limit_ms: float, candidate: Counts) -> Measurement:
    slow = _slower_than(candidate, limit_ms)
    return _share(metric, slow, candidate.answered, MIN_SLOW, f"over {limit_ms:g} ms")


def _time_limits(plan: Rollout, champion: Counts) -> dict[str, float]:
    """The times that the candidate's median and 99th percentile may not pass, in ms, at the histogram's edges."""
    limits = {}
    for name, quantile, ratio in (
        ("slower_than_p50", 0.5, plan.max_p50_ratio),
        ("slower_than_p99", 0.99, plan.max_p99_ratio),
    ):
        base = percentile_ms(champion, quantile)
        wanted = max(base * ratio, base + plan.latency_slack_ms)
        limits[name] = next((edge for edge, _ in champion.latency if edge >= wanted), math.inf)
    return limits


def percentile_ms(counts: Counts, quantile: float) -> float:
    """Return the smallest edge, in ms, with that share of the answers at or below it; 0 where none is known."""
    needed = quantile * counts.answered
    return next((edge for edge, count in counts.latency if count >= needed), 0.0) if counts.answered else 0.0


def _slower_than(counts: Counts, limit_ms: float) -> int:
    within = [count for edge, count in counts.latency if edge <= limit_ms]
    return counts.answered - within[-1] if within else counts.answered


def _answer_shift(plan: Rollout, candidate: Counts, champion: Counts) -> Measurement:
    """The larger shift of the two kinds of requests, of those that are known: where both sides have given
    ``min_requests`` answers. Until one is, it may be anything."""
    kinds = [(_of_kind(candidate, replayed), _of_kind(champion, replayed)) for replayed in (False, True)]
    found = [(min(sum(one.values()), sum(other.values())), answer_shift(one, other)) for one, other in kinds]
    known = [(shift, samples) for samples, shift in found if samples >= plan.min_requests]
    if known:
        shift, samples = max(known)
        return Measurement(metric="answer_shift", value=shift, samples=samples, low=shift, high=shift)
    samples, shift = max(found)
    return Measurement(metric="answer_shift", value=shift, samples=samples, low=0.0, high=1.0)


def _of_kind(counts: Counts, replayed: bool) -> dict[str, int]:
    return {name: count for name, count in counts.answers.items() if name.startswith(REPLAYED) is replayed}


def answer_shift(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Return the total variation distance of two samples' distributions, less what chance makes of equal ones.

    The distance is half the sum of |p - q| over the labels. For two samples of n and m answers of one
    distribution r, p - q of a label is about normal with the variance r (1 - r) (1/n + 1/m), so |p - q| is
    sqrt(2/pi) of its square root on average; r is estimated from both samples together. Never below 0.
    """
    n, m = sum(one.values()), sum(other.values())
    if not n or not m:
        return 0.0
    distance = noise = 0.0
    for label in {*one, *other}:
        a, b = one.get(label, 0), other.get(label, 0)
        pooled = (a + b) / (n + m)
        distance += abs(a / n - b / m) / 2
        noise += math.sqrt(2 / math.pi * pooled * (1 - pooled) * (1 / n + 1 / m)) / 2
    return max(distance - noise, 0.0)
