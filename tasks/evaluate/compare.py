"""Judge the candidates by the workload's rules, beside the champion on the same rows, and take one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tasks.evaluate.paired import against, agreement
from tasks.evaluate.pareto import better_up, quality_of
from tasks.evaluate.report import number
from tasks.gate.judge import SEVERITY, judge
from tasks.spec.metrics import declared
from tasks.spec.requests import Candidate, Judged, JudgeRequest, JudgeResult
from tasks.spec.rules import Evidence, Measurement, Verdict
from tasks.spec.value import RoomRef
from tasks.store.files import write_json
from tasks.store.room import open_room

Measured = tuple[Measurement, ...]
# What each objective looks at: less is better, but of quality, which is entity F1 where words are tagged and
# RMSE or perplexity (less is better) where a number is learnt, or the next piece of texts.
OBJECTIVES = {"quality": "accuracy", "latency": "p50_ms", "size": "model_bytes", "energy": "joules_per_1000"}


def compare(request: JudgeRequest, room: Path) -> JudgeResult:
    """Write ``verdict.json``, ``metrics.json`` and ``report.html`` into ``room`` and return the verdict."""
    champion = load_measurements(request.champion) if request.champion else None
    measured = {c.package_sha256: load_measurements(c.evaluation) + _paired(c, request) for c in request.candidates}
    verdicts = {
        c.package_sha256: judge(request.rules, Evidence(subject=measured[c.package_sha256], champion=champion))
        for c in request.candidates
    }
    passing = [c for c in request.candidates if verdicts[c.package_sha256].verdict == "pass"]
    chosen = min(passing, key=lambda c: _cost(request.objective, measured[c.package_sha256]), default=None)
    judged = tuple(
        Judged(
            variant=c.variant,
            package_sha256=c.package_sha256,
            verdict=verdicts[c.package_sha256],
            chosen=chosen is not None and c.package_sha256 == chosen.package_sha256,
            why=_why(request.objective, c, chosen, verdicts, measured),
            note=c.note,
        )
        for c in request.candidates
    )
    overall = "pass" if chosen else next(kind for kind in SEVERITY if any(j.verdict.verdict == kind for j in judged))
    result = JudgeResult(verdict=overall, chosen=chosen, judged=judged, summary=_summary(request, chosen, judged))
    _write(room, request, result, measured, champion)
    return result


def _paired(candidate: Candidate, request: JudgeRequest) -> Measured:
    """What the same rows say about a candidate beside the champion, and beside the model as it was trained."""
    found = against(candidate.evaluation, request.champion) if request.champion else ()
    whole = next((c for c in request.candidates if c.kind == "fp32"), None)
    return declared((*found, *agreement(candidate.evaluation, whole.evaluation)) if whole else found)


def load_measurements(evaluation: RoomRef) -> Measured:
    """Return the measurements of an evaluation's room."""
    data = json.loads((open_room(evaluation) / "measurements.json").read_text())
    return tuple(Measurement.parse(item, "measurements.json") for item in data)


def _cost(objective: str, measured: Measured) -> float:
    metric = _metric(objective, measured)
    return (-better_up(metric) if objective == "quality" else 1) * _value(measured, metric)


def _metric(objective: str, measured: Measured) -> str:
    metric = OBJECTIVES[objective]
    return quality_of({m.metric for m in measured}) if metric == "accuracy" else metric


def _why(
    objective: str,
    candidate: Candidate,
    chosen: Candidate | None,
    verdicts: dict[str, Verdict],
    measured: dict[str, Measured],
) -> str:
    verdict = verdicts[candidate.package_sha256]
    metric = _metric(objective, measured[candidate.package_sha256])
    if verdict.verdict != "pass" or chosen is None:
        return verdict.summary
    mine, taken = (_value(measured[c.package_sha256], metric) for c in (candidate, chosen))
    if candidate.package_sha256 == chosen.package_sha256:
        return f"{metric} = {number(mine)}, the best of those that pass"
    return f"{metric} = {number(mine)}, the one taken has {number(taken)}"


def _summary(request: JudgeRequest, chosen: Candidate | None, judged: Sequence[Judged]) -> str:
    if chosen is None:
        return "no candidate passes: " + "; ".join(f"{j.variant}: {j.verdict.summary}" for j in judged)
    taken = next(j for j in judged if j.chosen)
    others = [f"{j.variant}: {j.verdict.verdict}" for j in judged if not j.chosen]
    return f"{chosen.variant} taken by {request.objective}: {taken.verdict.summary}" + (
        f" (beside {', '.join(others)})" if others else ""
    )


def _write(
    room: Path, request: JudgeRequest, result: JudgeResult, measured: dict[str, Measured], champion: Measured | None
) -> None:
    from tasks.evaluate.report import write_comparison

    write_json(room / "verdict.json", result.model_dump(mode="json"))
    metrics = {
        f"holdout.{m.metric}.{c.variant}": m.value
        for c in request.candidates
        for m in measured[c.package_sha256]
        if m.slice == "overall"
    }
    if champion:
        metrics |= {f"holdout.{m.metric}.champion": m.value for m in champion if m.slice == "overall"}
    write_json(room / "metrics.json", metrics)
    write_comparison(room, request, result, measured, champion)


def _value(measured: Measured, metric: str) -> float:
    return next(m.value for m in measured if m.metric == metric and m.slice == "overall")
