"""The tables that the data steps hand on: Parquet written whole, feature columns as arrays, digests of rows.

    B rows   N values of one image (H*W)   C table columns
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.spec.errors import IntegrityLost

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.feature import Feature

SPLITS = ("train", "validation", "holdout")
SEED = 0


def empty_room(room: Path) -> None:
    """Make ``room`` an empty folder: a manifest lists all files, so a killed attempt must leave none."""
    room.mkdir(parents=True, exist_ok=True)
    for path in room.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet. The room's manifest, written later, says that the file is whole."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a table that an earlier step wrote.

    Raises:
        IntegrityLost: the file is missing or is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise IntegrityLost(f"{path}: can't be read as Parquet: {reason}") from None


def sample(places: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of the places, int64 ascending: all, or a seeded choice."""
    import numpy as np

    return places if len(places) <= most else np.sort(np.random.default_rng(SEED).choice(places, most, replace=False))


def images(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return a column of images as uint8 [B, N]; a missing image is all zeros (see the column's nulls)."""
    import numpy as np

    parts = [np.zeros((0, width), np.uint8)]
    for chunk in column.chunks:
        # The child array holds the rows of nulls and of what a slice cut off too; flatten() drops the nulls.
        rows = slice(chunk.offset, chunk.offset + len(chunk))
        flat = np.asarray(chunk.values.fill_null(0)).reshape(-1, width)[rows]
        parts.append(flat * np.asarray(chunk.is_valid())[:, None] if chunk.null_count else flat)
    return np.concatenate(parts)


def numbers(table: pa.Table, feature: Feature) -> np.ndarray:
    """Return table features as float64 [B, C]; NaN is missing, and there is one zero and one NaN."""
    import numpy as np

    array = np.column_stack([_floats(table.column(name)) for name in feature.columns])
    array[np.isnan(array)] = np.nan
    return array + 0.0


def class_counts(table: pa.Table, feature: Feature) -> dict[str, int]:
    """Return how many rows each label has; of words, how many words each tag has; of numbers nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = table.column("label")
    if pa.types.is_floating(labels.type):
        return {}
    if feature.kind == "tokens":
        labels = pc.list_flatten(pc.split_pattern(labels, " "))
    return {str(item["values"]): item["counts"] for item in labels.value_counts().to_pylist()}


def row_digests(table: pa.Table, feature: Feature) -> np.ndarray:
    """Return 128 bits (hex) of each row's features, S32 [B]: equal features, equal digest (BLAKE2b)."""
    import numpy as np

    digests = [hashlib.blake2b(row, digest_size=16).hexdigest() for row in _rows_as_bytes(table, feature)]
    return np.array(digests, dtype="S32")


def _rows_as_bytes(table: pa.Table, feature: Feature) -> Iterator[bytes]:
    import numpy as np

    if feature.holds in ("texts", "ids"):
        columns = [map(_text_as_bytes, table.column(name).to_pylist()) for name in feature.columns]
        yield from map(b"\x02".join, zip(*columns, strict=True))
        return
    if feature.kind == "image":
        column = table.column(feature.column)
        rows = images(column, feature.shape[0])
        missing = np.asarray(column.is_null().combine_chunks())
        yield from (b"" if lost else row.tobytes() for row, lost in zip(rows, missing, strict=True))
        return
    yield from (row.tobytes() for row in numbers(table, feature))


def _text_as_bytes(text: str | None) -> bytes:
    return b"\x00" if text is None else b"\x01" + text.encode()


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    import numpy as np

    return np.asarray(column.combine_chunks().to_numpy(zero_copy_only=False), dtype=np.float64)
