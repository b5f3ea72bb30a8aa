"""Rows that are equal in features: under different labels, or in more than one split.

    B rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.data.table import SPLITS, row_digests

if TYPE_CHECKING:
    import numpy as np

    from tasks.data.rawrows import RawRows
    from tasks.spec.feature import Feature


def digests_of(rows: RawRows, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's digest, S32 [B], and whether its text or image is missing, bool [B]; read range by range."""
    import numpy as np

    digests, missing = [np.zeros(0, "S32")], [np.zeros(0, bool)]
    for start, stop in rows.chunks():
        table = rows.read(start, stop, list(feature.columns))
        digests.append(row_digests(table, feature))
        empty = table.column(0).is_null().combine_chunks()
        missing.append(np.asarray(empty) if feature.kind != "table" else np.zeros(stop - start, bool))
    return np.concatenate(digests), np.concatenate(missing)


def conflicting(digests: np.ndarray, labels: list[str | None]) -> np.ndarray:
    """Return which rows have a twin, equal in features, under another label: bool [B]."""
    import numpy as np

    _, group = np.unique(digests, return_inverse=True)
    _, code = np.unique(np.array([label or "" for label in labels], dtype=str), return_inverse=True)
    pairs = np.unique(np.stack([group, code], axis=1), axis=0)
    labels_of_group = np.bincount(pairs[:, 0], minlength=group.max(initial=-1) + 1)
    return labels_of_group[group] > 1


def leaked(digests: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Return which rows are, by their features, in an earlier split too (``table.SPLITS``): bool [B]. Rows of
    validation that training has seen choose the wrong epoch; such rows of the holdout make the model look better."""
    import numpy as np

    place = np.select([splits == name for name in SPLITS], range(len(SPLITS)))
    _, group = np.unique(digests, return_inverse=True)
    earliest = np.full(group.max(initial=-1) + 1, len(SPLITS))
    np.minimum.at(earliest, group, place)
    return place > earliest[group]
