"""Declared parts of the holdout, and gaps between groups: measured with what supports them.

    B rows   K classes
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluate.answers import Answers
from tasks.evaluate.metrics import difference, wilson
from tasks.spec.errors import BadRequest
from tasks.spec.evaluate import Evaluate, Slice
from tasks.spec.rules import Measurement

# A group or value with fewer rows says nothing about a gap.
LEAST_ROWS, MOST_GROUPS = 10, 20


def measure_slices(declared: Evaluate, data: Path, answers: Answers) -> tuple[Measurement, ...]:
    """Measure the main metrics on each slice, and the gaps between each column's groups. The answers are in the order
    of the holdout's rows in ``data``.

    Raises:
        BadRequest: a condition that DuckDB can't answer, or a column that the data lacks.
    """
    if not (declared.slices or declared.groups):
        return ()
    import pyarrow.parquet as pq

    table = pq.read_table(data, filters=[("split", "==", "holdout")])
    found = []
    for item in declared.slices:
        found += answers.measure_part(f"slice:{item.name}", mask_of(table, item))
    for column in declared.groups:
        if column not in table.column_names:
            raise BadRequest(f"evaluate.groups: {column!r} is not there, must be one of {table.column_names}")
        values = np.array([str(value) for value in table.column(column).to_pylist()])
        if answers.gap_of:
            found += gap_between(column, values, answers)
        else:
            true, p = answers.flat
            found += gaps(column, values, true, p.argmax(axis=1), len(answers.names))
    return tuple(found)


def mask_of(table: Any, item: Slice) -> np.ndarray:
    """Return which rows of an Arrow table a slice's condition holds for, bool [B]; an unknown (NULL) is no."""
    import duckdb

    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.register("holdout", table)
        try:
            answer = connection.execute(f"SELECT coalesce(CAST(({item.where}) AS BOOLEAN), false) FROM holdout")
            rows = answer.fetchall()
        except duckdb.Error as error:
            line = str(error).splitlines()[0]
            raise BadRequest(f"evaluate.slices.{item.name}.where = {item.where!r}: {line}") from None
    if len(rows) != table.num_rows:
        raise BadRequest(f"evaluate.slices.{item.name}.where = {item.where!r}, must be one condition on a row")
    return np.array([row[0] for row in rows], dtype=bool)


def gaps(
    column: str, values: np.ndarray, true: np.ndarray, predicted: np.ndarray, num_classes: int
) -> list[Measurement]:
    """Return accuracy by group, and the largest gaps between two groups of a column's values [B].

    ``accuracy_gap``: of the shares that are right; ``selection_gap``: of the shares of one answer (demographic
    parity), of the class where it is largest; ``recall_gap``: of one class's recall (equal opportunity, Hardt 2016,
    arXiv:1610.02413), likewise. Each with the 95 % interval of the difference of the two shares. A column with one
    group of ten rows or more has no gap to measure.
    """
    groups = _groups(values)
    right = predicted == true
    shares = {name: [(int(right[values == name].sum()), int((values == name).sum()))] for name in groups}
    found = []
    for name in groups:
        hits, n = shares[name][0]
        low, high = wilson(hits, n)
        found.append(
            Measurement(metric="accuracy", slice=f"{column}={name}", value=hits / n, samples=n, low=low, high=high)
        )
    if len(groups) < 2:
        return found
    chosen = {name: _counts(predicted[values == name], np.ones((values == name).sum(), bool), num_classes)
              for name in groups}  # fmt: skip
    recalled = {
        name: [
            (int((right & (true == k))[values == name].sum()), int((true == k)[values == name].sum()))
            for k in range(num_classes)
        ]
        for name in groups
    }
    for metric, counts in (("accuracy_gap", shares), ("selection_gap", chosen), ("recall_gap", recalled)):
        if widest := _widest(counts):
            value, low, high, n = widest
            where = f"group:{column}"
            found.append(Measurement(metric=metric, slice=where, value=value, samples=n, low=low, high=high))
    return found


def gap_between(column: str, values: np.ndarray, answers: Answers) -> list[Measurement]:
    """Return the main metrics by group of a column's values [B], and the largest gap between two groups' values of the
    one that counts (``gap_of``), with its 95 % interval by those of the two (MOVER, Zou and Donner 2008)."""
    by_group = [answers.measure_part(f"{column}={name}", values == name) for name in _groups(values)]
    found = [m for group in by_group for m in group]
    told = sorted((m for m in found if m.metric == answers.gap_of and m.samples), key=lambda m: m.value)
    if len(told) < 2:
        return found
    less, more = told[0], told[-1]
    gap = more.value - less.value
    (down_of_less, up_of_less), (down_of_more, up_of_more) = _reach(less), _reach(more)
    gap_measured = Measurement(
        metric=f"{answers.gap_of}_gap",
        slice=f"group:{column}",
        value=gap,
        samples=min(less.samples, more.samples),
        low=max(0.0, gap - math.hypot(down_of_more, up_of_less)),
        high=gap + math.hypot(up_of_more, down_of_less),
    )
    return [*found, gap_measured]


def _reach(measured: Measurement) -> tuple[float, float]:
    """How far the interval goes below the value, and above it."""
    low, high = (measured.value if end is None else end for end in (measured.low, measured.high))
    return measured.value - low, high - measured.value


def _groups(values: np.ndarray) -> list[str]:
    return [value for value in np.unique(values) if (values == value).sum() >= LEAST_ROWS][:MOST_GROUPS]


def _counts(predicted: np.ndarray, there: np.ndarray, num_classes: int) -> list[tuple[int, int]]:
    return [(int((predicted == k).sum()), int(there.sum())) for k in range(num_classes)]


def _widest(counts: dict[str, list[tuple[int, int]]]) -> tuple[float, float, float, int] | None:
    """The largest difference of two groups' shares in one column of counts, its interval, and the fewest rows."""
    widest = None
    for column in zip(*counts.values(), strict=True):
        told = [(hits / n, hits, n) for hits, n in column if n >= LEAST_ROWS]
        if len(told) < 2:
            continue
        (_, a, n), (_, b, m) = max(told), min(told)
        low, high = difference(a, n, b, m)
        if widest is None or a / n - b / m > widest[0]:
            widest = (a / n - b / m, low, high, min(n, m))
    return widest
