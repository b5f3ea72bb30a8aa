"""Validate numbers that are labels: range, equal rows with different numbers, leakage; and texts that are their own
label, of which the number is how many characters they have. What an audit of classes would ask (how many of each, which
is likely wrong) has no meaning here: the report says what was left out, and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data.near import near_copies
from tasks.data.queue import write_queue
from tasks.data.rawrows import RawRows
from tasks.data.table import empty_room, write_table
from tasks.data.twins import conflicting, digests_of, leaked
from tasks.gate.judge import judge
from tasks.spec.requests import ValidateLabelsRequest, ValidateLabelsResult
from tasks.spec.rules import Evidence, Measurement, Rule
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.spec.validation import LabelRules

LEFT_OUT = {
    "class_ratio": "a number is of no class, so none can be rare",
    "noise_ratio": "confident learning estimates wrong classes, not wrong numbers",
    "annotator_agreement": "annotators are of classes",
    "near_leaked_ratio": "ids are equal or not, never near",
}
OF_TEXTS = {
    "class_ratio": "a text is of no class, so none can be rare",
    "noise_ratio": "a text is its own label, and so never a wrong one",
    "annotator_agreement": "annotators are of classes",
}


def validate_numbers(request: ValidateLabelsRequest, room: Path) -> ValidateLabelsResult:
    """Write ``conflicts.parquet``, ``report.json`` with what was ``left_out``, and a queue and ``suspects.parquet``
    without rows into ``room``.

    Numbers that break a rule are a verdict, never an exception.

    Raises:
        IntegrityLost: the cleaned room changed.
    """
    import numpy as np
    import pyarrow as pa

    rows = RawRows(open_room(request.clean) / "data.parquet")
    digests, _ = digests_of(rows, request.feature)
    labels, splits = rows.column("label"), np.array(rows.column("split").to_pylist())
    in_conflict = conflicting(digests, [str(label) for label in labels.to_pylist()])
    in_both = leaked(digests, splits)
    is_next = request.label.kind == "next"
    limits = (1, request.feature.max_chars) if is_next else (request.label.min, request.label.max)
    measured = measurements(labels, limits, int(in_conflict.sum()), int(in_both.sum()))
    if request.feature.kind != "ids":
        near = near_copies(rows, request.feature, splits, request.rules.max_audited_rows)
        ratio = float(near.sum()) / max(rows.rows, 1)
        measured += (Measurement(metric="near_leaked_ratio", value=ratio, samples=rows.rows),)
    asked = [rule for rule in rules(request.rules) if not (is_next and rule.metric == "distinct_labels")]
    verdict = judge(asked, Evidence(subject=measured))
    empty_room(room)
    picked = rows.take(np.flatnonzero(in_conflict), ["row_id", "label", "split"])
    write_table(room / "conflicts.parquet", picked)
    nothing = {"row_id": pa.string(), "label": pa.float64(), "suggested": pa.string(), "quality": pa.float64()}
    write_table(room / "suspects.parquet", pa.schema(nothing).empty_table())
    write_queue(room, request, rows, [])
    result = ValidateLabelsResult(
        verdict=verdict,
        class_counts={},
        conflicts=int(in_conflict.sum()),
        leaked=int(in_both.sum()),
        suspects=0,
        noise_ratio=None,
    )
    reasons = OF_TEXTS if is_next else LEFT_OUT
    facts = {
        "rows": rows.rows,
        "audited_rows": 0,
        "annotators": [],
        "left_out": {name: why for name, why in reasons.items() if name not in {m.metric for m in measured}},
        "measurements": [item.model_dump(mode="json") for item in measured],
    }
    write_json(room / "report.json", result.model_dump(mode="json", exclude={"room"}) | facts)
    return result


def rules(limits: LabelRules) -> tuple[Rule, ...]:
    """Return those of the workload's label rules that are for numbers. Numbers that are all the same teach nothing."""
    near = limits.max_near_leaked_ratio
    return (
        Rule(metric="unknown_label_ratio", max=0),
        Rule(metric="distinct_labels", min=2),
        Rule(metric="conflict_ratio", max=limits.max_conflict_ratio),
        Rule(metric="leaked_ratio", max=limits.max_leaked_ratio),
        *([Rule(metric="near_leaked_ratio", max=near)] if near is not None else []),
    )


def measurements(
    labels: pa.ChunkedArray, limits: tuple[float, float], conflicts: int, leaks: int
) -> tuple[Measurement, ...]:
    """Return the evidence: ratios of all rows; ``unknown`` is a label that is missing or out of its ``limits``."""
    import numpy as np

    found, rows = labels.to_numpy().astype(float), len(labels)
    # Written so that NaN, which is what a missing one is here, counts as unknown.
    unknown = int((~((found >= limits[0]) & (found <= limits[1]))).sum())

    def of_rows(metric: str, value: float) -> Measurement:
        return Measurement(metric=metric, value=value, samples=rows)

    return (
        of_rows("unknown_label_ratio", unknown / max(rows, 1)),
        of_rows("distinct_labels", len(np.unique(found[~np.isnan(found)]))),
        of_rows("conflict_ratio", conflicts / max(rows, 1)),
        of_rows("leaked_ratio", leaks / max(rows, 1)),
    )
