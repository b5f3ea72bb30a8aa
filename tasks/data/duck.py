"""DuckDB by Ibis: beyond its memory it goes to a scratch folder.

Ibis writes the SQL; DuckDB's own client runs it (Ibis 12 calls what DuckDB 2 has removed).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.engine import ROW, Engine, builtin, kinds_of, line
from tasks.spec.errors import BadRequest, TryAgain

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 65_536


class Duck(Engine):
    """One connection to a database in memory."""

    ibis_dialect = dialect = "duckdb"

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def scan(self, path: Path, schema: pa.Schema) -> Any:
        import ibis

        kinds = kinds_of(schema)
        columns = ", ".join([*kinds, ROW])
        source = f"read_parquet('{_quoted(path)}', file_row_number = true) AS t({columns})"
        self.run(f"CREATE OR REPLACE TEMP VIEW raw AS SELECT {columns} FROM {source}")
        return ibis.table(kinds | {ROW: "int64"}, name="raw")

    def keep(self, found: Any) -> Any:
        import ibis

        self._kept += 1
        name = f"kept{self._kept}"
        self.run(f"CREATE TEMP TABLE {name} AS {self.sql(found)}")
        return ibis.table(found.schema(), name=name)

    def settle(self, found: Any) -> Any:
        # A range of rows costs what it holds: it is computed again.
        return found

    def ranges(self, found: Any, bounds: list[tuple[int, int]]) -> Iterator[pa.Table]:
        for start, stop in bounds:
            yield self.table(found.filter((found[ROW] >= start) & (found[ROW] < stop)).order_by(ROW))

    def table(self, found: Any) -> pa.Table:
        return self._connection.sql(self.sql(found)).to_arrow_table()

    def batches(self, found: Any) -> Iterator[pa.RecordBatch]:
        return iter(self._connection.sql(self.sql(found)).to_arrow_reader(BATCH_ROWS))

    def run(self, statement: str) -> None:
        # Fetched, since a connection is busy until a result was.
        self._connection.execute(statement).fetchall()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query in DuckDB's SQL."""
        return self._connection.execute(query).fetchall()

    def function(self, call: Callable[..., Any], name: str, takes: tuple[str, ...], gives: str) -> Any:
        import ibis
        from ibis.backends.sql.datatypes import DuckDBType

        sql = [DuckDBType.to_string(ibis.dtype(kind)) for kind in (*takes, gives)]
        with contextlib.suppress(Exception):
            self._connection.remove_function(name)
        self._connection.create_function(name, call, sql[:-1], sql[-1], type="arrow")
        return builtin(name, takes, gives)

    def define(self, name: str, takes: tuple[Any, ...], gives: str, body: Any) -> Any:
        names = ", ".join(f"p{place}" for place in range(len(takes)))
        self.run(f"CREATE OR REPLACE TEMP MACRO {name}({names}) AS {body.sql(self.dialect)}")
        return builtin(name, takes, gives)

    def strip(self, text: Any, letters: str) -> Any:
        return builtin("trim", ("string", "string"), "string")(text, letters)

    def as_text(self, number: Any) -> Any:
        return number.cast("string")

    def digest(self, digest: Any, column: Any) -> Any:
        return builtin("hash", ("int64", column.type()), "int64")(digest, column)

    def edits(self, left: Any, right: Any) -> Any:
        return left.levenshtein(right)

    def search(self, text: Any, pattern: str) -> Any:
        return text.re_search(pattern)

    def replace(self, text: Any, pattern: str, by: str) -> Any:
        return text.re_replace(pattern, by)

    def case(self, text: Any, to: str) -> Any:
        return text.lower() if to == "lower" else text.upper()

    def time(self, text: Any, formats: tuple[str, ...], shape: str | None) -> Any:
        import ibis

        found = builtin("try_strptime", ("string", "array<string>"), "timestamp")(text, ibis.array(list(formats)))
        return found.strftime(shape) if shape else found.epoch_seconds().cast("float64")


@contextlib.contextmanager
def duck(scratch: Path, readable: list[Path], memory_bytes: int) -> Iterator[Duck]:
    """Open DuckDB. Rules read ``readable`` and nothing else.

    Raises:
        BadRequest: a rule that the engine can't run. TryAgain: neither memory nor disk suffice.
    """
    import duckdb

    connection = duckdb.connect(config={"memory_limit": f"{memory_bytes >> 20}MiB", "temp_directory": str(scratch)})
    try:
        _lock(connection, readable)
        yield Duck(connection)
    except duckdb.OutOfMemoryException as error:
        raise TryAgain(f"cleaning: {line(error)}; raise DRYDOCK_DATA_MEMORY_BYTES or free some disk") from None
    except duckdb.IOException as error:
        raise TryAgain(f"cleaning: {line(error)}; free some disk at {scratch.parent}") from None
    except duckdb.Error as error:
        raise BadRequest(f"data.clean: {line(error)}; correct the rule") from None
    finally:
        connection.close()


def _lock(connection: Any, folders: list[Path]) -> None:
    """An expression in a workload file is another's code: no file, no network, no setting is within its reach."""
    allowed = ", ".join(f"'{_quoted(folder)}'" for folder in folders)
    for setting in (
        "SET autoinstall_known_extensions = false",
        "SET autoload_known_extensions = false",
        f"SET allowed_directories = [{allowed}]",
        "SET enable_external_access = false",
        "SET lock_configuration = true",
    ):
        connection.execute(setting).fetchall()


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("'", "''")
