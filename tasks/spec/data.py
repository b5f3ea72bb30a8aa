"""The data section of a workload: where its rows come from, and how they are read, cleaned, judged and divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec.augment import OF_TEXTS, Augment
from tasks.spec.clean import PARSING, CleanRule
from tasks.spec.feature import Feature
from tasks.spec.label import Target
from tasks.spec.privacy import WATCH, Privacy
from tasks.spec.source import ColumnType, Source
from tasks.spec.validation import Expectations, LabelRules
from tasks.spec.value import Value


class TimeSplit(Value):
    """The past to train on, the future to be judged by: rows from ``holdout`` on are the holdout, those from
    ``validation`` on the validation split. Fixed days, so that no row moves as data grows."""

    column: str = Field(description="a column of texts in one ISO form, such as parse_date makes, or of numbers")
    validation: str | float
    holdout: str | float

    @model_validator(mode="after")
    def _in_order(self) -> TimeSplit:
        if isinstance(self.validation, str) != isinstance(self.holdout, str):
            raise ValueError("validation and holdout: must both be texts, or both numbers")
        if self.validation >= self.holdout:  # type: ignore[operator]
            raise ValueError(f"validation = {self.validation!r}, must be before holdout = {self.holdout!r}")
        return self


class Split(Value):
    """Rows go to a split by a seeded hash of their features, so equal rows never part and no row moves as data grows.

    Or by a column of the source that names the split; by the hash of a ``group`` (a patient, a shop), whose rows then
    never part; or by ``time``. With ``stratified`` each class is cut at its own shares, exact to a row; then rows next
    to a cut may move as data grows.
    """

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    column: str | None = Field(default=None, description="holds the names train, validation, holdout (or test)")
    group: str | None = Field(default=None, description="a column whose equal values stay together")
    time: TimeSplit | None = None
    stratified: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decide, beside the features."""
        return tuple(name for name in (self.column, self.group, self.time.column if self.time else None) if name)

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        ways = [name for name in ("column", "group", "time", "stratified") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)}: must be one of them, or none")
        return self

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Split:
        if self.validation + self.holdout > 0.9:
            raise ValueError(
                f"holdout = {self.holdout} and validation = {self.validation} leave under 10 % to train on; "
                "their sum must be 0.9 or less"
            )
        return self


# What each row of a data set has beside its features.
OWN_COLUMNS = ("row_id", "label", "split")


