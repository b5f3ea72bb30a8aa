"""Read a source into one table with the declared columns and types; nothing about types is guessed.

    image -> list<uint8> of H*W   text -> string   table -> double   label, split column -> string

An image is a list of fixed length in the cleaned table only: Parquet can't give back such a list where a row
has none, and whether a missing image is dropped is for cleaning to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tasks.data import delimited
from tasks.data.convert import Place, to_floats, to_images, to_images_from_columns, to_text
from tasks.data.source import format_of, opened, resolve
from tasks.data.table import empty_room
from tasks.spec.errors import BadRequest
from tasks.spec.requests import IngestRequest, IngestResult, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ingest", "resolve"]

BATCH_ROWS = 16_384


def ingest(request: IngestRequest, room: Path) -> IngestResult:
    """Write ``raw.parquet`` into ``room``, batch by batch, so that memory stays bounded.

    Raises:
        BadRequest: a column that is not there, a value of the wrong type (file, column and row are named),
            a file without rows, or one that is no CSV in UTF-8 and no Parquet.
        IntegrityLost: a file changed since its digest was taken.
    """
    import pyarrow.parquet as pq

    empty_room(room)
    schema = _schema(request)
    rows = 0
    with pq.ParquetWriter(room / "raw.parquet", schema, compression="zstd") as writer:
        for file in request.files:
            rows += _read_file(request, file, schema, writer)
    sources = tuple(file.sha256 for file in request.files)
    return IngestResult(rows=rows, columns=tuple(schema.names), sources=sources)


def _read_file(request: IngestRequest, file: SourceFile, schema: pa.Schema, writer: object) -> int:
    rows = 0
    with opened(file) as stream:
        for batch in _batches(request, file, stream):
            place = Place(file.name, rows)
            writer.write_table(_typed(request, batch, schema, place))  # type: ignore[attr-defined]
            rows += batch.num_rows
        if not rows:
            raise BadRequest(f"{file.name}: has a header and no rows; bring a file with rows")
    return rows


def _schema(request: IngestRequest) -> pa.Schema:
    import pyarrow as pa

    feature = request.feature
    kind = {"image": pa.list_(pa.uint8()), "text": pa.string(), "table": pa.float64()}[feature.kind]
    fields = dict.fromkeys(feature.columns, kind) | {request.label.column: pa.string()}
    if request.split_column is not None:
        if request.split_column in fields:
            raise BadRequest(f"data.split.column = {request.split_column!r}, is a feature or the label too")
        fields[request.split_column] = pa.string()
    return pa.schema(list(fields.items()))


def _batches(request: IngestRequest, file: SourceFile, stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The needed columns of a file as they are stored; a CSV's are all text."""
    if request.source.kind == "sklearn":
        return _digits_batches(request, file, stream)
    if format_of(request.source, file.name) == "csv":
        there = delimited.header(file.name, stream)
        return delimited.batches(file.name, stream, _needed(request, file.name, there))
    return _parquet_batches(request, file, stream)


def _parquet_batches(request: IngestRequest, file: SourceFile, stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(stream)
        columns = _needed(request, file.name, parquet.schema_arrow.names)
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise BadRequest(f"{file.name}: is no whole Parquet file: {_line(error)}; write it again") from None


def _digits_batches(request: IngestRequest, file: SourceFile, stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The bundled digits as columns ``pixels`` and ``label``: 1797 grey images of 8 x 8, values 0 to 16."""
    import gzip

    import numpy as np
    import pyarrow as pa

    _needed(request, file.name, ["pixels", "label"])
    with gzip.open(stream) as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(table[:, :-1].reshape(-1)), 64)
    yield pa.record_batch({"pixels": pixels, "label": pa.array(table[:, -1])})


def _needed(request: IngestRequest, file: str, there: list[str]) -> list[str]:
    """The columns to read, checked against those that are there."""
    if twice := [name for name, count in Counter(there).items() if count > 1]:
        raise BadRequest(f"{file}: column {twice[0]!r} is there twice; names must be distinct")
    needed: list[str] = []
    wanted = [request.label.column, *([request.split_column] if request.split_column else [])]
    for name in (*request.feature.columns, *wanted):
        if name in there:
            needed.append(name)
        elif request.feature.kind == "image" and name == request.feature.column:
            needed += _pixel_columns(request, file, there)
        else:
            raise _missing(file, name, there, "label column" if name == request.label.column else "column")
    return needed


def _pixel_columns(request: IngestRequest, file: str, there: list[str]) -> list[str]:
    """An image in separate columns, in order: ``<column>0`` to ``<column>N-1``, or with an underscore."""
    name, width, known = request.feature.columns[0], request.feature.shape[0], set(there)
    for stem in (name, f"{name}_"):
        if f"{stem}0" not in known:
            continue
        columns = [f"{stem}{index}" for index in range(width)]
        if lost := next((column for column in columns if column not in known), None):
            raise BadRequest(f"{file}: column {lost!r} is not there, an image has {width} values")
        if f"{stem}{width}" in known:
            raise BadRequest(f"{file}: column {stem}{width} is there, an image must have {width} values")
        return columns
    raise _missing(file, name, there, "column")


def _missing(file: str, name: str, there: list[str], what: str) -> BadRequest:
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    return BadRequest(f"{file}: {what} {name!r} is not there, found {shown}")


def _typed(request: IngestRequest, batch: pa.RecordBatch, schema: pa.Schema, place: Place) -> pa.Table:
    """Bring one batch to the declared types."""
    import pyarrow as pa

    feature, arrays = request.feature, []
    for name in schema.names:
        if name not in batch.schema.names:
            stored = _pixel_columns(request, place.file, batch.schema.names)
            arrays.append(to_images_from_columns([batch.column(item) for item in stored], stored, place))
        elif feature.kind == "image" and name == feature.column:
            arrays.append(to_images(batch.column(name), feature.shape[0], name, place))
        elif feature.kind == "table" and name in feature.columns:
            arrays.append(to_floats(batch.column(name), name, place))
        else:
            arrays.append(to_text(batch.column(name), name, place))
    cast = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
    return pa.Table.from_arrays(cast, schema=schema)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
