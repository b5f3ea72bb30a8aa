"""Labels that people corrected: read from an answered queue, kept with who and when, applied by the next cleaning.

    <home>/corrections/<workload>/<n>/corrections.jsonl     all corrections so far, a room, never changed again
    <home>/corrections/<workload>/head.json                 the newest room, by digest; written last

A correction is bound to the row's features and to the label that was judged, never to a row's number, which another
delivery of the same data gives to another row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.table import row_digests
from tasks.spec.errors import BadRequest
from tasks.spec.value import RoomRef, Value
from tasks.store.files import exclusive, write_json, write_whole
from tasks.store.manifest import write_manifest
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.spec.feature import Feature

FILE, HEAD = "corrections.jsonl", "head.json"
# The answer that takes a row out of the data set; no class is named so by accident.
DROP = "!drop"
COLUMNS = ("row_key", "label", "answer")


class Correction(Value):
    """One judged label: of the rows with this features' digest and this label. The label itself again: confirmed."""

    row_key: str
    label: str
    answer: str
    who: str
    at: str

    @property
    def names(self) -> tuple[str, str]:
        return (self.row_key, self.label)


class Change(NamedTuple):
    """One row that a correction changed, or dropped where ``after`` is None; ``rule`` says who and when."""

    row_id: str
    correction: Correction

    @property
    def rule(self) -> str:
        return f"relabel by {self.correction.who} at {self.correction.at}"

    @property
    def after(self) -> str | None:
        return None if self.correction.answer == DROP else self.correction.answer


class Corrected(NamedTuple):
    """A table as corrected, and what was changed, in the table's order."""

    table: pa.Table
    changes: tuple[Change, ...]


class Merged(NamedTuple):
    """What an answered queue brought."""

    changed: int
    confirmed: int
    dropped: int
    unanswered: int
    room: RoomRef | None


def merge(
    folder: Path, workload: str, answers: Path, classes: tuple[str, ...], who: str, at: str, is_tagged: bool = False
) -> Merged:
    """Add a queue's answers to a workload's corrections; a later answer on the same row and label wins.

    With ``is_tagged`` an answer is as many classes as the row's label has tags, with spaces between.

    Raises:
        BadRequest: no CSV of a relabel queue, or an answer that is no class; file, line and allowed are named.
    """
    found, unanswered = _read(answers, classes, who, at, is_tagged)
    room = _keep(folder / workload, found) if found else newest(folder, workload)
    kinds = [_kind(item) for item in found]
    counts = {kind: kinds.count(kind) for kind in ("changed", "confirmed", "dropped")}
    return Merged(**counts, unanswered=unanswered, room=room)


def newest(folder: Path, workload: str) -> RoomRef | None:
    """Return the room of all of a workload's corrections; None where nobody corrected anything."""
    head = folder / workload / HEAD
    if not head.is_file():
        return None
    digest = json.loads(head.read_text())
    return RoomRef(uri=str(folder / workload / digest["room"]), digest_sha256=digest["digest_sha256"])


def read(room: RoomRef | None) -> tuple[Correction, ...]:
    """Return the corrections of a room, in the order they were given.

    Raises:
        IntegrityLost: the room changed.
    """
    if room is None:
        return ()
    lines = (open_room(room) / FILE).read_text(encoding="utf-8").splitlines()
    return tuple(Correction.parse(json.loads(line), FILE) for line in lines)


def correct(table: pa.Table, feature: Feature, label: str, corrections: Iterable[Correction]) -> Corrected:
    """Return the table with its corrected labels, and without the rows that people dropped.

    ``label`` is the label column's name; ``row_id`` is there too. Works on any part of a table: a row's correction
    depends on that row alone.
    """
    import numpy as np
    import pyarrow as pa

    asked = {item.names: item for item in corrections if item.answer != item.label}
    if not asked or not table.num_rows:
        return Corrected(table, ())
    labels = table.column(label).to_pylist()
    keys = [key.decode() for key in row_digests(table, feature)]
    found = [asked.get((key, given)) for key, given in zip(keys, labels, strict=True)]
    ids = table.column("row_id").to_pylist()
    changes = tuple(Change(row_id, item) for row_id, item in zip(ids, found, strict=True) if item)
    answers = [item.answer if item else given for item, given in zip(found, labels, strict=True)]
    place = table.schema.get_field_index(label)
    kept = np.array([answer != DROP for answer in answers])
    return Corrected(table.set_column(place, label, pa.array(answers, pa.string())).filter(pa.array(kept)), changes)


