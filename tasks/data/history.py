"""The cleaned table beside the last accepted revision: what changed upstream, as numbers that expectations judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.profile import shift
from tasks.data.scalars import VIEW, named, quoted

if TYPE_CHECKING:
    import pandas as pd

    from tasks.spec.requests import ValidateDataRequest


def compared(
    request: ValidateDataRequest, schema: dict[str, str], rows: int, frame: pd.DataFrame, facts: dict[str, Any]
) -> dict[str, float]:
    """Return what an expectation of the stage ``history`` reads, by column.

    ``facts`` are the last accepted revision's (``dataset.json``), ``schema`` and ``rows`` the cleaned table's. A
    column that is gone, or of another kind, has a shift of 1.
    """
    before = facts["schema"]
    # How many files bring bytes that another file of this delivery brings too: yesterday's, sent again.
    repeated = len(request.sources) - len(set(request.sources))
    found = {
        "volume_ratio": rows / max(facts["rows"], 1),
        "missing_columns": len(set(before) - set(schema)),
        "changed_types": sum(before[name] != schema[name] for name in set(before) & set(schema)),
        "repeated_files": repeated,
        "new_files": len(set(request.sources) - set(facts["sources"])),
    }
    for name, column in facts["profile"].items():
        found[f"shift_{name}"] = shift(column, frame, name) if name in frame.columns else 1.0
    return {name: float(value) for name, value in found.items()}


def newest_frame(scalars: Any, request: ValidateDataRequest) -> pd.DataFrame:
    """Return one row: ``age_days`` of the source's newest row on the day of the run, null where no time can be read."""
    newest = request.expectations.newest
    assert newest is not None
    column = named(newest.column)
    times = {name: kind for name, kind, *_ in scalars.table_of(f"DESCRIBE {VIEW}")}
    if times[newest.column] == "DOUBLE":
        at = f"to_timestamp({column})"
    else:
        at = f"try_strptime({column}, {quoted(newest.format)})" if newest.format else f"TRY_CAST({column} AS TIMESTAMP)"
    age = f"epoch({quoted(request.today)}::TIMESTAMP + INTERVAL 1 DAY) - epoch(max({at}))"
    # Counted from the day's end: what came today is 0 to 1 days old.
    return scalars.frame_of(f"SELECT (({age}) / 86400)::DOUBLE AS age_days FROM {VIEW}")


def split_frame(scalars: Any, request: ValidateDataRequest) -> pd.DataFrame:
    """Return one row a split: its rows, their share of all, how far that is off the declared one, its classes."""
    # Of a number there is none, and none is in an empty list.
    names = ", ".join(f"'{name.replace(chr(39), chr(39) * 2)}'" for name in request.label.names) or "NULL"
    known, rows = f"count(DISTINCT label) FILTER (WHERE label IN ({names}))::DOUBLE AS classes", "count(*)"
    source = "scalars"
    if request.feature.kind == "tokens":
        source = "(SELECT split, row_id, unnest(string_split(label, ' ')) AS label FROM scalars)"
        rows = "count(DISTINCT row_id)"
    query = f"SELECT split, {rows}::DOUBLE AS rows, {known} FROM {source} GROUP BY split ORDER BY split"
    frame = scalars.frame_of(query)
    frame["ratio"] = frame["rows"] / max(frame["rows"].sum(), 1)
    declared = {"validation": request.split.validation, "holdout": request.split.holdout}
    declared["train"] = 1 - sum(declared.values())
    frame["off_ratio"] = (frame["ratio"] - frame["split"].map(declared).astype(float)).abs()
    return frame
