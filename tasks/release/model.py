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


class Replay(Value):
    """A side door to a workload's services for requests that bear ``token``: the replay of the holdout.

    Its answers count in Envoy's statistics as any other's; the servers see them marked as replayed.
    """

    token: str = Field(min_length=32, max_length=64, pattern=r"^[0-9a-zA-Z]+$", repr=False)
    backends: tuple[Backend, ...] = Field(min_length=1)


class Route(Value):
    """Where a workload's requests go: to ``backends`` by weight.

    ``shadow`` gets a copy of ``shadow.weight`` percent of them, and its answers are dropped. A route without
    backends answers 404 to the public: a first version that so far only the replay reaches.
    """

    backends: tuple[Backend, ...] = ()
    shadow: Backend | None = None
    replay: Replay | None = None

    @property
    def services(self) -> dict[str, Backend]:
        """Every service that the route names, once."""
        replayed = self.replay.backends if self.replay else ()
        shadowed = (self.shadow,) if self.shadow else ()
        return {backend.service: backend for backend in (*replayed, *shadowed, *self.backends)}

    @model_validator(mode="after")
    def _is_whole(self) -> Route:
        if not self.backends and (self.replay is None or self.shadow is not None):
            raise ValueError("a route needs backends, or a replay and no shadow")
        if self.shadow and not 1 <= self.shadow.weight <= 100:
            raise ValueError(f"shadow.weight = {self.shadow.weight}, must be 1 to 100, in percent")
        for name, group in (("backends", self.backends), ("replay", self.replay.backends if self.replay else ())):
            if group and not sum(backend.weight for backend in group):
                raise ValueError(f"the weights of {name} sum to 0, must be more")
            if len({backend.service for backend in group}) < len(group):
                raise ValueError(f"{name} name a service twice, must name each once")
        return self


class GatewayState(Value):
    """What the gateway routes where. The revision rises with every change, so that Envoy can confirm it.

    ``limits`` holds requests per second and client, by workload; a client is an API key, or else an address.
    """

    revision: int = Field(default=0, ge=0)
    routes: dict[Name, Route] = {}
    limits: dict[Name, int] = {}

    @model_validator(mode="after")
    def _services_have_one_home(self) -> GatewayState:
        seen: set[str] = set()
        for workload, route in self.routes.items():
            for service in route.services:
                if service in seen:
                    raise ValueError(f"routes.{workload}: service {service!r} is routed twice")
                seen.add(service)
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
    route: Route | None = Field(default=None, description="the route to put back on an undo; none: no route")
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
        route=Route.model_validate(opening.detail["route"]) if opening.detail.get("route") else None,
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
