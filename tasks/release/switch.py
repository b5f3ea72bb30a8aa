"""Change what serves: traffic, aliases and ledger move together or not at all.

    intent row ──► gateway's route (confirmed) ──► aliases ──► commit row

Whatever fails in between is undone here; whoever dies in between, ``reconcile`` finishes or undoes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.release.gateway import Gateway
from tasks.release.ledger import Ledger
from tasks.release.model import (
    Action,
    Aliases,
    Backend,
    Intent,
    Route,
    Version,
    aliases_of,
    champion_of,
    extended,
    previous_of,
    service_name,
)
from tasks.release.rollouts import Rollouts
from tasks.spec.errors import BadRequest, DrydockError, Refused, TryAgain

OnStep = Callable[[str], None]
EnsureServing = Callable[[Version], Sequence[str]]


@dataclass(frozen=True)
class Parts:
    """What a change of what serves moves together, and the rollouts that it may end."""

    ledger: Ledger
    gateway: Gateway
    aliases: Aliases
    rollouts: Rollouts


def _silent(step: str) -> None:
    """Nobody listens to the steps."""


def switch(
    parts: Parts,
    workload: str,
    target: Version,
    endpoints: Sequence[str],
    *,
    expected_champion: str | None,
    actor: str,
    intent_id: str,
    reason: str = "",
    check: Callable[[], None] = lambda: None,
    on_step: OnStep = _silent,
) -> Intent:
    """Promote a version whose replicas serve at ``endpoints``; return the committed intent.

    The same ``intent_id`` again changes nothing. ``check`` is called when nobody else may change anything any more, and
    refuses by raising. ``on_step`` hears ``intent``, the gateway's steps,
    ``champion``, ``previous`` and ``commit`` as each is done.

    Raises:
        Refused: the champion is not ``expected_champion``, or another change is in progress.
        TryAgain: gateway, registry or database can't be reached; nothing has changed, or the message says
            that the intent was left to the reconciler.
    """
    with parts.ledger.lease(workload):
        check()
        intent = _open(parts, workload, "promote", target, expected_champion, actor, reason, intent_id)
        return _carry_out(parts, intent, endpoints, on_step)


def rollback(
    parts: Parts,
    workload: str,
    *,
    reason: str,
    actor: str,
    intent_id: str,
    ensure_serving: EnsureServing,
    to: str | None = None,
    on_step: OnStep = _silent,
) -> Intent:
    """Go back to the previous version, or to any that served (``to``); return the committed intent.

    ``ensure_serving`` starts and verifies the target's replicas where they don't run, and returns their
    endpoints; no traffic moves before. A promotion or a rollout in progress is ended first, and a rollback
    without ``to`` then stays at the champion that it would have replaced.

    Raises:
        BadRequest: no reason, nothing to go back to, or ``to`` never served (lists what did).
        Refused, TryAgain: as ``switch``.
    """
    with parts.ledger.lease(workload):
        known = _known(parts.ledger, workload, intent_id)
        if known and known.state == "committed":
            return known
        target = _bound_target(known, to) or _rollback_target(parts, workload, to, reason)
        parts.rollouts.abort(workload, f"rolled back by {actor}: {reason}")
        endpoints = ensure_serving(target)
        champion = parts.ledger.champion(workload)
        expected = champion.version if champion else None
        intent = _open(parts, workload, "rollback", target, expected, actor, reason, intent_id)
        return _carry_out(parts, intent, endpoints, on_step)


def retire(
    parts: Parts, workload: str, *, reason: str, actor: str, intent_id: str, on_step: OnStep = _silent
) -> Intent:
    """Take a workload out of service: no route, no aliases; its history stays. Raises as ``switch`` does."""
    with parts.ledger.lease(workload):
        champion = parts.ledger.champion(workload)
        expected = champion.version if champion else None
        intent = _open(parts, workload, "retire", None, expected, actor, reason, intent_id)
        return _carry_out(parts, intent, (), on_step)


def finish(parts: Parts, intent: Intent, endpoints: Sequence[str], on_step: OnStep = _silent) -> Intent:
    """Carry an open intent through: route, aliases, commit row. The caller holds the lease. Idempotent."""
    if intent.target is None:
        parts.gateway.remove(intent.workload, on_step)
    else:
        service = service_name(intent.workload, intent.target.digest_sha256)
        backend = Backend(service=service, endpoints=tuple(endpoints))
        parts.gateway.route(intent.workload, Route(backends=(backend,)), on_step)
    line = extended(parts.ledger.lineage(intent.workload), intent.action, intent.target)
    # A rollback is an emergency: with the registry down it goes on, and the reconciler mirrors the aliases later.
    with contextlib.suppress(*((TryAgain,) if intent.action == "rollback" else ())):
        mirror(parts.aliases, intent.workload, aliases_of(line), on_step)
    intent = parts.ledger.commit(intent.intent_id)
    on_step("commit")
    return intent


def undo(parts: Parts, intent: Intent, reason: str, on_step: OnStep = _silent) -> Intent:
    """Put route and aliases back as the ledger has them, then write the undo row. The caller holds the lease.

    An intent that is no longer open stays as it is: its commit row may have been written by a call that
    failed after it.
    """
    intent = parts.ledger.intent(intent.intent_id)
    if intent.state != "open":
        return intent
    if intent.route:
        parts.gateway.route(intent.workload, intent.route, on_step)
    else:
        parts.gateway.remove(intent.workload, on_step)
    mirror(parts.aliases, intent.workload, aliases_of(parts.ledger.lineage(intent.workload)), on_step)
    return parts.ledger.undo(intent.intent_id, reason)


def mirror(
    aliases: Aliases, workload: str, wanted: dict[str, str | None], on_step: OnStep = _silent
) -> dict[str, str | None]:
    """Set the aliases that are not as ``wanted``; return those as they were found."""
    found = aliases.get(workload)
    moved = {alias: found.get(alias) for alias, version in wanted.items() if found.get(alias) != version}
    for alias in moved:
        aliases.set(workload, alias, wanted[alias])
        on_step(alias)
    return moved


def _open(
    parts: Parts,
    workload: str,
    action: Action,
    target: Version | None,
    expected_champion: str | None,
    actor: str,
    reason: str,
    intent_id: str,
) -> Intent:
    """Open the intent once Envoy answers: with a dead gateway there is nothing to leave open."""
    parts.gateway.check()
    # A promotion that the rollback wins over may have moved the route already.
    interrupted = parts.ledger.open_intent_of(workload)
    route = interrupted.route if interrupted else _public(parts.gateway.current().routes.get(workload))
    return parts.ledger.open_intent(
        workload, action, target, expected_champion, actor, reason, intent_id, route=route
    )


def _carry_out(parts: Parts, intent: Intent, endpoints: Sequence[str], on_step: OnStep) -> Intent:
    if intent.state == "committed":
        return intent
    on_step("intent")
    try:
        return finish(parts, intent, endpoints, on_step)
    except DrydockError as error:
        intent = _undo_after(parts, intent, error)
        if intent.state == "committed":
            return intent
        raise


def _undo_after(parts: Parts, intent: Intent, error: DrydockError) -> Intent:
    try:
        return undo(parts, intent, f"failed: {error}")
    except DrydockError as second:
        raise TryAgain(
            f"{intent.title}: failed ({error}) and can't be undone now ({second}); left to the reconciler"
        ) from error


def _known(ledger: Ledger, workload: str, intent_id: str) -> Intent | None:
    """The rollback that was asked for before under this id: asking again must not go further back."""
    try:
        intent = ledger.intent(intent_id)
    except BadRequest:
        return None
    return intent if (intent.workload, intent.action) == (workload, "rollback") else None


def _bound_target(known: Intent | None, to: str | None) -> Version | None:
    if known is None or known.target is None or to not in (None, known.target.version):
        return None
    return known.target


def _public(route: Route | None) -> Route | None:
    """What the public sees of a route: a rollout's shadow and replay are its own to bring back."""
    return Route(backends=route.backends) if route and route.backends else None


def _rollback_target(parts: Parts, workload: str, to: str | None, reason: str) -> Version:
    if not reason.strip():
        raise BadRequest(f"{workload}: rollback has no reason, must say why")
    ledger = parts.ledger
    line, interrupted = ledger.lineage(workload), ledger.open_intent_of(workload)
    if to is not None:
        return _served(ledger, workload, to)
    champion, rolling = champion_of(line), parts.rollouts.active(workload)
    promoting = interrupted is not None and interrupted.action == "promote"
    if champion and (promoting or (rolling and rolling.candidate != champion)):
        return champion
    if previous := previous_of(line):
        return previous
    served = _names(ledger, workload)
    raise Refused(f"{workload}: has no previous version to go back to; name one that served: {served}")


def _served(ledger: Ledger, workload: str, version: str) -> Version:
    for row in reversed(ledger.history(workload)):
        if row.kind == "commit" and row.target and row.target.version == version:
            return row.target
    raise BadRequest(f"{workload}: version {version} never served, must be one of {_names(ledger, workload)}")


def _names(ledger: Ledger, workload: str) -> str:
    served = [row.version for row in ledger.history(workload) if row.kind == "commit" and row.version]
    return ", ".join(dict.fromkeys(served)) or "none"
