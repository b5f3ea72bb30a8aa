"""Judge evidence by rules: pass, fail, error or inconclusive, with reasons that carry number and limit.

The same judge decides on data, labels, candidates and releases. Unknown is an error and never a pass: no
rules, a rule without its measurement, a number that is not finite.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

from tasks.spec.rules import PAIRED, Evidence, Measurement, Reason, Rule, Verdict

# From worst to best: one stop rule of a kind decides for the whole.
SEVERITY = ("error", "fail", "inconclusive", "pass")


def judge(rules: Sequence[Rule], evidence: Evidence) -> Verdict:
    """Judge evidence by rules. Watch rules are reported and never decide."""
    reasons = tuple(reason for rule in rules for reason in _judge_rule(rule, evidence))
    deciding = [r.verdict for r in reasons if r.rule.severity == "stop" and r.verdict != "not applicable"]
    if not deciding:
        return Verdict(verdict="error", reasons=reasons)
    return Verdict(verdict=next(kind for kind in SEVERITY if kind in deciding), reasons=reasons)


def _judge_rule(rule: Rule, evidence: Evidence) -> list[Reason]:
    if (rule.against == "champion" or rule.metric in PAIRED) and evidence.champion is None:
        text = f"{_name(rule)}: there is no champion to compare with"
        return [Reason(rule=rule, verdict="not applicable", text=text)]
    found = [m for m in evidence.subject if m.metric == rule.metric and fnmatch.fnmatchcase(m.slice, rule.slice)]
    if not found:
        return [Reason(rule=rule, verdict="error", text=f"{_name(rule)}: no such measurement")]
    return [_judge_measurement(rule, measurement, evidence) for measurement in found]


def _judge_measurement(rule: Rule, found: Measurement, evidence: Evidence) -> Reason:
    where = f"{found.metric} ({found.slice})"
    if not math.isfinite(found.value):
        return Reason(rule=rule, verdict="error", text=f"{where} = {found.value}, must be a finite number")
    if rule.bound == "interval":
        return _judge_interval(rule, found)
    if found.samples < rule.min_samples:
        text = f"{where}: {found.samples} samples, needs {rule.min_samples}"
        return Reason(rule=rule, verdict="inconclusive", text=text)
    if rule.against is None:
        return _judge_absolute(rule, found, where)
    base = next((m for m in evidence.champion or () if (m.metric, m.slice) == (found.metric, found.slice)), None)
    if base is None or not math.isfinite(base.value):
        return Reason(rule=rule, verdict="error", text=f"{where}: the champion has no such measurement")
    return _judge_relative(rule, found, base, where)


def _judge_absolute(rule: Rule, found: Measurement, where: str) -> Reason:
    low, high = _compared(rule, found)
    for value, limit, broken, word in (
        (low, rule.min, rule.min is not None and low < rule.min, "at least"),
        (high, rule.max, rule.max is not None and high > rule.max, "at most"),
    ):
        if broken:
            text = f"{where} = {value:.4g}, must be {word} {limit:.4g} (n = {found.samples})"
            return Reason(rule=rule, verdict="fail", text=text)
    limits = [f"{sign} {limit:.4g}" for sign, limit in ((">=", rule.min), ("<=", rule.max)) if limit is not None]
    return Reason(rule=rule, verdict="pass", text=f"{where} = {found.value:.4g} is {' and '.join(limits)}")


def _judge_interval(rule: Rule, found: Measurement) -> Reason:
    """Fail or pass once the whole interval says so. A wide interval fails nothing, so only a pass needs samples."""
    assert rule.max is not None
    where = found.metric if found.slice == "overall" else f"{found.metric} ({found.slice})"
    low, high = _ends(found)
    fail_above = rule.max if rule.fail_above is None else rule.fail_above
    count = f"(n = {found.samples})"
    if low > fail_above:
        text = f"{where} = {found.value:.4g}, must be at most {min(rule.max, fail_above):.4g} {count}"
        return Reason(rule=rule, verdict="fail", text=text)
    if found.samples < rule.min_samples:
        text = f"{where}: {found.samples} samples, needs {rule.min_samples}"
        return Reason(rule=rule, verdict="inconclusive", text=text)
    if high > rule.max:
        text = f"{where} = {found.value:.4g}, may be {high:.4g}, must be at most {rule.max:.4g} {count}"
        return Reason(rule=rule, verdict="inconclusive", text=text)
    return Reason(rule=rule, verdict="pass", text=f"{where} = {found.value:.4g} is <= {rule.max:.4g} {count}")


def _judge_relative(rule: Rule, found: Measurement, base: Measurement, where: str) -> Reason:
    for loss, limit, word in (
        (base.value - found.value, rule.max_drop, "drop"),
        (found.value - base.value, rule.max_rise, "rise"),
    ):
        # A tolerance of one part in 10^12, so that equal numbers never fail on rounding.
        if limit is not None and loss > limit + 1e-12 * max(1.0, abs(base.value)):
            text = (
                f"{where} = {found.value:.4g} against the champion's {base.value:.4g}: "
                f"a {word} of {loss:.4g}, must be at most {limit:.4g}"
            )
            return Reason(rule=rule, verdict="fail", text=text)
    text = f"{where} = {found.value:.4g} against the champion's {base.value:.4g} is within its limit"
    return Reason(rule=rule, verdict="pass", text=text)


def _compared(rule: Rule, found: Measurement) -> tuple[float, float]:
    """The two numbers to hold against min and max: the point, or the interval's worse ends."""
    return (found.value, found.value) if rule.bound == "point" else _ends(found)


def _ends(found: Measurement) -> tuple[float, float]:
    return (
        found.low if found.low is not None else found.value,
        found.high if found.high is not None else found.value,
    )


def _name(rule: Rule) -> str:
    return f"{rule.metric} ({rule.slice})"
