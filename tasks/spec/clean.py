"""Declared cleaning rules. Each says on which column, what is wrong, and what to do: fix, set missing or drop.

    texts     trim, case, unicode, replace, match, synonyms, allowed, spelling
    typing    parse_number, parse_date, parse_unit
    numbers   range, outliers
    missing   drop_missing, fill, flag_missing
    rows      allowed_labels, drop_duplicates, near_duplicates, dependency, condition, sql

They are applied in the order of the file. An ``action`` is what befalls a cell that breaks its rule: ``drop``
puts the row into quarantine, ``missing`` empties the cell.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.spec.value import Value, register_tags

Action = Literal["drop", "missing"]


class OnColumn(Value):
    """What rules on one column have in common."""

    column: str

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def made_columns(self) -> tuple[str, ...]:
        """Columns that this rule adds to the table."""
        return ()


class OnRows(Value):
    """What rules on whole rows have in common."""

    @property
    def named_columns(self) -> tuple[str, ...]:
        return ()

    @property
    def made_columns(self) -> tuple[str, ...]:
        return ()


class Trim(OnColumn):
    """Remove white space around a text."""

    rule: Literal["trim"]


class Case(OnColumn):
    """Bring a text to one case."""

    rule: Literal["case"]
    to: Literal["lower", "upper", "title"]


class UnicodeForm(OnColumn):
    """Bring a text to one Unicode normal form (UAX 15), so that what looks equal is equal."""

    rule: Literal["unicode"]
    form: Literal["NFC", "NFD", "NFKC", "NFKD"] = "NFC"


def _is_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern


class Replace(OnColumn):
    """Replace what a regular expression (RE2) matches; ``\\1`` is its first group."""

    rule: Literal["replace"]
    pattern: str = Field(min_length=1)
    by: str

    _pattern = field_validator("pattern")(_is_pattern)


class Match(OnColumn):
    """Demand that a text matches a regular expression (RE2) from its beginning to its end."""

    rule: Literal["match"]
    pattern: str = Field(min_length=1)
    action: Action = "drop"

    _pattern = field_validator("pattern")(_is_pattern)


class Synonyms(OnColumn):
    """Replace spellings by the one name they mean: ``{Spam: spam, SPAM: spam}``."""

    rule: Literal["synonyms"]
    replace: dict[str, str] = Field(min_length=1)


class AllowedValues(OnColumn):
    """Demand one of the named values; a missing cell is for the rules on missing ones."""

    rule: Literal["allowed"]
    values: tuple[str, ...] = Field(min_length=1)
    action: Action = "drop"


class Spelling(OnColumn):
    """Bring rare spellings to the frequent value they are near to (Levenshtein): ``jxfferson`` to ``jefferson``.

    A value is rare where the other is at least ``times`` as frequent, near where at most ``max_ratio`` of its
    characters differ. A value that is as near to two frequent ones stays.
    """

    rule: Literal["spelling"]
    max_ratio: float = Field(default=0.25, gt=0, lt=1)
    times: int = Field(default=5, ge=2)


class ParseNumber(OnColumn):
    """Read texts as numbers: ``1.234,5`` with decimal ``,`` and thousands ``.``."""

    rule: Literal["parse_number"]
    decimal: Literal[".", ","] = "."
    thousands: Literal["", ",", ".", " ", "'", "_"] = ""
    action: Action = "drop"

    @model_validator(mode="after")
    def _marks_differ(self) -> ParseNumber:
        if self.decimal == self.thousands:
            raise ValueError(f"thousands = {self.thousands!r}, must differ from decimal")
        return self


class ParseDate(OnColumn):
    """Read texts as dates or times by the first format (strftime) that fits; what none fits is acted on.

    ``into: iso`` gives the text 2026-11-26 or 2026-11-26T13:30:00, ``into: seconds`` the number of seconds
    since 1970 (UTC).
    """

    rule: Literal["parse_date"]
    formats: tuple[str, ...] = Field(min_length=1)
    into: Literal["iso", "seconds"] = "iso"
    action: Action = "drop"


class ParseUnit(OnColumn):
    """Read texts such as ``5 lb`` as numbers of one unit: ``units`` says how much of it each unit is."""

    rule: Literal["parse_unit"]
    units: dict[str, float] = Field(min_length=1)
    default: str | None = Field(default=None, description="the unit of a bare number; none: it is acted on")
    action: Action = "drop"

    @model_validator(mode="after")
    def _default_is_known(self) -> ParseUnit:
        if self.default is not None and self.default not in self.units:
            raise ValueError(f"default = {self.default!r}, must be one of {', '.join(self.units)}")
        return self


class DropMissing(OnColumn):
    """Drop rows where a column is missing (null, NaN, or an empty text)."""

    rule: Literal["drop_missing"]


class Fill(OnColumn):
    """Fill missing values of a column by a value, or by what the column itself shows."""

    rule: Literal["fill"]
    value: float | str | None = None
    by: Literal["mean", "median", "mode"] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Fill:
        if (self.value is None) == (self.by is None):
            raise ValueError("value and by: exactly one must be given")
        return self


class FlagMissing(OnColumn):
    """Add a number column that is 1 where another is missing, else 0."""

    rule: Literal["flag_missing"]
    into: str = Field(min_length=1)

    @property
    def made_columns(self) -> tuple[str, ...]:
        return (self.into,)


class Range(OnColumn):
    """Keep numbers within bounds: drop the row, clip the value, or empty the cell."""

    rule: Literal["range"]
    min: float | None = None
    max: float | None = None
    action: Literal["drop", "clip", "missing"] = "drop"

    @model_validator(mode="after")
    def _has_a_bound(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("min and max are both missing, at least one must be given")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min}, must be at most max = {self.max}")
        return self


class Outliers(OnColumn):
    """Keep numbers within ``width`` times the interquartile range below and above the quartiles (Tukey 1977)."""

    rule: Literal["outliers"]
    width: float = Field(default=3.0, gt=0)
    action: Literal["drop", "clip", "missing"] = "drop"


class Allowed(OnRows):
    """Drop rows whose label is not an allowed class."""

    rule: Literal["allowed_labels"]


class DropDuplicates(OnRows):
    """Keep the first of rows that are equal in features and label, or in the named columns."""

    rule: Literal["drop_duplicates"]
    columns: tuple[str, ...] = ()

    @property
    def named_columns(self) -> tuple[str, ...]:
        return self.columns


class NearDuplicates(OnColumn):
    """Keep the first of rows whose texts are alike: Jaccard similarity of their character trigrams.

    Candidates are found by MinHash (Broder 1997), so a pair at the limit may be missed, never a wrong one taken.
    """

    rule: Literal["near_duplicates"]
    similarity: float = Field(default=0.9, ge=0.5, le=1)


class Dependency(OnRows):
    """Repair columns that follow from others: ``[zip]`` determines ``[city, state]``.

    Within rows of equal determinant each dependent column has one true value: the one that more than half of
    the rows have. Where ``source`` names the column that says who a row comes from, the sources are weighed by
    how often each is right (truth discovery, Dong et al. 2009), and those that are ``trusted`` win.
    """

    rule: Literal["dependency"]
    determinant: tuple[str, ...] = Field(min_length=1)
    dependent: tuple[str, ...] = Field(min_length=1)
    source: str | None = None
    trusted: tuple[str, ...] = Field(default=(), description="values of the source column")

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (*self.determinant, *self.dependent, *([self.source] if self.source else []))

    @model_validator(mode="after")
    def _sides_differ(self) -> Dependency:
        if both := set(self.determinant) & {*self.dependent, self.source}:
            raise ValueError(f"determinant = {sorted(both)[0]!r}, must not be dependent or source too")
        if self.trusted and self.source is None:
            raise ValueError("trusted needs source: the column that says who a row comes from")
        return self


class Condition(OnRows):
    """Drop rows for which an SQL expression over the columns is false: ``started <= ended``. Unknown is kept."""

    rule: Literal["condition"]
    where: str = Field(min_length=1)


class Sql(OnColumn):
    """Set a column to what an SQL expression over the columns gives."""

    rule: Literal["sql"]
    expression: str = Field(min_length=1)


CleanRule = Annotated[
    Trim
    | Case
    | UnicodeForm
    | Replace
    | Match
    | Synonyms
    | AllowedValues
    | Spelling
    | ParseNumber
    | ParseDate
    | ParseUnit
    | DropMissing
    | Fill
    | FlagMissing
    | Range
    | Outliers
    | Allowed
    | DropDuplicates
    | NearDuplicates
    | Dependency
    | Condition
    | Sql,
    Field(discriminator="rule"),
]
PARSING = (ParseNumber, ParseDate, ParseUnit)
register_tags(
    *("trim", "case", "unicode", "replace", "match", "synonyms", "allowed", "spelling"),
    *("parse_number", "parse_date", "parse_unit", "range", "outliers", "drop_missing", "fill", "flag_missing"),
    *("allowed_labels", "drop_duplicates", "near_duplicates", "dependency", "condition", "sql"),
)
