"""The rows of an SQL query, by SQLAlchemy: streamed, every value as text (or bytes), digested as they come."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost, TryAgain
from tasks.spec.requests import SourceFile
from tasks.spec.source import SqlSource

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
NAME = "data.source.query"


def resolve_query(source: SqlSource, secrets: Callable[[str], str]) -> SourceFile:
    """Run the query and return the digest of its rows.

    Raises:
        BadRequest: a query or an address that the database refuses, or no rows.
        TryAgain: the database can't be reached.
    """
    digest, size = hashlib.sha256(), 0
    with _rows(source, secrets) as (columns, blocks):
        digest.update(json.dumps(columns).encode())
        for block in blocks:
            size += _add(digest, block)
    if not size:
        raise BadRequest(f"{NAME}: gives no rows; ask for some")
    return SourceFile(name=NAME, sha256=digest.hexdigest(), bytes=size)


class Query:
    """A planned query's rows: ``with Query(...) as query``, ``header()``, then ``batches(columns)``."""

    def __init__(self, source: SqlSource, file: SourceFile, secrets: Callable[[str], str]) -> None:
        self._source, self._file, self._secrets = source, file, secrets

    def __enter__(self) -> Query:
        self._stack = contextlib.ExitStack()
        self._columns, self._blocks = self._stack.enter_context(_rows(self._source, self._secrets))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def header(self) -> list[str]:
        return self._columns

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns.

        Raises:
            IntegrityLost: the rows are not those of the time when the run was planned.
        """
        import pyarrow as pa

        places = [self._columns.index(name) for name in columns]
        digest = hashlib.sha256(json.dumps(self._columns).encode())
        for block in self._blocks:
            _add(digest, block)
            arrays = [_array(name, [row[place] for row in block]) for name, place in zip(columns, places, strict=True)]
            yield pa.record_batch(arrays, names=columns)
        if digest.hexdigest() != self._file.sha256:
            raise IntegrityLost(f"{NAME}: gives other rows than when the run was planned; start a new run")


@contextlib.contextmanager
def _rows(source: SqlSource, secrets: Callable[[str], str]) -> Iterator[tuple[list[str], Iterator[list[list[Any]]]]]:
    """The names of the columns, and the rows in blocks; nothing that the query did is kept."""
    import sqlalchemy as sa

    try:
        engine = sa.create_engine(secrets(source.url), poolclass=sa.NullPool)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError, ValueError):
        # SQLAlchemy's own message may show the address, and the password in it.
        what = "is no address that SQLAlchemy opens, such as postgresql+pg8000://user:${secret:NAME}@host/database"
        raise BadRequest(f"data.source.url: {what}") from None
    try:
        with engine.connect() as connection:
            streaming = connection.execution_options(stream_results=True, yield_per=BATCH_ROWS)
            result = streaming.exec_driver_sql(source.query)
            if not result.returns_rows:
                raise BadRequest(f"{NAME}: gives no rows; it must be a SELECT")
            # The size is said here too: without it a block is one row.
            blocks = ([[_value(item) for item in row] for row in block] for block in result.partitions(BATCH_ROWS))
            yield list(result.keys()), blocks
    except sa.exc.SQLAlchemyError as error:
        raise _told(error) from None
    finally:
        engine.dispose()


def _told(error: Any) -> DrydockError:
    import sqlalchemy as sa

    cause = getattr(error, "orig", None) or error
    reason = " ".join(str(cause).split())[:200]
    if isinstance(error, (sa.exc.InterfaceError, sa.exc.OperationalError)) and "syntax" not in reason:
        return TryAgain(f"data.source.url: the database does not answer the query: {reason}")
    return BadRequest(f"{NAME}: {reason}; correct the query")


def _value(item: Any) -> str | bytes | None:
    if item is None or isinstance(item, str | bytes):
        return item
    if isinstance(item, memoryview | bytearray):
        return bytes(item)
    if isinstance(item, bool | float):
        return repr(item).lower()
    return str(item)


def _array(name: str, values: list[Any]) -> pa.Array:
    import pyarrow as pa

    is_bytes = any(isinstance(value, bytes) for value in values)
    try:
        return pa.array(values, pa.binary() if is_bytes else pa.string())
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise BadRequest(f"{NAME}: column {name!r}: {str(error)[:160]}") from None


def _add(digest: Any, block: list[list[Any]]) -> int:
    """Take rows into the digest, each value with its length so that no two tables look the same."""
    before = [b"-" if v is None else v.encode("utf-8", "surrogatepass") if isinstance(v, str) else b"b" + v
              for row in block for v in row]  # fmt: skip
    content = b"".join(b"%d:" % len(item) + item for item in before)
    digest.update(content)
    return len(content)
