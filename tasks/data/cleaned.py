"""What cleaning leaves: the cleaned rows, the repair log and the quarantine, each written as it is computed.

Files are written in row groups of one size whatever batches the engine hands out: the same request gives the
same bytes. How many rows a group has follows from the raw table, so that one of them fits into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.corrections import Change, Correction, correct
from tasks.data.divide import LABEL, NAMES, Cuts, cuts_of, divide, positions
from tasks.data.engine import ROW
from tasks.data.rawrows import RawRows
from tasks.data.table import SPLITS
from tasks.data.worktable import DROPPED, IMAGES, NUMBERS, WorkTable
from tasks.spec.requests import CleanRequest

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS, GROUP_BYTES, MIN_GROUP_ROWS = 131_072, 32 << 20, 64
# Beside the workload's own names, which hold no NUL.
OWN = AT, GONE, WHY = "\0row", "\0dropped", "\0why"


class Written(NamedTuple):
    """How many rows went to each split, all others are in quarantine; and what people's corrections changed."""

    rows_by_split: dict[str, int]
    changes: tuple[Change, ...]

    @property
    def rows(self) -> int:
        return sum(self.rows_by_split.values())


class Groups:
    """A Parquet file written in row groups of exactly ``rows`` (the last may be smaller), by a thread: one group is
    written while the next is computed."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int = GROUP_ROWS) -> None:
        import pyarrow.parquet as pq

        # Numbers are mostly distinct: trying a dictionary on them costs more than it saves.
        texts = [field.name for field in schema if str(field.type) == "string" and field.name != "row_id"]
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts)
        self._schema, self._held, self._rows, self._group = schema, list[Any](), 0, rows
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None and self._rows:
                self._write(self._rows)
            self._written()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._rows += table.num_rows
        while self._rows >= self._group:
            self._write(self._group)

    def _write(self, count: int) -> None:
        import pyarrow as pa

        # One chunk a group: where chunks meet, pages would end.
        whole = pa.concat_tables(self._held)
        group = whole.slice(0, count).combine_chunks()
        self._written()
        self._writing = self._thread.submit(self._writer.write_table, group, row_group_size=self._group)
        self._held, self._rows = [whole.slice(count)], self._rows - count

    def _written(self) -> None:
        """Wait for the group that is being written; its error is raised here."""
        if self._writing:
            self._writing.result()


def write_repairs(work: WorkTable, path: Path, label: str, changes: tuple[Change, ...]) -> list[dict[str, Any]]:
    """Write ``repairs.parquet`` in the order of the rules, then of the rows, and corrections of the column ``label``
    at the end; return the counts by rule."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in ("row_id", "column", "before", "after", "rule")])
    rules = pa.array([entry.rule for entry in work.entries], pa.string())
    columns = pa.array([entry.column for entry in work.entries], pa.string())
    counts = np.zeros(len(work.entries), np.int64)
    with Groups(path, schema) as groups:
        for batch in _log(work):
            number = batch.column("number")
            counts += np.bincount(np.asarray(number), minlength=len(counts))
            row_id = batch.column(ROW).cast(pa.string())
            cells = [row_id, columns.take(number), batch.column("before"), batch.column("after"), rules.take(number)]
            groups.add(pa.Table.from_arrays(cells, schema=schema))
        groups.add(pa.Table.from_pylist([_corrected(change, label) for change in changes], schema))
    by_rule = [_counted(entry, int(count)) for entry, count in zip(work.entries, counts, strict=True)]
    return by_rule + _corrections_counted(changes, label)


def _corrected(change: Change, label: str) -> dict[str, str | None]:
    before = change.correction.label
    return {"row_id": change.row_id, "column": label, "before": before, "after": change.after, "rule": change.rule}


def _corrections_counted(changes: tuple[Change, ...], label: str) -> list[dict[str, Any]]:
    counts = Counter((change.rule, change.after is None) for change in changes)
    return [
        {"rule": rule, "column": label, "changed_cells": 0 if gone else count, "dropped_rows": count if gone else 0}
        for (rule, gone), count in sorted(counts.items())
    ]


def _counted(entry: Any, count: int) -> dict[str, Any]:
    changed, dropped = (0, count) if entry.drops else (count, 0)
    return {"rule": entry.rule, "column": entry.column, "changed_cells": changed, "dropped_rows": dropped}


