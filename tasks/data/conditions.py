"""Expectations on each row's value as SQL: exact counts over all rows, and the rows that quarantine takes.

Great Expectations names the broken expectation; which rows of a large table break it, only a scan of all rows can say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.data.scalars import VIEW, Scalars, named, quoted

Expectation = dict[str, Any]
UNIQUE = "expect_column_values_to_be_unique"


def broken_by(expectation: Expectation) -> str | None:
    """Return the SQL condition of rows that break an expectation; None where it is not on each row's value.

    As in Great Expectations a missing value breaks none but those on missing values.
    """
    rule, kwargs = _RULES.get(expectation["type"]), expectation["kwargs"]
    if rule is None or "column" not in kwargs or kwargs.get("row_condition"):
        return None
    return rule(named(str(kwargs["column"])), kwargs)


def count_broken(scalars: Scalars, expectations: list[Expectation]) -> dict[int, int]:
    """Return how many rows break each expectation that can be counted, by its index in the list; one scan."""
    columns = set(scalars.columns)
    counts = {
        index: _count(item, condition)
        for index, item in enumerate(expectations)
        if (condition := broken_by(item)) and item["kwargs"]["column"] in columns
    }
    if not counts:
        return {}
    found = scalars.table_of(f"SELECT {', '.join(counts.values())} FROM {VIEW}")[0]
    return dict(zip(counts, map(int, found), strict=True))


def broken_rows(scalars: Scalars, expectation: Expectation, limit: int | None = None) -> list[str]:
    """Return the ids of the rows that break an expectation: all, or the first ``limit`` of them."""
    source, column = VIEW, str(expectation["kwargs"]["column"])
    if expectation["type"] == UNIQUE:
        counted = f"count(*) OVER (PARTITION BY {named(column)}) AS {named(_twins(column))}"
        source = f"(SELECT *, {counted} FROM {VIEW})"
    most = f" LIMIT {limit}" if limit is not None else ""
    found = scalars.table_of(f"SELECT row_id FROM {source} WHERE {broken_by(expectation)}{most}")
    return [row_id for (row_id,) in found]


def _count(expectation: Expectation, condition: str) -> str:
    if expectation["type"] != UNIQUE:
        return f"count(*) FILTER (WHERE {condition})"
    column = named(str(expectation["kwargs"]["column"]))
    # Hashes of 64 bits: of ten million values two share one by chance in three runs of a million, a false alarm.
    return f"count({column}) - count(DISTINCT hash({column})) FILTER (WHERE {column} IS NOT NULL)"


def _twins(column: str) -> str:
    return f"twins of {column}"


def _missing(column: str, kwargs: dict[str, Any]) -> str | None:
    return f"{column} IS NULL" if kwargs.get("mostly", 1) == 1 else None


def _between(value: str, kwargs: dict[str, Any]) -> str | None:
    signs = (("min_value", "<", "strict_min"), ("max_value", ">", "strict_max"))
    parts = [
        f"{value} {sign}{'=' if kwargs.get(strict) else ''} {quoted(kwargs[name])}"
        for name, sign, strict in signs
        if kwargs.get(name) is not None
    ]
    return f"coalesce({' OR '.join(parts)}, FALSE)" if parts and kwargs.get("mostly", 1) == 1 else None


def _set(negation: str) -> Callable[[str, dict[str, Any]], str | None]:
    def rule(column: str, kwargs: dict[str, Any]) -> str | None:
        values = ", ".join(quoted(value) for value in kwargs.get("value_set") or ())
        if not values or kwargs.get("mostly", 1) != 1:
            return None
        return f"coalesce({column} {negation} IN ({values}), FALSE)"

    return rule


def _regex(negation: str) -> Callable[[str, dict[str, Any]], str | None]:
    def rule(column: str, kwargs: dict[str, Any]) -> str | None:
        if not kwargs.get("regex") or kwargs.get("mostly", 1) != 1:
            return None
        return f"coalesce({negation} regexp_matches({column}, {quoted(kwargs['regex'])}), FALSE)"

    return rule


def _unique(column: str, kwargs: dict[str, Any]) -> str | None:
    twins = named(_twins(str(kwargs["column"])))
    return f"{column} IS NOT NULL AND {twins} > 1" if kwargs.get("mostly", 1) == 1 else None


_RULES: dict[str, Callable[[str, dict[str, Any]], str | None]] = {
    "expect_column_values_to_not_be_null": _missing,
    "expect_column_values_to_be_between": _between,
    "expect_column_value_lengths_to_be_between": lambda column, kwargs: _between(f"length({column})", kwargs),
    "expect_column_values_to_be_in_set": _set("NOT"),
    "expect_column_values_to_not_be_in_set": _set(""),
    "expect_column_values_to_match_regex": _regex("NOT"),
    "expect_column_values_to_not_match_regex": _regex(""),
    UNIQUE: _unique,
}
SUPPORTED = tuple(_RULES)
