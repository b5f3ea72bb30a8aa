"""Two models' answers on the same rows: whether one is really better, with the pairs that tell them apart.

    B rows
"""

from __future__ import annotations

import math

import numpy as np

from tasks.spec.rules import Measurement
from tasks.spec.value import RoomRef
from tasks.store.room import open_room

Z95 = 1.959963984540054


def against(candidate: RoomRef, champion: RoomRef) -> tuple[Measurement, ...]:
    """Return ``accuracy_gain`` (candidate minus champion, with its interval), ``mcnemar_p`` (that they err alike)
    and ``champion_agreement``, on the rows that both were asked."""
    mine, theirs, right = _paired(candidate, champion)
    gained, lost = int(((mine == right) & (theirs != right)).sum()), int(((mine != right) & (theirs == right)).sum())
    n = len(right)
    low, high = paired_interval(gained, lost, n)
    return (
        Measurement(metric="accuracy_gain", value=(gained - lost) / n, samples=n, low=low, high=high),
        Measurement(metric="mcnemar_p", value=mcnemar(gained, lost), samples=gained + lost),
        Measurement(metric="champion_agreement", value=float((mine == theirs).mean()), samples=n),
    )


def agreement(candidate: RoomRef, reference: RoomRef) -> Measurement:
    """Return the share of rows on which a candidate answers as the uncompressed model does."""
    mine, theirs, right = _paired(candidate, reference)
    return Measurement(metric="agreement", value=float((mine == theirs).mean()), samples=len(right))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947): of the rows where one alone is right, as many for
    either. 1 where there are none. Large counts by the normal approximation with continuity correction."""
    n, few = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    if n > 1000:
        return math.erfc(max(0.0, abs(gained - lost) - 1) / math.sqrt(2 * n))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired shares (Wald with half counts, Agresti and Min 2005)."""
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    centre = (b - c) / m
    half = Z95 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / m)) / m
    return max(-1.0, centre - half), min(1.0, centre + half)


def _paired(one: RoomRef, other: RoomRef) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both models' answers and the labels, by row."""
    import pyarrow.parquet as pq

    tables = [_by_row(pq.read_table(open_room(ref) / "predictions.parquet")) for ref in (one, other)]
    shared = sorted(tables[0].keys() & tables[1].keys())
    first, second = ([table[row] for row in shared] for table in tables)
    return (np.array([item[0] for item in first]), np.array([item[0] for item in second]),
            np.array([item[1] for item in first]))  # fmt: skip


def _by_row(table: object) -> dict[object, tuple[str, str]]:
    columns = (table.column(name).to_pylist() for name in ("row_id", "prediction", "label"))  # type: ignore[attr-defined]
    return {row: (prediction, label) for row, prediction, label in zip(*columns, strict=True)}

