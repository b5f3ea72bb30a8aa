"""Functional dependencies that a dirty table shows: what mostly follows from what, with the support of each.

A dependency's error is the share of rows to remove until it holds (g3 of Kivinen and Mannila 1995), over rows that
share their determinant with another, since a lone row shows nothing. It is held against the error with the dependent
column shuffled: what chance alone would give with groups of these sizes. Typing errors differ from one another; where a
second value comes several times within a group, there are two truths, and no dependency.

    n rows   d columns
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.duck import Duck
from tasks.data.scalars import quoted

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS, MAX_COLUMNS, MAX_PAIRS = 200_000, 60, 400
# Found where at most so many rows disagree, far fewer than by chance, and half of the rows can show it.
MAX_ERROR, MIN_LIFT, MIN_COVERAGE = 0.1, 0.6, 0.5
MIN_CHANCE = 0.02
# Rows of groups with a second truth: a value of three rows (two in a small group) and of a twentieth of the group. The
# same slip of the keyboard comes twice in a group now and then.
MAX_TORN = 0.01
IS_TORN = "s >= 2 AND s >= least(3, 0.3 * n) AND s >= 0.05 * n"


class Dependent(NamedTuple):
    """``determinant`` gives ``dependent`` in ``support`` of the ``rows`` that share their determinant."""

    determinant: tuple[str, ...]
    dependent: str
    support: float
    rows: int


class Sample:
    """A table's scalar columns as texts ``c0``, ``c1``, ..., and each shuffled as ``s0``, ``s1``, ...; seeded."""

    def __init__(self, engine: Duck, path: Path, schema: pa.Schema) -> None:
        self._engine = engine
        kinds = {field.name: str(field.type) for field in schema}
        self.names = [name for name, kind in kinds.items() if kind in ("string", "double")][:MAX_COLUMNS]
        places = {name: f"c{place}" for place, name in enumerate(schema.names)}
        all_columns = ", ".join([*places.values(), "row"])
        source = f"read_parquet({quoted(str(path))}, file_row_number = true) AS t({all_columns})"
        cells = ", ".join(f"nullif(trim({places[name]}::VARCHAR), '') AS c{i}" for i, name in enumerate(self.names))
        self.run(f"CREATE TABLE picked AS SELECT row, {cells} FROM {source} ORDER BY hash(row) LIMIT {MAX_ROWS}")
        self.run("CREATE TABLE cells AS SELECT row_number() OVER (ORDER BY row) AS n, * EXCLUDE row FROM picked")
        shuffled = "row_number() OVER (ORDER BY hash(n, {0})) AS n"
        parts = [f"(SELECT c{i} AS s{i}, {shuffled.format(i)} FROM cells)" for i in self._all()]
        joined = " ".join(f"JOIN {part} AS t{i} USING (n)" for i, part in enumerate(parts))
        self.run(f"CREATE TABLE sample AS SELECT * FROM cells {joined}")
        self.rows = int(self.run("SELECT count(*) FROM sample")[0][0])
        counts = ", ".join(f"count(DISTINCT c{i})" for i in self._all())
        self.distinct = dict(zip(self.names, self.run(f"SELECT {counts} FROM sample")[0], strict=True))

    def run(self, query: str) -> list[tuple[Any, ...]]:
        return self._engine.rows(query)

    def column(self, name: str) -> str:
        return f"c{self.names.index(name)}"

    def _all(self) -> range:
        return range(len(self.names))

    def agreement(self, determinant: tuple[str, ...], dependent: str, shuffled: bool = False) -> tuple[int, int, int]:
        """Return how many rows share their determinant with another, how many of them say what most say, and how many
        are of a group that is torn between two values."""
        sides = ", ".join(self.column(name) for name in determinant)
        there = " AND ".join(f"{self.column(name)} IS NOT NULL" for name in determinant)
        value = self.column(dependent).replace("c", "s") if shuffled else self.column(dependent)
        there += f" AND {value} IS NOT NULL"
        counts = f"SELECT {sides}, count(*) AS c FROM sample WHERE {there} GROUP BY {sides}, {value}"
        most = "coalesce(max(c, 2)[1], 0) AS m, coalesce(max(c, 2)[2], 0) AS s"
        groups = f"SELECT sum(c) AS n, {most} FROM ({counts}) GROUP BY {sides} HAVING sum(c) > 1"
        torn = f"coalesce(sum(n) FILTER (WHERE {IS_TORN}), 0)"
        found = self.run(f"SELECT coalesce(sum(n), 0), coalesce(sum(m), 0), {torn} FROM ({groups})")[0]
        return int(found[0]), int(found[1]), int(found[2])


def discover(sample: Sample) -> list[Dependent]:
    """Return the dependencies of single columns; then, for columns that none of them gives, of pairs."""
    useful = [name for name in sample.names if sample.distinct[name] > 1]
    keys = [name for name in useful if sample.distinct[name] * 2 <= sample.rows]
    found = [_shown(sample, (key,), name) for key in keys for name in useful if key != name]
    single = [item for item in found if item]
    lacking = [name for name in useful if name not in {item.dependent for item in single}]
    return single + _pairs(sample, single, keys, lacking)


def _pairs(sample: Sample, single: list[Dependent], keys: list[str], lacking: list[str]) -> list[Dependent]:
    """What two columns give together, of which neither follows from the other."""
    related = {(item.determinant[0], item.dependent) for item in single}
    apart = [pair for pair in combinations(keys, 2) if not {pair, pair[::-1]} & related]
    # Fewest groups first: those have most rows to show something.
    apart.sort(key=lambda pair: sample.distinct[pair[0]] * sample.distinct[pair[1]])
    tried = [(pair, name) for name in lacking for pair in apart if name not in pair][:MAX_PAIRS]
    found: dict[str, Dependent] = {}
    for pair, name in tried:
        if name not in found and (item := _shown(sample, pair, name)):
            found[name] = item
    return list(found.values())


def _shown(sample: Sample, determinant: tuple[str, ...], dependent: str) -> Dependent | None:
    rows, agreeing, torn = sample.agreement(determinant, dependent)
    if not rows or rows < MIN_COVERAGE * sample.rows or 1 - agreeing / rows > MAX_ERROR or torn > MAX_TORN * rows:
        return None
    by_chance = sample.agreement(determinant, dependent, shuffled=True)
    chance = 1 - by_chance[1] / max(by_chance[0], 1)
    error = 1 - agreeing / rows
    if chance < MIN_CHANCE or error > (1 - MIN_LIFT) * chance:
        return None
    return Dependent(determinant, dependent, 1 - error, rows)
