"""The generated suites: what a workload file says about its data, as expectations, one suite a stage.

    raw        as it was read: the columns are there, and most rows have a label
    clean      each row of the cleaned table, and ``rejected_ratio``, the share of rows that cleaning dropped
    split      one row a split: ``split``, ``rows``, ``ratio`` (of all rows), ``classes`` (how many it has)
    newest     one row: ``age_days``, the age of the newest row of the source
    history    one row: the cleaned table beside the last accepted revision: ``volume_ratio``, ``missing_columns``,
               ``changed_types``, ``repeated_files``, ``new_files``, ``shift_<column>``
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.data.cells import tags_pattern
from tasks.data.scalars import GROUP_ROWS, IMAGE_PARTS
from tasks.data.table import SPLITS
from tasks.spec.data import OWN_COLUMNS

if TYPE_CHECKING:
    from tasks.spec.requests import ValidateDataRequest
    from tasks.spec.validation import Check, Newest, Severity

STAGES = ("raw", "clean", "split", "newest", "history")
AGE = "age_days"
REJECTED = "rejected_ratio"
Expectation = dict[str, Any]
# Great Expectations' own words, which its data docs show.
NATIVE = {"stop": "critical", "quarantine": "warning", "warn": "info"}


def generated(request: ValidateDataRequest, history: dict[str, float] | None) -> dict[str, list[Expectation]]:
    """Return the expectations that follow from the workload file, by stage, in Great Expectations' own form.

    ``history`` is what was compared with the last accepted revision, None where there is none.
    """
    found = {"raw": _raw(request), "clean": _clean(request), "split": _splits(request)}
    if request.expectations.newest is not None:
        found["newest"] = _newest(request.expectations.newest)
    if history is not None:
        found["history"] = _history(request, history)
    severity_of = request.expectations.severity_of
    return {
        stage: [judged(item, severity_of(item["meta"]["check"])) for item in items] for stage, items in found.items()
    }


def judged(item: Expectation, severity: Severity) -> Expectation:
    """Return an expectation with its severity: in our word, and in Great Expectations' own."""
    return item | {"severity": NATIVE[severity], "meta": item["meta"] | {"severity": severity}}


def _raw(request: ValidateDataRequest) -> list[Expectation]:
    annotators = request.label.annotators
    labels = annotators.columns if annotators else (request.label.column,)
    if request.label.kind == "next":
        labels = ()
    names = {*labels, *_scalars(request)} - set(request.made_columns)
    names |= {*request.columns, *([request.split.column] if request.split.column else [])}
    # Of several annotators any may have labelled few rows.
    mostly = 0.5 if annotators is None else 1e-9
    return [
        _expect("table_columns_to_match_set", "raw_columns", "the declared columns", column_set=sorted(names)),
        *(_expect("column_values_to_not_be_null", "raw_labels", "rows have labels", column=name, mostly=mostly)
          for name in labels),
    ]


def _clean(request: ValidateDataRequest) -> list[Expectation]:
    rules, feature = request.expectations, request.feature
    rows = {"min_value": rules.min_rows, **({"max_value": rules.max_rows} if rules.max_rows else {})}
    alike = [GROUP_ROWS] if request.anonymity else []
    columns = {"column_set": sorted({*OWN_COLUMNS, REJECTED, *alike, *_scalars(request), *request.keep})}
    kind = {"images": _image, "texts": _text, "numbers": _table, "ids": _ids}[feature.holds]
    return [
        _expect("table_row_count_to_be_between", "rows", "data.expectations.min_rows, max_rows", **rows),
        _expect("table_columns_to_match_set", "columns", "the columns of a cleaned table", **columns),
        _expect("column_values_to_be_unique", "row_id", "each row has its own id", column="row_id"),
        _expect("column_values_to_not_be_null", "label", "every row has a label", column="label"),
        _classes(request),
        _expect("column_values_to_be_in_set", "split", "no other split", column="split", value_set=list(SPLITS)),
        _at_most("rejected", REJECTED, rules.max_rejected_ratio, "data.expectations.max_rejected_ratio"),
        *kind(feature),
        *_anonymity(request),
    ]


def _classes(request: ValidateDataRequest) -> Expectation:
    """Each label is a class; of words, each tag is; a number is in its range."""
    if request.label.kind == "number":
        return _between("classes", "label", request.label.min, request.label.max, "data.label.min and max")
    if request.label.kind == "next":
        return _between("classes", "label", 1, request.feature.max_chars, "each text has 1 to max_chars characters")
    names, why = request.label.names, "data.label.classes"
    if request.feature.kind == "tokens":
        return _expect("column_values_to_match_regex", "classes", why, column="label", regex=tags_pattern(names))
    return _expect("column_values_to_be_in_set", "classes", why, column="label", value_set=list(names))


