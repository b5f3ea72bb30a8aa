"""One cleaning rule on a whole table, and the record of every cell it changed and every row it dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.table import row_digests
from tasks.spec import clean as c
from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.spec.clean import CleanRule
    from tasks.spec.feature import Feature
    from tasks.spec.workload import Label

# The column of a dropped row where no single one is the cause.
WHOLE_ROW = "*"


class Repairs:
    """What cleaning did. A changed cell has an ``after``; a dropped row has none."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self.by_rule: list[dict[str, Any]] = []

    @property
    def changed_cells(self) -> int:
        return sum(item["changed_cells"] for item in self.by_rule)

    @property
    def dropped_rows(self) -> int:
        return sum(item["dropped_rows"] for item in self.by_rule)

    def add(self, rule: str, column: str, row_id: Any, before: Any, after: Any = None) -> None:
        """Record one rule's work: row ids [B] with the values before, and after where cells changed."""
        import pyarrow as pa

        rows = len(row_id)
        nothing = pa.nulls(rows, pa.string())
        columns = {
            "row_id": row_id,
            "column": pa.repeat(column, rows),
            "before": before if before is not None else nothing,
            "after": after if after is not None else nothing,
            "rule": pa.repeat(rule, rows),
        }
        changed, dropped = (rows, 0) if after is not None else (0, rows)
        counts = {"changed_cells": changed, "dropped_rows": dropped}
        self.by_rule.append({"rule": rule, "column": column, **counts})
        self._parts.append(pa.table(columns).cast(_schema()))

    def table(self) -> pa.Table:
        """Return ``repairs.parquet``'s rows, in the order of the rules."""
        import pyarrow as pa

        return pa.concat_tables([_schema().empty_table(), *self._parts])


class Work(NamedTuple):
    """What a rule works on, and where it records what it did."""

    table: pa.Table
    feature: Feature
    label: Label
    repairs: Repairs


def apply_rule(rule: CleanRule, work: Work) -> pa.Table:
    """Return the table after one rule; what it did is added to ``work.repairs``.

    Raises:
        BadRequest: the rule does not fit the column's type.
    """
    return _RULES[type(rule)](rule, work)


def _trim(rule: c.Trim, work: Work) -> pa.Table:
    import pyarrow.compute as pc

    return _change(rule, work, pc.utf8_trim_whitespace(_texts(rule, work.table)))


def _synonyms(rule: c.Synonyms, work: Work) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = _texts(rule, work.table)
    found = pc.index_in(texts, value_set=pa.array(rule.replace, pa.string()))
    meant = pc.take(pa.array(rule.replace.values(), pa.string()), found)
    return _change(rule, work, pc.coalesce(meant, texts))


def _fill(rule: c.Fill, work: Work) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = work.table.column(rule.column)
    is_text = isinstance(rule.value, str)
    if not (pa.types.is_string if is_text else pa.types.is_floating)(column.type):
        raise _misfit(rule, column, f"value = {rule.value!r}")
    value = pa.scalar(rule.value, column.type)
    return _change(rule, work, pc.if_else(_missing(column), value, column))


def _range(rule: c.Range, work: Work) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = work.table.column(rule.column)
    if not pa.types.is_floating(column.type):
        raise _misfit(rule, column, "needs numbers")
    kept = column
    if rule.min is not None:
        kept = pc.if_else(pc.less(kept, rule.min), rule.min, kept)
    if rule.max is not None:
        kept = pc.if_else(pc.greater(kept, rule.max), rule.max, kept)
    if rule.action == "clip":
        return _change(rule, work, kept)
    # A missing number is not out of range: drop_missing and fill are the rules on those.
    outside = pc.and_(pc.not_equal(kept, column), pc.invert(pc.is_nan(column)))
    return _drop(rule, rule.column, work, pc.fill_null(outside, False))


def _drop_missing(rule: c.DropMissing, work: Work) -> pa.Table:
    return _drop(rule, rule.column, work, _missing(work.table.column(rule.column)))


def _allowed(rule: c.Allowed, work: Work) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pc.is_in(work.table.column(work.label.column), value_set=pa.array(work.label.names, pa.string()))
    return _drop(rule, work.label.column, work, pc.invert(known))


def _duplicates(rule: c.DropDuplicates, work: Work) -> pa.Table:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = work.table.column(work.label.column).combine_chunks().dictionary_encode().indices
    codes = np.asarray(pc.fill_null(labels, -1))
    keys = np.char.add(row_digests(work.table, work.feature), codes.astype("S12"))
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    kept = first[group]
    mask = kept != np.arange(len(keys))
    # What the dropped row is equal to says more than its own long features.
    twins = work.table.column("row_id").take(pa.array(kept[mask]))
    before = pc.binary_join_element_wise("equal to row ", twins, "")
    return _drop(rule, WHOLE_ROW, work, pa.chunked_array([pa.array(mask)]), before)


_RULES: dict[type, Callable[..., Any]] = {
    c.Trim: _trim,
    c.Synonyms: _synonyms,
    c.DropMissing: _drop_missing,
    c.Fill: _fill,
    c.Range: _range,
    c.Allowed: _allowed,
    c.DropDuplicates: _duplicates,
}


def _change(rule: Any, work: Work, new: Any) -> pa.Table:
    """Put ``new`` in the place of the rule's column; cells that differ are recorded."""
    import pyarrow.compute as pc

    table = work.table
    old = table.column(rule.column)
    # Null differs from a value; null and null do not.
    same = pc.or_(pc.fill_null(pc.equal(old, new), False), pc.and_(old.is_null(), new.is_null()))
    mask = pc.invert(same)
    work.repairs.add(
        rule.rule,
        rule.column,
        table.column("row_id").filter(mask),
        _as_text(old.filter(mask)),
        _as_text(new.filter(mask)),
    )
    return table.set_column(table.schema.get_field_index(rule.column), rule.column, new)


def _drop(rule: Any, column: str, work: Work, mask: Any, before: Any = None) -> pa.Table:
    import pyarrow.compute as pc

    table = work.table
    if before is None:
        before = _as_text(table.column(column).filter(mask))
    work.repairs.add(rule.rule, column, table.column("row_id").filter(mask), before)
    return table.filter(pc.invert(mask))


def _missing(column: Any) -> Any:
    """Null, NaN, or an empty text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type):
        return pc.fill_null(pc.equal(column, ""), True)
    return pc.is_null(column, nan_is_null=True) if pa.types.is_floating(column.type) else column.is_null()


def _texts(rule: Any, table: pa.Table) -> Any:
    import pyarrow as pa

    column = table.column(rule.column)
    if not pa.types.is_string(column.type):
        raise _misfit(rule, column, "needs texts")
    return column


def _as_text(column: Any) -> Any:
    """Cells as text; of images (never changed, dropped only where missing) nothing."""
    import pyarrow as pa

    nested = pa.types.is_fixed_size_list(column.type)
    return pa.nulls(len(column), pa.string()) if nested else column.cast(pa.string())


def _misfit(rule: Any, column: Any, why: str) -> BadRequest:
    kind = {"string": "texts", "double": "numbers"}.get(str(column.type), "images")
    return BadRequest(f"data.clean: rule {rule.rule} on {rule.column!r}: {why}, the column holds {kind}")


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ("row_id", "column", "before", "after", "rule")])