def _log(work: WorkTable) -> Iterable[pa.RecordBatch]:
    """What happened to each row, one line an entry: ``number``, ``row``, ``before``, ``after``."""
    import ibis

    items, hits = [], []
    for number, entry in enumerate(work.entries):
        if entry.found:
            hit, before, after = _happened(work, number, entry)
            fields = {"number": ibis.literal(number, "int32"), "before": before, "after": after}
            hits.append(hit)
            items.append(hit.ifelse(ibis.struct(fields), None))
    if not items:
        return ()
    any_hit = hits[0]
    for hit in hits[1:]:
        any_hit = any_hit | hit
    lines = work.table.filter(any_hit).select(ROW, item=ibis.array(items).unnest())
    lines = lines.filter(lines["item"].notnull())
    item = lines["item"]
    named = lines.select(ROW, number=item["number"], before=item["before"], after=item["after"])
    return work.engine.batches(named.order_by("number", ROW))


def _happened(work: WorkTable, number: int, entry: Any) -> tuple[Any, Any, Any]:
    """Whether an entry did something to a row, and the cell before and after it."""
    import ibis

    table = work.table
    dropped, before = table[DROPPED], table[f"before{number}"]
    if entry.drops:
        return (dropped == number).fill_null(False), _logged(work, entry, before), ibis.null("string")
    after = table[f"after{number}"]
    same_type = before.type() == after.type()
    changed = ~(before.identical_to(after) if same_type else work.as_text(before).identical_to(work.as_text(after)))
    was_alive = dropped.isnull() | (dropped >= number)
    return changed & was_alive, work.as_text(before), work.as_text(after)


def _logged(work: WorkTable, entry: Any, before: Any) -> Any:
    """What a dropped row had; of images nothing."""
    import ibis

    images = entry.column in work.names and work.kind(entry.column) == IMAGES
    return ibis.null("string") if images else work.as_text(before)


def write_rows(
    request: CleanRequest, work: WorkTable, raw: RawRows, room: Path, corrections: tuple[Correction, ...]
) -> Written:
    """Write ``data.parquet`` and ``quarantine.parquet``, range by range of the raw table; labels that people
    corrected are applied last.

    Raises:
        BadRequest: a split name that is not known.
    """
    counts, changes = dict.fromkeys(SPLITS, 0), list[Change]()
    has_validation, cuts = _has_validation(request, work), _cuts(request, work, raw)
    schema, quarantine = _data_schema(request, work), _quarantine_schema(raw.schema)
    size = max(MIN_GROUP_ROWS, min(GROUP_ROWS, raw.fitting(GROUP_BYTES)))
    with (
        Groups(room / "data.parquet", schema, size) as data,
        Groups(room / "quarantine.parquet", quarantine, size) as aside,
    ):
        for (start, stop), rows in _ranges(request, work, raw):
            alive = rows.filter(rows.column(GONE).is_null())
            labelled = alive.append_column(LABEL, alive.column(request.label.column)) if cuts else alive
            splits = divide(labelled, request.feature, request.split, has_validation, cuts)
            finished = _finished(request, schema, alive, splits, raw, start, stop)
            found = correct(finished, request.feature, "label", corrections)
            for name, count in Counter(found.table.column("split").to_pylist()).items():
                counts[name] += count
            data.add(found.table)
            changes += found.changes
            if alive.num_rows < rows.num_rows:
                dropped = rows.filter(rows.column(GONE).is_valid())
                aside.add(_set_aside(work, dropped, raw.read(start, stop), start, quarantine))
            if gone := [change for change in found.changes if change.after is None]:
                aside.add(_taken_out(gone, request.label.column, raw.read(start, stop), start, quarantine))
    return Written(counts, tuple(changes))


