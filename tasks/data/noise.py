"""Confident learning: which labels are likely wrong, and how many (Northcutt et al. 2021, by cleanlab).

A small model is asked about rows that it was not fitted on, so it can't have learned their wrong labels by heart:
patch features and a ridge classifier's left-out answers for images, logistic regression by cross-validation for
texts (on words and pairs of words) and tables.

    A audited rows   K classes
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.patches import patch_features
from tasks.data.ridge import left_out_probabilities
from tasks.data.table import SEED, images, numbers, sample

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.data.rawrows import RawRows
    from tasks.spec.feature import Feature, ImageFeature

# A class with fewer rows can't be in every fold.
FOLDS, FOLDS_OF_MANY, MANY_ROWS = 5, 3, 5_000
# The 97.5 % quantile of the normal distribution: a 95 % interval.
Z95 = 1.959964


class Noise(NamedTuple):
    """What the audit found. ``ratio`` is the estimated share of wrong labels among ``samples`` rows (its 95 %
    interval is low to high), ``by_class`` the same of each class's own rows, by class index, with their number;
    the arrays hold the suspects, worst first: index into the table, the class suggested, and quality, the
    model's probability of the given label."""

    samples: int
    ratio: float
    low: float
    high: float
    rows: np.ndarray
    suggested: np.ndarray
    quality: np.ndarray
    by_class: dict[int, tuple[float, int]] = {}


class Suspects(NamedTuple):
    """What confident learning says on A rows: indices of the suspects, worst first; the share of wrong labels
    overall, and of each given class, float64 [K]."""

    found: np.ndarray
    ratio: float
    by_class: np.ndarray


def audit(table: pa.Table | RawRows, feature: Feature, codes: np.ndarray, max_rows: int) -> Noise:
    """Return the label errors of a table; ``codes`` are its class indices, int64 [B], -1 where unknown or where the
    features are missing.

    At most ``max_rows`` rows are audited, a seeded sample. Where fewer than two classes have rows enough,
    nothing can be said: 0 samples.
    """
    import numpy as np

    rows = _auditable(codes, max_rows)
    classes, labels = np.unique(codes[rows], return_inverse=True)
    if len(classes) < 2:
        nothing = np.zeros(0, np.int64)
        return Noise(0, 0.0, 0.0, 1.0, nothing, nothing, np.zeros(0))
    probabilities = _out_of_sample(table.take(rows), feature, labels)
    return _noise(rows, classes, labels, probabilities)


def wilson(ratio: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a ratio (Wilson 1927)."""
    centre = ratio + Z95**2 / (2 * samples)
    spread = Z95 * math.sqrt(ratio * (1 - ratio) / samples + Z95**2 / (4 * samples**2))
    scale = 1 + Z95**2 / samples
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _auditable(codes: np.ndarray, max_rows: int) -> np.ndarray:
    """Indices, ascending, of the rows to audit, of classes of FOLDS rows."""
    import numpy as np

    rows = sample(np.flatnonzero(codes >= 0), max_rows)
    classes, counts = np.unique(codes[rows], return_counts=True)
    return rows[np.isin(codes[rows], classes[counts >= FOLDS])]


def _out_of_sample(table: pa.Table, feature: Feature, labels: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [A, K], of each row by a model that was not fitted on it."""
    if feature.kind == "image":
        return image_probabilities(images(table.column(feature.column), feature.shape[0]), feature, labels)
    return _cross_validated(table, feature, labels)


def image_probabilities(pixels: np.ndarray, feature: ImageFeature, labels: np.ndarray) -> np.ndarray:
    """Return probabilities, float64 [A, K], of images uint8 [A, N], each by a model fitted on all the others."""
    import numpy as np

    scaled = pixels.reshape(-1, feature.height, feature.width) / np.float32(feature.max_value)
    return left_out_probabilities(patch_features(scaled), labels)


def _cross_validated(table: pa.Table, feature: Feature, labels: np.ndarray) -> np.ndarray:
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
    return numbers(table, feature)


def _model(feature: Feature) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if feature.kind == "text":
        from sklearn.feature_extraction.text import TfidfVectorizer

        # Texts are wide and sparse: less shrinking than the default (C = 1) is needed to separate them.
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=20_000)
        return make_pipeline(words, LogisticRegression(C=10, max_iter=100, tol=1e-3))
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import StandardScaler

    filled = SimpleImputer(keep_empty_features=True)
    return make_pipeline(filled, StandardScaler(), LogisticRegression(max_iter=100, tol=1e-3))


def confident(labels: np.ndarray, probabilities: np.ndarray) -> Suspects:
    """Return the suspects among labels int [A] of 0 to K-1, by out-of-sample probabilities float64 [A, K].

    The ratios come from the estimated joint distribution of given and true labels.
    """
    import numpy as np
    from cleanlab.count import estimate_joint
    from cleanlab.filter import find_label_issues

    # One process: a pool of forked ones costs more than it saves here, and may not be forked in a worker.
    found = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    joint = estimate_joint(labels, probabilities)
    right = np.diag(joint) / np.maximum(joint.sum(axis=1), 1e-12)
    ratio = float(np.clip(1 - np.trace(joint), 0, 1))
    return Suspects(np.asarray(found, dtype=np.int64), ratio, np.clip(1 - right, 0, 1))


def _noise(rows: np.ndarray, classes: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> Noise:
    """The suspects as rows of the table, by the classes' own indices."""
    import numpy as np

    said = confident(labels, probabilities)
    low, high = wilson(said.ratio, len(rows))
    counts = np.bincount(labels, minlength=len(classes))
    return Noise(
        samples=len(rows),
        ratio=said.ratio,
        low=low,
        high=high,
        rows=rows[said.found],
        suggested=classes[probabilities[said.found].argmax(axis=1)],
        quality=probabilities[said.found, labels[said.found]],
        by_class={int(k): (float(said.by_class[i]), int(counts[i])) for i, k in enumerate(classes)},
    )
