"""The ledger: the one truth of what serves, who wanted it and why.

    intent ──► commit     the version serves
          └──► undo       nothing changed

At most one intent of a workload is open. Who carries it out holds the workload's lease, which the kernel
releases at death: an open intent whose lease can be taken has lost its actor.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tasks.release.chain import TABLE, Chain, Checked, Head, Read
from tasks.release.entries import Entry, closing, entry_of, lock_name, opening, previous_columns, required
from tasks.release.model import (
    Action,
    Intent,
    Lineage,
    Route,
    Row,
    Version,
    champion_of,
    lineage,
    previous_of,
    to_intent,
    utc_text,
)
from tasks.spec.errors import BadRequest, Refused, TryAgain
from tasks.store.files import exclusive

LEASE_SECONDS = 15.0
POLL_SECONDS = 0.02
DECISIONS = ("approval", "rejection")
C = TABLE.c


class LeaseHeld(TryAgain):
    """Another actor, who lives, holds the workload's lease."""


class Ledger:
    """The ledger under ``home`` (SQLite), or at ``url`` (``postgresql+psycopg2://…``)."""

    def __init__(self, home: Path, url: str | None = None, keys: Path | None = None) -> None:
        self.home = home
        self.chain = Chain(home, url, keys)

    def open_intent(
        self,
        workload: str,
        action: Action,
        target: Version | None,
        expected_champion: str | None,
        actor: str,
        reason: str,
        intent_id: str,
        route: Route | None = None,
    ) -> Intent:
        """Win the right to change what serves, by compare-and-set; the caller holds the workload's lease.

        The same ``intent_id`` again returns the existing intent, open or committed; one that was undone is
        opened again. A rollback wins over an open promotion, which is undone in the same transaction.
        ``route`` is what the gateway is put back to if the intent is undone.

        Raises:
            Refused: another intent is open (says whose), or the champion is not ``expected_champion``.
            BadRequest: no reason for a rollback, no actor, or the id is of another intent.
        """
        entry = opening(workload, action, target, actor, reason, intent_id, route)

        def decide(read: Read) -> list[Entry]:
            if (known := _intent(read, intent_id)) and not _may_reopen(known, entry):
                return []
            superseded = _superseded(_open_intent(read, workload), action, intent_id)
            champion = _champion(read, workload)
            _check_champion(workload, champion, expected_champion)
            opened = entry | previous_columns(champion)
            return [closing(superseded, "undo", reason, actor, intent_id), opened] if superseded else [opened]

        self.chain.append(decide)
        return self.intent(intent_id)

    def commit(self, intent_id: str, by: str | None = None) -> Intent:
        """State that the intent's target serves now. Idempotent.

        Raises:
            Refused: the intent was undone.
            BadRequest: there is no such intent.
        """
        return self._close(intent_id, "commit", None, by)

    def undo(self, intent_id: str, reason: str, by: str | None = None) -> Intent:
        """State that nothing changed, and why. Idempotent.

        Raises:
            Refused: the intent was committed.
            BadRequest: there is no such intent.
        """
        return self._close(intent_id, "undo", reason, by)

    def intent(self, intent_id: str) -> Intent:
        """Return one intent; raises BadRequest where there is none of this id."""
        return _known(_intent(self.chain.rows, intent_id), intent_id)

    def open_intents(self) -> tuple[Intent, ...]:
        """Return the open intents of all workloads, oldest first."""
        return tuple(to_intent(row, None) for row in self.chain.rows(_is_open()))

    def open_intent_of(self, workload: str) -> Intent | None:
        return _open_intent(self.chain.rows, workload)

    def champion(self, workload: str) -> Version | None:
        """Return the version that serves, or None."""
        return _champion(self.chain.rows, workload)

    def previous(self, workload: str) -> Version | None:
        """Return the version that a rollback goes back to, or None."""
        return previous_of(self.lineage(workload))

    def lineage(self, workload: str) -> Lineage:
        """Return the line of champions; the last one serves."""
        return lineage(self.chain.rows(C.workload == workload, C.kind == "commit"))

    def at(self, workload: str, time: dt.datetime) -> Version | None:
        """Return the version that served at an aware time, or None; a time in the future is now."""
        return _champion(self.chain.rows, workload, C.at <= utc_text(time))

    def history(self, workload: str) -> tuple[Row, ...]:
        """Return all rows of a workload, oldest first."""
        return tuple(self.chain.rows(C.workload == workload))

    def workloads(self) -> tuple[str, ...]:
        """Return the workloads that ever had a commit, by name."""
        last = sa.select(sa.func.max(C.seq)).where(C.kind == "commit").group_by(C.workload)
        return tuple(sorted(row.workload for row in self.chain.rows(C.seq.in_(last))))

    def record_approval(
        self, workload: str, version: Version, evidence_sha256: str, actor: str, reason: str = ""
    ) -> Row:
        """Record that a person approved a version on this evidence. The same decision again adds no row."""
        return self._decide("approval", workload, version, evidence_sha256, actor, reason)

    def record_rejection(
        self, workload: str, version: Version, evidence_sha256: str, actor: str, reason: str
    ) -> Row:
        """Record that a person rejected a version on this evidence; the reason is required."""
        required("reason", reason)
        return self._decide("rejection", workload, version, evidence_sha256, actor, reason)

    def decision(self, workload: str, version: Version, until: dt.datetime | None = None) -> Row | None:
        """Return the last approval or rejection of a version (up to a time), or None; its detail names the evidence.

        An approval counts for that evidence alone, a rejection until the version is approved.
        """
        return _decision(self.chain.rows, workload, version, until)

    def record_event(
        self, workload: str, action: str, actor: str, reason: str, detail: dict[str, Any] | None = None
    ) -> Row:
        """Record something that changes nothing but belongs to the history: an alias put back, say."""
        entry = entry_of("event", workload, actor, reason) | {"action": action, "detail": detail}
        return self.chain.append(lambda _read: [entry])[0]

    def verify(self) -> Checked:
        """Hold every row against the chain and the chain against its signed head; raises IntegrityLost."""
        return self.chain.verify()

    def head(self) -> Head:
        """Return the signed head, to be written to further places outside."""
        return self.chain.signed_head()

    @contextlib.contextmanager
    def lease(self, workload: str, wait_seconds: float = LEASE_SECONDS) -> Iterator[None]:
        """Hold the exclusive right to act on a workload; it ends with the block or with the process.

        Raises:
            LeaseHeld: another actor held it for ``wait_seconds``.
        """
        deadline = time.monotonic() + wait_seconds
        with contextlib.ExitStack() as stack:
            while True:
                with contextlib.suppress(LeaseHeld):
                    stack.enter_context(self._try_lease(workload))
                    break
                if time.monotonic() >= deadline:
                    raise LeaseHeld(f"{workload}: another change is in progress{self._holder(workload)}")
                time.sleep(POLL_SECONDS)
            yield

    def _try_lease(self, workload: str) -> contextlib.AbstractContextManager[None]:
        if self.chain.url.get_backend_name() == "postgresql":
            return self._advisory_lease(workload)
        return self._file_lease(self.home / "locks" / f"{lock_name(workload)}.lease")

    @contextlib.contextmanager
    def _file_lease(self, path: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(path, wait=False))
            except TryAgain as error:
                raise LeaseHeld(str(error)) from None
            yield

    @contextlib.contextmanager
    def _advisory_lease(self, workload: str) -> Iterator[None]:
        """PostgreSQL's own lock, which ends with its connection: it holds across hosts."""
        key = {"room": zlib.crc32(b"drydock.lease") >> 1, "workload": zlib.crc32(workload.encode()) >> 1}
        with self.chain.connected() as connection:
            taken = connection.execute(sa.text("SELECT pg_try_advisory_xact_lock(:room, :workload)"), key)
            if not taken.scalar():
                raise LeaseHeld(f"{workload}: its lease is held by another process; try again")
            yield

    def _holder(self, workload: str) -> str:
        intent = self.open_intent_of(workload)
        return f" ({intent.title}, since {intent.opened_at})" if intent else ""

    def _close(self, intent_id: str, kind: str, reason: str | None, by: str | None) -> Intent:
        wanted = {"commit": "committed", "undo": "undone"}[kind]

        def decide(read: Read) -> list[Entry]:
            intent = _known(_intent(read, intent_id), intent_id)
            if intent.state not in ("open", wanted):
                raise Refused(f"{intent.title}: intent {intent_id} is {intent.state} and can't be {wanted}")
            return [] if intent.state == wanted else [closing(intent, kind, reason, by)]

        self.chain.append(decide)
        return self.intent(intent_id)

    def _decide(
        self, kind: str, workload: str, version: Version, evidence_sha256: str, actor: str, reason: str
    ) -> Row:
        entry = entry_of(kind, workload, actor, reason) | version.model_dump()
        entry["detail"] = {"evidence_sha256": required("evidence_sha256", evidence_sha256)}

        def decide(read: Read) -> list[Entry]:
            last = _decision(read, workload, version)
            same = last and (last.kind, last.actor, last.detail) == (kind, entry["actor"], entry["detail"])
            return [] if same else [entry]

        self.chain.append(decide)
        return _decision(self.chain.rows, workload, version)  # type: ignore[return-value]


