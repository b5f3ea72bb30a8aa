"""The generated suite: what a workload file says about its data, as expectations; and the frame they read.

Great Expectations reads columns of scalars, so an image column is stood for by what its rows show:
``<column>_size``, ``<column>_min``, ``<column>_max`` and ``<column>_mean``; a text column also by
``<column>_chars``. ``rejected_ratio`` is the share of rows that cleaning dropped, the same in every row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.table import SPLITS, images

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from tasks.spec.requests import ValidateDataRequest

REJECTED = "rejected_ratio"
Expectation = dict[str, Any]


def expectations(request: ValidateDataRequest) -> list[Expectation]:
    """Return the expectations that follow from the workload file, in Great Expectations' own form."""
    rules, feature = request.expectations, request.feature
    rows = {"min_value": rules.min_rows, **({"max_value": rules.max_rows} if rules.max_rows else {})}
    splits = {"min_value": len(SPLITS), "max_value": len(SPLITS)}
    columns = {"column_set": sorted(_columns(request)), "exact_match": True}
    return [
        _expect("table_row_count_to_be_between", "rows: data.expectations.min_rows, max_rows", **rows),
        _expect("table_columns_to_match_set", "the columns of a cleaned table", **columns),
        _expect("column_values_to_be_unique", "each row has its own id", column="row_id"),
        _expect("column_values_to_not_be_null", "every row has a label", column="label"),
        _expect(
            "column_values_to_be_in_set",
            "data.label.classes",
            column="label",
            value_set=list(request.label.names),
        ),
        _expect("column_values_to_be_in_set", "no other split", column="split", value_set=list(SPLITS)),
        _expect("column_unique_value_count_to_be_between", "each split has rows", column="split", **splits),
        _at_most(REJECTED, rules.max_rejected_ratio, "data.expectations.max_rejected_ratio"),
        *{"image": _image, "text": _text, "table": _table}[feature.kind](feature),
    ]


def frame(request: ValidateDataRequest, table: pa.Table) -> pd.DataFrame:
    """Return the cleaned table as the frame that expectations read."""
    feature = request.feature
    if feature.kind == "image":
        frame = table.drop_columns([feature.column]).to_pandas()
        return frame.assign(**_image_columns(feature, table), **{REJECTED: _rejected(request)})
    frame = table.to_pandas()
    if feature.kind == "text":
        frame[f"{feature.column}_chars"] = frame[feature.column].str.len()
    frame[REJECTED] = _rejected(request)
    return frame


def _image_columns(feature: Any, table: pa.Table) -> dict[str, Any]:
    """Scalars of each image, float64 [B]; NaN where the image is missing."""
    import numpy as np

    column = table.column(feature.column)
    missing = np.asarray(column.is_null().combine_chunks())
    pixels = images(column, column.type.list_size)
    derived = {
        "size": np.full(len(pixels), pixels.shape[1]),
        "min": pixels.min(axis=1),
        "max": pixels.max(axis=1),
        "mean": pixels.mean(axis=1),
    }
    return {f"{feature.column}_{name}": np.where(missing, np.nan, found) for name, found in derived.items()}


def _rejected(request: ValidateDataRequest) -> float:
    return request.dropped_rows / max(request.rows_in, 1)


def _columns(request: ValidateDataRequest) -> set[str]:
    feature = request.feature
    derived = {
        "image": [f"{feature.columns[0]}_{name}" for name in ("size", "min", "max", "mean")],
        "text": [feature.columns[0], f"{feature.columns[0]}_chars"],
        "table": feature.columns,
    }[feature.kind]
    return {"row_id", "label", "split", REJECTED, *derived}


def _image(feature: Any) -> list[Expectation]:
    name, size = feature.column, feature.shape[0]
    return [
        _expect("column_values_to_not_be_null", "no image is missing", column=f"{name}_size"),
        _between(f"{name}_size", size, size, "data.feature.height times width"),
        _between(f"{name}_min", 0, feature.max_value, "pixels from 0 to data.feature.max_value"),
        _between(f"{name}_max", 0, feature.max_value, "pixels from 0 to data.feature.max_value"),
    ]


def _text(feature: Any) -> list[Expectation]:
    name = feature.column
    return [
        _expect("column_values_to_not_be_null", "no text is missing", column=name),
        _between(f"{name}_chars", 1, feature.max_chars, "length: 1 to data.feature.max_chars"),
    ]


def _table(feature: Any) -> list[Expectation]:
    """Missing numbers may be (the model fills them with the training mean), but not in every row."""
    kind = {"type_": "float64"}
    return [
        expectation
        for name in feature.columns
        for expectation in (
            _expect("column_values_to_be_of_type", "a column of numbers", column=name, **kind),
            _expect("column_values_to_not_be_null", "not all values are missing", column=name, mostly=1e-9),
        )
    ]


def _between(column: str, low: float, high: float, why: str) -> Expectation:
    return _expect("column_values_to_be_between", why, column=column, min_value=low, max_value=high)


def _at_most(column: str, high: float, why: str) -> Expectation:
    return _expect("column_max_to_be_between", why, column=column, max_value=high)


def _expect(kind: str, why: str, **kwargs: Any) -> Expectation:
    return {"type": f"expect_{kind}", "kwargs": kwargs, "meta": {"why": why}}
