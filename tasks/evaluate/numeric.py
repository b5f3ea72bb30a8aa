"""Numbers answered on the holdout: how far they are off, and how well they rank the items of each user.

Rows of one user err together, so where there are users intervals come from drawing users, else from drawing rows; a
unit is a line of sums, and every metric is a function of the sums of all lines.

    B rows   U units (users, or at most MOST_UNITS lots of rows)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tasks.evaluate.tagged import interval
from tasks.spec.label import NumberLabel
from tasks.spec.rules import Measurement

MOST_UNITS = 4000
RANKED = 10
RELEVANT_RATIO = 0.75


class NumberAnswers(NamedTuple):
    """``true`` and ``said`` float64 [B]; ``users`` [B]: whose each row is, None where nobody's."""

    true: np.ndarray
    said: np.ndarray
    label: NumberLabel
    users: np.ndarray | None = None
    relevant: float | None = None
    names: tuple[str, ...] = ()

    gap_of = "rmse"

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return self.true, self.said

    def measure(self) -> tuple[Measurement, ...]:
        errors = _errors(self.true, self.said, self.users, "overall")
        return (*errors, *self._ranking()) if self.users is not None else tuple(errors)

    def measure_part(self, where: str, rows: np.ndarray) -> list[Measurement]:
        users = None if self.users is None else self.users[rows]
        return _errors(self.true[rows], self.said[rows], users, where)

    def instead(self, rows: np.ndarray, probabilities: np.ndarray) -> NumberAnswers:
        users = None if self.users is None else self.users[rows]
        said = probabilities[:, 0].astype(np.float64)
        return self._replace(true=self.true[rows], said=said, users=users)

    def columns(self) -> dict[str, list[Any]]:
        return {"label": self.true.tolist(), "prediction": self.said.tolist()}

    def _ranking(self) -> tuple[Measurement, ...]:
        least = self.relevant
        if least is None:
            least = self.label.min + RELEVANT_RATIO * self.label.span
        assert self.users is not None
        order = np.argsort(self.users, kind="stable")
        cuts = np.flatnonzero(self.users[order][1:] != self.users[order][:-1]) + 1
        each = [(self.true[rows], self.said[rows]) for rows in np.split(order, cuts)]
        gains = [(true - self.label.min, said) for true, said in each]
        return (
            _mean("ndcg_at_10", [value for pair in gains if (value := ndcg(*pair)) is not None]),
            _mean("recall_at_10", [value for true, said in each if (value := recall(true >= least, said)) is not None]),
        )


def ndcg(gains: np.ndarray, said: np.ndarray) -> float | None:
    """Return NDCG at 10 (Järvelin and Kekäläinen 2002) of one user's holdout items, ranked by what was said of them.

    An item's gain is its true number less the least that the label may be, discounted by log2(rank + 1); equal
    answers keep the order of the rows. None, and left out of the mean over users, where a user has fewer than two
    items or no gain: then every order is as good.
    """
    if len(gains) < 2 or not gains.any():
        return None
    discount = 1 / np.log2(np.arange(2, 2 + min(RANKED, len(gains))))
    ranked = gains[np.argsort(-said, kind="stable")][:RANKED]
    return float((ranked @ discount) / (np.sort(gains)[::-1][:RANKED] @ discount))


def recall(relevant: np.ndarray, said: np.ndarray) -> float | None:
    """Return which share of one user's relevant holdout items is among the ten of which most was said.

    Relevant is a true number of ``evaluate.relevant`` or more. None, and left out of the mean over users, where a user
    has no relevant item, or no more than ten items at all: then every order finds them.
    """
    if len(relevant) <= RANKED or not relevant.any():
        return None
    return float(relevant[np.argsort(-said, kind="stable")][:RANKED].sum() / relevant.sum())


def rmse(sums: np.ndarray) -> float:
    """Root of the mean squared error, of the sums of rows, squared errors, absolute errors."""
    return float(np.sqrt(sums[1] / max(sums[0], 1)))


def mae(sums: np.ndarray) -> float:
    return float(sums[2] / max(sums[0], 1))


def sums_of(values: np.ndarray, users: np.ndarray | None) -> np.ndarray:
    """Add up rows [B, N] by unit: [U, N]."""
    unit = np.arange(len(values)) % MOST_UNITS if users is None else np.unique(users, return_inverse=True)[1]
    return np.stack([np.bincount(unit, column) for column in values.T], axis=1)


def _errors(true: np.ndarray, said: np.ndarray, users: np.ndarray | None, where: str) -> list[Measurement]:
    if not len(true):
        # Still there with no samples: a rule on it is inconclusive then, and no error.
        return [Measurement(metric=name, slice=where, value=0.0, samples=0) for name in ("rmse", "mae")]
    error = said - true
    sums = sums_of(np.stack([np.ones(len(error)), error**2, np.abs(error)], axis=1), users)
    return [_measured(name, score, sums, len(true), where) for name, score in (("rmse", rmse), ("mae", mae))]


def _mean(name: str, values: list[float]) -> Measurement:
    """The mean over users; of none there are no samples, which a rule finds inconclusive."""
    if not values:
        return Measurement(metric=name, value=0.0, samples=0)
    sums = np.stack([np.ones(len(values)), values], axis=1)
    return _measured(name, lambda total: float(total[1] / total[0]), sums, len(values), "overall")


def _measured(
    name: str, score: Callable[[np.ndarray], float], sums: np.ndarray, samples: int, where: str
) -> Measurement:
    """A score of the sums [U, N], with its percentile bootstrap interval (seeded) over units."""
    value = score(sums.sum(axis=0))
    low, high = interval(score, sums, value)
    return Measurement(metric=name, slice=where, value=value, samples=samples, low=low, high=high)
