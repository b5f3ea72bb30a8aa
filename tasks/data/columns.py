"""The declared columns: which of a file's are read, and how a batch of them gets its types."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tasks.data.convert import Place, to_floats, to_images, to_images_from_columns, to_text
from tasks.data.words import check_as_many, to_words
from tasks.spec.errors import BadRequest
from tasks.spec.requests import IngestRequest

if TYPE_CHECKING:
    import pyarrow as pa

MAX_COLUMNS = 10_000


def schema_of(request: IngestRequest) -> pa.Schema:
    """Return the raw table's columns and types.

    Raises:
        BadRequest: the split column is a feature or the label too.
    """
    import pyarrow as pa

    feature = request.feature
    kind = {"images": pa.list_(pa.uint8()), "numbers": pa.float64()}.get(feature.holds, pa.string())
    declared = {name: {"text": pa.string(), "number": pa.float64()}[kind] for name, kind in request.columns.items()}
    read = [name for name in feature.columns if name not in request.made_columns]
    annotators = request.label.annotators
    labels = annotators.columns if annotators else (request.label.column,)
    if request.label.kind == "next":  # which is no column: the text is its own
        labels = ()
    label = pa.float64() if request.label.kind == "number" else pa.string()
    fields = dict.fromkeys(read, kind) | dict.fromkeys(labels, label)
    if request.split_column is not None:
        if request.split_column in fields:
            raise BadRequest(f"data.split.column = {request.split_column!r}, is a feature or the label too")
        fields[request.split_column] = pa.string()
    return pa.schema(list((fields | declared).items()))


def needed(request: IngestRequest, file: str, there: list[str]) -> list[str]:
    """Return the columns to read, checked against those that are there.

    Raises:
        BadRequest: a column that is not there, or there twice; or more of them than a table has.
    """
    if len(there) > MAX_COLUMNS:
        raise BadRequest(f"{file}: has {len(there)} columns, must be {MAX_COLUMNS} or fewer")
    if twice := [name for name, count in Counter(there).items() if count > 1]:
        raise BadRequest(f"{file}: column {twice[0]!r} is there twice; names must be distinct")
    found: list[str] = []
    for name in schema_of(request).names:
        if name in there:
            found.append(name)
        elif request.feature.kind == "image" and name == request.feature.column:
            found += _pixel_columns(request, file, there)
        else:
            raise _missing(file, name, there, "label column" if name == request.label.column else "column")
    return found


def typed(request: IngestRequest, batch: pa.RecordBatch, schema: pa.Schema, place: Place) -> pa.Table:
    """Bring one batch to the declared types.

    Raises:
        BadRequest: a value that won't fit, by file, column and row.
    """
    import pyarrow as pa

    feature, arrays = request.feature, []
    for field in schema:
        name = field.name
        if name not in batch.schema.names:
            stored = _pixel_columns(request, place.file, batch.schema.names)
            arrays.append(to_images_from_columns([batch.column(item) for item in stored], stored, place))
        elif feature.kind == "image" and name == feature.column:
            arrays.append(to_images(batch.column(name), feature.shape[0], name, place))
        elif feature.kind == "tokens" and name in (feature.column, request.label.column):
            arrays.append(to_words(batch.column(name), name, place))
        elif pa.types.is_floating(field.type):
            arrays.append(to_floats(batch.column(name), name, place))
        else:
            arrays.append(to_text(batch.column(name), name, place))
    cast = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
    table = pa.Table.from_arrays(cast, schema=schema)
    if feature.kind == "tokens":
        check_as_many(table.column(feature.column), table.column(request.label.column), request.label.column, place)
    return table


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
    names = [item if len(item) <= 40 else item[:37] + "..." for item in there[:20]]
    shown = ", ".join(names) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    return BadRequest(f"{file}: {what} {name!r} is not there, found {shown}")
