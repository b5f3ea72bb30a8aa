"""Judge the candidates by the workload's rules, beside the champion on the same rows, and take one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tasks.gate.judge import SEVERITY, judge
from tasks.spec.requests import Candidate, Judged, JudgeRequest, JudgeResult
from tasks.spec.rules import Evidence, Measurement
from tasks.spec.value import RoomRef
from tasks.store.files import write_json
from tasks.store.room import open_room

Measured = tuple[Measurement, ...]
# What each objective makes small.
COST = {
    "quality": lambda m: -_value(m, "accuracy"),
    "latency": lambda m: _value(m, "p50_ms"),
    "size": lambda m: _value(m, "model_bytes"),
}


def compare(request: JudgeRequest, room: Path) -> JudgeResult:
    """Write ``verdict.json``, ``metrics.json`` and ``report.html`` into ``room`` and return the verdict."""
    champion = load_measurements(request.champion) if request.champion else None
    measured = {c.package_sha256: load_measurements(c.evaluation) for c in request.candidates}
    verdicts = {
        c.package_sha256: judge(request.rules, Evidence(subject=measured[c.package_sha256], champion=champion))
        for c in request.candidates
    }
    passing = [c for c in request.candidates if verdicts[c.package_sha256].verdict == "pass"]
    chosen = min(passing, key=lambda c: COST[request.objective](measured[c.package_sha256]), default=None)
    judged = tuple(
        Judged(
            variant=c.variant,
            package_sha256=c.package_sha256,
            verdict=verdicts[c.package_sha256],
            chosen=chosen is not None and c.package_sha256 == chosen.package_sha256,
        )
        for c in request.candidates
    )
    overall = "pass" if chosen else next(kind for kind in SEVERITY if any(j.verdict.verdict == kind for j in judged))
    result = JudgeResult(verdict=overall, chosen=chosen, judged=judged, summary=_summary(request, chosen, judged))
    _write(room, request, result, measured, champion)
    return result


def load_measurements(evaluation: RoomRef) -> Measured:
    """Return the measurements of an evaluation's room."""
    data = json.loads((open_room(evaluation) / "measurements.json").read_text())
    return tuple(Measurement.parse(item, "measurements.json") for item in data)


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
