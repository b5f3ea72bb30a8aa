"""The rules that are declared for tables of known errors, and the score of what they repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tasks.data.clean import cleaned_table
from tasks.data.engine import ROW, Runs, engine
from tasks.data.repair import Meaning
from tasks.spec import clean as c


def _follows(determinant: list[str], *dependent: str, **more: Any) -> c.CleanRule:
    return c.Dependency(rule="dependency", determinant=tuple(determinant), dependent=dependent, **more)


# A hospital is known by its number, and as well by its name or telephone; a measure by its code or its name. The
# average is a state's, of one measure.
HOSPITAL: tuple[c.CleanRule, ...] = (
    _follows(["HospitalName"], "ProviderNumber"),
    _follows(["PhoneNumber"], "ProviderNumber"),
    _follows(
        ["ProviderNumber"],
        *("HospitalName", "Address1", "City", "State", "ZipCode", "CountyName", "PhoneNumber"),
        *("HospitalType", "HospitalOwner", "EmergencyService"),
    ),
    _follows(["ZipCode"], "City", "State", "CountyName"),
    _follows(["MeasureName"], "MeasureCode"),
    _follows(["MeasureCode"], "MeasureName", "Condition"),
    _follows(["State", "MeasureCode"], "StateAverage"),
)
HOSPITAL_SPELLING = (
    *HOSPITAL,
    *(c.Spelling(rule="spelling", column=name) for name in ("HospitalType", "Condition", "State", "HospitalOwner")),
)
TIMES = ("sched_dep_time", "act_dep_time", "sched_arr_time", "act_arr_time")
# The sites write one time in many ways ("7:16aDec 1", "9:05 a.m. (Estimated)"); what holds none is missing.
_ONE_FORM: tuple[c.CleanRule, ...] = tuple(
    rule
    for name in TIMES
    for rule in (
        c.Replace(
            rule="replace", column=name, pattern=r"^.*?\b0?(\d{1,2}:\d\d) ?([aApP])(?:\b|\.|[A-Z]).*$", by=r"\1 \2.m."
        ),
        c.Case(rule="case", column=name, to="lower"),
        c.Match(rule="match", column=name, pattern=r"\d{1,2}:\d\d [ap]\.m\.", action="missing"),
    )
)
FLIGHTS = (*_ONE_FORM, _follows(["flight"], *TIMES, source="src"))
FLIGHTS_TRUSTED = (*_ONE_FORM, _follows(["flight"], *TIMES, source="src", trusted=("aa", "ua", "CO")))


class Score(NamedTuple):
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(1e-9, self.precision + self.recall)


def repaired(folder: Path, rules: tuple[c.CleanRule, ...], room: Path) -> Score:
    """Clean a folder's dirty table; return the score against its clean one, over every cell."""
    import pyarrow.parquet as pq

    dirty, clean = pq.read_table(folder / "dirty.parquet"), pq.read_table(folder / "clean.parquet")
    room.mkdir(parents=True)
    with engine(room, folder, Runs(256 << 20)) as running:
        work = cleaned_table(running, rules, folder / "dirty.parquet", Meaning((), "", ()))
        alive = work.alive(*work.names)
        # A text that became a number is compared as a log shows it.
        texts = {work.place(name): work.as_text(alive[work.place(name)]) for name in work.names}
        found = running.table(alive.mutate(**texts).order_by(ROW))
    wrong = written = right = 0
    for name in dirty.column_names:
        cells = [table.column(column) for table, column in ((dirty, name), (found, work.place(name)), (clean, name))]
        for before, after, truth in zip(*(column.to_pylist() for column in cells), strict=True):
            wrong += before != truth
            written += before != (after or "")
            right += before != (after or "") and after == truth
    return Score(right / max(1, written), right / max(1, wrong))
