"""What cleaning runs on: expressions that Ibis writes as SQL, and what engines do each in their own way.

DuckDB (``tasks.data.duck``) is the default: out of core, on all cores. Spark (``tasks.data.spark``) is for tables that
one machine can't clean in time. A request gives the same bytes on both.
"""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

SCRATCH = ".engine"
ROW = "row"


class Runs(NamedTuple):
    """Where cleaning runs: on DuckDB with so many bytes of memory, or on the Spark of this master."""

    memory_bytes: int = 384 << 20
    spark_master: str = ""


class Engine(ABC):
    """One connection. Expressions are Ibis tables and values over ``scan`` and ``keep``."""

    # What Ibis and sqlglot call its SQL.
    ibis_dialect: str
    dialect: str

    def __init__(self) -> None:
        self._kept, self._named = 0, 0

    @abstractmethod
    def scan(self, path: Path, schema: pa.Schema) -> Any:
        """Return a Parquet file as a table: ``row`` counts from 0, its columns are c0, c1, ... by their place.

        The source's own names never reach the engine, which takes ``a`` and ``A`` for one.
        """

    @abstractmethod
    def run(self, statement: str) -> None:
        """Run a statement of the engine's own SQL."""

    @abstractmethod
    def table(self, found: Any) -> pa.Table:
        """Return a table that fits into memory."""

    @abstractmethod
    def batches(self, found: Any) -> Iterator[pa.RecordBatch]:
        """Yield a table of any size, in its order."""

    @abstractmethod
    def function(self, call: Callable[..., Any], name: str, takes: tuple[str, ...], gives: str) -> Any:
        """Return a function on Arrow arrays as one that expressions call. Types are Ibis's names."""

    @abstractmethod
    def define(self, name: str, takes: tuple[Any, ...], gives: str, body: Any) -> Any:
        """Return an expression of sqlglot's over ``p0``, ``p1``, ... as a function that expressions call."""

    @abstractmethod
    def keep(self, found: Any) -> Any:
        """Compute a table now, and return it as it is kept until the end."""

    @abstractmethod
    def settle(self, found: Any) -> Any:
        """Return a table that is read several times from here on."""

    @abstractmethod
    def ranges(self, found: Any, bounds: list[tuple[int, int]]) -> Iterator[pa.Table]:
        """Yield the rows of each range in their order. ``found`` has every row once, the ranges are all of them."""

    @abstractmethod
    def strip(self, text: Any, letters: str) -> Any:
        """Return a text without any of the letters at its ends."""

    @abstractmethod
    def as_text(self, number: Any) -> Any:
        """Return a float in the fewest digits that give it back: 0.1, 1e+16."""

    @abstractmethod
    def digest(self, digest: Any, column: Any) -> Any:
        """Return the digest (int64) of one, and of one column more. Within one run only: engines differ in theirs."""

    @abstractmethod
    def edits(self, left: Any, right: Any) -> Any:
        """Return the number of edits between two texts, of their characters (code points)."""

    @abstractmethod
    def search(self, text: Any, pattern: str) -> Any:
        """Return whether a text holds a pattern (RE2)."""

    @abstractmethod
    def replace(self, text: Any, pattern: str, by: str) -> Any:
        """Return a text with all that a pattern (RE2) finds replaced; ``\\1`` is its first group."""

    @abstractmethod
    def case(self, text: Any, to: str) -> Any:
        """Return a text in ``lower`` or ``upper`` case, letter by letter."""

    @abstractmethod
    def time(self, text: Any, formats: tuple[str, ...], shape: str | None) -> Any:
        """Return a text that has one of the formats, read as UTC: as ``shape`` says, else its seconds since 1970; null
        where it has none."""

    def named(self, found: Any) -> Any:
        """Return a table under a name, not computed: what builds on it is written as if it began there.

        Without names, the SQL of a hundred rules is written anew for each of them.
        """
        import ibis

        self._named += 1
        name = f"named{self._named}"
        self.run(f"CREATE TEMPORARY VIEW {name} AS {self.sql(found)}")
        return ibis.table(found.schema(), name=name)

    def value(self, found: Any) -> Any:
        """Return a single value; of a table, its first row's first column, None where there is no row."""
        column = self.table(found).column(0)
        return column[0].as_py() if len(column) else None

    def sql(self, found: Any) -> str:
        """Return an expression in the engine's own SQL."""
        import ibis

        return str(ibis.to_sql(found.as_table(), dialect=self.ibis_dialect))


def kinds_of(schema: pa.Schema) -> dict[str, str]:
    """Return the engine's names of a file's columns, by their place, and Ibis's of what they hold."""
    return {f"c{place}": "float64" if str(kind) == "double" else "string" for place, kind in enumerate(schema.types)}


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
def engine(room: Path, readable: Path, runs: Runs) -> Iterator[Engine]:
    """Open the engine with its scratch folder in ``room``. On DuckDB rules can read ``readable`` and nothing else; on
    Spark only expressions of a few kinds are allowed, and none of them reads anything.

    Raises:
        BadRequest: a rule that the engine can't run, or no Spark where one is asked for.
        TryAgain: neither memory nor disk suffice.
    """
    import ibis

    scratch = room / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    fused = ibis.options.sql.fuse_selects
    # Merged, a chain of rules is one expression that repeats the ones before it: exponential in their number.
    ibis.options.sql.fuse_selects = False
    try:
        with _opened(scratch, [readable, room], runs) as running:
            yield running
    finally:
        ibis.options.sql.fuse_selects = fused
        shutil.rmtree(scratch, ignore_errors=True)


def _opened(scratch: Path, readable: list[Path], runs: Runs) -> contextlib.AbstractContextManager[Engine]:
    if runs.spark_master:
        from tasks.data.spark import spark

        return spark(scratch, runs)
    from tasks.data.duck import duck

    return duck(scratch, readable, runs.memory_bytes)


def line(error: Exception) -> str:
    """Return an engine's error as one line."""
    return " ".join(str(error).split())[:200]
