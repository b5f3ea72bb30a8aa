"""What a package answered on the holdout beside what is true: one class a row here, tags in ``tagged.py``,
numbers in ``numeric.py``, how likely texts are in ``perplexed.py``.

    B rows   K classes
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from tasks.evaluate.metrics import bootstrap_macro_f1, confusion, macro_f1, measure, wilson
from tasks.evaluate.numeric import NumberAnswers
from tasks.evaluate.perplexed import TextAnswers
from tasks.evaluate.tagged import TagAnswers
from tasks.serve.package import Package
from tasks.spec.evaluate import Evaluate
from tasks.spec.feature import Feature
from tasks.spec.label import Target
from tasks.spec.pieces import counted
from tasks.spec.rules import Measurement

BATCH_ROWS = 256


class Answers(Protocol):
    """Each class on the holdout's rows; ``flat`` is for the report's pictures: true classes and probabilities, or true
    numbers and those that were said, or of texts pieces and their mean log-probability. ``gap_of``: the metric whose
    gap between groups is measured, where it isn't the shares of classes."""

    names: tuple[str, ...]

    @property
    def gap_of(self) -> str: ...

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]: ...

    def measure(self) -> tuple[Measurement, ...]:
        """Return all that is known overall and by class."""

    def measure_part(self, where: str, rows: np.ndarray) -> list[Measurement]:
        """Return the main metrics on some rows: a mask [B], or their numbers."""

    def instead(self, rows: np.ndarray, probabilities: np.ndarray) -> Answers:
        """Return other answers to some of the rows, given by their numbers."""

    def columns(self) -> dict[str, list[Any]]:
        """Return label, prediction and probabilities of each row, as ``predictions.parquet`` has them."""


def answers_of(
    feature: Feature,
    label: Target,
    declared: Evaluate,
    rows: Any,
    true: Any,
    probabilities: np.ndarray,
    tokenizer: Any = None,
) -> Answers:
    """``rows`` and ``true`` as ``read_split`` returns them, ``probabilities`` as ``ask`` does."""
    if label.kind == "next":
        pieces, characters = counted(feature, rows, tokenizer)
        nats = -probabilities[:, 0].astype(np.float64) * pieces
        return TextAnswers(nats, pieces, characters)
    if label.kind == "number":
        users = np.array([row[0] for row in rows]) if feature.kind == "ids" else None
        said = probabilities[:, 0].astype(np.float64)
        return NumberAnswers(true.astype(np.float64), said, label, users, declared.relevant)
    kind = TagAnswers if feature.kind == "tokens" else ClassAnswers
    return kind(true, probabilities, label.names)


def ask(package: Package, rows: Any, names: tuple[str, ...]) -> np.ndarray:
    """Return a package's answers to rows in the order of ``names``, the classes as the workload's file has them; of a
    number, which has none, as they are."""
    parts = [package.predict(rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS)]
    answers = np.concatenate(parts)
    return answers[:, [package.signature.classes.index(name) for name in names]] if names else answers


class ClassAnswers(NamedTuple):
    """``true`` int64 [B], ``probabilities`` [B, K]."""

    true: np.ndarray
    probabilities: np.ndarray
    names: tuple[str, ...]

    gap_of = ""

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return self.true, self.probabilities

    @property
    def predicted(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)

    def measure(self) -> tuple[Measurement, ...]:
        return measure(self.true, self.probabilities, self.names)

    def measure_part(self, where: str, rows: np.ndarray) -> list[Measurement]:
        true, predicted = self.true[rows], self.predicted[rows]
        n, hits = len(true), int((true == predicted).sum())
        if not n:
            # Still there with no samples: a rule on it is inconclusive then, and no error.
            return [Measurement(metric=name, slice=where, value=0.0, samples=0) for name in ("accuracy", "macro_f1")]
        low, high = wilson(hits, n)
        matrix = confusion(true, predicted, len(self.names))
        f1, (f1_low, f1_high) = macro_f1(matrix, matrix.sum(axis=1) > 0), bootstrap_macro_f1(matrix, there_only=True)
        return [
            Measurement(metric="accuracy", slice=where, value=hits / n, samples=n, low=low, high=high),
            Measurement(metric="macro_f1", slice=where, value=f1, samples=n, low=f1_low, high=f1_high),
        ]

    def instead(self, rows: np.ndarray, probabilities: np.ndarray) -> ClassAnswers:
        return self._replace(true=self.true[rows], probabilities=probabilities)

    def columns(self) -> dict[str, list[Any]]:
        return {
            "label": [self.names[k] for k in self.true],
            "prediction": [self.names[k] for k in self.predicted],
            "probabilities": list(self.probabilities),
        }
