"""Classification metrics with intervals, from a confusion matrix and probabilities.

    M confusion matrix, int64 [K, K], rows: true class, columns: predicted    P probabilities, float [B, K]
"""

from __future__ import annotations

import math

import numpy as np

from tasks.spec.rules import Measurement

Z95 = 1.959963984540054
BOOTSTRAPS = 200


def measure(true: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]) -> tuple[Measurement, ...]:
    """Return accuracy, macro F1, calibration error and log loss overall, and recall and F1 for each class.

    ``true`` int64 [B], ``probabilities`` [B, K].
    """
    predicted = probabilities.argmax(axis=1)
    matrix = confusion(true, predicted, len(classes))
    n = len(true)
    accuracy = float((true == predicted).mean())
    low, high = wilson(int((true == predicted).sum()), n)
    f1_low, f1_high = _bootstrap_macro_f1(true, predicted, len(classes))
    overall = (
        Measurement(metric="accuracy", value=accuracy, samples=n, low=low, high=high),
        Measurement(metric="macro_f1", value=macro_f1(matrix), samples=n, low=f1_low, high=f1_high),
        Measurement(metric="calibration_error", value=calibration_error(true, probabilities), samples=n),
        Measurement(metric="log_loss", value=log_loss(true, probabilities), samples=n),
    )
    return overall + tuple(m for k, name in enumerate(classes) for m in _class_measurements(matrix, k, name))


def confusion(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return M."""
    return np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), within [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def f1_by_class(matrix: np.ndarray) -> np.ndarray:
    """Return F1 of each class [K]; a class that is neither there nor predicted counts as 0."""
    hits = np.diag(matrix).astype(float)
    return 2 * hits / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)


def macro_f1(matrix: np.ndarray) -> float:
    return float(f1_by_class(matrix).mean())


def calibration_error(true: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class over equal-width bins (Guo 2017, arXiv:1706.04599)."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(correct[index == b].mean() - confidence[index == b].mean()) * (index == b).mean() for b in set(index)]
    return float(sum(gaps))


def log_loss(true: np.ndarray, probabilities: np.ndarray) -> float:
    return float(-np.log(np.clip(probabilities[np.arange(len(true)), true], 1e-12, 1.0)).mean())


def _class_measurements(matrix: np.ndarray, k: int, name: str) -> list[Measurement]:
    n, hits = int(matrix[k].sum()), int(matrix[k, k])
    low, high = wilson(hits, n)
    where = f"class:{name}"
    return [
        Measurement(metric="recall", slice=where, value=hits / n if n else 0.0, samples=n, low=low, high=high),
        Measurement(metric="f1", slice=where, value=float(f1_by_class(matrix)[k]), samples=n),
    ]


def _bootstrap_macro_f1(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[float, float]:
    """Percentile bootstrap (seeded): resampling rows is resampling the confusion matrix's cells."""
    cells = confusion(true, predicted, num_classes).ravel()
    draws = np.random.default_rng(0).multinomial(len(true), cells / cells.sum(), size=BOOTSTRAPS)
    scores = [macro_f1(draw.reshape(num_classes, num_classes)) for draw in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
