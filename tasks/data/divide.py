"""Which split a row goes to: by a hash of its features, so that a row keeps its split as the data grows.

    B rows   C table columns
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING, Any

from tasks.data.table import numbers
from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.data import Split, TimeSplit
    from tasks.spec.feature import Feature

# What a split column may say; ``test`` is the usual name of a holdout.
# Of each class the places below which rows are holdout, and validation.
Cuts = dict[str, tuple[float, float]]
# The label column of a table that is divided by class.
LABEL = "\0label"
NAMES = {"train": "train", "validation": "validation", "dev": "validation", "holdout": "holdout", "test": "holdout"}


def divide(
    table: pa.Table, feature: Feature, split: Split, has_validation: bool, cuts: Cuts | None = None
) -> np.ndarray:
    """Return each row's split [B], by a hash of its features or group, by its time, or by the split column.

    ``has_validation`` says whether the split column names validation rows anywhere. An image is a text here:
    the digest of its pixels. ``cuts`` are those of each class, where the split is stratified.

    Raises:
        BadRequest: the split column holds another name, or none; a row has no time.
    """
    import numpy as np

    if split.time is not None:
        return _by_time(table, split.time)
    position = positions(table, feature, split.seed)
    if split.group is not None:
        position = _of_group(table.column(split.group), position, split.seed)
    if split.column is None:
        low, high = _bounds(table, split, cuts)
        return np.where(position < low, "holdout", np.where(position < high, "validation", "train"))
    named = _named(table, split)
    if not has_validation:
        # The share of the training rows, so that the holdout keeps the rows its author gave it.
        named[(named == "train") & (position < split.validation)] = "validation"
    return named


def cuts_of(places: np.ndarray, labels: np.ndarray, split: Split) -> Cuts:
    """Return where each class is cut, so that the splits have their shares of it: by its rows' own places."""
    import numpy as np

    shares = [split.holdout, split.holdout + split.validation]
    found = {}
    for label in np.unique(labels):
        own = np.sort(places[labels == label])
        at = [min(len(own), round(share * len(own))) for share in shares]
        # Between two places, so that equal rows never part.
        found[str(label)] = tuple(float(own[place]) if place < len(own) else 1.0 for place in at)
    return found


def _bounds(table: pa.Table, split: Split, cuts: Cuts | None) -> tuple[Any, Any]:
    import numpy as np

    usual = (split.holdout, split.holdout + split.validation)
    if cuts is None:
        return usual
    pairs = [cuts.get(str(label), usual) for label in table.column(LABEL).to_pylist()]
    low, high = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(low, float), np.array(high, float)


def _of_group(column: pa.ChunkedArray, own: np.ndarray, seed: int) -> np.ndarray:
    """The place of each row's group; a row without one stands alone, by its features."""
    import numpy as np

    key = f"split {seed}".encode()
    known: dict[Any, float] = {}
    out = own.copy()
    for row, group in enumerate(column.to_pylist()):
        if group is None or group == "":
            continue
        if group not in known:
            digest = hashlib.blake2b(_digest(str(group)), digest_size=8, key=key).digest()
            known[group] = float(np.uint64(int.from_bytes(digest, "big")) >> np.uint64(11)) / 2**53
        out[row] = known[group]
    return out


def _by_time(table: pa.Table, time: TimeSplit) -> np.ndarray:
    import numpy as np

    found = table.column(time.column).to_pylist()
    wanted = str if isinstance(time.holdout, str) else float
    wrong = next((row for row, at in enumerate(found) if not isinstance(at, wanted) or at == ""), None)
    if wrong is not None:
        where = f"data.split.time.column = {time.column!r}, row_id {table.column('row_id')[wrong]}"
        raise BadRequest(f"{where}: found {found[wrong]!r}, must be a {'text' if wanted is str else 'number'}")
    at = np.array(found)
    return np.where(at >= time.holdout, "holdout", np.where(at >= time.validation, "validation", "train"))


def positions(table: pa.Table, feature: Feature, seed: int) -> np.ndarray:
    """Return where each row stands between 0 and 1, float64 [B]: equal features, equal place."""
    import numpy as np

    if feature.kind == "table":
        found = _mixed(numbers(table, feature), seed)
    else:
        key = f"split {seed}".encode()
        texts = table.column(feature.columns[0]).to_pylist()
        inner = map(str.encode, texts) if feature.kind == "image" else map(_digest, texts)
        for name in feature.columns[1:]:
            inner = map(operator.add, inner, map(_digest, table.column(name).to_pylist()))
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
