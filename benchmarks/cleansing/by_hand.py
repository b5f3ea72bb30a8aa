"""The same rules, log, quarantine, splits and demands as hand-written SQL: what a good engineer does in a day.

One pass for the rules on cells into a table, then what looks at groups, then the files. A split is a hash of the
features (MD5, since it must be the same in a year, which the engine's own need not be).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cleansing.generate import NUMBERS

BOUNDED = NUMBERS[:6]
COLUMNS = (*NUMBERS, "label", "city")


def clean_by_hand(raw: Path, room: Path, memory_bytes: int) -> tuple[Any, dict[str, Any]]:
    """Write data, repairs and quarantine into ``room``; return the connection and what was found."""
    import duckdb

    config = {"memory_limit": f"{memory_bytes >> 20}MiB", "temp_directory": str(room / "scratch")}
    connection = duckdb.connect(str(room / "work.db"), config=config)

    def run(statement: str) -> list[Any]:
        return connection.execute(statement).fetchall()

    run(f"CREATE VIEW raw AS SELECT * FROM read_parquet('{raw}', file_row_number = true) AS t({_names()}, row)")
    run(f"CREATE TABLE cells AS SELECT row, {_cells()}, {_dropped()} AS dropped FROM raw")
    run(_cities())
    run(_twins())
    order = ", ".join(f"c.{name}" for name in NUMBERS)
    key = " || '|' || ".join(f"coalesce(CAST(c.{name} AS VARCHAR), '')" for name in NUMBERS)
    place = f"(md5_number({key}) % 1000000) / 1000000.0"
    alive = "FROM cells c ANTI JOIN twins t ON c.row = t.row WHERE c.dropped IS NULL ORDER BY c.row"
    split = f"CASE WHEN {place} < 0.2 THEN 'holdout' WHEN {place} < 0.35 THEN 'validation' ELSE 'train' END"
    rows = f"SELECT CAST(c.row AS VARCHAR) AS row_id, {order}, c.label, {split} AS split {alive}"
    run(f"COPY ({rows}) TO '{room}/data.parquet' (FORMAT parquet, COMPRESSION zstd)")
    gone = "SELECT row, dropped FROM cells WHERE dropped IS NOT NULL UNION ALL SELECT row, 'drop_duplicates' FROM twins"
    run(f"CREATE TABLE gone AS {gone}")
    aside = "SELECT g.dropped, r.* FROM raw r JOIN gone g ON r.row = g.row ORDER BY r.row"
    run(f"COPY ({aside}) TO '{room}/quarantine.parquet' (FORMAT parquet, COMPRESSION zstd)")
    run(f"COPY ({_repairs()}) TO '{room}/repairs.parquet' (FORMAT parquet, COMPRESSION zstd)")
    (kept,) = run(f"SELECT count(*) FROM read_parquet('{room}/data.parquet')")[0]
    (changed,) = run(f"SELECT count(*) FROM read_parquet('{room}/repairs.parquet') WHERE NOT drops")[0]
    return connection, {"rows": kept, "changed": changed}


def validate_by_hand(connection: Any, room: Path) -> bool:
    """The generated suite's demands as one scan."""
    parts = [
        "count(*) >= 100",
        "count(DISTINCT row_id) = count(*)",
        "bool_and(label IS NOT NULL AND label IN ('no', 'yes'))",
        "bool_and(split IN ('train', 'validation', 'holdout')) AND count(DISTINCT split) = 3",
        *(f"count({name}) > 0" for name in NUMBERS),
    ]
    statement = f"SELECT {' AND '.join(f'({part})' for part in parts)} FROM read_parquet('{room}/data.parquet')"
    return bool(connection.execute(statement).fetchall()[0][0])


def _names() -> str:
    return ", ".join([*NUMBERS, "label", "zip", "city"])


def _cells() -> str:
    bounded = [f"CASE WHEN {name} < 0 OR {name} > 1000 THEN NULL ELSE {name} END" for name in BOUNDED]
    bounded[1] = f"coalesce({bounded[1]}, 100)"
    numbers = [f"{what} AS {name}" for what, name in zip(bounded, BOUNDED, strict=True)]
    return ", ".join([*numbers, *NUMBERS[6:], "lower(trim(label)) AS label", "zip", "city"])


def _dropped() -> str:
    low = [f"(CASE WHEN {name} < 0 OR {name} > 1000 THEN NULL ELSE {name} END)" for name in ("n0", "n3")]
    return (
        "CASE WHEN label IS NULL OR lower(trim(label)) NOT IN ('no', 'yes') THEN 'allowed_labels' "
        f"WHEN NOT ({low[0]} + {low[1]} >= 0) THEN 'condition' END"
    )


def _cities() -> str:
    counts = "SELECT zip, city, count(*) AS n FROM cells WHERE dropped IS NULL AND city IS NOT NULL GROUP BY ALL"
    shared = f"SELECT *, sum(n) OVER (PARTITION BY zip) AS total FROM ({counts})"
    winners = f"SELECT zip, city AS meant FROM ({shared}) WHERE n * 2 > total"
    wrong = f"SELECT row, city, meant FROM cells JOIN ({winners}) USING (zip) WHERE dropped IS NULL"
    return f"CREATE TABLE cities AS {wrong} AND city IS DISTINCT FROM meant"


def _twins() -> str:
    keys = ", ".join([*NUMBERS, "label"])
    first = f"SELECT row, min(row) OVER (PARTITION BY {keys}) AS first FROM suspects"
    often = f"SELECT hash({keys}) AS h FROM cells WHERE dropped IS NULL GROUP BY h HAVING count(*) > 1"
    suspects = f"SELECT * FROM cells SEMI JOIN ({often}) o ON hash({keys}) = o.h WHERE dropped IS NULL"
    return f"CREATE TABLE twins AS WITH suspects AS ({suspects}) SELECT row, first FROM ({first}) WHERE row <> first"


def _repairs() -> str:
    """Every changed cell and dropped row. A rule sees the cells as the rules before it have left them."""
    text = "CAST({} AS VARCHAR)"
    parts = [
        _change("trim", "label", "r.label", "trim(r.label)", 0),
        _change("case", "label", "trim(r.label)", "lower(trim(r.label))", 1),
    ]
    judged = "(c.dropped IS NULL OR c.dropped <> 'allowed_labels')"
    for place, name in enumerate(BOUNDED):
        after = "NULL" if name == "n1" else f"c.{name}"
        out = f"(r.{name} < 0 OR r.{name} > 1000) AND {judged}"
        parts.append(_lines("range", name, text.format(f"r.{name}"), text.format(after), out, 3 + place))
    filled = f"(r.n1 IS NULL OR r.n1 < 0 OR r.n1 > 1000) AND {judged}"
    parts.append(_lines("fill", "n1", "NULL", "'100'", filled, 9))
    parts.append("SELECT 10, row, 'city', city, meant, 'dependency', false FROM cities")
    parts.append("SELECT 11, row, '*', dropped, NULL, dropped, true FROM gone")
    names = "number, row, name, before, after, rule, drops"
    return f"SELECT * FROM ({' UNION ALL '.join(parts)}) AS t({names}) ORDER BY 1, 2"


def _change(rule: str, name: str, before: str, after: str, number: int) -> str:
    return _lines(rule, name, before, after, f"{before} IS DISTINCT FROM {after}", number)


def _lines(rule: str, name: str, before: str, after: str, where: str, number: int) -> str:
    source = "raw r JOIN cells c ON r.row = c.row"
    return f"SELECT {number}, r.row, '{name}', {before}, {after}, '{rule}', false FROM {source} WHERE {where}"
