"""Parquet files: columns as they are stored, read in batches that fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# The metadata is read whole; a file with a million row groups is one that nobody can read.
FOOTER_BYTES = 32 << 20
BATCH_BYTES, PROBED_ROWS = 8 << 20, 64


class Columnar:
    """One file: ``header()`` first, then ``batches(columns)``."""

    def __init__(self, name: str, stream: BinaryIO, batch_rows: int) -> None:
        self._name, self._stream, self._batch_rows = name, stream, batch_rows

    def header(self) -> list[str]:
        """Return the column names.

        Raises:
            BadRequest: no whole Parquet file, or metadata beyond what memory should hold.
        """
        self._check_footer()
        return self._open().schema_arrow.names

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns.

        Raises:
            BadRequest: a damaged page, or not as many rows as the footer says; Arrow itself does not mind.
        """
        import pyarrow as pa

        file, rows = self._open(), 0
        groups = [file.metadata.row_group(place) for place in range(file.metadata.num_row_groups)]
        try:
            # Encoded, repeated values take next to nothing: the first rows tell what they take in memory.
            first = next(file.iter_batches(batch_size=PROBED_ROWS, columns=columns, use_threads=False), None)
            sizes = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
            sizes += [first.nbytes // max(first.num_rows, 1)] if first is not None else []
            most = max(1, min(self._batch_rows, BATCH_BYTES // max([1, *sizes])))
            # Read as it is asked for: a row group may be larger than memory.
            for batch in file.iter_batches(batch_size=most, columns=columns, use_threads=False):
                rows += batch.num_rows
                yield batch
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._error(error) from None
        for said in (file.metadata.num_rows, sum(group.num_rows for group in groups)):
            if said != rows:
                raise BadRequest(f"{self._name}: has {rows} rows, and its footer says {said}; write it again")

    def _open(self) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._stream.seek(0)
        try:
            return pq.ParquetFile(self._stream, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._error(error) from None

    def _check_footer(self) -> None:
        size = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(max(0, size - 8))
        tail = self._stream.read(8)
        footer = int.from_bytes(tail[:4], "little")
        if tail[4:] == b"PAR1" and footer > FOOTER_BYTES:
            raise BadRequest(f"{self._name}: its metadata has {footer} bytes, must be {FOOTER_BYTES} or fewer")

    def _error(self, error: Exception) -> BadRequest:
        reason = " ".join(str(error).split())[:160]
        return BadRequest(f"{self._name}: is no whole Parquet file: {reason}; write it again")
