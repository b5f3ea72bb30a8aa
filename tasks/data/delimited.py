"""CSV and TSV files: one header line, quotes as in RFC 4180. Every value comes as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.data.rejects import Rejects
from tasks.spec.errors import BadRequest
from tasks.store.files import CHUNK_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

# A row must fit into a block, so this bounds the memory that a file without line ends takes.
BLOCK_BYTES = 4 << 20
HEADER_BYTES = 1 << 20
DELIMITERS = {"csv": ",", "tsv": "\t"}


class Delimited:
    """One file: ``header()`` first, then ``batches(columns)``. ``stream`` is UTF-8."""

    def __init__(self, name: str, stream: BinaryIO, delimiter: str, rejects: Rejects) -> None:
        self._name, self._stream, self._delimiter, self._rejects = name, stream, delimiter, rejects
        self._refusal: BadRequest | None = None

    def header(self) -> list[str]:
        """Return the column names, those written twice included.

        Raises:
            BadRequest: no rows, lines without an end, or quotes that are never closed (all rows behind would
                be one value).
        """
        import pyarrow as pa

        self._check_lines()
        self._check_quotes()
        self._stream.seek(0)
        try:
            names = self._reader(handler=lambda row: "skip").schema.names
        except pa.ArrowInvalid as error:
            raise self._error(error) from None
        self._stream.seek(0)
        return names

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns as text; an empty field is null.

        Raises:
            BadRequest: a row with more or fewer values than the header, unless such rows are kept aside.
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
            yield from self._reader(self._ragged, convert)
        except pa.ArrowInvalid as error:
            raise self._refusal or self._error(error) from None

    def _reader(self, handler: Any, convert: Any = None) -> Any:
        from pyarrow import csv as arrow_csv

        return arrow_csv.open_csv(
            self._stream,
            # One thread: with more, a row's number is not known.
            read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=arrow_csv.ParseOptions(
                delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=handler
            ),
            convert_options=convert,
        )

    def _ragged(self, row: Any) -> str:
        reason = f"Expected {row.expected_columns} columns, got {row.actual_columns}; correct that row"
        try:
            # Arrow counts the header as the first row.
            self._rejects.unread(row.number - 1, reason, row.text)
        except BadRequest as error:
            # Arrow swallows what its handler raises.
            self._refusal = error
            return "error"
        return "skip"

    def _check_lines(self) -> None:
        """Refuse a header or a line that is longer than memory should hold."""
        self._stream.seek(0)
        run, first = 0, True
        while chunk := self._stream.read(CHUNK_BYTES):
            ends = [end for end in (chunk.find(b"\n"), chunk.find(b"\r")) if end >= 0]
            run += min(ends, default=len(chunk))
            limit = HEADER_BYTES if first else BLOCK_BYTES
            if run > limit:
                what = "the header" if first else "a line"
                raise BadRequest(f"{self._name}: {what} has more than {limit} bytes; is this a CSV file?")
            if ends:
                run, first = len(chunk) - 1 - max(chunk.rfind(b"\n"), chunk.rfind(b"\r")), False

    def _check_quotes(self) -> None:
        """Refuse a quote that is never closed. An odd count alone may be a stray quote in a text (5" pipe)."""
        self._stream.seek(0)
        count = sum(chunk.count(b'"') for chunk in iter(lambda: self._stream.read(CHUNK_BYTES), b""))
        if count % 2 == 0:
            return
        self._stream.seek(0)
        text = io.TextIOWrapper(self._stream, encoding="utf-8", errors="replace", newline="")
        rows = csv.reader(text, strict=True, delimiter=self._delimiter)
        try:
            for _ in rows:
                pass
        except csv.Error as error:
            raise BadRequest(f"{self._name}: line {rows.line_num}: {error}; close or double the quote") from None
        finally:
            text.detach()

    def _error(self, error: Exception) -> BadRequest:
        text = " ".join(str(error).split())[:160]
        return BadRequest(f"{self._name}: can't be read as CSV: {text!r}; correct that row")