def _may_reopen(known: Intent, entry: Entry) -> bool:
    asked = tuple(entry[name] for name in ("workload", "action", "version", "digest_sha256"))
    version = known.target.model_dump() if known.target else {"version": None, "digest_sha256": None}
    if asked != (known.workload, known.action, version["version"], version["digest_sha256"]):
        raise BadRequest(f"intent {known.intent_id}: is the {known.title}; ask with another intent id")
    if known.superseded_by:
        raise Refused(
            f"{known.title}: intent {known.intent_id} was undone by rollback {known.superseded_by}; "
            "ask with another intent id"
        )
    return known.state == "undone"


def _superseded(other: Intent | None, action: str, intent_id: str) -> Intent | None:
    """The open promotion that a rollback wins over; any other open intent is in the way."""
    if other is None:
        return None
    if action == "rollback" and other.action == "promote":
        return other
    raise Refused(
        f"{other.title}: intent {other.intent_id} is open since {other.opened_at}; "
        f"intent {intent_id} must wait for its end"
    )


def _check_champion(workload: str, champion: Version | None, expected: str | None) -> None:
    found = champion.version if champion else None
    if found != expected:
        raise Refused(
            f"{workload}: the champion is {_label(found)}, expected {_label(expected)}; compare with it first"
        )