def _ranges(request: CleanRequest, work: WorkTable, raw: RawRows) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """All rows in their order, range by range: what is written of them, and who dropped them for what."""
    import ibis

    table = work.table
    why = ibis.null("string")
    for number, entry in enumerate(work.entries):
        if entry.drops and entry.found:
            hit = table[DROPPED] == number
            why = hit.ifelse(_logged(work, entry, table[f"before{number}"]), why)
    names = dict.fromkeys((*request.feature.columns, request.label.column, *request.keep, *request.split.columns))
    columns = {name: table[work.place(name)] for name in names}
    columns[request.label.column] = work.as_text(columns[request.label.column])
    # By place: the engine would take names that differ in case alone for one.
    places = {f"out{place}": column for place, column in enumerate(columns.values())}
    bounds = raw.chunks()
    asked = table.select(ROW, DROPPED, why=why, **places)
    for bound, found in zip(bounds, work.engine.ranges(asked, bounds), strict=True):
        rows = found.append_column("row_id", found.column(ROW).cast("string"))
        yield bound, rows.rename_columns([*OWN, *columns, "row_id"])


def _finished(
    request: CleanRequest, schema: pa.Schema, alive: pa.Table, splits: Any, raw: RawRows, start: int, stop: int
) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [alive.column("row_id")]
    for name in request.feature.columns:
        column = alive.column(name)
        if request.feature.kind == "image":
            column = raw.read(start, stop, [name]).column(0).take(pc.subtract(alive.column(AT), start))
        columns.append(column)
    columns += [alive.column(name) for name in (*request.keep, request.label.column)]
    columns += [pa.array(splits.tolist(), pa.string())]
    cast = [column.cast(field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(cast, schema=schema)


def _set_aside(work: WorkTable, dropped: pa.Table, raw: pa.Table, start: int, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    number = dropped.column(GONE)
    rules = pa.array([entry.rule for entry in work.entries], pa.string())
    names = pa.array([entry.column for entry in work.entries], pa.string())
    whole = raw.take(pc.subtract(dropped.column(AT), start))
    own = [dropped.column("row_id"), rules.take(number), names.take(number), dropped.column(WHY)]
    return pa.Table.from_arrays([*own, *whole.columns], schema=schema)


def _taken_out(gone: list[Change], label: str, raw: pa.Table, start: int, schema: pa.Schema) -> pa.Table:
    """Rows that a person took out of the data set."""
    import pyarrow as pa

    whole = raw.take(pa.array([int(change.row_id) - start for change in gone]))
    columns = [[c.row_id, c.rule, label, c.correction.label] for c in gone]
    own = [pa.array(cells, pa.string()) for cells in zip(*columns, strict=True)]
    return pa.Table.from_arrays([*own, *whole.columns], schema=schema)


def _data_schema(request: CleanRequest, work: WorkTable) -> pa.Schema:
    import pyarrow as pa

    feature = request.feature
    width = feature.shape[0]
    kinds = {"images": pa.list_(pa.uint8(), width), "numbers": pa.float64()}
    fields = [("row_id", pa.string()), *((name, kinds.get(feature.holds, pa.string())) for name in feature.columns)]
    further = [(name, pa.float64() if work.kind(name) == NUMBERS else pa.string()) for name in request.keep]
    label = pa.string() if request.label.kind == "class" else pa.float64()
    return pa.schema([*fields, *further, ("label", label), ("split", pa.string())])


def _quarantine_schema(raw: pa.Schema) -> pa.Schema:
    """Why each row is there, then the row as it was read; a raw column of one of these names stands beside it."""
    import pyarrow as pa

    return pa.schema([*((name, pa.string()) for name in ("row_id", "rule", "column", "reason")), *raw])


def _cuts(request: CleanRequest, work: WorkTable, raw: RawRows) -> Cuts | None:
    """Where each class is cut, where the split is stratified: one pass over the places of all rows."""
    import numpy as np

    if not request.split.stratified:
        return None
    places, labels = [], []
    for _, rows in _ranges(request, work, raw):
        alive = rows.filter(rows.column(GONE).is_null())
        places.append(positions(alive, request.feature, request.split.seed))
        labels.append(np.array([str(label) for label in alive.column(request.label.column).to_pylist()], dtype=str))
    return cuts_of(np.concatenate(places), np.concatenate(labels), request.split)


def _has_validation(request: CleanRequest, work: WorkTable) -> bool:
    if request.split.column is None:
        return False
    rows = work.alive(request.split.column)
    named = rows[work.place(request.split.column)].strip().lower()
    validation = [name for name, split in NAMES.items() if split == "validation"]
    return bool(work.engine.value(rows.filter(named.isin(validation)).count()))
