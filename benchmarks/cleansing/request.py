"""What the pipeline is asked on the generated table."""

from __future__ import annotations

from pathlib import Path

from cleansing.generate import FEATURES, LABELS, NUMBERS

from tasks.spec import clean as c
from tasks.spec.data import Split
from tasks.spec.feature import TableFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest, CleanResult, ValidateDataRequest
from tasks.spec.validation import Expectations
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

RULES: tuple[c.CleanRule, ...] = (
    c.Trim(rule="trim", column="label"),
    c.Case(rule="case", column="label", to="lower"),
    c.Allowed(rule="allowed_labels"),
    *(c.Range(rule="range", column=name, min=0, max=1000, action="missing") for name in NUMBERS[:6]),
    c.Fill(rule="fill", column="n1", value=100),
    c.Condition(rule="condition", where="n0 + n3 >= 0"),
    c.Dependency(rule="dependency", determinant=("zip",), dependent=("city",)),
    c.DropDuplicates(rule="drop_duplicates"),
)


def clean_request(raw: Path) -> CleanRequest:
    """The cleaning of the room in which ``raw.parquet`` lies."""
    return CleanRequest(
        workload="bench",
        raw=RoomRef(uri=str(raw), digest_sha256=write_manifest(raw)),
        feature=TableFeature(kind="table", columns=FEATURES),
        label=Label(classes=LABELS),
        rules=RULES,
        split=Split(),
    )


def validate_request(
    asked: CleanRequest, room: Path, digest: str, result: CleanResult, suites: str
) -> ValidateDataRequest:
    """The validation of what the cleaning left."""
    return ValidateDataRequest(
        workload=asked.workload,
        raw=asked.raw,
        clean=RoomRef(uri=str(room), digest_sha256=digest),
        rows_in=result.rows_in,
        dropped_rows=result.dropped_rows,
        feature=asked.feature,
        label=asked.label,
        split=asked.split,
        columns=("zip", "city"),
        expectations=Expectations(),
        suites_sha256=suites,
    )