def _label(version: str | None) -> str:
    return f"version {version}" if version else "none"


def _known(intent: Intent | None, intent_id: str) -> Intent:
    if intent is None:
        raise BadRequest(f"intent {intent_id!r}: the ledger has none of this id")
    return intent


def _intent(read: Read, intent_id: str) -> Intent | None:
    rows = read(C.intent_id == intent_id, C.kind.in_(("intent", "commit", "undo")))
    opening = next((row for row in reversed(rows) if row.kind == "intent"), None)
    return to_intent(opening, rows[-1] if rows[-1].kind != "intent" else None) if opening else None


def _is_open() -> Any:
    later = TABLE.alias("later")
    closed = sa.exists().where(
        later.c.intent_id == C.intent_id, later.c.seq > C.seq, later.c.kind.in_(("commit", "undo"))
    )
    return sa.and_(C.kind == "intent", ~closed)


def _open_intent(read: Read, workload: str) -> Intent | None:
    rows = read(C.workload == workload, _is_open(), newest=1)
    return to_intent(rows[0], None) if rows else None


def _champion(read: Read, workload: str, *where: Any) -> Version | None:
    return champion_of(lineage(read(C.workload == workload, C.kind == "commit", *where, newest=1)))


def _decision(read: Read, workload: str, version: Version, until: dt.datetime | None = None) -> Row | None:
    rows = [row for row in read(C.workload == workload, C.kind.in_(DECISIONS)) if row.target == version]
    return next((r for r in reversed(rows) if until is None or dt.datetime.fromisoformat(r.at) <= until), None)
