"""Declared cleaning rules. Each says on which column, what is wrong, and what to do: fix, drop or refuse."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec.value import Value, register_tags


class Trim(Value):
    """Remove white space around a text."""

    rule: Literal["trim"]
    column: str

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)


class Synonyms(Value):
    """Replace spellings by the one name they mean: ``{Spam: spam, SPAM: spam}``."""

    rule: Literal["synonyms"]
    column: str
    replace: dict[str, str] = Field(min_length=1)

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)


class DropMissing(Value):
    """Drop rows where a column is missing (null, NaN, or an empty text)."""

    rule: Literal["drop_missing"]
    column: str

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)


class Fill(Value):
    """Fill missing values of a column."""

    rule: Literal["fill"]
    column: str
    value: float | str

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)


class Range(Value):
    """Keep numbers within bounds: drop the row or clip the value."""

    rule: Literal["range"]
    column: str
    min: float | None = None
    max: float | None = None
    action: Literal["drop", "clip"] = "drop"

    @property
    def named_columns(self) -> tuple[str, ...]:
        return (self.column,)

    @model_validator(mode="after")
    def _has_a_bound(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("min and max are both missing, at least one must be given")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min}, must be at most max = {self.max}")
        return self


class Allowed(Value):
    """Drop rows whose label is not an allowed class."""

    rule: Literal["allowed_labels"]

    @property
    def named_columns(self) -> tuple[str, ...]:
        return ()


class DropDuplicates(Value):
    """Keep the first of rows that are equal in features and label."""

    rule: Literal["drop_duplicates"]

    @property
    def named_columns(self) -> tuple[str, ...]:
        return ()


CleanRule = Annotated[
    Trim | Synonyms | DropMissing | Fill | Range | Allowed | DropDuplicates, Field(discriminator="rule")
]
register_tags("trim", "synonyms", "drop_missing", "fill", "range", "allowed_labels", "drop_duplicates")
