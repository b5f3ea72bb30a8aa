"""Tags of words: how many entities were found exactly, overall and by type, with intervals over whole rows.

Words of one row err together, so intervals come from drawing rows: each row is a line of counts, and every metric is
a function of their sums.

    B rows   W words of all rows   K tags   E types of entities
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tasks.spec.entities import f1, kinds_of, matched
from tasks.spec.rules import Measurement

DRAWS, BINS = 200, 15
# Of an entity: found exactly, said, there.
FOUND, SAID, THERE = range(3)


class TagAnswers(NamedTuple):
    """``true``: B arrays of tags' places; ``probabilities`` [W, K], row by row."""

    true: list[np.ndarray]
    probabilities: np.ndarray
    names: tuple[str, ...]

    gap_of = "entity_f1"

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.true), self.probabilities

    @property
    def ends(self) -> np.ndarray:
        return np.cumsum([len(row) for row in self.true])[:-1]

    def measure(self) -> tuple[Measurement, ...]:
        kinds = kinds_of(self.names)
        counts = np.concatenate([self._tags(), self._entities(kinds).reshape(len(self.true), -1)], axis=1)
        rows, there = len(self.true), int(counts[:, len(TAG_COUNTS) + THERE :: 3].sum())
        overall = [_measured(name, score, counts, rows) for name, score in TAG_SCORES.items()]
        overall += [_measured(name, score, counts, there) for name, score in ENTITY_SCORES.items()]
        return (*overall, *(m for k, name in enumerate(kinds) for m in _of_kind(name, counts, k)))

    def measure_part(self, where: str, rows: np.ndarray) -> list[Measurement]:
        picked = np.arange(len(self.true))[rows]
        if not len(picked):
            return [Measurement(metric=name, slice=where, value=0.0, samples=0) for name in ("accuracy", "entity_f1")]
        parts = np.split(self.probabilities, self.ends)
        of_part = self.instead(picked, np.concatenate([parts[row] for row in picked])).measure()
        kept = [m for m in of_part if m.metric in ("accuracy", "entity_f1") and m.slice == "overall"]
        return [m.model_copy(update={"slice": where}) for m in kept]

    def instead(self, rows: np.ndarray, probabilities: np.ndarray) -> TagAnswers:
        return self._replace(true=[self.true[row] for row in rows], probabilities=probabilities)

    def columns(self) -> dict[str, list[Any]]:
        predicted = np.split(self.probabilities.argmax(axis=1), self.ends)
        return {
            "label": [[self.names[k] for k in row] for row in self.true],
            "prediction": [[self.names[k] for k in row] for row in predicted],
            "probabilities": [part.tolist() for part in np.split(self.probabilities, self.ends)],
        }

    def _entities(self, kinds: tuple[str, ...]) -> np.ndarray:
        """Counts of each row's entities, int64 [B, E, 3]."""
        columns = self.columns()
        pairs = zip(columns["label"], columns["prediction"], strict=True)
        return np.array([matched(true, said, kinds) for true, said in pairs], np.int64).reshape(-1, len(kinds), 3)

    def _tags(self) -> np.ndarray:
        """Counts of each row's tags, float64 [B, 3 + 3 * BINS]: how many, how many right, the sum of their log losses;
        and for each bin of the top tag's probability how many, how many right, the sum of the probabilities."""
        true, p = self.flat
        row = np.repeat(np.arange(len(self.true)), [len(tags) for tags in self.true])
        right, sure = p.argmax(axis=1) == true, p.max(axis=1)
        loss = -np.log(np.clip(p[np.arange(len(true)), true], 1e-12, 1.0))
        place = np.minimum((sure * BINS).astype(int), BINS - 1)
        binned = np.zeros((len(self.true), BINS, 3))
        for column, value in enumerate((np.ones(len(true)), right, sure)):
            np.add.at(binned[:, :, column], (row, place), value)
        sums = [np.bincount(row, value, len(self.true)) for value in (np.ones(len(true)), right, loss)]
        return np.concatenate([np.stack(sums, axis=1), binned.reshape(len(self.true), -1)], axis=1)


def _calibration_error(sums: np.ndarray) -> float:
    """As ``metrics.calibration_error``, of sums."""
    binned = sums[3 : len(TAG_COUNTS)].reshape(BINS, 3)
    return float(np.abs(binned[:, 1] - binned[:, 2]).sum() / sums[0])


def _of_entities(sums: np.ndarray) -> np.ndarray:
    return sums[len(TAG_COUNTS) :].reshape(-1, 3)


def _macro_f1(sums: np.ndarray) -> float:
    return float(np.mean([f1(*kind) for kind in _of_entities(sums)]))


def _of_all(score: Callable[[Any], float]) -> Callable[[np.ndarray], float]:
    return lambda sums: float(score(_of_entities(sums).sum(axis=0)))


SCORES: dict[str, Callable[[Any], float]] = {
    "precision": lambda c: c[FOUND] / max(c[SAID], 1),
    "recall": lambda c: c[FOUND] / max(c[THERE], 1),
    "f1": lambda c: f1(*c),
}
TAG_COUNTS = range(3 + 3 * BINS)
TAG_SCORES: dict[str, Callable[[np.ndarray], float]] = {
    "accuracy": lambda sums: float(sums[1] / sums[0]),
    "log_loss": lambda sums: float(sums[2] / sums[0]),
    "calibration_error": _calibration_error,
}
ENTITY_SCORES = {f"entity_{name}": _of_all(score) for name, score in SCORES.items()} | {"macro_f1": _macro_f1}


def _of_kind(name: str, counts: np.ndarray, k: int) -> list[Measurement]:
    """Precision, recall and F1 of one type of entity, as a class's."""
    first = len(TAG_COUNTS) + 3 * k
    mine = counts[:, first : first + 3]
    there = int(mine[:, THERE].sum())
    return [_measured(metric, score, mine, there, f"class:{name}") for metric, score in SCORES.items()]


def _measured(
    name: str, score: Callable[[np.ndarray], float], counts: np.ndarray, samples: int, where: str = "overall"
) -> Measurement:
    """A score of the sums of counts [B, N], with its percentile bootstrap interval (seeded) over rows."""
    value = float(score(counts.sum(axis=0)))
    low, high = interval(score, counts, value)
    return Measurement(metric=name, slice=where, value=value, samples=samples, low=low, high=high)


def interval(score: Callable[[np.ndarray], float], counts: np.ndarray, value: float) -> tuple[float, float]:
    """Return the 95 % interval of a score whose value on all rows is ``value``."""
    rows = len(counts)
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=DRAWS) @ counts
    low, high = np.quantile([score(sums) for sums in drawn], [0.025, 0.975])
    return min(float(low), value), max(float(high), value)
