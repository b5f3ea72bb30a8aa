"""JSON lines: one object a line. Numbers and texts come as text, lists as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.data.rejects import Rejects
from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

# A batch ends at whichever comes first.
BATCH_ROWS, BATCH_BYTES = 16_384, 8 << 20
LINE_BYTES = 4 << 20


class JsonLines:
    """One file: ``header()`` first, then ``batches(columns)``. ``stream`` is UTF-8."""

    def __init__(self, name: str, stream: BinaryIO, rejects: Rejects) -> None:
        self._name, self._stream, self._rejects = name, stream, rejects

    def header(self) -> list[str]:
        """Return the keys of the first object: a key that a later line lacks is missing there."""
        probe = Rejects(self._rejects.policy)
        probe.begin(self._name)
        for _, record in self._records(probe):
            return list(record)
        raise BadRequest(f"{self._name}: holds no JSON object; write one on each line")

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns.

        Raises:
            BadRequest: a line that is no JSON object, unless such lines are kept aside.
        """
        rows: list[list[Any]] = []
        num_bytes = 0
        for size, record in self._records(self._rejects):
            rows.append([record.get(name) for name in columns])
            num_bytes += size
            if len(rows) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
                yield self._batch(columns, rows)
                rows, num_bytes = [], 0
        if rows:
            yield self._batch(columns, rows)

    def _records(self, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each line's bytes and object."""
        self._stream.seek(0)
        number = 0
        while line := self._stream.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise BadRequest(f"{self._name}: row {number + 1} has more than {LINE_BYTES} bytes; split it")
            text = line.decode().removeprefix("\ufeff" if not number else "").strip()
            if not text:
                continue
            number += 1
            try:
                yield len(line), _record(text)
            except (ValueError, RecursionError) as error:
                rejects.unread(number, f"is no JSON object ({error}); correct that line", text)

    def _batch(self, columns: list[str], rows: list[list[Any]]) -> pa.RecordBatch:
        import pyarrow as pa

        arrays = []
        for name, values in zip(columns, zip(*rows, strict=True), strict=True):
            nested = any(isinstance(value, list) for value in values)
            try:
                arrays.append(pa.array(values) if nested else pa.array(map(_text, values), pa.string()))
            except (pa.ArrowException, UnicodeEncodeError) as error:
                raise BadRequest(f"{self._name}: column {name!r}: {str(error)[:160]}; correct the values") from None
        return pa.record_batch(arrays, names=columns)


def _record(text: str) -> dict[str, Any]:
    found = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__}")
    for value in found.values():
        if isinstance(value, dict):
            raise ValueError("an object within the object")
        if isinstance(value, str):
            value.encode()  # A lone surrogate is no text.
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null where a value is missing")


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return repr(value).lower() if isinstance(value, bool) else repr(value)
