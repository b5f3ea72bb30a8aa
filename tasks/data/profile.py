"""A profile: the distribution of each scalar column, small enough to keep with every dataset revision; and its shift.

A number is counted in bins between its own quantiles, texts and numbers of few distinct values by value, the missing as
a bin of their own. The shift between two revisions is the total variation distance of the counts in the bins of the
older one: 0 for the same shares, 1 for none in common.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

BINS = 20
# A text column with more distinct values is no category: its length stands for it.
MAX_CATEGORIES = 100
OTHER = "\x00other"
Column = dict[str, Any]
LEFT_OUT = ("row_id", "rejected_ratio", "group_rows")


def profile_of(frame: pd.DataFrame) -> dict[str, Column]:
    """Return each column's profile, as plain data. Constant columns of a validation and row ids are left out."""
    found = {str(name): _column(frame[name]) for name in frame.columns if name not in LEFT_OUT}
    return {name: column for name, column in found.items() if column}


def shift(before: Column, frame: pd.DataFrame, name: str) -> float:
    """Return the shift of one column against its older profile, 0 to 1; 1 where the column is of another kind."""
    now = _column(frame[name], before)
    if not now or now["kind"] != before["kind"]:
        return 1.0
    return distance(before, now)


def distance(before: Column, now: Column) -> float:
    """Return the total variation distance of two profiles over the same bins."""
    one, two = _shares(before), _shares(now)
    return min(1.0, sum(abs(one.get(key, 0.0) - two.get(key, 0.0)) for key in {*one, *two}) / 2)


def counted(values: np.ndarray, edges: list[float]) -> list[int]:
    """Return how many finite numbers lie in each bin; the first and the last bin are open to the outside."""
    import numpy as np

    places = np.searchsorted(np.asarray(edges[1:-1]), values, side="right")
    return np.bincount(places, minlength=max(len(edges) - 1, 1)).tolist()


def _column(values: pd.Series, like: Column | None = None) -> Column:
    import pandas as pd

    missing = int(values.isna().sum())
    present = values.dropna()
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return _category(present.astype(str), missing, like)
    few = like["kind"] == "category" if like else present.nunique() <= BINS
    if few:
        return _category(present.map("{:.6g}".format), missing, like)
    return _number(present.to_numpy(float), missing, like)


def _number(values: np.ndarray, missing: int, like: Column | None) -> Column:
    import numpy as np

    if like and like["kind"] == "number":
        edges = like["edges"]
    else:
        quantiles = np.quantile(values, np.linspace(0, 1, BINS + 1)) if len(values) else np.zeros(1)
        edges = np.unique(quantiles).tolist()
    found = {"kind": "number", "edges": edges, "counts": counted(values, edges), "missing": missing}
    if len(values):
        found |= {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}
    return found


def _category(values: pd.Series, missing: int, like: Column | None) -> Column:
    counts = values.value_counts()
    if like and like["kind"] == "category":
        known = set(like["counts"])
    elif len(counts) <= MAX_CATEGORIES:
        known = set(counts.index)
    else:
        return {}
    found = {str(value): int(count) for value, count in counts.items() if value in known}
    return {"kind": "category", "counts": dict(sorted(found.items())), "other": int(counts.sum()) - sum(found.values()),
            "missing": missing}  # fmt: skip


def _shares(column: Column) -> dict[Any, float]:
    counts = column["counts"] if column["kind"] == "category" else dict(enumerate(column["counts"]))
    counts = {**counts, OTHER: column.get("other", 0), None: column["missing"]}
    total = math.fsum(counts.values())
    return {key: count / total for key, count in counts.items()} if total else {}
