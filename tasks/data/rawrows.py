"""The raw table in ranges of rows, and what stands for its images while the rules work."""

from __future__ import annotations

import hashlib
import itertools
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.spec.errors import IntegrityLost

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

CHUNK_BYTES, HELD_BYTES = 24 << 20, 128 << 20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 250_000


class RawRows:
    """A Parquet file's rows by their place, holding one row group in memory, or a table of HELD_BYTES whole.

    What a group before took goes back to the system at once: Arrow's pool keeps it for later, and with it a step on
    wide rows holds 1.6 times as much.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:160]
            raise IntegrityLost(f"{path}: can't be read as Parquet: {reason}") from None
        metadata = self._file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.rows: int = metadata.num_rows
        self.schema: pa.Schema = self._file.schema_arrow
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + group.num_rows)
        self._held: dict[int, pa.Table] = {}

    @cached_property
    def chunk_rows(self) -> int:
        return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, self.fitting(CHUNK_BYTES)))

    @cached_property
    def _first(self) -> tuple[int, int]:
        """Bytes and rows of the first row group in memory: encoded, repeated values take next to nothing."""
        if not self.rows:
            return 0, 0
        group = self._file.read_row_group(0)
        self._held = {0: group}
        return group.nbytes, group.num_rows

    def fitting(self, num_bytes: int) -> int:
        """Return how many rows of middle size fit into so many bytes of memory."""
        size, rows = self._first
        return num_bytes * rows // max(1, size)

    @property
    def _fits(self) -> bool:
        return self.rows <= self.fitting(HELD_BYTES)

    def chunks(self) -> list[tuple[int, int]]:
        """Return the ranges that make up the table; each fits into memory."""
        return [(start, min(self.rows, start + self.chunk_rows)) for start in range(0, self.rows, self.chunk_rows)]

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Return the rows from ``start`` up to ``stop``."""
        import pyarrow as pa

        parts = [self.schema.empty_table().select(columns or self.schema.names)]
        for number in range(len(self._starts) - 1):
            first, last = max(start, self._starts[number]), min(stop, self._starts[number + 1])
            if first < last:
                group = self._group(number).select(columns or self.schema.names)
                parts.append(group.slice(first - self._starts[number], last - first))
        return pa.concat_tables(parts)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a whole column: one of labels or splits, which are small."""
        return self._file.read([name]).column(0)

    def take(self, places: np.ndarray, columns: list[str] | None = None) -> pa.Table:
        """Return the rows at the given places, int64 [B], in that order."""
        import numpy as np
        import pyarrow as pa

        wanted, order = np.unique(places, return_inverse=True)
        parts = [self.schema.empty_table().select(columns or self.schema.names)]
        for number, (first, last) in enumerate(itertools.pairwise(self._starts)):
            within = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, last)]
            if len(within):
                names = parts[0].column_names
                held = self._group(number).select(names) if self._fits else self._file.read_row_group(number, names)
                parts.append(held.take(pa.array(within - first)))
                del held
                pa.default_memory_pool().release_unused()
        return pa.concat_tables(parts).take(pa.array(order))

    def _group(self, number: int) -> pa.Table:
        import pyarrow as pa

        fits = self._fits
        if number not in self._held:
            if not fits:
                self._held = {}
                pa.default_memory_pool().release_unused()
            self._held[number] = self._file.read_row_group(number)
        return self._held[number]


def write_slim(rows: RawRows, column: str, path: Path) -> None:
    """Write the raw table with a digest (BLAKE2b, hex) in the place of each image; none where it is missing.

    Rules only ask whether an image is there and whether two are equal; megabytes a row stay out of the engine.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = rows.schema.get_field_index(column)
    schema = rows.schema.set(place, pa.field(column, pa.string()))
    with pq.ParquetWriter(path, schema) as writer:
        for start, stop in rows.chunks():
            table = rows.read(start, stop)
            writer.write_table(table.set_column(place, schema.field(place), digests(table.column(column))))


def digests(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the digest of each image's bytes, null where there is none."""
    import numpy as np
    import pyarrow as pa

    found: list[str | None] = []
    for chunk in column.chunks:
        values, ends = np.asarray(chunk.values), np.asarray(chunk.offsets)
        there = np.asarray(chunk.is_valid())
        for start, stop, is_there in zip(ends[:-1], ends[1:], there, strict=True):
            content = values[start:stop].tobytes()
            found.append(hashlib.blake2b(content, digest_size=16).hexdigest() if is_there else None)
    return pa.chunked_array([pa.array(found, pa.string())])
