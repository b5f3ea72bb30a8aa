"""A table as columns of scalars, read by DuckDB from its Parquet file: what expectations, profiles and reports see.

An image column is stood for by what its rows show: ``<column>_size``, ``<column>_min``, ``<column>_max`` and
``<column>_mean``; a text column also by ``<column>_chars``.

Memory is bounded whatever the size: a table of more than WHOLE_BYTES is never loaded. Great Expectations then sees a
seeded sample of SAMPLE_ROWS rows, and beside it rows that break an expectation (found by DuckDB, which reads all rows
and counts exactly; see ``tasks.data.conditions``). Batch by batch was the other way: exact for each row's value, but
wrong for what a column has as a whole (uniqueness, means, quantiles), and a hundred times slower on ten million rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from tasks.spec.feature import Feature

WHOLE_BYTES = 64 << 20
SAMPLE_ROWS = 20_000
MEMORY = "384MB"
VIEW, ROW = "scalars", "file_row_number"
GROUP_ROWS = "group_rows"
IMAGE_PARTS = ("size", "min", "max", "mean")


class Scalars:
    """The scalar columns of one Parquet file. Use ``opened``."""

    def __init__(self, connection: Any, path: Path, feature: Feature, alike: tuple[str, ...]) -> None:
        self.connection, self.path = connection, path
        source = f"read_parquet({quoted(str(path))}, file_row_number = true)"
        more = f", {_group_rows(alike)}" if alike else ""
        self.table_of(f"CREATE VIEW {VIEW} AS SELECT {_columns(path, feature)}{more} FROM {source}")
        self.rows = int(self.table_of(f"SELECT count(*) FROM {VIEW}")[0][0])
        self.sampled = _uncompressed_bytes(path) > WHOLE_BYTES and self.rows > SAMPLE_ROWS

    def table_of(self, query: str) -> list[tuple[Any, ...]]:
        """Return a query's rows, all of them: a connection serves one result at a time."""
        return self.connection.execute(query).fetchall()

    @property
    def columns(self) -> list[str]:
        return [name for name, *_ in self.table_of(f"DESCRIBE {VIEW}") if name != ROW]

    def frame(self) -> pd.DataFrame:
        """Return the rows as a frame: all of them in order, or the seeded sample of a large table."""
        # Ordered by a hash of the row's place: the same table, the same sample, and no row order shows in it.
        chosen = f"ORDER BY hash({ROW}) LIMIT {SAMPLE_ROWS}" if self.sampled else f"ORDER BY {ROW}"
        return self.frame_of(f"SELECT * EXCLUDE ({ROW}) FROM {VIEW} {chosen}")

    def rows_where(self, condition: str, limit: int) -> pd.DataFrame:
        """Return the first rows for which a condition is true."""
        return self.frame_of(f"SELECT * EXCLUDE ({ROW}) FROM {VIEW} WHERE {condition} LIMIT {limit}")

    def frame_of(self, query: str) -> pd.DataFrame:
        return self.connection.sql(query).to_arrow_table().to_pandas()


@contextmanager
def opened(path: Path, feature: Feature, alike: tuple[str, ...] = ()) -> Iterator[Scalars]:
    """Open a table's scalar columns; what doesn't fit the memory limit goes to a temporary folder.

    With ``alike`` there is one column more, ``group_rows``: how many rows are equal in these columns.
    """
    import duckdb

    with tempfile.TemporaryDirectory(prefix="drydock-duckdb-") as scratch:
        config = {"memory_limit": MEMORY, "temp_directory": scratch, "autoinstall_known_extensions": "false"}
        with duckdb.connect(":memory:", config=config) as connection:
            yield Scalars(connection, path, feature, alike)


def named(column: str) -> str:
    """Return a column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def quoted(value: object) -> str:
    """Return a value as an SQL literal."""
    if isinstance(value, bool) or value is None:
        return {True: "TRUE", False: "FALSE", None: "NULL"}[value]
    return repr(value) if isinstance(value, int | float) else "'" + str(value).replace("'", "''") + "'"


def _columns(path: Path, feature: Feature) -> str:
    import pyarrow.parquet as pq

    parts = []
    for name in pq.read_schema(path).names:
        if feature.kind == "image" and name == feature.column:
            parts += _image(name)
        else:
            parts.append(named(name))
        if feature.holds == "texts" and name == feature.column:
            parts.append(f"length({named(name)})::DOUBLE AS {named(f'{name}_chars')}")
    return ", ".join([*parts, ROW])


def _group_rows(alike: tuple[str, ...]) -> str:
    return f"count(*) OVER (PARTITION BY {', '.join(map(named, alike))})::DOUBLE AS {named(GROUP_ROWS)}"


def _image(name: str) -> list[str]:
    column, functions = named(name), ("len", "list_min", "list_max", "list_avg")
    return [
        f"{function}({column})::DOUBLE AS {named(f'{name}_{part}')}"
        for function, part in zip(functions, IMAGE_PARTS, strict=True)
    ]


def _uncompressed_bytes(path: Path) -> int:
    import pyarrow.parquet as pq

    meta = pq.read_metadata(path)
    return sum(meta.row_group(index).total_byte_size for index in range(meta.num_row_groups))