def _anonymity(request: ValidateDataRequest) -> list[Expectation]:
    """Each row shares its values of these columns with enough others."""
    if request.anonymity is None:
        return []
    why = f"data.privacy.anonymity of {', '.join(request.anonymity.columns)}"
    least = {"column": GROUP_ROWS, "min_value": request.anonymity.k}
    return [_expect("column_values_to_be_between", "anonymity", why, **least)]


def _splits(request: ValidateDataRequest) -> list[Expectation]:
    classes = len(request.label.names)
    found = [_expect("table_row_count_to_equal", "split_rows", "each split has rows", value=len(SPLITS))]
    if classes:
        found.append(_between("split_classes", "classes", classes, classes, "each split has every class"))
    if not request.split.columns:
        # By a hash, so a share is off by chance alone; four deviations of the rarest demand's size.
        rows = max(request.rows_in - request.dropped_rows, 1)
        slack = 4 * math.sqrt(0.25 / rows) + 0.01
        found.append(_at_most("split_ratio", "off_ratio", slack, "data.split: the shares that were declared"))
    return found


def _newest(newest: Newest) -> list[Expectation]:
    """The age of the newest row, once a day; a day ahead may be another zone's, more is a wrong clock."""
    why = f"data.expectations.newest.max_age_days of {newest.column}"
    return [
        _expect("column_values_to_not_be_null", "newest", "a time can be read", column=AGE),
        _between("newest", AGE, -1, newest.max_age_days, why),
    ]


def _history(request: ValidateDataRequest, history: dict[str, float]) -> list[Expectation]:
    rules = request.expectations
    volume = (rules.min_volume_ratio, rules.max_volume_ratio)
    shifts = sorted(name for name in history if name.startswith("shift_"))
    found = [
        _between("volume", "volume_ratio", *volume, "data.expectations.min_volume_ratio, max_volume_ratio"),
        _between("schema", "missing_columns", 0, 0, "the columns of the last accepted revision"),
        _between("schema", "changed_types", 0, 0, "with the types they had"),
        _between("repeated", "repeated_files", 0, 0, "no file is delivered twice under two names"),
        *(_at_most("shift", name, rules.max_shift, "data.expectations.max_shift") for name in shifts),
    ]
    if rules.fresh:
        new = {"column": "new_files", "min_value": 1}
        found.append(_expect("column_values_to_be_between", "fresh", "data.expectations.fresh", **new))
    return found


def _scalars(request: ValidateDataRequest) -> list[str]:
    """The scalar columns that stand for the features."""
    feature = request.feature
    if feature.kind == "image":
        return [f"{feature.column}_{part}" for part in IMAGE_PARTS]
    return [feature.column, f"{feature.column}_chars"] if feature.holds == "texts" else list(feature.columns)


def _image(feature: Any) -> list[Expectation]:
    name, size = feature.column, feature.shape[0]
    bounds = "pixels from 0 to data.feature.max_value"
    return [
        _expect("column_values_to_not_be_null", "missing", "no image is missing", column=f"{name}_size"),
        _between("pixels", f"{name}_size", size, size, "data.feature.height times width"),
        _between("pixels", f"{name}_min", 0, feature.max_value, bounds),
        _between("pixels", f"{name}_max", 0, feature.max_value, bounds),
    ]


def _text(feature: Any) -> list[Expectation]:
    name = feature.column
    return [
        _expect("column_values_to_not_be_null", "missing", "no text is missing", column=name),
        _between("chars", f"{name}_chars", 1, feature.max_chars, "length: 1 to data.feature.max_chars"),
    ]


def _ids(feature: Any) -> list[Expectation]:
    return [
        _expect("column_values_to_not_be_null", "missing", "no id is missing", column=name) for name in feature.columns
    ]


def _table(feature: Any) -> list[Expectation]:
    """Missing numbers may be (the model fills them with the training mean), but not in every row."""
    return [
        expectation
        for name in feature.columns
        for expectation in (
            _expect("column_values_to_be_of_type", "numbers", "a column of numbers", column=name, type_="float64"),
            _expect("column_values_to_not_be_null", "numbers", "not all are missing", column=name, mostly=1e-9),
        )
    ]


def _between(check: Check, column: str, low: float, high: float, why: str) -> Expectation:
    return _expect("column_values_to_be_between", check, why, column=column, min_value=low, max_value=high)


def _at_most(check: Check, column: str, high: float, why: str) -> Expectation:
    return _expect("column_max_to_be_between", check, why, column=column, max_value=high)


def _expect(kind: str, check: Check, why: str, **kwargs: Any) -> Expectation:
    return {"type": f"expect_{kind}", "kwargs": kwargs, "meta": {"check": check, "why": why}}
