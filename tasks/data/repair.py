"""One cleaning rule on the table: which function does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tasks.data import cells, groups
from tasks.data.dependency import dependency
from tasks.data.worktable import WorkTable
from tasks.spec import clean as c


class Meaning(NamedTuple):
    """What rules on whole rows need to know: the features, and the label with its classes; the column of words, where
    the label is a tag for each of them. A text that is its own label is both."""

    features: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    words: str | None = None


def apply_rule(rule: c.CleanRule, work: WorkTable, meaning: Meaning) -> None:
    """Add one rule to the table; what it does is recorded there.

    Raises:
        BadRequest: the rule does not fit the column's type, or is no pattern or expression for the engine.
    """
    if isinstance(rule, c.Replace | c.Match):
        cells.check_pattern(rule.rule, rule.pattern)
    if isinstance(rule, c.Allowed):
        cells.allowed_labels(meaning.classes, meaning.label, work, meaning.words)
    elif isinstance(rule, c.DropDuplicates):
        groups.duplicates(rule.columns or tuple(dict.fromkeys((*meaning.features, meaning.label))), work)
    else:
        _RULES[type(rule)](rule, work)


_RULES: dict[type, Callable[[Any, WorkTable], None]] = {
    c.Trim: cells.trim,
    c.Case: cells.case,
    c.UnicodeForm: cells.unicode_form,
    c.Replace: cells.replace,
    c.Match: cells.match,
    c.Synonyms: cells.synonyms,
    c.AllowedValues: cells.allowed_values,
    c.Spelling: groups.spelling,
    c.ParseNumber: cells.parse_number,
    c.ParseDate: cells.parse_date,
    c.ParseUnit: cells.parse_unit,
    c.DropMissing: cells.drop_missing,
    c.Fill: groups.fill,
    c.FlagMissing: cells.flag_missing,
    c.Range: cells.in_range,
    c.Outliers: groups.outliers,
    c.NearDuplicates: groups.near_duplicates,
    c.Dependency: dependency,
    c.Condition: cells.condition,
    c.Sql: cells.sql,
}
