"""Near copies across splits: a row of validation or holdout that an earlier split has too, but for a little noise, a
date, a changed name.

Every row becomes a unit vector, projected at random to a few numbers (Johnson and Lindenstrauss 1984), which keeps
angles well enough to find candidates; the nearest candidates are then compared in full.

    B rows   h rows of one split   t rows of the splits before it   D full width   d projected width
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.table import SEED, SPLITS, images, numbers, sample

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.data.rawrows import RawRows
    from tasks.spec.feature import Feature

WIDTH = 64
CANDIDATES = 3
# Cosines from which two rows are near: texts by their letter triples and quadruples, images by their pixels around
# the mean. Rows are candidates from SLACK below, about four standard deviations of the projection's error.
NEAR = {"texts": 0.9, "images": 0.99}
SLACK = 0.06
BLOCK = 1024
# Numbers of a table are near where they agree to so many significant digits, all of them.
DIGITS = 3


def near_copies(table: pa.Table | RawRows, feature: Feature, splits: np.ndarray, max_rows: int) -> np.ndarray:
    """Return which rows have a near copy in an earlier split (``table.SPLITS``), bool [B]; an equal row is near
    too. Ids are equal or not, and near to none.

    At most ``max_rows`` rows of a split are looked at, a seeded sample, against at most five times as many.
    """
    import numpy as np

    found = np.zeros(len(splits), bool)
    if feature.kind == "ids":
        return found
    for place, split in enumerate(SPLITS):
        ours = sample(np.flatnonzero(splits == split), max_rows)
        before = sample(np.flatnonzero(np.isin(splits, SPLITS[:place])), 5 * max_rows)
        if len(ours) and len(before):
            found[ours] = _near(table.take(np.concatenate([ours, before])), feature, len(ours))
    return found


def _near(table: pa.Table, feature: Feature, num_ours: int) -> np.ndarray:
    """Which of the first ``num_ours`` rows are near to one of the rest: bool [h]."""
    import numpy as np

    if feature.kind == "table":
        rounded = _rounded(numbers(table, feature))
        return np.isin(rounded[:num_ours], rounded[num_ours:])
    vectors = _texts(table, feature) if feature.holds == "texts" else _images(table, feature)
    projected = _projected(vectors)
    limit = NEAR[feature.holds]
    found = np.zeros(num_ours, bool)
    for start in range(0, num_ours, BLOCK):
        block = slice(start, min(start + BLOCK, num_ours))
        cosines = projected[block] @ projected[num_ours:].T
        found[block] = _confirmed(vectors, cosines, start, num_ours, limit)
    return found


def _confirmed(vectors: Any, cosines: np.ndarray, start: int, num_ours: int, limit: float) -> np.ndarray:
    """Which rows of a block are near in full to one of their best candidates."""
    import numpy as np

    found = np.zeros(len(cosines), bool)
    count = min(CANDIDATES, cosines.shape[1])
    best = np.argpartition(cosines, -count, axis=1)[:, -count:]
    likely = np.take_along_axis(cosines, best, axis=1) >= limit - SLACK
    rows, places = np.nonzero(likely)
    if len(rows):
        left, right = vectors[start + rows], vectors[num_ours + best[rows, places]]
        products = left.multiply(right) if hasattr(left, "multiply") else left * right
        exact = np.asarray(products.sum(axis=1)).reshape(-1)
        found[rows[exact >= limit]] = True
    return found


def _projected(vectors: Any) -> np.ndarray:
    """[B, D] -> float32 [B, d], unit vectors; rows that are all zero stay so, near to none."""
    import numpy as np

    width = min(WIDTH, vectors.shape[1])
    axes = np.random.default_rng(SEED).standard_normal((vectors.shape[1], width)).astype(np.float32)
    return _unit(np.asarray(vectors @ axes, dtype=np.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _texts(table: pa.Table, feature: Any) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    texts = [text or "" for text in table.column(feature.column).to_pylist()]
    return HashingVectorizer(
        analyzer="char_wb", ngram_range=(3, 4), n_features=1 << 14, alternate_sign=False, dtype="float32"
    ).transform(texts)


def _images(table: pa.Table, feature: Any) -> np.ndarray:
    import numpy as np

    pixels = images(table.column(feature.column), feature.shape[0]).astype(np.float32)
    return _unit(pixels - pixels.mean(axis=1, keepdims=True))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Rows of numbers [B, C] to DIGITS significant digits, as one comparable value each."""
    import numpy as np

    size = np.floor(np.log10(np.maximum(np.abs(values), 1e-300)))
    scale = 10.0 ** (DIGITS - 1 - np.nan_to_num(size))
    rounded = np.ascontiguousarray(np.round(values * scale) / scale + 0.0)
    rounded[np.isnan(rounded)] = np.nan
    return rounded.view(np.dtype((np.void, rounded.dtype.itemsize * rounded.shape[1]))).reshape(-1)
