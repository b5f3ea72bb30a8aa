"""Spark by Ibis: for tables that one machine can't clean in time.

Its workers read and write the room, so they share the state folder under its path, and they have Python, NumPy and
PyArrow. The functions that run there are sent along.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data import spark_workers as workers
from tasks.data.engine import ROW, Engine, Runs, builtin, kinds_of, line
from tasks.spec.errors import BadRequest, TryAgain

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = "{python} -m pip install --no-deps --no-build-isolation --require-hashes -r locks/spark.lock"
# What Java itself needs of a driver.
LEAST_MEMORY_BYTES = 1 << 30
# Errors that a retry can't help.
OF_RULES = ("Analysis", "Parse", "Python", "IllegalArgument", "SparkRuntime", "Arithmetic", "NumberFormat", "DateTime")
# Of a date's format: what Python reads as DuckDB does.
DIRECTIVE = re.compile(r"%(-?.)")
DIRECTIVES = frozenset("YmdHMSybBaApIfj%")
# Of an SQL expression: what means the same in both dialects, and reads nothing.
ALLOWED = {
    *("Column", "Identifier", "Literal", "Null", "Boolean", "Paren", "Not", "Neg", "And", "Or", "Is", "In", "Between"),
    *("EQ", "NEQ", "GT", "GTE", "LT", "LTE", "Add", "Sub", "Mul", "Div", "Mod", "DPipe", "Case", "If"),
    *("Coalesce", "Nullif", "Abs", "Length", "Least", "Greatest"),
}


class Spark(Engine):
    """One session."""

    ibis_dialect, dialect = "pyspark", "spark"

    def __init__(self, session: Any, scratch: Path) -> None:
        super().__init__()
        self._session, self._scratch, self._functions = session, scratch, 0
        self._text = self.function(workers.texts_of, "number_as_text", ("float64",), "string")

    def scan(self, path: Path, schema: pa.Schema) -> Any:
        import ibis

        kinds = kinds_of(schema)
        columns = [f"{_quoted(name)} AS c{place}" for place, name in enumerate(schema.names)]
        if "_metadata" in schema.names:
            raise BadRequest("data.clean: Spark has a column '_metadata' of its own; rename it, or clean on DuckDB")
        frame = self._session.read.parquet(_url(path))
        frame.selectExpr(*columns, f"_metadata.row_index AS `{ROW}`").createOrReplaceTempView("raw")
        return ibis.table(kinds | {ROW: "int64"}, name="raw")

    def keep(self, found: Any) -> Any:
        import ibis

        self._kept += 1
        name = f"kept{self._kept}"
        # By the workers, in memory or on their disks; who computes it again where one is lost is the step's retry.
        self._session.sql(self.sql(found)).localCheckpoint().createOrReplaceTempView(name)
        return ibis.table(found.schema(), name=name)

    def settle(self, found: Any) -> Any:
        return self.keep(found)

    def ranges(self, found: Any, bounds: list[tuple[int, int]]) -> Iterator[pa.Table]:
        import pyarrow as pa

        batches = self.batches(found.order_by(ROW))
        held: pa.Table | None = None
        for start, stop in bounds:
            parts = [held] if held is not None else []
            while sum(part.num_rows for part in parts) < stop - start:
                parts.append(pa.Table.from_batches([next(batches)]))
            whole = pa.concat_tables(parts)
            yield whole.slice(0, stop - start)
            held = whole.slice(stop - start)

    def table(self, found: Any) -> pa.Table:
        return self._session.sql(self.sql(found)).toArrow()

    def batches(self, found: Any) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        self._kept += 1
        folder = self._scratch.absolute() / f"written{self._kept}"
        self._session.sql(self.sql(found)).write.parquet(f"file://{folder}")
        # Files are named by the place of what they hold.
        for path in sorted(folder.glob("part-*")):
            yield from pq.ParquetFile(path).iter_batches()

    def run(self, statement: str) -> None:
        self._session.sql(statement).collect()

    def function(self, call: Callable[..., Any], name: str, takes: tuple[str, ...], gives: str) -> Any:
        import ibis
        from pyspark import cloudpickle
        from pyspark.sql.functions import ArrowUDFType, arrow_udf

        # The workers have no module of ours.
        cloudpickle.register_pickle_by_value(sys.modules[call.__module__])
        made = arrow_udf(call, self._type(ibis.dtype(gives)), ArrowUDFType.SCALAR)
        self._session.udf.register(name, made)
        return builtin(name, takes, gives)

    def define(self, name: str, takes: tuple[Any, ...], gives: str, body: Any) -> Any:
        import ibis

        _check(body)
        given = ", ".join(f"p{place} {self._type(kind)}" for place, kind in enumerate(takes))
        text = f"CREATE TEMPORARY FUNCTION {name}({given}) RETURNS {self._type(ibis.dtype(gives))}"
        self.run(f"{text} RETURN {body.sql(self.dialect)}")
        return builtin(name, takes, gives)

    def strip(self, text: Any, letters: str) -> Any:
        return builtin("btrim", ("string", "string"), "string")(text, letters)

    def as_text(self, number: Any) -> Any:
        return self._text(number)

    def digest(self, digest: Any, column: Any) -> Any:
        return builtin("xxhash64", ("int64", column.type()), "int64")(digest, column)

    def edits(self, left: Any, right: Any) -> Any:
        return left.levenshtein(right)

    def search(self, text: Any, pattern: str) -> Any:
        return self._called(workers.searcher(pattern), "string", "boolean")(text)

    def replace(self, text: Any, pattern: str, by: str) -> Any:
        return self._called(workers.replacer(pattern, by), "string", "string")(text)

    def case(self, text: Any, to: str) -> Any:
        return self._called(workers.caser(to), "string", "string")(text)

    def time(self, text: Any, formats: tuple[str, ...], shape: str | None) -> Any:
        for form in formats:
            if odd := [found for found in DIRECTIVE.findall(form) if found.strip("-") not in DIRECTIVES]:
                raise BadRequest(f"data.clean: rule parse_date: %{odd[0]} is not known on Spark; use DuckDB")
        plain = tuple(DIRECTIVE.sub(lambda found: "%" + found[1].strip("-"), form) for form in formats)
        if shape:
            return self._called(workers.times(plain, "%H" in shape), "string", "string")(text)
        return self._called(workers.seconds(plain), "string", "float64")(text)

    def _called(self, call: Callable[[Any], Any], takes: str, gives: str) -> Any:
        """A function of one column, under a name of its own."""
        self._functions += 1
        return self.function(call, f"function{self._functions}", (takes,), gives)

    @staticmethod
    def _type(kind: Any) -> str:
        from ibis.backends.sql.datatypes import PySparkType

        return str(PySparkType.to_string(kind))


@contextlib.contextmanager
def spark(scratch: Path, runs: Runs) -> Iterator[Spark]:
    """Open a session; at the end its Java is gone.

    Raises:
        BadRequest: no PySpark, no Java, or a rule that Spark can't run. TryAgain: the cluster failed.
    """
    with warnings.catch_warnings():
        # It has no say over pandas, which it is not used with.
        warnings.filterwarnings("ignore", module="pyspark")
        own = "PYSPARK_PYTHON" not in os.environ
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        try:
            yield from _spark(scratch, runs)
        finally:
            if own:
                del os.environ["PYSPARK_PYTHON"]


def _spark(scratch: Path, runs: Runs) -> Iterator[Spark]:
    try:
        from pyspark import errors
    except ImportError:
        raise BadRequest(
            f"spark_master = {runs.spark_master!r} needs PySpark; install it: {INSTALL.format(python=sys.executable)}"
        ) from None
    from py4j.protocol import Py4JError

    session = _session(scratch, runs)
    try:
        yield Spark(session, scratch)
    except errors.PySparkException as error:
        # What the rules ask for can't be done; all else is the cluster's.
        if isinstance(error, tuple(getattr(errors, f"{name}Exception") for name in OF_RULES)):
            raise BadRequest(f"data.clean: {line(error)}; correct the rule") from None
        raise TryAgain(f"cleaning on {runs.spark_master}: {line(error)}") from None
    except (Py4JError, ConnectionError) as error:
        raise TryAgain(f"cleaning on {runs.spark_master}: {line(error)}") from None
    finally:
        _end(session)


def _session(scratch: Path, runs: Runs) -> Any:
    import ibis
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    _ = ibis.pyspark  # its options are there once the backend is
    settings = {
        "spark.driver.memory": f"{max(runs.memory_bytes, LEAST_MEMORY_BYTES) >> 20}m",
        "spark.local.dir": str(scratch),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.caseSensitive": "true",
        # As DuckDB: what can't be computed is missing, and no day begins elsewhere.
        "spark.sql.ansi.enabled": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }
    if runs.spark_master.startswith("local"):
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
        # For a table that one machine holds, 200 tasks a shuffle are 190 too many.
        settings |= {"spark.sql.shuffle.partitions": str(os.cpu_count() or 1)}
    try:
        builder = SparkSession.builder.appName("drydock clean").master(runs.spark_master)
        return builder.config(map=settings).getOrCreate()
    except (PySparkException, Py4JError) as error:
        if "JAVA_GATEWAY" in str(error):
            raise BadRequest(
                f"spark_master = {runs.spark_master!r} needs Java 17 or newer; install it: "
                "sudo apt-get install -y openjdk-17-jre-headless"
            ) from None
        raise TryAgain(f"cleaning on {runs.spark_master}: {line(error)}") from None


def _end(session: Any) -> None:
    """End the session and its Java, which would live on until this process ends; it may be dead already."""
    from py4j.protocol import Py4JError
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    try:
        with contextlib.suppress(Py4JError, OSError):
            session.stop()
        with contextlib.suppress(Py4JError, OSError):
            gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait(30)
    except subprocess.TimeoutExpired:
        gateway.proc.kill()
        gateway.proc.wait()
    finally:
        # PySpark would go on with what it knows of a Java that is gone.
        SparkContext._gateway = SparkContext._jvm = SparkContext._active_spark_context = None
        type(session)._instantiatedSession = type(session)._activeSession = None


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _url(path: Path) -> str:
    """A file's URL, in which no letter stands for others."""
    return "file://" + re.sub(r"([\\*?{}\[\]])", r"\\\1", str(path.absolute()))


def _check(body: Any) -> None:
    """Refuse what Spark may understand otherwise, or what reaches beyond the row: reflect() calls any Java method."""
    from sqlglot import exp

    # The expression itself is cast to what its rule needs.
    for node in body.this.walk():
        name = type(node).__name__
        if name not in ALLOWED:
            shown = node.name if isinstance(node, exp.Anonymous) else name.lower()
            raise BadRequest(f"data.clean: {shown} in an SQL expression is not known on Spark; use DuckDB")
        if isinstance(node, exp.Div) and not isinstance(node.expression.unnest(), exp.Nullif):
            raise BadRequest("data.clean: a division on Spark needs nullif(DIVISOR, 0) as its divisor")