def confirmed(corrections: Iterable[Correction]) -> set[tuple[str, str]]:
    """Return the pairs of features' digest and label that a person has judged to be right."""
    return {(item.row_key, item.answer) for item in corrections if item.answer != DROP}


def summary(corrections: Iterable[Correction]) -> list[dict[str, Any]]:
    """Return who answered when, and how many: for a revision's lineage."""
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for item in corrections:
        row = counts.setdefault((item.who, item.at), {"changed": 0, "confirmed": 0, "dropped": 0})
        row[_kind(item)] += 1
    return [{"who": who, "at": at, **counts[who, at]} for who, at in sorted(counts, key=lambda pair: pair[1])]


def _kind(item: Correction) -> str:
    return {DROP: "dropped", item.label: "confirmed"}.get(item.answer, "changed")


def _keep(folder: Path, found: list[Correction]) -> RoomRef:
    """Write the next room with all corrections, then point at it."""
    with exclusive(folder / ".lock"):
        merged = {item.names: item for item in read(newest(folder.parent, folder.name))}
        for item in found:
            merged.pop(item.names, None)
            merged[item.names] = item
        number = 1 + max([int(path.name) for path in folder.iterdir() if path.name.isdigit()], default=0)
        room = folder / str(number)
        lines = [json.dumps(item.model_dump(), sort_keys=True, ensure_ascii=False) for item in merged.values()]
        write_whole(room / FILE, "\n".join(lines) + "\n")
        digest = write_manifest(room)
        write_json(folder / HEAD, {"room": room.name, "digest_sha256": digest})
        return RoomRef(uri=str(room), digest_sha256=digest)


def _read(
    path: Path, classes: tuple[str, ...], who: str, at: str, is_tagged: bool
) -> tuple[list[Correction], int]:
    """The answers of a queue's CSV, and how many rows have none."""
    try:
        # A spreadsheet writes a byte order mark, and may write semicolons.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: can't be read as UTF-8 text ({error}); give the queue.csv you answered") from None
    separator = ";" if ";" in text.partition("\n")[0] and "," not in text.partition("\n")[0] else ","
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    if lost := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        there = ", ".join(lines.fieldnames or ()) or "nothing"
        raise BadRequest(f"{path}: column {lost[0]!r} is not there, found {there}; give the queue.csv you answered")
    found, unanswered = [], 0
    for line in lines:
        if (answer := (line["answer"] or "").strip()) == "":
            unanswered += 1
            continue
        if answer != DROP and not _is_allowed(answer, line, classes, is_tagged):
            many = "as many as the label has, each of" if is_tagged else "one of"
            allowed = f"must be empty, {DROP} or {many} {', '.join(classes[:20])}"
            raise BadRequest(f"{path}: line {lines.line_num}: answer {answer!r}, {allowed}")
        found.append(_correction(path, lines.line_num, line, answer, who, at))
    return found, unanswered


def _is_allowed(answer: str, line: dict[str, Any], classes: tuple[str, ...], is_tagged: bool) -> bool:
    if not is_tagged:
        return answer in classes
    tags = answer.split(" ")
    return set(tags) <= set(classes) and len(tags) == len((line["label"] or "").split(" "))


def _correction(path: Path, number: int, line: dict[str, Any], answer: str, who: str, at: str) -> Correction:
    key = (line["row_key"] or "").strip()
    if len(key) != 32 or set(key) - set("0123456789abcdef"):
        raise BadRequest(f"{path}: line {number}: row_key {key!r}, must be the 32 hex digits of the queue; keep them")
    return Correction(row_key=key, label=line["label"] or "", answer=answer, who=who, at=at)
