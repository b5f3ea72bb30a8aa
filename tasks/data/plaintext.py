"""Plain text: each line, or each paragraph, is a row of the column ``text``; empty ones are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, Literal

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN = "text"
# A batch ends at whichever comes first.
BATCH_ROWS, BATCH_BYTES = 16_384, 8 << 20
ROW_BYTES = 4 << 20


class PlainText:
    """One file: ``header()`` first, then ``batches(columns)``. ``stream`` is UTF-8."""

    def __init__(self, name: str, stream: BinaryIO, row: Literal["line", "paragraph"]) -> None:
        self._name, self._stream, self._row = name, stream, row

    def header(self) -> list[str]:
        """Return the one column.

        Raises:
            BadRequest: white space alone, or a row that is longer than memory should hold.
        """
        if next(self._rows(), None) is None:
            raise BadRequest(f"{self._name}: holds no text but white space; bring a file with lines")
        return [COLUMN]

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows as texts.

        Raises:
            BadRequest: a row that is longer than memory should hold.
        """
        rows: list[str] = []
        num_bytes = 0
        for row in self._rows():
            rows.append(row)
            num_bytes += len(row)
            if len(rows) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
                yield _batch(rows)
                rows, num_bytes = [], 0
        if rows:
            yield _batch(rows)

    def _rows(self) -> Iterator[str]:
        """Each row that is not empty. A paragraph's lines are joined by a space: their ends say where a page was
        full."""
        held: list[str] = []
        size = 0
        for line in self._lines():
            size += len(line)
            if size > ROW_BYTES:
                raise BadRequest(f"{self._name}: a {self._row} has more than {ROW_BYTES} bytes; split it")
            if line:
                held.append(line)
            if held and (self._row == "line" or not line):
                yield " ".join(held)
                held = []
            if not held:
                size = 0
        if held:
            yield " ".join(held)

    def _lines(self) -> Iterator[str]:
        self._stream.seek(0)
        first = True
        while line := self._stream.readline(ROW_BYTES + 1):
            if len(line) > ROW_BYTES:
                raise BadRequest(f"{self._name}: a line has more than {ROW_BYTES} bytes; split it")
            yield line.decode().removeprefix("\ufeff" if first else "").strip()
            first = False


def _batch(rows: list[str]) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.record_batch([pa.array(rows, pa.string())], names=[COLUMN])
