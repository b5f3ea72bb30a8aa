"""A table to which rows are only added, each bound to the one before by its hash (SQLite or PostgreSQL).

The head (number and hash of the last row) is signed and written to ``<home>/ledger.head`` after each
append. A writer that dies between the table's commit and the head's write leaves a head that lags, never
one that leads: so a head that leads means that rows were cut off.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from tasks.release.entries import Entry
from tasks.release.model import Row, utc_text
from tasks.spec.errors import DrydockError, IntegrityLost, TryAgain, full_disk
from tasks.spec.value import Value, canonical_json, sha256_of
from tasks.store.files import exclusive, write_json
from tasks.store.sign import key_id, make_key, sign_bytes, verify_bytes

ATTEMPTS = 50
BUSY_SECONDS = 10
RESTORE = "restore ledger and ledger.head from one backup"

TABLE = sa.Table(
    "ledger",
    sa.MetaData(),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("workload", sa.String(80), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("intent_id", sa.String(128), index=True),
    sa.Column("action", sa.String(32)),
    sa.Column("version", sa.String(64)),
    sa.Column("digest_sha256", sa.String(64)),
    sa.Column("previous_version", sa.String(64)),
    sa.Column("previous_digest_sha256", sa.String(64)),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    # Text and not JSON: a database that reorders the keys would break the hash.
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("prev_hash", sa.String(64), nullable=False),
    sa.Column("row_hash", sa.String(64), nullable=False),
)

COLUMNS = tuple(TABLE.c.keys())

Read = Callable[..., list[Row]]


class Head(Value):
    """The number and hash of the last row that was signed."""

    seq: int
    row_hash: str


GENESIS = Head(seq=0, row_hash="0" * 64)


class Checked(Value):
    """A chain that verified: its rows, and how many of them came after the signed head."""

    rows: int
    unsigned: int


class Chain:
    """The chained table under ``home``; ``url`` names another database, ``keys`` the signing key's folder."""

    def __init__(self, home: Path, url: str | None = None, keys: Path | None = None) -> None:
        self.home = home
        self.url = sa.make_url(url or f"sqlite:///{home / 'ledger.db'}")
        self.keys = keys or home / "keys"
        self.head_path = home / "ledger.head"
        self._set_up()

    def append(self, decide: Callable[[Read], Sequence[Entry]]) -> tuple[Row, ...]:
        """Add the entries that ``decide`` returns after reading, all or none; return their rows.

        The numbers are the compare-and-set: rows that ``decide`` has not seen have taken the number, so
        the insert fails and it decides again.

        Raises:
            IntegrityLost: rows that the signed head names are missing.
            TryAgain: the database can't be reached or stays locked.
        """
        for _ in range(ATTEMPTS):
            # Before the table is read: read after it, a head that another writer just wrote would lead.
            head = self.signed_head()
            with contextlib.suppress(sa.exc.IntegrityError):
                rows = self._append(head, decide)
                if rows:
                    self._write_head(_head_of(rows[-1]))
                return rows
        raise TryAgain(f"{self._name}: {ATTEMPTS} attempts to add a row were overtaken; try again")

    def rows(self, *where: Any, newest: int | None = None) -> list[Row]:
        """Return the rows that meet the conditions, oldest first; at most the ``newest`` ones."""
        with self.connected() as connection:
            return _select(connection, *where, newest=newest)

    def verify(self) -> Checked:
        """Walk the whole chain and hold it against the signed head.

        Raises:
            IntegrityLost: names the first row that was edited, deleted, or cut off.
        """
        head, last, signed = self.signed_head(), GENESIS, GENESIS.row_hash
        with self.connected() as connection:
            for found in connection.execute(sa.select(TABLE).order_by(TABLE.c.seq)).mappings():
                last = self._check_row(found, last)
                signed = last.row_hash if last.seq == head.seq else signed
        self._check_not_cut(head, last)
        if signed != head.row_hash:
            raise IntegrityLost(f"{self._name}: row {head.seq} is not the one that was signed; {RESTORE}")
        return Checked(rows=last.seq, unsigned=last.seq - head.seq)

    def signed_head(self) -> Head:
        """Return the head that was written outside of the table.

        Raises:
            IntegrityLost: it is missing, unreadable, or not signed by our key.
        """
        try:
            data = json.loads(self.head_path.read_bytes())
            head, signature = Head(seq=data["seq"], row_hash=data["row_hash"]), str(data["ed25519"])
        except (OSError, ValueError, KeyError, TypeError):
            raise IntegrityLost(f"{self.head_path}: is missing or can't be read; {RESTORE}") from None
        verify_bytes(canonical_json(head.model_dump()), signature, self.keys, str(self.head_path))
        return head

    def _append(self, head: Head, decide: Callable[[Read], Sequence[Entry]]) -> tuple[Row, ...]:
        with self.connected("IMMEDIATE") as connection:
            newest = _select(connection, newest=1)
            last = _head_of(newest[-1]) if newest else GENESIS
            self._check_not_cut(head, last)
            self._check_signed(head, _select(connection, TABLE.c.seq == head.seq))
            entries = decide(functools.partial(_select, connection))
            linked = _link(entries, last, newest[-1].at if newest else "")
            if linked:
                connection.execute(sa.insert(TABLE), linked)
            return tuple(_row(row) for row in linked)

    def _check_row(self, found: Mapping[str, Any], last: Head) -> Head:
        if found["seq"] != last.seq + 1:
            raise IntegrityLost(f"{self._name}: row {last.seq + 1} is missing; {RESTORE}")
        if found["row_hash"] != _hash(found):
            raise IntegrityLost(f"{self._name}: row {found['seq']} was edited; {RESTORE}")
        if found["prev_hash"] != last.row_hash:
            raise IntegrityLost(f"{self._name}: row {found['seq']} does not follow row {last.seq}; {RESTORE}")
        return Head(seq=found["seq"], row_hash=found["row_hash"])

    def _check_signed(self, head: Head, found: list[Row]) -> None:
        """Hold the row that the signed head names against it: no head is signed over rows that were written anew."""
        if head != GENESIS and [_head_of(row) for row in found] != [head]:
            raise IntegrityLost(f"{self._name}: row {head.seq} was edited, or one before it; {RESTORE}")

    def _check_not_cut(self, head: Head, last: Head) -> None:
        if head.seq > last.seq:
            raise IntegrityLost(
                f"{self._name}: row {last.seq + 1} to {head.seq} were cut off: "
                f"the signed head names row {head.seq}, the last one is {last.seq}; {RESTORE}"
            )

    def _write_head(self, head: Head) -> None:
        with exclusive(self.home / "locks" / "ledger.head.lock"):
            # A slower writer of an earlier row must not take the head back.
            if self.head_path.exists() and self.signed_head().seq >= head.seq:
                return
            signature = sign_bytes(canonical_json(head.model_dump()), self.keys)
            signed = head.model_dump() | {"ed25519": signature, "key_id": key_id(self.keys)}
            try:
                write_json(self.head_path, signed)
            except OSError as error:
                # The rows are in the table; the next append signs them too.
                raise TryAgain(f"{self.head_path}: can't be written: {error.strerror}; try again") from error

    def _set_up(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        with exclusive(self.home / "locks" / "ledger.setup.lock"):
            make_key(self.keys)
            with self.connected("IMMEDIATE") as connection:
                TABLE.metadata.create_all(connection)
                empty = not _select(connection, newest=1)
            # Only for an empty table: a head that is missing later was taken away.
            if empty and not self.head_path.exists():
                self._write_head(GENESIS)

    @property
    def _name(self) -> str:
        return f"ledger {self.url.database}"

    @functools.cached_property
    def _engine(self) -> sa.Engine:
        if self.url.get_backend_name() != "sqlite":
            return sa.create_engine(self.url, pool_pre_ping=True)
        # No pool: a connection that crosses a fork corrupts the file.
        engine = sa.create_engine(self.url, poolclass=sa.NullPool, connect_args={"timeout": BUSY_SECONDS})
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    @contextlib.contextmanager
    def connected(self, begin: str = "DEFERRED") -> Iterator[sa.Connection]:
        """A transaction; ``IMMEDIATE`` takes SQLite's write lock before the first read."""
        try:
            connection = self._engine.connect().execution_options(sqlite_begin=begin)
            with connection, connection.begin():
                yield connection
        except sa.exc.IntegrityError:
            raise
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            if _is_full(error.orig):
                raise TryAgain(full_disk(self._name)) from error
            raise TryAgain(f"{self._name}: can't be used now: {error.orig}; try again") from error
        except sa.exc.DatabaseError as error:
            raise IntegrityLost(f"{self._name}: can't be read: {error.orig}; {RESTORE}") from error
        except sa.exc.SQLAlchemyError as error:
            raise DrydockError(f"{self._name}: {error}") from error


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN comes late and deferred; ours is the event below.
    connection.isolation_level = None
    # Not WAL: its index is a file of its own, so on a full disk nothing could be read.
    connection.execute("PRAGMA journal_mode = DELETE")
    # A commit must outlive a power cut, the removal of its journal too: the head must never lead.
    connection.execute("PRAGMA synchronous = EXTRA")


def _is_full(error: BaseException | None) -> bool:
    """Whether the database found no room: SQLite's code, or PostgreSQL's disk_full."""
    return getattr(error, "sqlite_errorname", "") == "SQLITE_FULL" or getattr(error, "sqlstate", "") == "53100"


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")


def _head_of(row: Row) -> Head:
    return Head(seq=row.seq, row_hash=row.row_hash)


def _select(connection: sa.Connection, *where: Any, newest: int | None = None) -> list[Row]:
    query = sa.select(TABLE).where(*where).order_by(TABLE.c.seq.desc()).limit(newest)
    return [_row(found) for found in reversed(connection.execute(query).mappings().all())]


def _row(found: Mapping[str, Any]) -> Row:
    try:
        return Row.model_validate({**found, "detail": json.loads(found["detail"])})
    except (ValidationError, ValueError, TypeError):
        raise IntegrityLost(f"ledger: row {found['seq']} can't be read; {RESTORE}") from None


def _link(entries: Sequence[Entry], last: Head, not_before: str) -> list[Entry]:
    """Number, date and chain the entries. A clock that was set back dates no row before its forerunner."""
    now, linked = max(utc_text(dt.datetime.now(dt.UTC)), not_before), []
    for entry in entries:
        row = dict.fromkeys(COLUMNS) | entry
        row |= {"seq": last.seq + 1, "at": now, "prev_hash": last.row_hash}
        row["detail"] = canonical_json(entry.get("detail") or {}).decode()
        row["row_hash"] = _hash(row)
        linked.append(row)
        last = Head(seq=row["seq"], row_hash=row["row_hash"])
    return linked


def _hash(row: Mapping[str, Any]) -> str:
    try:
        return sha256_of({name: row[name] for name in COLUMNS if name != "row_hash"})
    except (TypeError, ValueError):
        # A blob or a number out of JSON's range: nothing that we wrote.
        return ""
