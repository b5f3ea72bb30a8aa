"""Classification metrics with intervals, from a confusion matrix and probabilities.

    M confusion matrix, int64 [K, K], rows: true class, columns: predicted    P probabilities, float [B, K]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tasks.spec.rules import Measurement

Z95 = 1.959963984540054
BOOTSTRAPS, BOOTSTRAP_CELLS = 200, 4_000_000


def measure(true: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]) -> tuple[Measurement, ...]:
    """Return accuracy, macro F1, AUROC, calibration error and log loss overall, and recall and F1 for each class.

    ``true`` int64 [B], ``probabilities`` [B, K].
    """
    predicted = probabilities.argmax(axis=1)
    matrix = confusion(true, predicted, len(classes))
    n = len(true)
    accuracy = float((true == predicted).mean())
    low, high = wilson(int((true == predicted).sum()), n)
    f1_low, f1_high = bootstrap_macro_f1(matrix)
    overall = (
        Measurement(metric="accuracy", value=accuracy, samples=n, low=low, high=high),
        Measurement(metric="macro_f1", value=macro_f1(matrix), samples=n, low=f1_low, high=f1_high),
        _bootstrapped("auroc", auroc, true, probabilities),
        _bootstrapped("calibration_error", calibration_error, true, probabilities),
        _bootstrapped("log_loss", log_loss, true, probabilities),
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


def difference(a: int, n: int, b: int, m: int) -> tuple[float, float]:
    """Return the 95 % interval of a/n - b/m, two shares of different rows (Newcombe 1998, method 10)."""
    p, q = a / n, b / m
    (p_low, p_high), (q_low, q_high) = wilson(a, n), wilson(b, m)
    low = p - q - math.hypot(p - p_low, q_high - q)
    return low, p - q + math.hypot(p_high - p, q - q_low)


def f1_by_class(matrix: np.ndarray) -> np.ndarray:
    """Return F1 of each class [K]; a class that is neither there nor predicted counts as 0."""
    hits = np.diag(matrix).astype(float)
    return 2 * hits / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)


def f1_interval(hits: int, missed: int) -> tuple[float, float]:
    """Return the 95 % interval of one class's F1: of its rows and the answers that name it, ``hits`` are both and
    ``missed`` one alone. The share of hits has Wilson's interval, and F1 = 2 share / (1 + share) rises with it (Lam
    2023, arXiv:2309.14621, the indirect method); unlike a bootstrap's it has a width where all are right too."""
    low, high = wilson(hits, hits + missed)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def macro_f1(matrix: np.ndarray, classes: np.ndarray | None = None) -> float:
    """The mean of F1 over all classes, or over those that a mask [K] names."""
    scores = f1_by_class(matrix)
    return float((scores if classes is None else scores[classes]).mean())


def auroc(true: np.ndarray, probabilities: np.ndarray) -> float:
    """The area under the ROC curve, each class against the rest, averaged over the classes that are there; by ranks
    (Mann and Whitney 1947), ties counted half. 0.5 where no class has both sides."""
    scores = []
    for k in range(probabilities.shape[1]):
        mine = true == k
        if 0 < mine.sum() < len(true):
            scores.append(_area(probabilities[mine, k], probabilities[~mine, k]))
    return float(np.mean(scores)) if scores else 0.5


def _area(inside: np.ndarray, outside: np.ndarray) -> float:
    outside = np.sort(outside)
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))


def calibration_error(true: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class over equal-width bins (Guo 2017, arXiv:1706.04599)."""
    return sum(abs(right - sure) * rows for sure, right, rows in calibration(true, probabilities, bins)) / len(true)


def calibration(true: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> list[tuple[float, float, int]]:
    """Return (mean confidence, share that is right, rows) of each bin of the top class's confidence that has rows."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        (float(confidence[index == b].mean()), float(correct[index == b].mean()), int((index == b).sum()))
        for b in range(bins)
        if (index == b).any()
    ]


def log_loss(true: np.ndarray, probabilities: np.ndarray) -> float:
    return float(-np.log(np.clip(probabilities[np.arange(len(true)), true], 1e-12, 1.0)).mean())


def _class_measurements(matrix: np.ndarray, k: int, name: str) -> list[Measurement]:
    n, hits = int(matrix[k].sum()), int(matrix[k, k])
    low, high = wilson(hits, n)
    f1_low, f1_high = f1_interval(hits, n + int(matrix[:, k].sum()) - 2 * hits)
    where, f1 = f"class:{name}", float(f1_by_class(matrix)[k])
    return [
        Measurement(metric="recall", slice=where, value=hits / n if n else 0.0, samples=n, low=low, high=high),
        Measurement(metric="f1", slice=where, value=f1, samples=n, low=f1_low, high=f1_high),
    ]


def _bootstrapped(
    name: str, score: Callable[[np.ndarray, np.ndarray], float], true: np.ndarray, probabilities: np.ndarray
) -> Measurement:
    """A score with its percentile bootstrap interval (seeded); the more rows the fewer draws, at least 40."""
    draw, n = np.random.default_rng(0), len(true)
    draws = int(np.clip(BOOTSTRAP_CELLS / (n * probabilities.shape[1]), 40, BOOTSTRAPS))
    picked = [draw.integers(0, n, n) for _ in range(draws)]
    low, high = np.quantile([score(true[rows], probabilities[rows]) for rows in picked], [0.025, 0.975])
    value = score(true, probabilities)
    return Measurement(metric=name, value=value, samples=n, low=min(float(low), value), high=max(float(high), value))


def bootstrap_macro_f1(matrix: np.ndarray, there_only: bool = False) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval (seeded) of macro F1: over all classes, or over those that M has
    rows of. Resampling rows is resampling M's cells: those that are not empty, C of them, in all draws at once."""
    true, predicted = matrix.nonzero()
    n, one = matrix.sum(), np.eye(len(matrix))
    draws = np.random.default_rng(0).multinomial(n, matrix[true, predicted] / n, size=BOOTSTRAPS)  # [draws, C]
    right = (true == predicted)[:, None]
    hits, rows, said = draws @ (one[true] * right), draws @ one[true], draws @ one[predicted]  # [draws, K]
    f1 = 2 * hits / np.maximum(rows + said, 1)
    scores = f1.mean(axis=1, where=rows > 0) if there_only else f1.mean(axis=1)
    value = macro_f1(matrix, matrix.sum(axis=1) > 0 if there_only else None)
    low, high = np.quantile(scores, [0.025, 0.975])
    return min(float(low), value), max(float(high), value)
