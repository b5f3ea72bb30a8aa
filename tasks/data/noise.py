"""Confident learning: which labels are likely wrong, and how many (Northcutt et al. 2021, by cleanlab).

A plain classifier is asked about rows that it was not fitted on (cross-validation), so it can't have learned
their wrong labels by heart.

    A audited rows   K classes
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.table import images, numbers

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.feature import Feature

# A class with fewer rows can't be in every fold.
FOLDS, FOLDS_OF_MANY, MANY_ROWS = 5, 3, 5_000
SEED = 0
# The 97.5 % quantile of the normal distribution: a 95 % interval.
Z95 = 1.959964


class Noise(NamedTuple):
    """What the audit found. ``ratio`` is the estimated share of wrong labels among ``samples`` rows (its 95 %
    interval is low to high); the arrays hold the suspects, worst first: index into the table, the class
    suggested, and quality, the model's probability of the given label."""

    samples: int
    ratio: float
    low: float
    high: float
    rows: np.ndarray
    suggested: np.ndarray
    quality: np.ndarray


def audit(table: pa.Table, feature: Feature, codes: np.ndarray, max_rows: int) -> Noise:
    """Return the label errors of a table; ``codes`` are its class indices, int64 [B], -1 where unknown.

    At most ``max_rows`` rows are audited, a seeded sample. Where fewer than two classes have rows enough,
    nothing can be said: 0 samples.
    """
    import numpy as np

    rows = _auditable(table, feature, codes, max_rows)
    classes, labels = np.unique(codes[rows], return_inverse=True)
    if len(classes) < 2:
        nothing = np.zeros(0, np.int64)
        return Noise(0, 0.0, 0.0, 1.0, nothing, nothing, np.zeros(0))
    probabilities = _out_of_sample(table.take(rows), feature, labels)
    return _confident(rows, classes, labels, probabilities)


def wilson(ratio: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a ratio (Wilson 1927)."""
    centre = ratio + Z95**2 / (2 * samples)
    spread = Z95 * math.sqrt(ratio * (1 - ratio) / samples + Z95**2 / (4 * samples**2))
    scale = 1 + Z95**2 / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _auditable(table: pa.Table, feature: Feature, codes: np.ndarray, max_rows: int) -> np.ndarray:
    """Indices, ascending, of the rows to audit: known label, features there, of a class of FOLDS rows."""
    import numpy as np

    usable = codes >= 0
    if feature.kind != "table":
        usable &= np.asarray(table.column(feature.column).is_valid().combine_chunks())
    rows = np.flatnonzero(usable)
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(SEED).choice(rows, max_rows, replace=False))
    classes, counts = np.unique(codes[rows], return_counts=True)
    return rows[np.isin(codes[rows], classes[counts >= FOLDS])]


def _out_of_sample(table: pa.Table, feature: Feature, labels: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [A, K], of each row by a model fitted on the other folds."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    num_folds = FOLDS_OF_MANY if len(labels) > MANY_ROWS else FOLDS
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        # A fit that stops at max_iter ranks labels as well: the audit needs no last digit.
        warnings.simplefilter("ignore")
        return cross_val_predict(
            _model(feature), _inputs(table, feature), labels, cv=folds, method="predict_proba"
        )


def _inputs(table: pa.Table, feature: Feature) -> Any:
    import numpy as np

    if feature.kind == "text":
        return np.array(table.column(feature.column).to_pylist(), dtype=object)
    if feature.kind == "image":
        return images(table.column(feature.column), feature.shape[0]) / np.float32(feature.max_value)
    return numbers(table, feature)


def _model(feature: Feature) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if feature.kind == "text":
        from sklearn.feature_extraction.text import TfidfVectorizer

        # Texts are wide and sparse: less shrinking than the default (C = 1) is needed to separate them.
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=20_000)
        return make_pipeline(words, LogisticRegression(C=10, max_iter=100, tol=1e-3))
    if feature.kind == "image":
        return LogisticRegression(max_iter=50, tol=1e-3)
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import StandardScaler

    filled = SimpleImputer(keep_empty_features=True)
    return make_pipeline(filled, StandardScaler(), LogisticRegression(max_iter=100, tol=1e-3))


def _confident(rows: np.ndarray, classes: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> Noise:
    import numpy as np
    from cleanlab.count import estimate_joint
    from cleanlab.filter import find_label_issues

    # One process: a pool of forked ones costs more than it saves here, and may not be forked in a worker.
    found = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    found = np.asarray(found, dtype=np.int64)
    ratio = float(np.clip(1 - np.trace(estimate_joint(labels, probabilities)), 0, 1))
    low, high = wilson(ratio, len(rows))
    return Noise(
        samples=len(rows),
        ratio=ratio,
        low=low,
        high=high,
        rows=rows[found],
        suggested=classes[probabilities[found].argmax(axis=1)],
        quality=probabilities[found, labels[found]],
    )
