"""CSV files: UTF-8, comma, one header line, quotes as in RFC 4180. Every value comes as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.spec.errors import BadRequest
from tasks.store.files import CHUNK_BYTES

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

BLOCK_BYTES = 4 << 20
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def header(name: str, stream: BinaryIO) -> list[str]:
    """Return the column names of a CSV file, those written twice included; the stream is at its start after.

    Raises:
        BadRequest: not UTF-8, or quotes that are never closed (all rows behind would be one value).
    """
    import pyarrow as pa

    if stream.read(2) in UTF16_MARKS:
        raise BadRequest(f"{name}: is UTF-16; save it as UTF-8")
    _check_quotes(name, stream)
    stream.seek(0)
    try:
        names = _reader(stream).schema.names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _error(name, error) from None
    stream.seek(0)
    return names


def batches(name: str, stream: BinaryIO, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the named columns as text; an empty field is null.

    Raises:
        BadRequest: a row with more or fewer values than the header, or not UTF-8.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    convert = arrow_csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    try:
        yield from _reader(stream, convert)
    except pa.ArrowInvalid as error:
        raise _error(name, error) from None


def _reader(stream: BinaryIO, convert: arrow_csv.ConvertOptions | None = None) -> Any:
    from pyarrow import csv as arrow_csv

    return arrow_csv.open_csv(
        stream,
        # One thread: with more, a parse error can't name the row.
        read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=convert,
    )


def _check_quotes(name: str, stream: BinaryIO) -> None:
    """Refuse a quote that is never closed. An odd count alone may be a stray quote in a text (5" pipe)."""
    stream.seek(0)
    count = sum(chunk.count(b'"') for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""))
    if count % 2 == 0:
        return
    stream.seek(0)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
    rows = csv.reader(text, strict=True)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        raise BadRequest(f"{name}: line {rows.line_num}: {error}; close or double the quote") from None
    finally:
        text.detach()


def _error(name: str, error: Exception) -> BadRequest:
    text = " ".join(str(error).split())[:160]
    if "utf" in text.lower():
        return BadRequest(f"{name}: is not UTF-8 ({text}); save it as UTF-8")
    return BadRequest(f"{name}: can't be read as CSV: {text!r}; correct that row")
