"""The values of a release: versions, ledger rows, intents, the gateway's state; and what the rows mean.

Reading the ledger is pure: ``lineage`` folds the commit rows into what serves and what served before.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from tasks.spec.errors import BadRequest
from tasks.spec.value import Value
from tasks.spec.workload import Name

Kind = Literal["intent", "commit", "undo", "approval", "rejection", "event"]
Action = Literal["promote", "rollback", "retire"]
Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
ENDPOINT = r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}"


class Version(Value):
    """One registered version of a workload, bound to its package's digest."""

    version: str = Field(min_length=1, max_length=64)
    digest_sha256: str = Sha256


class Backend(Value):
    """One service behind a workload's path, with its share of the traffic."""

    service: str = Field(pattern=r"^[a-z][a-z0-9-]{0,79}$")
    endpoints: tuple[str, ...] = Field(min_length=1, description="host:port of each replica")
    weight: int = Field(default=100, ge=0, le=10_000, description="share of the sum of the weights")

    @model_validator(mode="after")
    def _endpoints_are_addresses(self) -> Backend:
        for endpoint in self.endpoints:
            if not re.fullmatch(ENDPOINT, endpoint) or not 0 < int(endpoint.rpartition(":")[2]) < 65536:
                raise ValueError(f"endpoints of {self.service}: found {endpoint!r}, must be host:port")
        return self


class GatewayState(Value):
    """What the gateway routes where. The revision rises with every change, so that Envoy can confirm it."""

    revision: int = Field(default=0, ge=0)
    routes: dict[Name, tuple[Backend, ...]] = {}

    @model_validator(mode="after")
    def _routes_are_whole(self) -> GatewayState:
        seen: set[str] = set()
        for workload, backends in self.routes.items():
            if not sum(backend.weight for backend in backends):
                raise ValueError(f"routes.{workload}: the weights sum to 0, must be more")
            for backend in backends:
                if backend.service in seen:
                    raise ValueError(f"routes.{workload}: service {backend.service!r} is routed twice")
                seen.add(backend.service)
        return self


class Row(Value):
    """One row: ``version`` is what it is about, ``previous_version`` what served before."""

    seq: int
    at: str = Field(description="aware UTC, ISO 8601 with microseconds")
    workload: str
    kind: Kind
    intent_id: str | None = None
    action: str | None = None
    version: str | None = None
    digest_sha256: str | None = None
    previous_version: str | None = None
    previous_digest_sha256: str | None = None
    actor: str
    reason: str = ""
    detail: dict[str, Any] = {}
    prev_hash: str
    row_hash: str

    @property
    def target(self) -> Version | None:
        return _version(self.version, self.digest_sha256)

    @property
    def previous(self) -> Version | None:
        return _version(self.previous_version, self.previous_digest_sha256)


class Intent(Value):
    """A change of what serves: open while it is carried out, then committed or undone."""

    intent_id: str
    workload: str
    action: Action
    target: Version | None = Field(description="None: the workload is taken out of service")
    champion: Version | None = Field(description="what served when the intent was opened")
    actor: str
    reason: str
    state: Literal["open", "committed", "undone"]
    opened_at: str
    route: tuple[Backend, ...] = Field(default=(), description="the route to put back on an undo")
    superseded_by: str | None = Field(default=None, description="the rollback that won over it")

    @property
    def title(self) -> str:
        """The intent in a message: ``digits: promote of version 3 by rita``."""
        what = f"{self.action} of version {self.target.version}" if self.target else self.action
        return f"{self.workload}: {what} by {self.actor}"


class Aliases(Protocol):
    """The registry's aliases of versions; ``tasks.registry`` has MLflow's. They mirror the ledger."""

    def set(self, workload: str, alias: str, version: str | None) -> None:
        """Point an alias at a version; None removes it. Idempotent. Raises TryAgain where it is down."""

    def get(self, workload: str) -> dict[str, str]:
        """Return alias -> version. Raises TryAgain where it is down."""


def service_name(workload: str, digest_sha256: str) -> str:
    """Return the name of the service that serves a package; the gateway's cluster bears it too."""
    return f"{workload}-{digest_sha256[:12]}"


def utc_text(time: dt.datetime) -> str:
    """Return a time as the ledger writes it: fixed width, so that texts compare as times do.

    Raises:
        BadRequest: the time has no zone.
    """
    if time.tzinfo is None:
        raise BadRequest(f"time {time.isoformat()}: has no zone, must be aware (add +00:00 for UTC)")
    return time.astimezone(dt.UTC).isoformat(timespec="microseconds")


def to_intent(opening: Row, closing: Row | None) -> Intent:
    """Read an intent from the row that opened it and the row that closed it, if any."""
    states = {None: "open", "commit": "committed", "undo": "undone"}
    return Intent(
        intent_id=opening.intent_id or "",
        workload=opening.workload,
        action=opening.action,  # type: ignore[arg-type]
        target=opening.target,
        champion=opening.previous,
        actor=opening.actor,
        reason=opening.reason,
        state=states[closing.kind if closing else None],  # type: ignore[arg-type]
        opened_at=opening.at,
        route=tuple(Backend.model_validate(backend) for backend in opening.detail.get("route", ())),
        superseded_by=closing.detail.get("superseded_by") if closing else None,
    )


Lineage = tuple[Version | None, ...]


def lineage(commits: Iterable[Row]) -> Lineage:
    """Fold commit rows, oldest first, into the line of champions; the last one serves (None: nothing)."""
    line: Lineage = ()
    for row in commits:
        line = extended(line, row.action or "", row.target)
    return line


def extended(line: Lineage, action: str, target: Version | None) -> Lineage:
    """Return the line after one more commit.

    A promotion adds to the line; a rollback cuts it back to its target. So a second rollback goes one
    further back, and never forward again to the version that the first one left.
    """
    if action == "rollback" and target in line:
        return line[: len(line) - line[::-1].index(target)]
    return (*line, target) if not line or line[-1] != target else line


def champion_of(line: Lineage) -> Version | None:
    return line[-1] if line else None


def previous_of(line: Lineage) -> Version | None:
    """Return what a rollback without a named version goes back to: the last other version that served."""
    return next((v for v in reversed(line[:-1]) if v is not None and v != line[-1]), None)


def aliases_of(line: Lineage) -> dict[str, str | None]:
    """Return the registry's aliases that mirror the line."""
    champion, previous = champion_of(line), previous_of(line)
    return {
        "champion": champion.version if champion else None,
        "previous": previous.version if previous else None,
    }


def _version(version: str | None, digest_sha256: str | None) -> Version | None:
    return Version(version=version, digest_sha256=digest_sha256) if version and digest_sha256 else None
