"""``drydock status``: services, and per workload what serves, what waits and what happened last."""

from __future__ import annotations

from typing import Any

from tasks.engines.supervisor import Supervisor
from tasks.site import Site
from tasks.spec.errors import DrydockError
from tasks.spec.load import load_workload, workload_names
from tasks.store.events import read_events

TOLD = {
    *("failure", "refusal", "review", "approval", "rejection"),
    *("promotion", "rollback", "alias", "route", "notification"),
}


def status_of(site: Site) -> dict[str, Any]:
    """Return the state of the whole site as plain data; what is down is said, not raised."""
    return {
        "services": _services(site),
        "workloads": [_workload(site, name) for name in workload_names(site.workloads)],
        "events": [event for event in read_events(site.home, 200) if event["kind"] in TOLD][-8:],
    }


def _services(site: Site) -> dict[str, str]:
    if not (site.home / "state.json").exists():
        return {}
    try:
        infos = Supervisor(site.home).infos()
    except DrydockError:
        return {}
    names = [name for name in infos if not name.startswith(("job-", "svc-"))]
    return {name: infos[name].state.lower() for name in sorted(names)}


def _workload(site: Site, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"workload": name, "problem": ""}
    try:
        load_workload(site.workloads, name)
    except DrydockError as error:
        return found | {"problem": str(error)}
    if not (site.home / "ledger.db").exists():
        return found | {"champion": None, "services": []}
    champion = site.ledger.champion(name)
    found["champion"] = champion.version if champion else None
    intent = site.ledger.open_intent_of(name)
    found["in_progress"] = intent.title if intent else ""
    found["services"] = _served(site, name)
    return found


def _served(site: Site, name: str) -> list[dict[str, Any]]:
    """Each service of the workload: version, replicas, share of traffic, requests, errors, latency by Envoy."""
    try:
        replicas = [r for r in site.engine.replicas() if r.labels.get("workload") == name]
        backends = {b.service: b.weight for b in site.gateway.current().routes.get(name, ())}
        stats = site.gateway.stats()
    except DrydockError:
        return []
    services = {replica.service: replica.labels for replica in replicas}
    total = sum(backends.values()) or 1
    rows = []
    for service, labels in sorted(services.items()):
        row = {
            "service": service,
            "version": labels.get("version"),
            "replicas": sum(r.running for r in replicas if r.service == service),
            "traffic_ratio": backends.get(service, 0) / total,
        }
        rows.append(row | (stats[service].model_dump() if service in stats else {}))
    return rows


def status_text(found: dict[str, Any]) -> str:
    """Return the status for a person."""
    lines = ["SERVICES"]
    services = found["services"] or {"": "nothing runs; ./drydock up starts it"}
    lines += [f"  {name:<24} {state}" for name, state in services.items()]
    lines.append("WORKLOADS")
    for workload in found["workloads"]:
        champion = workload.get("champion")
        state = workload["problem"] or (f"champion: version {champion}" if champion else "no champion yet")
        lines.append(f"  {workload['workload']:<24} {state}")
        if workload.get("in_progress"):
            lines.append(f"    in progress: {workload['in_progress']}")
        lines += [_service_line(row) for row in workload.get("services", ())]
    lines.append("LAST EVENTS")
    lines += [f"  {e['at'][:19]}  {e['kind']:<10} {e['message']}" for e in found["events"]] or ["  none"]
    return "\n".join(lines)


def _service_line(row: dict[str, Any]) -> str:
    line = f"    version {row['version']}: {row['traffic_ratio']:.0%} of traffic, {row['replicas']} running"
    shown = {"service", "version", "replicas", "traffic_ratio"}
    facts = {name: value for name, value in row.items() if name not in shown and value is not None}
    told = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()]
    return ", ".join([line, *told])


