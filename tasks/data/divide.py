"""Which split a row goes to: by a hash of its features, so that a row keeps its split as the data grows.

    B rows   C table columns
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tasks.data.table import numbers
from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.data import Split
    from tasks.spec.feature import Feature

# What a split column may say; ``test`` is the usual name of a holdout.
NAMES = {"train": "train", "validation": "validation", "dev": "validation", "holdout": "holdout", "test": "holdout"}


def divide(table: pa.Table, feature: Feature, split: Split, has_validation: bool) -> np.ndarray:
    """Return each row's split [B], by a hash of its features or by the split column.

    ``has_validation`` says whether the split column names validation rows anywhere. An image is a text here:
    the digest of its pixels.

    Raises:
        BadRequest: the split column holds another name, or none.
    """
    import numpy as np

    position = positions(table, feature, split.seed)
    if split.column is None:
        bounds = [split.holdout, split.holdout + split.validation]
        return np.array(["holdout", "validation", "train"])[np.searchsorted(bounds, position, side="right")]
    named = _named(table, split)
    if not has_validation:
        # The share of the training rows, so that the holdout keeps the rows its author gave it.
        named[(named == "train") & (position < split.validation)] = "validation"
    return named


def positions(table: pa.Table, feature: Feature, seed: int) -> np.ndarray:
    """Return where each row stands between 0 and 1, float64 [B]: equal features, equal place."""
    import numpy as np

    if feature.kind == "table":
        found = _mixed(numbers(table, feature), seed)
    else:
        key = f"split {seed}".encode()
        texts = table.column(feature.columns[0]).to_pylist()
        inner = map(str.encode, texts) if feature.kind == "image" else map(_digest, texts)
        digests = (hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in inner)
        found = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
    # 53 bits, what a double holds exactly: below 1 always.
    return (found >> np.uint64(11)).astype(np.float64) / 2**53


def _digest(text: str | None) -> bytes:
    content = b"\x00" if text is None else b"\x01" + text.encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def _mixed(array: np.ndarray, seed: int) -> np.ndarray:
    """64 bits of each row [B, C] by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), column after column.

    A hash that works on columns: one call of a cryptographic one for each row takes longer than all the cleaning.
    """
    import numpy as np

    start = hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest()
    found = np.full(len(array), int.from_bytes(start, "big"), np.uint64)
    for column in np.ascontiguousarray(array.T).view(np.uint64):
        found = (found ^ column) + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found


def _named(table: pa.Table, split: Split) -> np.ndarray:
    import numpy as np

    found = table.column(split.column).to_pylist()
    names = [NAMES.get((text or "").strip().lower()) for text in found]
    if None in names:
        row = names.index(None)
        where = f"data.split.column = {split.column!r}, row_id {table.column('row_id')[row]}"
        raise BadRequest(f"{where}: found {found[row]!r}, must be one of {', '.join(NAMES)}")
    return np.array(names, dtype="<U10")
