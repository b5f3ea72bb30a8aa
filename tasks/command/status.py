"""``drydock status``: services, and per workload what serves, what waits and what happened last."""

from __future__ import annotations

from typing import Any

from tasks.engines.supervisor import Supervisor
from tasks.site import Site
from tasks.spec.errors import DrydockError
from tasks.spec.load import load_workload, workload_names
from tasks.stack import health, log_name
from tasks.store.events import read_events
from tasks.store.space import free_bytes, warning

# How many are read for what concerns a workload, and of these for the list, which has the newest alone.
READ_EVENTS, TOLD_EVENTS, MOST_EVENTS = 2000, 200, 8
CONCERNS, ENDS = ("failure", "refusal", "review"), ("promotion", "rollback", "approval", "rejection")
TOLD = {
    *("failure", "refusal", "review", "approval", "rejection"),
    *("promotion", "rollback", "alias", "route", "notification"),
}


def status_of(site: Site) -> dict[str, Any]:
    """Return the state of the whole site as plain data; what is down is said, not raised."""
    events = read_events(site.home, READ_EVENTS)
    return {
        "services": _services(site),
        "workloads": [
            {"event": _concern(events, name)} | _workload(site, name) for name in workload_names(site.workloads)
        ],
        "events": _newest(events[-TOLD_EVENTS:]),
        "free_bytes": free_bytes(site.home),
        "disk": warning(site.home),
    }


def _newest(read: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest events; one that came again and again, as in an outage, is told once with how often."""
    events: dict[str, dict[str, Any]] = {}
    for event in read:
        if event["kind"] in TOLD:
            before = events.pop(event["message"], {"times": 0})
            events[event["message"]] = event | {"times": before["times"] + 1}
    return list(events.values())[-MOST_EVENTS:]


def _services(site: Site) -> dict[str, str]:
    if not (site.home / "state.json").exists():
        return {}
    try:
        infos = Supervisor(site.home).infos()
    except DrydockError:
        return {}
    names = [name for name in infos if not name.startswith(("job-", "svc-"))]
    states = {name: infos[name].state.lower() for name in sorted(names)}
    # A process that runs may still be loading, or hang.
    for component, said in health(site).items():
        program = log_name(component)
        if said != "healthy" and states.get(program) == "running":
            states[program] = f"running, {said}"
    return states


def _workload(site: Site, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"workload": name, "problem": "", "champion": None}
    try:
        load_workload(site.workloads, name)
    except DrydockError as error:  # what serves goes on serving
        found["problem"] = f"its file is wrong: {error}"
    if not site.has_ledger:
        return found | {"services": []}
    try:
        found |= _history(site, name)
    except DrydockError as error:  # the database is locked, say
        found["problem"] = f"its history can't be read: {error}"
    return found | {"services": _served(site, name)}


def _concern(events: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The workload's newest event, where it is one that asks for a person."""
    told = [event for event in events if event.get("workload") == name and event["kind"] in (*CONCERNS, *ENDS)]
    return told[-1] if told and told[-1]["kind"] in CONCERNS else None


def _history(site: Site, name: str) -> dict[str, Any]:
    """What the ledger and the last rollout's file tell."""
    champion, intent = site.ledger.champion(name), site.ledger.open_intent_of(name)
    return {
        "champion": champion.version if champion else None,
        "in_progress": intent.title if intent else "",
        "rollout": _rollout(site, name),
    }


def _rollout(site: Site, name: str) -> dict[str, Any] | None:
    """The rollout under way, or how the last one ended."""
    state = site.rollouts.last(name)
    if state is None:
        return None
    return {
        "version": state.candidate.version,
        "phase": state.phase,
        "stage": state.stage_name,
        "stages": list(state.stages),
        "why": state.why,
    }


def _served(site: Site, name: str) -> list[dict[str, Any]]:
    """Each service of the workload: version, replicas, share of traffic, requests, errors, latency by Envoy."""
    try:
        replicas = [r for r in site.engine.replicas() if r.labels.get("workload") == name]
        route = site.gateway.current().routes.get(name)
        backends = {b.service: b.weight for b in route.backends} if route else {}
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
    if found["disk"]:
        lines.append(f"  {'disk':<24} {found['disk']}")
    lines.append("WORKLOADS")
    for workload in found["workloads"]:
        champion = workload.get("champion")
        state = f"champion: version {champion}" if champion else "no champion yet"
        lines.append(f"  {workload['workload']:<24} {state}")
        if workload["problem"]:
            lines.append(f"    {workload['problem']}")
        if workload.get("in_progress"):
            lines.append(f"    in progress: {workload['in_progress']}")
        if rollout := workload.get("rollout"):
            lines.append(_rollout_line(rollout))
        if event := workload["event"]:
            lines.append(f"    {event['kind']} {event['at'][:19]}: {event['message']}")
        lines += [_service_line(row) for row in workload.get("services", ())]
    lines.append("LAST EVENTS")
    lines += [_event_line(event) for event in found["events"]] or ["  none"]
    return "\n".join(lines)


def _event_line(event: dict[str, Any]) -> str:
    times = f" ({event['times']} times)" if event["times"] > 1 else ""
    return f"  {event['at'][:19]}  {event['kind']:<10} {event['message']}{times}"


def _rollout_line(rollout: dict[str, Any]) -> str:
    runs = rollout["phase"] == "running"
    where = f" at {rollout['stage']} of {', '.join(rollout['stages'])}" if runs else ""
    why = f": {rollout['why']}" if rollout["why"] else ""
    return f"    {'' if runs else 'last '}rollout of version {rollout['version']}: {rollout['phase']}{where}{why}"


def _service_line(row: dict[str, Any]) -> str:
    line = f"    version {row['version']}: {row['traffic_ratio']:.0%} of traffic, {row['replicas']} running"
    told = [f"{name} {row[name]}" for name in ("requests", "failures") if name in row]
    told += [f"{name[:3]} {row[name]:.3g} ms" for name in ("p50_ms", "p99_ms") if row.get(name) is not None]
    return ", ".join([line, *told])


