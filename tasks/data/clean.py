"""Apply the declared cleaning rules in order, and divide the rows into train, validation and holdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data.cleaned import write_repairs, write_rows
from tasks.data.corrections import read
from tasks.data.engine import ROW, SCRATCH, Engine, Runs, engine
from tasks.data.rawrows import RawRows, write_slim
from tasks.data.repair import Meaning, apply_rule
from tasks.data.table import empty_room
from tasks.data.truth import inferred
from tasks.data.worktable import IMAGES, NUMBERS, TEXTS, WorkTable, num_words
from tasks.spec.data import OWN_COLUMNS
from tasks.spec.errors import BadRequest
from tasks.spec.requests import CleanRequest, CleanResult
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    from tasks.spec.clean import CleanRule

RUNS = Runs()


def clean(request: CleanRequest, room: Path, runs: Runs = RUNS) -> CleanResult:
    """Write ``data.parquet``, ``repairs.parquet``, ``quarantine.parquet`` and ``report.json`` into ``room``.

    A row keeps the id it has in the raw table, its index. The same request gives the same bytes, wherever
    it ``runs``. What the engine can't hold in memory goes to a folder in the room, which is gone at the end.

    Raises:
        BadRequest: a rule that does not fit its column, no row left, a missing image left, a split name that
            is not known.
        IntegrityLost: the raw room changed.
        TryAgain: neither memory nor disk suffice.
    """
    _check_names(request)
    path = open_room(request.raw) / "raw.parquet"
    empty_room(room)
    raw = RawRows(path)
    with engine(room, path.parent, runs) as running:
        base = inferred(request, raw, _base(request, raw, path, room), room)
        work = cleaned_table(running, request.rules, base, _meaning(request), _image(request))
        if request.label.kind == "next":
            work.add(request.label.column, work[request.feature.columns[0]].length().cast("float64"))
        work.settle()
        _check_columns(request, work)
        written = write_rows(request, work, raw, room, read(request.corrections))
        by_rule = write_repairs(work, room / "repairs.parquet", request.label.column, written.changes)
    if not written.rows:
        counts = ", ".join(f"{item['rule']} {item['dropped_rows']}" for item in by_rule)
        found = f"cleaning dropped all {raw.rows} rows ({counts})"
        raise BadRequest(f"{request.workload}: {found}; check data.clean")
    result = CleanResult(
        rows_in=raw.rows,
        rows_out=written.rows,
        changed_cells=sum(item["changed_cells"] for item in by_rule),
        dropped_rows=sum(item["dropped_rows"] for item in by_rule),
        rows_by_split=written.rows_by_split,
    )
    write_json(room / "report.json", result.model_dump(exclude={"room"}) | {"rules": by_rule})
    return result


def cleaned_table(
    running: Engine, rules: tuple[CleanRule, ...], path: Path, meaning: Meaning, image: str | None = None
) -> WorkTable:
    """Return a Parquet file's table after the rules; it is computed as it is read."""
    schema = RawRows(path).schema
    work = WorkTable(running, running.scan(path, schema), schema.names, image)
    for rule in rules:
        apply_rule(rule, work, meaning)
    return work


def _meaning(request: CleanRequest) -> Meaning:
    words = request.feature.columns[0] if request.feature.kind == "tokens" else None
    label = request.feature.columns[0] if request.label.kind == "next" else request.label.column
    return Meaning(request.feature.columns, label, request.label.names, words)


def _image(request: CleanRequest) -> str | None:
    return request.feature.columns[0] if request.feature.kind == "image" else None


def _base(request: CleanRequest, raw: RawRows, path: Path, room: Path) -> Path:
    """The file that the engine reads: images are left out of it."""
    image = _image(request)
    if image is None:
        return path
    slim = room / SCRATCH / "slim.parquet"
    slim.parent.mkdir(exist_ok=True)
    write_slim(raw, image, slim)
    return slim


def _check_columns(request: CleanRequest, work: WorkTable) -> None:
    """Cleaning ends with the types that the features have. A missing number or text is for the expectations to
    judge; a missing image can't even be stored."""
    wanted = TEXTS if request.feature.holds == "ids" else request.feature.holds
    for name in request.feature.columns:
        if (found := work.kind(name)) != wanted:
            what = f"feature column {name!r} holds {found} after cleaning, must be {wanted}"
            raise BadRequest(f"{request.workload}: {what}; a rule such as parse_number in data.clean changes that")
    if request.label.kind == "number" and (found := work.kind(request.label.column)) != NUMBERS:
        what = f"label column {request.label.column!r} holds {found} after cleaning, must be {NUMBERS}"
        raise BadRequest(f"{request.workload}: {what}; take out the rule that makes it so")
    if request.feature.kind == "tokens":
        _check_tags(request, work)
    if wanted != IMAGES:
        return
    name = request.feature.columns[0]
    rows = work.alive(name)
    missing = rows.filter(rows[work.place(name)].isnull())
    if count := work.engine.value(missing.count()):
        found = f"{count} rows have no image (first row_id {work.engine.value(missing[ROW].min())})"
        rule = f"{{rule: drop_missing, column: {name}}}"
        raise BadRequest(f"{request.workload}: {found}; add {rule} to data.clean")


def _check_tags(request: CleanRequest, work: WorkTable) -> None:
    """Each word has a tag still."""
    name, label = request.feature.columns[0], request.label.column
    rows = work.alive(name, label)
    odd = rows.filter(num_words(rows[work.place(name)]) != num_words(rows[work.place(label)]))
    if count := work.engine.value(odd.count()):
        found = f"{count} rows have more or fewer words than tags (first row_id {work.engine.value(odd[ROW].min())})"
        raise BadRequest(f"{request.workload}: {found}; a rule in data.clean must keep the number of both")


def _check_names(request: CleanRequest) -> None:
    for name in request.feature.columns:
        if name in OWN_COLUMNS:
            allowed = f"must be another name than {', '.join(OWN_COLUMNS)}"
            raise BadRequest(f"{request.workload}: feature column {name!r}, {allowed}")
    for field, name in (("label", request.label.column), ("split", request.split.column)):
        if name == "row_id":
            raise BadRequest(f"{request.workload}: data.{field}.column = 'row_id', must be another name")
