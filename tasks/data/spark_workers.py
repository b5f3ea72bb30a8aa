"""Functions on Arrow arrays that Spark's workers run, where Spark's own would give other results than DuckDB's."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable
from typing import Any

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def texts_of(numbers: Any) -> Any:
    import pyarrow as pa

    return pa.array([None if number is None else repr(number) for number in numbers.to_pylist()], pa.string())


def searcher(pattern: str) -> Callable[[Any], Any]:
    def search(texts: Any) -> Any:
        import pyarrow.compute as pc

        return pc.match_substring_regex(texts, pattern)

    return search


def replacer(pattern: str, by: str) -> Callable[[Any], Any]:
    def replace(texts: Any) -> Any:
        import pyarrow.compute as pc

        return pc.replace_substring_regex(texts, pattern, by)

    return replace


def caser(to: str) -> Callable[[Any], Any]:
    """Letter by letter as DuckDB: where one would become several, it becomes the single one that there is, or stays."""
    single = {"ß": "ẞ"} if to == "upper" else {"İ": "i"}

    def case(texts: Any) -> Any:
        import pyarrow as pa

        def of(letter: str) -> str:
            changed = letter.upper() if to == "upper" else letter.lower()
            return single.get(letter, changed if len(changed) == 1 else letter)

        found = [None if text is None else "".join(map(of, text)) for text in texts.to_pylist()]
        return pa.array(found, pa.string())

    return case


def _read(text: str | None, formats: tuple[str, ...]) -> dt.datetime | None:
    for form in formats if text is not None else ():
        with contextlib.suppress(ValueError):
            return dt.datetime.strptime(text or "", form).replace(tzinfo=dt.UTC)
    return None


def times(formats: tuple[str, ...], timed: bool) -> Callable[[Any], Any]:
    def times_of(texts: Any) -> Any:
        import pyarrow as pa

        found = [_read(text, formats) for text in texts.to_pylist()]
        # Not by strftime, which writes a year before 1000 in three digits.
        texts = [None if time is None else time.isoformat()[: 19 if timed else 10] for time in found]
        return pa.array(texts, pa.string())

    return times_of


def seconds(formats: tuple[str, ...]) -> Callable[[Any], Any]:
    def seconds_of(texts: Any) -> Any:
        import pyarrow as pa

        found = [_read(text, formats) for text in texts.to_pylist()]
        return pa.array([None if time is None else (time - EPOCH).total_seconds() for time in found], pa.float64())

    return seconds_of
