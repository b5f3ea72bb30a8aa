"""Finish or undo what a dead actor left open, and put back what was moved by hand.

The ledger says what should serve; gateway and aliases are made to agree. Who still lives holds its
workload's lease, and is left alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.release.ledger import LeaseHeld
from tasks.release.model import Backend, Intent, Lineage, Route, Version, aliases_of, champion_of, service_name
from tasks.release.switch import Parts, finish, mirror, undo
from tasks.spec.errors import DrydockError, TryAgain
from tasks.spec.value import Value
from tasks.store.events import record_event

INTERVAL_SECONDS = 1.0
# What is over by then is no news: when the stack comes up, MLflow takes this long to answer.
TOLD_AFTER_ROUNDS = 20
ACTOR, CHALLENGER = "reconciler", "challenger"
# The endpoints of all of a version's running replicas once it is ready, none where it is not. A replica that
# is only busy must stay in: taking it out would send its load to the others, which are busy too.
Ready = Callable[[str, Version], Sequence[str]]


class Report(Value):
    """What one round did, and what kept it from doing more: one line each."""

    done: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


def run(
    parts: Parts,
    home: Path,
    ready: Ready,
    stop: threading.Event,
    interval_seconds: float = INTERVAL_SECONDS,
) -> None:
    """Reconcile once an interval until ``stop`` is set. A dependency that stays down is reported once.

    The aliases have a thread of their own: a registry that hangs keeps no traffic waiting.
    """
    aliases = threading.Thread(
        target=_repeat, args=(lambda: mirror_once(parts, home), home, stop, interval_seconds), daemon=True
    )
    aliases.start()
    _repeat(lambda: settle_once(parts, home, ready), home, stop, interval_seconds)
    aliases.join(interval_seconds)


def _repeat(work: Callable[[], Report], home: Path, stop: threading.Event, interval_seconds: float) -> None:
    rounds: dict[str, int] = {}
    while not stop.is_set():
        # What went away may come back, and is news then.
        rounds = {message: rounds.get(message, 0) + 1 for message in sorted(_errors_of(work))}
        for message, number in rounds.items():
            if number == TOLD_AFTER_ROUNDS:
                record_event(home, "failure", f"reconciler: {message}")
        stop.wait(interval_seconds)


def reconcile_once(parts: Parts, home: Path, ready: Ready) -> Report:
    """Settle every open intent without an actor, then make gateway and aliases agree with the ledger.

    One workload's trouble does not keep the others waiting: it is in the report.

    Raises:
        TryAgain, IntegrityLost: the ledger can't be read.
    """
    settled, mirrored = settle_once(parts, home, ready), mirror_once(parts, home)
    return Report(done=settled.done + mirrored.done, errors=settled.errors + mirrored.errors)


def settle_once(parts: Parts, home: Path, ready: Ready) -> Report:
    """Settle open intents without an actor, then put routes back that are not as the ledger says."""
    served = {*parts.ledger.workloads(), *parts.gateway.current().routes}
    waiting = {intent.workload for intent in parts.ledger.open_intents()}
    # Open intents first: half-done traffic does not wait for checks.
    workloads = (*sorted(waiting), *sorted(served - waiting))
    return _each(workloads, lambda workload: _settle_workload(parts, home, ready, workload))


def mirror_once(parts: Parts, home: Path) -> Report:
    """Put aliases back that are not as the ledger says, and name the version that is being rolled out."""
    workloads = sorted({*parts.ledger.workloads(), *parts.rollouts.open_workloads()})
    return _each(workloads, lambda workload: _put_back_aliases(parts, home, workload))


def _each(workloads: Sequence[str], work: Callable[[str], list[str]]) -> Report:
    done: list[str] = []
    errors: list[str] = []
    for workload in workloads:
        try:
            done += work(workload)
        except LeaseHeld:
            continue
        except DrydockError as error:
            errors.append(str(error))
    return Report(done=tuple(done), errors=tuple(errors))


def _errors_of(work: Callable[[], Report]) -> tuple[str, ...]:
    try:
        return work().errors
    except (DrydockError, OSError) as error:
        return (str(error),)


def _settle_workload(parts: Parts, home: Path, ready: Ready, workload: str) -> list[str]:
    with parts.ledger.lease(workload, wait_seconds=0):
        if intent := parts.ledger.open_intent_of(workload):
            return [_settle(parts, home, ready, intent)]
        if parts.rollouts.active(workload):
            return []  # the route is the rollout's
        return _put_back_route(parts, home, ready, workload, parts.ledger.lineage(workload))


def _settle(parts: Parts, home: Path, ready: Ready, intent: Intent) -> str:
    """Finish an intent whose actor is dead if its target is ready (or it needs none), else undo it."""
    endpoints = ready(intent.workload, intent.target) if intent.target else ()
    if intent.target and not endpoints:
        return _undo(parts, home, intent, "its actor died, and no replica of the target is ready")
    try:
        finish(parts, intent, endpoints)
    except TryAgain:
        # Open as before: the next round tries again.
        raise
    except DrydockError as error:
        return _undo(parts, home, intent, f"its actor died, and finishing it failed: {error}")
    kind = "promotion" if intent.action == "promote" else intent.action
    return _tell(home, kind, f"{intent.title}: finished, its actor died")


def _undo(parts: Parts, home: Path, intent: Intent, reason: str) -> str:
    undo(parts, intent, reason)
    return _tell(home, "failure", f"{intent.title}: undone: {reason}")


def _put_back_route(parts: Parts, home: Path, ready: Ready, workload: str, line: Lineage) -> list[str]:
    champion, found = champion_of(line), parts.gateway.current().routes.get(workload)
    if champion is None:
        return _remove_route(parts, home, workload, found)
    endpoints = tuple(ready(workload, champion))
    service = service_name(workload, champion.digest_sha256)
    # With no replica ready any route is as bad; the engine restarts them, and this round comes again.
    if not endpoints or (_same(found, service, endpoints) and parts.gateway.settled()):
        return []
    parts.gateway.route(workload, Route(backends=(Backend(service=service, endpoints=endpoints),)))
    return [_tell(home, "route", f"{workload}: its route is back at version {champion.version}")]


def _remove_route(parts: Parts, home: Path, workload: str, found: Route | None) -> list[str]:
    if not found:
        return []
    parts.gateway.remove(workload)
    return [_tell(home, "route", f"{workload}: its route was removed, the ledger has no champion")]


def _same(found: Route | None, service: str, endpoints: tuple[str, ...]) -> bool:
    if found is None or found.shadow or found.replay or len(found.backends) != 1:
        return False
    return found.backends[0].service == service and set(found.backends[0].endpoints) == set(endpoints)


def _put_back_aliases(parts: Parts, home: Path, workload: str) -> list[str]:
    """Look without the lease, which a rollback must not have to wait for; act with it."""
    wanted, found = _aliases(parts, workload), parts.aliases.get(workload)
    if all(found.get(alias) == version for alias, version in wanted.items()):
        return []
    with parts.ledger.lease(workload, wait_seconds=0):
        if parts.ledger.open_intent_of(workload):
            return []
        moved = mirror(parts.aliases, workload, _aliases(parts, workload))
    return [
        _tell(home, "alias", f"{workload}: alias {alias} was at {found or 'none'}, is back as in the ledger")
        for alias, found in moved.items()
        if alias != CHALLENGER  # which comes and goes with each rollout
    ]


def _aliases(parts: Parts, workload: str) -> dict[str, str | None]:
    rollout = parts.rollouts.active(workload)
    challenger = rollout.candidate.version if rollout and rollout.phase != "returned" else None
    return aliases_of(parts.ledger.lineage(workload)) | {CHALLENGER: challenger}


def _tell(home: Path, kind: str, message: str) -> str:
    record_event(home, kind, message, actor=ACTOR)
    return message
