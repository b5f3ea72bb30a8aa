"""Two models' answers on the same rows: whether one is really better, with the pairs that tell them apart.

    B rows
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tasks.evaluate.numeric import sums_of
from tasks.evaluate.perplexed import bits_gain
from tasks.evaluate.tagged import interval
from tasks.spec.entities import f1, kinds_of, matched
from tasks.spec.rules import Measurement
from tasks.spec.value import RoomRef
from tasks.store.room import open_room

Z95 = 1.959963984540054


def against(candidate: RoomRef, champion: RoomRef) -> tuple[Measurement, ...]:
    """Return ``accuracy_gain`` (candidate minus champion, with its interval), ``mcnemar_p`` (that they err alike)
    and ``champion_agreement``, on the rows that both were asked. Of tagged words ``entity_f1_gain`` and the
    agreement; of numbers ``rmse_gain`` alone, of texts whose next piece is told ``bits_gain``."""
    mine, theirs, right = _paired(candidate, champion)
    if mine and isinstance(mine[0], dict):
        return (bits_gain(mine, theirs),)
    if right and isinstance(right[0], float):
        return (_rmse_gain(mine, theirs, right),)
    if right and isinstance(right[0], list):
        return (_entity_f1_gain(mine, theirs, right), _agreement("champion_agreement", mine, theirs))
    pairs = [(one == true, other == true) for one, other, true in zip(mine, theirs, right, strict=True)]
    gained, lost, n = pairs.count((True, False)), pairs.count((False, True)), len(right)
    low, high = paired_interval(gained, lost, n)
    return (
        Measurement(metric="accuracy_gain", value=(gained - lost) / n, samples=n, low=low, high=high),
        Measurement(metric="mcnemar_p", value=mcnemar(gained, lost), samples=gained + lost),
        _agreement("champion_agreement", mine, theirs),
    )


def agreement(candidate: RoomRef, reference: RoomRef) -> tuple[Measurement, ...]:
    """Return the share of rows, or of words, on which a candidate answers as the uncompressed model does; of numbers,
    which are hardly ever the same, nothing."""
    mine, theirs, _ = _paired(candidate, reference)
    return () if mine and isinstance(mine[0], float | dict) else (_agreement("agreement", mine, theirs),)


def _agreement(metric: str, mine: list[Any], theirs: list[Any]) -> Measurement:
    pairs = list(zip(mine, theirs, strict=True))
    if mine and isinstance(mine[0], list):
        pairs = [words for row in pairs for words in zip(*row, strict=True)]
    return Measurement(metric=metric, value=sum(one == other for one, other in pairs) / len(pairs), samples=len(mine))


def _entity_f1_gain(mine: list[Any], theirs: list[Any], right: list[Any]) -> Measurement:
    """Candidate minus champion, with the interval of drawing rows, both answers of a row together."""
    kinds = kinds_of(sorted({tag for row in (*mine, *theirs, *right) for tag in row}))
    counts = [
        [np.array(matched(true, said, kinds), np.int64).reshape(-1, 3).sum(axis=0) for said in both]
        for true, *both in zip(right, mine, theirs, strict=True)
    ]
    flat = np.array(counts).reshape(len(right), 6)
    value = _gain(flat.sum(axis=0))
    low, high = interval(_gain, flat, value)
    return Measurement(metric="entity_f1_gain", value=value, samples=len(right), low=low, high=high)


def _gain(sums: np.ndarray) -> float:
    return f1(*sums[:3]) - f1(*sums[3:])


def _rmse_gain(mine: list[float], theirs: list[float], right: list[float]) -> Measurement:
    """Champion minus candidate, so that more is better, with the interval of drawing rows, both answers of a row
    together."""
    true = np.array(right)
    squares = [(np.array(said) - true) ** 2 for said in (mine, theirs)]
    sums = sums_of(np.stack([np.ones(len(true)), *squares], axis=1), None)
    value = _less_error(sums.sum(axis=0))
    low, high = interval(_less_error, sums, value)
    return Measurement(metric="rmse_gain", value=value, samples=len(true), low=low, high=high)


def _less_error(sums: np.ndarray) -> float:
    return float(np.sqrt(sums[2] / sums[0]) - np.sqrt(sums[1] / sums[0]))


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


def _paired(one: RoomRef, other: RoomRef) -> tuple[list[Any], list[Any], list[Any]]:
    """Both models' answers and the labels, by row: names, lists of tags, numbers, or what texts cost."""
    import pyarrow.parquet as pq

    tables = [_by_row(pq.read_table(open_room(ref) / "predictions.parquet")) for ref in (one, other)]
    shared = sorted(tables[0].keys() & tables[1].keys())
    first, second = ([table[row] for row in shared] for table in tables)
    return [item[0] for item in first], [item[0] for item in second], [item[1] for item in first]


def _by_row(table: object) -> dict[object, tuple[Any, Any]]:
    columns = (table.column(name).to_pylist() for name in ("row_id", "prediction", "label"))  # type: ignore[attr-defined]
    return {row: (prediction, label) for row, prediction, label in zip(*columns, strict=True)}

