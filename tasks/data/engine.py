"""DuckDB by Ibis: the engine that cleans. It works out of core: beyond its memory it goes to a scratch folder.

Ibis writes the SQL, from expressions that other engines understand too; DuckDB's own client runs it (Ibis 12 calls
what DuckDB 2 has removed).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.spec.errors import BadRequest, TryAgain

if TYPE_CHECKING:
    import pyarrow as pa

SCRATCH = ".engine"
ROW = "row"
BATCH_ROWS = 65_536


class Engine:
    """One connection. Expressions are Ibis tables and values over ``scan`` and ``keep``."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._kept, self._named = connection, 0, 0

    def scan(self, path: Path, schema: pa.Schema) -> Any:
        """Return a Parquet file as a table: ``row`` counts from 0, its columns are c0, c1, ... by their place.

        The source's own names never reach the engine, which takes ``a`` and ``A`` for one.
        """
        import ibis

        types = ["float64" if str(kind) == "double" else "string" for kind in schema.types]
        kinds = {f"c{place}": kind for place, kind in enumerate(types)}
        columns = ", ".join([*kinds, ROW])
        source = f"read_parquet('{_quoted(path)}', file_row_number = true) AS t({columns})"
        self.run(f"CREATE OR REPLACE TEMP VIEW raw AS SELECT {columns} FROM {source}")
        return ibis.table(kinds | {ROW: "int64"}, name="raw")

    def keep(self, found: Any) -> Any:
        """Compute a table now, and return it as it is kept until the end."""
        import ibis

        self._kept += 1
        name = f"kept{self._kept}"
        self.run(f"CREATE TEMP TABLE {name} AS {self._sql(found)}")
        return ibis.table(found.schema(), name=name)

    def named(self, found: Any) -> Any:
        """Return a table under a name, not computed: what builds on it is written as if it began there.

        Without names, the SQL of a hundred rules is written anew for each of them.
        """
        import ibis

        self._named += 1
        name = f"named{self._named}"
        self.run(f"CREATE TEMP VIEW {name} AS {self._sql(found)}")
        return ibis.table(found.schema(), name=name)

    def table(self, found: Any) -> pa.Table:
        """Return a table that fits into memory."""
        return self._connection.sql(self._sql(found)).to_arrow_table()

    def batches(self, found: Any) -> Iterator[pa.RecordBatch]:
        """Yield a table of any size."""
        return iter(self._connection.sql(self._sql(found)).to_arrow_reader(BATCH_ROWS))

    def value(self, found: Any) -> Any:
        """Return a single value; of a table, its first row's first column, None where there is no row."""
        rows = self._connection.execute(self._sql(found)).fetchall()
        return rows[0][0] if rows else None

    def run(self, statement: str) -> None:
        # Fetched, since a connection is busy until a result was.
        self._connection.execute(statement).fetchall()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query in the engine's own SQL."""
        return self._connection.execute(query).fetchall()

    def function(self, call: Callable[..., Any], name: str, takes: tuple[str, ...], gives: str) -> Any:
        """Return a function on Arrow arrays as one that expressions call. Types are Ibis's names."""
        import ibis
        from ibis.backends.sql.datatypes import DuckDBType

        sql = [DuckDBType.to_string(ibis.dtype(kind)) for kind in (*takes, gives)]
        with contextlib.suppress(Exception):
            self._connection.remove_function(name)
        self._connection.create_function(name, call, sql[:-1], sql[-1], type="arrow")
        return builtin(name, takes, gives)

    @staticmethod
    def _sql(found: Any) -> str:
        import ibis

        return str(ibis.to_sql(found, dialect="duckdb"))


def builtin(name: str, takes: tuple[Any, ...], gives: str) -> Any:
    """Return a function of the engine's own as one that expressions call."""
    import inspect

    import ibis

    def call(*columns: Any) -> Any: ...

    # Ibis asks a Python function for its parameters.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(f"p{place}", kind) for place in range(len(takes))]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return ibis.udf.scalar.builtin(call, name=name, signature=(takes, gives))


@contextlib.contextmanager
def engine(room: Path, readable: Path, memory_bytes: int) -> Iterator[Engine]:
    """Open the engine with its scratch folder in ``room``; rules can read ``readable`` and nothing else.

    Raises:
        BadRequest: a rule that the engine can't run. TryAgain: neither memory nor disk suffice.
    """
    import duckdb
    import ibis

    scratch = room / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    fused = ibis.options.sql.fuse_selects
    # Merged, a chain of rules is one expression that repeats the ones before it: exponential in their number.
    ibis.options.sql.fuse_selects = False
    connection = duckdb.connect(config={"memory_limit": f"{memory_bytes >> 20}MiB", "temp_directory": str(scratch)})
    try:
        _lock(connection, [readable, room])
        yield Engine(connection)
    except duckdb.OutOfMemoryException as error:
        raise TryAgain(f"cleaning: {_line(error)}; raise DRYDOCK_DATA_MEMORY_BYTES or free some disk") from None
    except duckdb.IOException as error:
        raise TryAgain(f"cleaning: {_line(error)}; free some disk at {room.parent}") from None
    except duckdb.Error as error:
        raise BadRequest(f"data.clean: {_line(error)}; correct the rule") from None
    finally:
        connection.close()
        ibis.options.sql.fuse_selects = fused
        shutil.rmtree(scratch, ignore_errors=True)


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
