"""The judge: unknown is never a pass, a stop rule more never helps, and a reason carries number and limit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.gate.judge import judge
from tasks.spec.rules import Evidence, Measurement, Rule

pytestmark = pytest.mark.timeout(30)

METRICS = st.sampled_from(["accuracy", "recall", "p99_ms"])
SLICES = st.sampled_from(["overall", "class:0", "class:1"])
LIMITS = st.floats(-2, 2)
SEVERITY = st.sampled_from(["stop", "watch"])
BOUNDS = st.tuples(LIMITS, LIMITS).map(sorted).map(lambda ends: dict(zip(("min", "max"), ends, strict=True)))
ABSOLUTE = st.builds(
    lambda limits, **facts: Rule(**limits, **facts), st.builds(dict, min=LIMITS) | BOUNDS,
    metric=METRICS, slice=SLICES | st.just("class:*"),
    min_samples=st.integers(1, 50), bound=st.sampled_from(["point", "worse"]), severity=SEVERITY,
)  # fmt: skip
INTERVAL = st.builds(
    Rule, metric=METRICS, slice=SLICES, max=LIMITS, fail_above=st.none() | LIMITS, bound=st.just("interval"),
    min_samples=st.integers(1, 50), severity=SEVERITY,
)  # fmt: skip
RELATIVE = st.builds(
    Rule, metric=METRICS, slice=SLICES | st.just("*"), against=st.just("champion"), max_drop=LIMITS,
    max_rise=st.none() | LIMITS, min_samples=st.integers(1, 50), severity=SEVERITY,
)  # fmt: skip
RULES = st.lists(ABSOLUTE | INTERVAL | RELATIVE, max_size=5)
MEASURED = st.lists(
    st.builds(
        Measurement, metric=METRICS, slice=SLICES, value=LIMITS | st.just(math.nan) | st.just(math.inf),
        samples=st.integers(0, 60), low=st.none() | LIMITS, high=st.none() | LIMITS,
    ),
    max_size=8, unique_by=lambda m: (m.metric, m.slice),
).map(tuple)  # fmt: skip
EVIDENCE = st.builds(Evidence, subject=MEASURED, champion=st.none() | MEASURED)


def one(value: float, samples: int = 100, champion: float | None = None, **interval: float) -> Evidence:
    """Evidence of one accuracy."""
    subject = (Measurement(metric="accuracy", value=value, samples=samples, **interval),)
    base = None if champion is None else (Measurement(metric="accuracy", value=champion, samples=samples),)
    return Evidence(subject=subject, champion=base)


# --- properties ---------------------------------------------------------------------------------------------


@given(evidence=EVIDENCE)
def test_no_rules_is_an_error(evidence):
    assert judge([], evidence).verdict == "error"


@given(rules=RULES, evidence=EVIDENCE)
def test_a_pass_means_that_every_stop_rule_was_answered_by_finite_numbers_within_its_limits(rules, evidence):
    verdict = judge(rules, evidence)
    stops = [rule for rule in rules if rule.severity == "stop"]
    answered = [reason for reason in verdict.reasons if reason.rule.severity == "stop"]
    assert {reason.verdict for reason in answered} <= {"pass", "not applicable"} or verdict.verdict != "pass"
    if verdict.verdict != "pass":
        return
    assert any(reason.verdict == "pass" for reason in answered)
    for rule in stops:
        of_rule = [m for m in evidence.subject if m.metric == rule.metric and _in(m.slice, rule.slice)]
        if rule.against is None:
            assert of_rule
            assert all(math.isfinite(m.value) and m.samples >= rule.min_samples for m in of_rule)
            assert rule.bound != "point" or all(m.value >= rule.min for m in of_rule)
        elif evidence.champion is not None:
            assert of_rule


@given(rules=RULES, more=(ABSOLUTE | RELATIVE), evidence=EVIDENCE)
def test_one_more_stop_rule_never_turns_a_refusal_into_a_pass(rules, more, evidence):
    stop = more.model_copy(update={"severity": "stop"})
    before, after = judge(rules, evidence).verdict, judge([*rules, stop], evidence).verdict
    has_decided = any(
        r.rule.severity == "stop" and r.verdict != "not applicable" for r in judge(rules, evidence).reasons
    )
    if before != "pass" and has_decided:
        assert after != "pass"
    assert judge([stop, *rules], evidence).verdict == after


@given(rules=RULES, more=(ABSOLUTE | RELATIVE), evidence=EVIDENCE)
def test_a_watch_rule_is_told_and_never_decides(rules, more, evidence):
    watch = more.model_copy(update={"severity": "watch"})
    verdict = judge([*rules, watch], evidence)
    assert verdict.verdict == judge(rules, evidence).verdict
    assert any(reason.rule == watch for reason in verdict.reasons)


@given(rules=RULES, evidence=EVIDENCE)
def test_the_same_evidence_gives_the_same_verdict_and_every_reason_is_a_line(rules, evidence):
    verdict = judge(rules, evidence)
    assert verdict == judge(tuple(rules), evidence)
    assert all(reason.text and "\n" not in reason.text for reason in verdict.reasons)
    assert verdict.summary


@given(value=LIMITS, limit=LIMITS)
def test_a_higher_demand_is_never_easier(value, limit):
    rule = Rule(metric="accuracy", min=limit)
    if judge([rule], one(value)).verdict == "fail":
        assert judge([rule.model_copy(update={"min": limit + 1e-6})], one(value)).verdict == "fail"


@given(rules=st.lists(ABSOLUTE | RELATIVE, min_size=1, max_size=4), evidence=EVIDENCE, gain=st.floats(0, 3))
def test_better_evidence_never_turns_a_pass_into_a_refusal(rules, evidence, gain):
    """Where more is better and only too little is forbidden, a higher value with its interval is at least as good."""
    only_more = [rule.model_copy(update={"max": None, "max_rise": None}) for rule in rules]
    raised = tuple(
        m.model_copy(
            update={
                "value": m.value + gain,
                "low": None if m.low is None else m.low + gain,
                "high": None if m.high is None else m.high + gain,
            }
        )
        for m in evidence.subject
    )
    if judge(only_more, evidence).verdict == "pass":
        assert judge(only_more, evidence.model_copy(update={"subject": raised})).verdict == "pass"


@given(evidence=EVIDENCE, gain=LIMITS)
def test_a_rule_on_the_same_rows_is_not_applicable_without_a_champion(evidence, gain):
    rule = Rule(metric="accuracy_gain", min=gain, bound="worse")
    alone = judge([rule], evidence.model_copy(update={"champion": None}))
    assert (alone.verdict, alone.reasons[0].verdict) == ("error", "not applicable")


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_equal_numbers_pass_a_drop_and_a_rise_of_nothing(value):
    rules = [Rule(metric="accuracy", against="champion", max_drop=0.0, max_rise=0.0)]
    assert judge(rules, one(value, champion=value)).verdict == "pass"


def _in(name: str, pattern: str) -> bool:
    return pattern in (name, "*") or (pattern.endswith("*") and name.startswith(pattern[:-1]))


# --- examples -----------------------------------------------------------------------------------------------

ACCURATE = Rule(metric="accuracy", min=0.9)
BELOW = Rule(metric="accuracy", max=0.5, fail_above=0.6, min_samples=50, bound="interval")


@pytest.mark.parametrize(
    ("rule", "evidence", "verdict", "words"),
    [
        (ACCURATE, one(0.9), "pass", ["accuracy (overall)", "0.9", ">= 0.9"]),
        (ACCURATE, one(0.85), "fail", ["= 0.85", "at least 0.9", "n = 100"]),
        (ACCURATE, one(math.nan), "error", ["nan", "finite"]),
        (ACCURATE, one(math.inf), "error", ["inf", "finite"]),
        (ACCURATE, Evidence(subject=()), "error", ["no such measurement"]),
        (Rule(metric="f1", min=0.9), one(1.0), "error", ["f1 (overall)", "no such measurement"]),
        (Rule(metric="accuracy", slice="class:*", min=0), one(1.0), "error", ["class:*"]),
        (Rule(metric="accuracy", max=0.5), one(0.6), "fail", ["= 0.6", "at most 0.5"]),
        (Rule(metric="accuracy", min=0.9, min_samples=101), one(1.0), "inconclusive", ["100 samples", "needs 101"]),
        (Rule(metric="accuracy", min=0.9, min_samples=101), one(0.1), "inconclusive", ["100 samples"]),
        (Rule(metric="accuracy", min=0.9, min_samples=101), one(math.nan), "error", ["finite"]),
        (Rule(metric="accuracy", min=0.9, bound="worse"), one(0.95, low=0.89, high=1), "fail", ["at least 0.9"]),
        (Rule(metric="accuracy", max=0.96, bound="worse"), one(0.95, low=0, high=0.97), "fail", ["at most 0.96"]),
        (Rule(metric="accuracy", min=0.9, bound="worse"), one(0.95), "pass", [">= 0.9"]),
        (BELOW, one(0.3, low=0.1, high=0.5), "pass", ["accuracy = 0.3", "<= 0.5", "n = 100"]),
        (BELOW, one(0.3, low=0.1, high=0.51), "inconclusive", ["may be 0.51", "at most 0.5", "n = 100"]),
        (BELOW, one(0.8, low=0.6, high=0.9), "inconclusive", ["may be 0.9"]),
        (BELOW, one(0.8, low=0.61, high=0.9), "fail", ["= 0.8", "at most 0.5", "n = 100"]),
        (BELOW, one(1.0, samples=3, low=0.61, high=1), "fail", ["n = 3"]),
        (BELOW, one(0.0, samples=3, low=0, high=0.1), "inconclusive", ["3 samples", "needs 50"]),
        (BELOW, one(math.nan, low=0, high=0.1), "error", ["finite"]),
        (Rule(metric="accuracy", max=0.5, bound="interval"), one(0.51), "fail", ["at most 0.5"]),
    ],
)
def test_one_rule(rule, evidence, verdict, words):
    found = judge([rule], evidence)
    assert found.verdict == verdict
    for word in words:
        assert word in found.reasons[0].text


@pytest.mark.parametrize(
    "wrong",
    [
        {"min": 0.1, "bound": "interval"},
        {"min": 0.1, "max": 0.5, "bound": "interval"},
        {"max": 0.5, "fail_above": 0.6},
        {"max_rise": 0.1, "against": "champion", "bound": "interval"},
    ],
)
def test_a_rule_on_an_interval_has_a_max_alone(wrong):
    with pytest.raises(ValueError, match="interval"):
        Rule(metric="accuracy", **wrong)


AGAINST = Rule(metric="accuracy", against="champion", max_drop=0.01)


@pytest.mark.parametrize(
    ("value", "champion", "verdict", "words"),
    [
        (0.95, 0.95, "pass", ["0.95", "within"]),
        (0.94, 0.95, "pass", ["0.94"]),
        (0.93, 0.95, "fail", ["0.93", "champion's 0.95", "drop of 0.02", "at most 0.01"]),
        (0.99, 0.95, "pass", ["within"]),
        (0.99, math.nan, "error", ["champion has no such measurement"]),
    ],
)
def test_a_rule_against_the_champion(value, champion, verdict, words):
    found = judge([AGAINST], one(value, champion=champion))
    assert found.verdict == verdict
    for word in words:
        assert word in found.reasons[0].text


def test_without_a_champion_the_rule_is_not_applicable_and_alone_it_is_an_error():
    found = judge([ACCURATE, AGAINST], one(0.95))
    assert found.verdict == "pass"
    assert [reason.verdict for reason in found.reasons] == ["pass", "not applicable"]
    assert "no champion" in found.reasons[1].text
    assert judge([AGAINST], one(0.95)).verdict == "error"


def test_a_champion_that_was_not_measured_is_an_error_and_not_no_champion():
    evidence = one(0.95).model_copy(update={"champion": ()})
    assert judge([ACCURATE, AGAINST], evidence).verdict == "error"


def test_a_star_judges_each_slice_by_itself():
    subject = tuple(
        Measurement(metric="recall", slice=f"class:{k}", value=v, samples=20) for k, v in enumerate((0.9, 0.4, 0.8))
    )
    found = judge([Rule(metric="recall", slice="class:*", min=0.75)], Evidence(subject=subject))
    assert [reason.verdict for reason in found.reasons] == ["pass", "fail", "pass"]
    assert found.verdict == "fail"
    assert found.summary.startswith("recall (class:1) = 0.4, must be at least 0.75")


def test_the_worst_answer_decides():
    fail, unsure = Rule(metric="accuracy", min=0.99), Rule(metric="accuracy", min=0.1, min_samples=999)
    error = Rule(metric="f1", min=0)
    assert judge([unsure, ACCURATE], one(0.95)).verdict == "inconclusive"
    assert judge([unsure, fail], one(0.95)).verdict == "fail"
    assert judge([unsure, fail, error], one(0.95)).verdict == "error"
