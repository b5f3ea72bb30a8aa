"""What the page shows of a workload: champion, rollout, services, the versions that served, the history."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tasks.release.chain import TABLE
from tasks.release.model import Route, Row, Version, champion_of, lineage, previous_of, service_name, to_intent
from tasks.release.rollout import RolloutState
from tasks.site import Site
from tasks.spec.errors import DrydockError, IntegrityLost
from tasks.spec.load import workload_names

HISTORY_ROWS = 200
NAME = r"[a-z][a-z0-9-]{0,39}"


def names(site: Site) -> list[str]:
    """Return every workload: those declared, and those that are gone but still routed."""
    # A folder may be called anything; one of a wrong name has no DAG and no release.
    declared = [name for name in workload_names(site.workloads) if re.fullmatch(NAME, name)]
    return sorted({*declared, *site.gateway.current().routes})


def picture(site: Site, workload: str) -> dict[str, Any]:
    """Return a workload's state as plain data. Takes no lock that a writer holds.

    Raises:
        DrydockError: ledger or gateway state can't be read.
    """
    commits = _commits(site, workload)
    line = lineage(commits)
    champion, previous = champion_of(line), previous_of(line)
    rollout = _rollout(site, workload)
    route = site.gateway.current().routes.get(workload)
    versions = _versions(workload, commits, rollout)
    intent = site.ledger.open_intent_of(workload) if commits else None
    return {
        "workload": workload,
        "champion": champion.version if champion else None,
        "serving_since": commits[-1].at if champion else None,
        "previous": previous.version if previous else None,
        "served": served_before(commits, champion),
        "rollout": told(rollout) if rollout else None,
        "in_progress": intent.title.partition(": ")[2] if intent else "",
        "versions": versions,
        "services": services(workload, route, versions, _running(site, workload), champion),
        "history": history(_newest_rows(site, workload)),
    }


def served_before(commits: Iterable[Row], champion: Version | None) -> list[str]:
    """Return the versions that a rollback may go to, the last one that served first."""
    served = [row.target for row in reversed(tuple(commits)) if row.target and row.target != champion]
    return list(dict.fromkeys(version.version for version in served))


def services(
    workload: str, route: Route | None, versions: dict[str, str], running: dict[str, Any], champion: Version | None
) -> list[dict[str, Any]]:
    """Return each service with its version, role, share of the traffic and replicas; who gets most comes first."""
    routed = route.services if route else {}
    weights = {backend.service: backend.weight for backend in route.backends} if route else {}
    shadow = route.shadow.service if route and route.shadow else None
    serving = service_name(workload, champion.digest_sha256) if champion else None
    rows = []
    for name in {*routed, *running}:
        rows.append(
            {
                "service": name,
                "version": versions.get(name) or running.get(name, {}).get("version"),
                "role": _role(name, serving, shadow, name in weights and weights[name] > 0),
                "traffic_ratio": weights.get(name, 0) / (sum(weights.values()) or 1),
                "replicas": running[name]["replicas"] if name in running else len(routed[name].endpoints),
            }
        )
    return sorted(rows, key=lambda row: (-row["traffic_ratio"], row["role"] != "shadow", row["service"]))


def told(rollout: RolloutState) -> dict[str, Any]:
    """Return what a reader may know of a rollout: all but its token, and but what was counted."""
    shown = ("actor", "reason", "stages", "stage", "phase", "active", "outcome", "why", "began_at", "phase_at")
    found = {name: getattr(rollout, name) for name in shown}
    steps = [step.model_dump() for step in rollout.history]
    return found | {"version": rollout.candidate.version, "history": steps}


def history(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one entry a change, newest first: an intent with how it ended; approvals and events as they are."""
    closings = {row.intent_id: row for row in rows if row.kind in ("commit", "undo")}
    entries = [_entry(row, closings) for row in rows if row.kind not in ("commit", "undo")]
    return entries[::-1]


def _entry(row: Row, closings: dict[str | None, Row]) -> dict[str, Any]:
    entry: dict[str, Any] = {name: getattr(row, name) for name in ("seq", "at", "version", "actor", "reason")}
    entry |= {"action": row.action or row.kind, "previous": row.previous_version, "state": "recorded", "outcome": ""}
    if row.kind != "intent":
        return entry
    closing = closings.get(row.intent_id)
    # An intent that was undone may be opened again: only what came later closes this row.
    closing = closing if closing and closing.seq > row.seq else None
    entry["state"] = to_intent(row, closing).state
    if closing and closing.kind == "undo":
        entry["outcome"] = closing.reason
    return entry


def _role(name: str, serving: str | None, shadow: str | None, routed: bool) -> str:
    if name == serving:
        return "champion"
    if name == shadow:
        return "shadow"
    return "candidate" if routed else "standby"


def _commits(site: Site, workload: str) -> list[Row]:
    return _rows(site, TABLE.c.workload == workload, TABLE.c.kind == "commit")


def _newest_rows(site: Site, workload: str) -> list[Row]:
    return _rows(site, TABLE.c.workload == workload, newest=HISTORY_ROWS)


def _rows(site: Site, *where: Any, newest: int | None = None) -> list[Row]:
    if not site.has_ledger:
        return []
    return site.ledger.chain.rows(*where, newest=newest)


def _versions(workload: str, commits: Iterable[Row], rollout: RolloutState | None) -> dict[str, str]:
    """The version behind each service; where several hold one package, the last that served."""
    served = [row.target for row in commits if row.target]
    tried = [rollout.candidate] if rollout else []
    return {service_name(workload, version.digest_sha256): version.version for version in (*tried, *served)}


def _running(site: Site, workload: str) -> dict[str, Any]:
    """Services with their running replicas, by the engine; none where it is down: the route then has to do."""
    try:
        replicas = [r for r in site.engine.replicas() if r.labels.get("workload") == workload]
    except DrydockError:
        return {}
    found: dict[str, Any] = {}
    for replica in replicas:
        one = found.setdefault(replica.service, {"version": replica.labels.get("version"), "replicas": 0})
        one["replicas"] += bool(replica.running)
    return found


def _rollout(site: Site, workload: str) -> RolloutState | None:
    try:
        return site.rollouts.last(workload)
    except IntegrityLost:
        # The reconciler tells of it and puts the route back; the rest of the picture is right.
        return None
