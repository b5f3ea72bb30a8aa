"""Apply the declared cleaning rules in order, and divide the rows into train, validation and holdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data.corrections import correct, read
from tasks.data.repair import Repairs, Work, apply_rule
from tasks.data.table import SPLITS, empty_room, read_table, row_digests, write_table
from tasks.spec.errors import BadRequest
from tasks.spec.requests import CleanRequest, CleanResult
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.workload import Split

OWN_COLUMNS = ("row_id", "label", "split")
# What a split column may say; ``test`` is the usual name of a holdout.
NAMES = {"train": "train", "validation": "validation", "holdout": "holdout", "test": "holdout"}


def clean(request: CleanRequest, room: Path) -> CleanResult:
    """Write ``data.parquet``, ``repairs.parquet`` and ``report.json`` into ``room``.

    A row keeps the id it has in the raw table, its index. The same request gives the same bytes.

    Raises:
        BadRequest: a rule that does not fit its column, no row left, a missing image left, a split name that
            is not known.
        IntegrityLost: the raw room changed.
    """
    _check_names(request)
    raw = _with_fixed_images(request, read_table(open_room(request.raw) / "raw.parquet"))
    table, repairs = _repaired(request, raw)
    if not table.num_rows:
        counts = ", ".join(f"{item['rule']} {item['dropped_rows']}" for item in repairs.by_rule)
        found = f"cleaning dropped all {raw.num_rows} rows ({counts})"
        raise BadRequest(f"{request.workload}: {found}; check data.clean")
    _check_images(request, table)
    splits = divide(table, request)
    empty_room(room)
    write_table(room / "data.parquet", _finished(request, table, splits))
    write_table(room / "repairs.parquet", repairs.table())
    result = CleanResult(
        rows_in=raw.num_rows,
        rows_out=table.num_rows,
        changed_cells=repairs.changed_cells,
        dropped_rows=repairs.dropped_rows,
        rows_by_split={name: int((splits == name).sum()) for name in SPLITS},
    )
    write_json(room / "report.json", result.model_dump(exclude={"room"}) | {"rules": repairs.by_rule})
    return result


def _repaired(request: CleanRequest, raw: pa.Table) -> tuple[pa.Table, Repairs]:
    import pyarrow as pa
    import pyarrow.compute as pc

    row_id = pc.cast(pa.array(range(raw.num_rows), pa.int64()), pa.string())
    table, repairs = raw.append_column("row_id", row_id), Repairs()
    for rule in request.rules:
        table = apply_rule(rule, Work(table, request.feature, request.label, repairs))
    return _corrected(request, table, repairs), repairs


def _corrected(request: CleanRequest, table: pa.Table, repairs: Repairs) -> pa.Table:
    """Labels that people corrected, applied last; the repair log says who and when."""
    column = request.label.column
    found = correct(table, request.feature, column, read(request.corrections))
    for rule, dropped in sorted({(change.rule, change.after is None) for change in found.changes}):
        own = [item for item in found.changes if (item.rule, item.after is None) == (rule, dropped)]
        before = [item.correction.label for item in own]
        repairs.add(rule, column, [item.row_id for item in own], before, None if dropped else [i.after for i in own])
    return found.table


def _with_fixed_images(request: CleanRequest, raw: pa.Table) -> pa.Table:
    """The raw table with its images as fixed_size_list<uint8>[H*W]."""
    import pyarrow as pa

    if request.feature.kind != "image":
        return raw
    name = request.feature.column
    fixed = raw.column(name).cast(pa.list_(pa.uint8(), request.feature.shape[0]))
    return raw.set_column(raw.schema.get_field_index(name), name, fixed)


def _check_images(request: CleanRequest, table: pa.Table) -> None:
    """A missing number or text is for the expectations to judge; a missing image can't even be stored."""
    if request.feature.kind != "image":
        return
    missing = table.filter(table.column(request.feature.column).is_null())
    if missing.num_rows:
        found = f"{missing.num_rows} rows have no image (first row_id {missing.column('row_id')[0]})"
        rule = f"{{rule: drop_missing, column: {request.feature.column}}}"
        raise BadRequest(f"{request.workload}: {found}; add {rule} to data.clean")


def divide(table: pa.Table, request: CleanRequest) -> np.ndarray:
    """Return each row's split, by a hash of its features or by the split column.

    Raises:
        BadRequest: the split column holds another name, or none.
    """
    import numpy as np

    split = request.split
    position = positions(row_digests(table, request.feature), split.seed)
    if split.column is None:
        bounds = [split.holdout, split.holdout + split.validation]
        return np.array(["holdout", "validation", "train"])[np.searchsorted(bounds, position, side="right")]
    named = _named_splits(table, split)
    if not (named == "validation").any():
        # The share of the training rows, so that the holdout keeps the rows its author gave it.
        named[(named == "train") & (position < split.validation)] = "validation"
    return named


def positions(digests: np.ndarray, seed: int) -> np.ndarray:
    """Return where each row stands between 0 and 1: a keyed hash (BLAKE2b) of its features' digest."""
    import hashlib

    import numpy as np

    key = f"split {seed}".encode()
    found = b"".join(hashlib.blake2b(bytes(item), digest_size=8, key=key).digest() for item in digests)
    # 53 bits, what a double holds exactly: below 1 always.
    return (np.frombuffer(found, dtype=">u8") >> 11).astype(np.float64) / 2**53


def _named_splits(table: pa.Table, split: Split) -> np.ndarray:
    import numpy as np

    found = table.column(split.column).to_pylist()
    names = [NAMES.get((text or "").strip().lower()) for text in found]
    if None in names:
        row = names.index(None)
        where = f"data.split.column = {split.column!r}, row_id {table.column('row_id')[row]}"
        raise BadRequest(f"{where}: found {found[row]!r}, must be one of {', '.join(NAMES)}")
    return np.array(names, dtype="<U10")


def _finished(request: CleanRequest, table: pa.Table, splits: np.ndarray) -> pa.Table:
    import pyarrow as pa

    columns = {"row_id": table.column("row_id")}
    columns |= {name: table.column(name) for name in request.feature.columns}
    columns |= {"label": table.column(request.label.column), "split": pa.array(splits.tolist(), pa.string())}
    return pa.table(columns)


def _check_names(request: CleanRequest) -> None:
    for name in request.feature.columns:
        if name in OWN_COLUMNS:
            allowed = f"must be another name than {', '.join(OWN_COLUMNS)}"
            raise BadRequest(f"{request.workload}: feature column {name!r}, {allowed}")
    for field, name in (("label", request.label.column), ("split", request.split.column)):
        if name == "row_id":
            raise BadRequest(f"{request.workload}: data.{field}.column = 'row_id', must be another name")