class Data(Value):
    """The rows: where they come from, what of them is read, and how they are cleaned, judged and divided."""

    source: Source
    feature: Feature
    label: Target
    columns: dict[str, ColumnType] = Field(default={}, description="further columns, for the cleaning rules to read")
    keep: tuple[str, ...] = Field(
        default=(), description="of the further columns, those that stay in the data set for evaluate.slices and groups"
    )
    bad_rows: Literal["refuse", "quarantine"] = Field(
        default="refuse", description="rows that can't be read as their columns' types"
    )
    privacy: Privacy = WATCH
    clean: tuple[CleanRule, ...] = ()
    expectations: Expectations = Expectations()
    labels: LabelRules = LabelRules()
    split: Split = Split()
    augment: Augment | None = Field(default=None, description="changed copies of rows of the training split")

    @property
    def made_columns(self) -> tuple[str, ...]:
        """The columns that cleaning adds, which the source need not have."""
        return tuple(name for rule in self.clean for name in rule.made_columns)

    @property
    def read_columns(self) -> dict[str, ColumnType]:
        """The types of columns that are not read as feature, label or split would be: what is parsed is text."""
        parsed = {rule.column for rule in self.clean if isinstance(rule, PARSING)}
        return {name: "text" if name in parsed else kind for name, kind in self.columns.items()} | {
            name: "text" for name in self.feature.columns if name in parsed
        }

    @model_validator(mode="after")
    def _label_is_no_feature(self) -> Data:
        if self.label.column in self.feature.columns:
            raise ValueError(f"label.column = {self.label.column!r}, is a feature column too")
        return self

    @model_validator(mode="after")
    def _ids_have_a_number(self) -> Data:
        """What can be told of numbers and of ids; the rest is for classes."""
        if self.feature.kind == "ids" and self.label.kind != "number":
            raise ValueError(f"label.kind = {self.label.kind!r}, must be number where data.feature.kind is 'ids'")
        if self.label.kind != "number":
            return self
        if self.feature.kind not in ("ids", "table"):
            raise ValueError(f"label.kind = 'number', must be class where data.feature.kind is {self.feature.kind!r}")
        if self.split.stratified:
            raise ValueError("split.stratified = true: a number is of no class; must be false")
        if any(rule.rule == "allowed_labels" for rule in self.clean):
            raise ValueError("clean: 'allowed_labels' is for classes; take {rule: range} on the label's column")
        if self.feature.kind == "ids" and self.labels.max_near_leaked_ratio is not None:
            raise ValueError("labels.max_near_leaked_ratio: ids are equal or not, never near; must be left out")
        return self

    @model_validator(mode="after")
    def _next_is_of_texts(self) -> Data:
        """A text that is its own label has no label column, and is learnt as it is."""
        if self.label.kind != "next":
            return self
        if self.feature.kind != "text":
            kind = self.feature.kind
            raise ValueError(f"label.kind = 'next', must be class or number where data.feature.kind is {kind!r}")
        if self.split.stratified:
            raise ValueError("split.stratified = true: a text is of no class; must be false")
        if any(rule.rule == "allowed_labels" for rule in self.clean):
            raise ValueError("clean: 'allowed_labels' is for classes; take {rule: match} on the text's column")
        if self.augment:
            raise ValueError("augment: changed copies would be learnt as texts that were written; must be left out")
        return self

    @model_validator(mode="after")
    def _annotators_are_columns_of_their_own(self) -> Data:
        for name in self.label.annotators.columns if self.label.annotators else ():
            if name in (*self.feature.columns, self.label.column, *self.columns, *self.split.columns):
                raise ValueError(f"label.annotators.columns: {name!r} is another column too; name each once")
        if self.label.annotators and self.feature.kind == "tokens":
            raise ValueError("label.annotators: a row of words has a tag for each; must be one label a row")
        return self

    @model_validator(mode="after")
    def _columns_are_named_once(self) -> Data:
        for name in self.columns:
            if name in (*self.feature.columns, self.label.column, self.split.column):
                raise ValueError(f"columns.{name}: is feature, label or split column already; remove it here")
        for name in self.made_columns:
            if name in (*self.columns, self.label.column, self.split.column):
                raise ValueError(f"clean: column {name!r} is made by a rule and read from the source; name another")
        return self

    @model_validator(mode="after")
    def _kept_columns_are_there(self) -> Data:
        for name in self.keep:
            if name not in self.columns:
                raise ValueError(f"keep: {name!r} is no further column, must be one of {sorted(self.columns)}")
            if name in OWN_COLUMNS:
                raise ValueError(f"keep: {name!r} is a name of our own, must be none of {', '.join(OWN_COLUMNS)}")
            if name in self.privacy.columns and self.privacy.columns[name].action == "drop":
                raise ValueError(f"keep: {name!r} is dropped by privacy.columns; generalise it instead")
        return self

    @model_validator(mode="after")
    def _private_columns_can_be_treated(self) -> Data:
        texts = {name for name, kind in self.columns.items() if kind == "text"}
        texts |= set(self.feature.columns) if self.feature.kind in ("text", "ids") else set()
        texts |= {name for name, kind in self.read_columns.items() if kind == "text"}
        numbers = {*self.columns, *(self.feature.columns if self.feature.kind == "table" else ())} - texts
        for name, column in self.privacy.columns.items():
            where, action = f"privacy.columns.{name}", column.action
            if name not in texts | numbers or name in self.made_columns:
                allowed = sorted({*texts, *numbers} - set(self.made_columns))
                raise ValueError(f"{where}: is no column of texts or numbers that is read; must be one of {allowed}")
            if name in self.feature.columns and action == "drop":
                raise ValueError(f"{where}.action = 'drop': the model reads it; take it out of data.feature instead")
            if name in self.feature.columns and self.feature.kind == "ids":
                raise ValueError(f"{where}: clients send it as it is, so the model would know none of theirs")
            if name in numbers and not (action == "drop" or column.width):
                raise ValueError(f"{where}: holds numbers; action must be drop, or generalise with width")
            if name in texts and column.width:
                raise ValueError(f"{where}.width: the column holds texts; generalise it by first")
        return self

    @model_validator(mode="after")
    def _anonymity_is_of_what_is_kept(self) -> Data:
        kept = (*(self.feature.columns if self.feature.kind == "table" else ()), *self.keep)
        for name in self.privacy.anonymity.columns if self.privacy.anonymity else ():
            if name not in kept:
                known = f"must be feature columns of a table or kept ones ({', '.join(kept) or 'there are none'})"
                raise ValueError(f"privacy.anonymity.columns: {name!r} is not in the data set; {known}")
        return self

    @model_validator(mode="after")
    def _rules_name_known_columns(self) -> Data:
        known = {*self.feature.columns, *self.columns}
        known |= {self.label.column} if self.label.kind != "next" else set()
        known |= {self.split.column} if self.split.column else set()
        for index, rule in enumerate(self.clean):
            known |= set(rule.made_columns)
            for column in rule.named_columns:
                if column not in known:
                    raise ValueError(f"clean.{index}.column = {column!r}, must be one of {sorted(known)}")
        for column in self.split.columns:
            if column not in known or column == self.label.column:
                allowed = sorted(known - {self.label.column})
                raise ValueError(f"split: column {column!r} is not read; add it to columns, or take one of {allowed}")
        return self

    @model_validator(mode="after")
    def _changes_fit_feature(self) -> Data:
        fitting = {"image": False, "text": True}
        for change in self.augment.changes if self.augment else ():
            if fitting.get(self.feature.kind) is not isinstance(change, OF_TEXTS):
                what = "texts" if isinstance(change, OF_TEXTS) else "images"
                found = f"is for {what}, data.feature.kind is {self.feature.kind!r}"
                raise ValueError(f"augment.changes: {change.kind!r} {found}")
        return self

    @model_validator(mode="after")
    def _newest_is_read(self) -> Data:
        newest, read = self.expectations.newest, {*self.columns, *self.feature.columns} - set(self.made_columns)
        if newest and newest.column not in read:
            raise ValueError(f"expectations.newest.column = {newest.column!r}, must be one of {sorted(read)}")
        return self

    @model_validator(mode="after")
    def _strata_are_classes(self) -> Data:
        if self.split.stratified and self.feature.kind == "tokens":
            raise ValueError("split.stratified = true: a row of words has no single class; must be false")
        return self
