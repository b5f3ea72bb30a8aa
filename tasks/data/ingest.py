"""Read a source into one table with the declared columns and types; nothing about types is guessed.

    image -> list<uint8> of H*W   text -> string   table -> double   label, split column -> string
    further columns as the workload declares them

An image is a list of fixed length in the cleaned table only: Parquet can't give back such a list where a row
has none, and whether a missing image is dropped is for cleaning to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.columns import needed, schema_of, typed
from tasks.data.convert import Place
from tasks.data.partitions import Part, Partitions
from tasks.data.privacy import Protection
from tasks.data.reader import Opening, Reader, readers
from tasks.data.rejects import Rejects
from tasks.data.source import Secrets, resolve
from tasks.data.table import empty_room
from tasks.spec.errors import BadRequest
from tasks.spec.privacy import Receipt, together
from tasks.spec.requests import IngestRequest, IngestResult

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ingest", "resolve"]

# Parquet holds a row group in memory until it is written.
ROW_GROUP_BYTES = 32 << 20


def ingest(
    request: IngestRequest, room: Path, secrets: Secrets = str, key: bytes = b"", kept: Partitions | None = None
) -> IngestResult:
    """Write ``raw.parquet`` into ``room``, batch by batch, so that memory stays bounded.

    Where the workload says so, rows that can't be read go to ``quarantine.parquet``; else the first is an error.
    ``key`` is what hashes personal data, where ``data.privacy`` asks for that; ``kept`` holds the files that were read
    before.

    Raises:
        BadRequest: a column that is not there, a value of the wrong type (file, column and row are named),
            a file without rows, or one that is not of its format.
        IntegrityLost: a file changed since its digest was taken.
        TryAgain: a database or a store can't be reached.
    """
    import pyarrow.parquet as pq

    empty_room(room)
    schema = schema_of(request)
    rejects, encodings = Rejects(request.bad_rows, request.privacy.is_active), dict[str, str]()
    kept = kept or Partitions(None, request, "")
    with pq.ParquetWriter(room / "raw.parquet", schema, compression="zstd") as writer:
        sink = _Sink(request, schema, rejects, encodings, key, kept, _Groups(writer), [])
        for file, opened in readers(Opening(request, secrets, room, rejects, encodings)):
            part = kept.find(file)
            if part is not None:
                sink.again(file, part)
                continue
            with opened as reader:
                finish = sink.take(file, reader)
            # The file has been held against its digest by now.
            finish()
        sink.groups.flush()
    kept.clear()
    rejects.write(room / "quarantine.parquet")
    sources = tuple(file.sha256 for file in request.files)
    facts = {"rows": sink.groups.rows, "columns": tuple(schema.names), "sources": sources, "encodings": encodings}
    return IngestResult(quarantined_rows=len(rejects), privacy=together(sink.receipts), **facts)


class _Groups:
    """Tables gathered into row groups of a good size."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._parts, self._bytes, self.rows = writer, [], 0, 0

    def add(self, table: pa.Table) -> None:
        self._parts.append(table)
        self._bytes += table.nbytes
        self.rows += table.num_rows
        if self._bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self._parts:
            self._writer.write_table(pa.concat_tables(self._parts))
        self._parts, self._bytes = [], 0


class _Sink(NamedTuple):
    """What a file's batches go through: the types, the quarantine, the table."""

    request: IngestRequest
    schema: pa.Schema
    rejects: Rejects
    encodings: dict[str, str]
    key: bytes
    kept: Partitions
    groups: _Groups
    receipts: list[Receipt]

    def again(self, file: str, part: Part) -> None:
        """Take what a file gave before."""
        import pyarrow.parquet as pq

        source = pq.ParquetFile(part.table)
        for number in range(source.num_row_groups):
            self.groups.add(source.read_row_group(number))
        self.rejects.extend(part.rejects)
        self.encodings.update({file: part.encoding} if part.encoding else {})
        self.receipts.append(part.receipt)

    def take(self, file: str, reader: Reader) -> Callable[[], None]:
        """Read a file; what is returned keeps it for the next time."""
        self.rejects.begin(file)
        protection, writer = Protection(self.request, self.key), self.kept.begin(file, self.schema)
        seen = 0
        before = len(self.rejects)
        for batch in reader.batches(needed(self.request, file, reader.header())):
            for table in self._tables(batch, Place(file, seen, self.request.privacy.is_active)):
                protected = protection.applied(table, file)
                self.groups.add(protected)
                if writer is not None:
                    writer.add(protected)
            seen += batch.num_rows
        if not seen and len(self.rejects) == before:
            raise BadRequest(f"{file}: has a header and no rows; bring a file with rows")
        receipt = protection.receipt()
        self.receipts.append(receipt)

        def finish() -> None:
            if writer is not None:
                writer.close(self.rejects.since(before), self.encodings.get(file), receipt)

        return finish

    def _tables(self, batch: pa.RecordBatch, place: Place) -> Iterator[pa.Table]:
        """The batch typed; where a row won't fit and may be kept aside, in halves down to that row."""
        try:
            yield typed(self.request, batch, self.schema, place)
        except BadRequest as error:
            if self.rejects.policy == "refuse":
                raise
            if batch.num_rows == 1:
                self.rejects.unfit(place.offset + 1, error, batch.to_pylist()[0])
                return
            half = batch.num_rows // 2
            yield from self._tables(batch.slice(0, half), place)
            yield from self._tables(batch.slice(half), place._replace(offset=place.offset + half))
