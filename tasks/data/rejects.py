"""Rows that can't be read: refused with the first one's reason, or kept aside whole, as the workload says."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.table import write_table
from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

# A file with more of them is no file with some bad rows.
MAX_ROWS = 100_000
MAX_CONTENT = 10_000


class Rejects:
    """The quarantine of an ingest. Rows are numbered from 1 within their file, the header left out."""

    def __init__(self, policy: str, is_private: bool = False) -> None:
        self.policy, self._is_private = policy, is_private
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[int] = []
        self._file = ""

    def begin(self, file: str) -> None:
        """Count the rows of another file from here on."""
        self._file, self._skipped = file, []

    def __len__(self) -> int:
        return len(self._rows)

    def unread(self, row: int, reason: str, content: str) -> None:
        """Take a row that the reader itself could not read: ``row`` counts from 1.

        Raises:
            BadRequest: the policy is to refuse, or there are too many.
        """
        self._take(row, f"{self._file}: row {row}: {reason}", content)
        self._skipped.append(row)

    def unfit(self, row: int, error: BadRequest, values: dict[str, Any]) -> None:
        """Take a row whose values don't fit their columns; ``row`` counts from 1 among those that were read."""
        self._take(self.original(row), str(error), json.dumps(values, default=repr, ensure_ascii=False))

    def since(self, count: int) -> list[dict[str, Any]]:
        """Return the rows taken after the first ``count``."""
        return self._rows[count:]

    def extend(self, rows: list[dict[str, Any]]) -> None:
        """Take rows that an earlier ingest kept aside."""
        self._rows += rows

    def original(self, row: int) -> int:
        """Return a row's number in its file, from its number among the rows that the reader could read."""
        number = row
        while (now := row + bisect_right(self._skipped, number)) != number:
            number = now
        return number

    def write(self, path: Path) -> None:
        """Write ``quarantine.parquet``, unless rows like these would have been refused."""
        import pyarrow as pa

        if self.policy == "quarantine":
            write_table(path, pa.Table.from_pylist(self._rows, schema=_schema()))

    def _take(self, row: int, reason: str, content: str) -> None:
        if self.policy == "refuse":
            raise BadRequest(reason)
        if len(self._rows) >= MAX_ROWS:
            raise BadRequest(f"{reason}; and {MAX_ROWS} rows before it can't be read; correct the source")
        # Nobody can say where in a broken row the personal data stand.
        content = "withheld by data.privacy" if self._is_private else content
        shown = content.encode("utf-8", "backslashreplace").decode()[:MAX_CONTENT]
        self._rows.append({"file": self._file, "row": row, "reason": reason, "content": shown})


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())])
