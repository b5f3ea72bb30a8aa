"""Drive the rollouts: look, decide, keep the decision, then act on it.

What was decided is in the file before anything moves, and every act can be done twice, so a controller that is
killed anywhere is made good by the next one's first look. A rollout's own acts, in this order:

    route ──► ledger rows and events ──► (returned) stop the candidate ──► tell registry and people ──► settled
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.release.evidence import Counts
from tasks.release.ledger import LeaseHeld
from tasks.release.model import Backend, Route, Version, service_name
from tasks.release.replay import Replayer
from tasks.release.rollout import (
    RolloutState,
    Seen,
    Step,
    abort,
    advance,
    promoted,
    route_of,
    settled,
    wants_replay,
)
from tasks.release.rollouts import Rollouts
from tasks.release.stats import ServiceStats
from tasks.release.switch import Parts
from tasks.spec.errors import DrydockError, TryAgain, from_os
from tasks.store.events import record_event

BUSY_SECONDS, IDLE_SECONDS = 0.1, 1.0
# Counters are kept, and the servers asked for their answers, this often: between two looks no more is lost
# than a restart of Envoy within it would hide.
KEEP_SECONDS = 1.0
ENDS = ("failed", "inconclusive", "aborted", "abandoned")


@dataclass(frozen=True)
class Hands:
    """What a controller acts through."""

    parts: Parts
    rollouts: Rollouts
    endpoints: Callable[[str, Version], Sequence[str]]
    answers: Callable[[str, Version], dict[str, int]]
    rows: Callable[[str, Version], Sequence[bytes]]
    gateway_url: str
    stop: Callable[[str, Version], object]
    tell: Callable[[RolloutState], None]
    gateway_ca: str | None = None


def run(hands: Hands, home: Path, stop: threading.Event) -> None:
    """Drive every rollout until ``stop`` is set. A dependency that fails is reported once and asked again."""
    replayers: dict[str, Replayer] = {}
    reported: set[str] = set()
    try:
        while not stop.is_set():
            errors, busy = _round(hands, home, replayers)
            for message in sorted(errors - reported):
                record_event(home, "failure", f"rollout: {message}")
            reported = errors
            stop.wait(BUSY_SECONDS if busy else IDLE_SECONDS)
    finally:
        for replayer in replayers.values():
            replayer.stop()


def _round(hands: Hands, home: Path, replayers: dict[str, Replayer]) -> tuple[set[str], bool]:
    """Look at every rollout once; return what went wrong, and whether one is under way."""
    errors: set[str] = set()
    workloads = hands.rollouts.open_workloads()
    for workload in workloads:
        state = None
        try:
            state = tick(hands, home, workload, time.time())
            _replay(hands, replayers, workload, state)
        except LeaseHeld:
            continue
        except (DrydockError, OSError) as error:
            errors.add(str(error if isinstance(error, DrydockError) else from_os(error)))
    for workload in set(replayers) - set(workloads):
        replayers.pop(workload).stop()
    return errors, bool(workloads)


def tick(hands: Hands, home: Path, workload: str, now: float) -> RolloutState | None:
    """Look at a workload's rollout once and act on what is seen; return it as it stands, None where none is open.

    Raises:
        LeaseHeld: somebody else acts on the workload.
        TryAgain: something that it acts on is down; what was decided is kept, and done at a later look.
    """
    # One look asks each service once: one that hangs takes seconds to ask.
    hands = replace(hands, endpoints=functools.cache(hands.endpoints))
    with hands.parts.ledger.lease(workload, wait_seconds=0):
        state = hands.rollouts.last(workload)
        # A change that is half done is the reconciler's to finish or to undo, before anything else moves.
        if state is None or state.ended or hands.parts.ledger.open_intent_of(workload):
            return state
        decided = _decide(hands, state, now)
        if _worth_keeping(state, decided):
            hands.rollouts.save(decided)
        return _act(hands, home, decided, now)


def _decide(hands: Hands, state: RolloutState, now: float) -> RolloutState:
    if state.phase not in ("running", "passed"):
        return state
    serving = hands.parts.ledger.champion(state.workload)
    if serving == state.candidate:
        return promoted(state, now)
    if serving != state.champion:
        return abort(state, f"{_named(serving)} serves by now", now)
    return advance(state, _look(hands, state, now), now)


def _look(hands: Hands, state: RolloutState, now: float) -> Seen:
    ready = bool(hands.endpoints(state.workload, state.candidate))
    versions = [version for version in (state.candidate, state.champion) if version]
    names = [service_name(state.workload, version.digest_sha256) for version in versions]
    try:
        stats = hands.parts.gateway.stats(*names)
    except TryAgain:
        return Seen(candidate_ready=ready)
    ask = now - state.seen_at >= KEEP_SECONDS or state.sides[0].last is None
    counts = [
        counts_of(stats[name], _answers(hands, state.workload, version) if ask else {})
        for name, version in zip(names, versions, strict=True)
    ]
    return Seen(candidate=counts[0], champion=counts[1] if state.champion else None, candidate_ready=ready)


def counts_of(stats: ServiceStats, answers: dict[str, int]) -> Counts:
    """Return what Envoy counted for a service, with what the service says that it answered."""
    return Counts(
        requests=stats.requests,
        failures=stats.failures,
        refused=stats.client_errors,
        latency=stats.latency,
        answers=answers,
    )


def _answers(hands: Hands, workload: str, version: Version) -> dict[str, int]:
    # Added evidence: a server that does not tell now is asked again, and the gateway's numbers go on.
    with contextlib.suppress(TryAgain):
        return hands.answers(workload, version)
    return {}


def _worth_keeping(old: RolloutState, new: RolloutState) -> bool:
    """Whether the file must follow: anything but the counters changed, or the counters are of a while ago."""
    counters = {"sides", "seen_at"}
    changed = old.model_copy(update={name: getattr(new, name) for name in counters}) != new
    return changed or old.sides[0].last is None or new.seen_at - old.seen_at >= KEEP_SECONDS


def _act(hands: Hands, home: Path, state: RolloutState, now: float) -> RolloutState:
    if state.phase == "returned" or (state.active and state.silent_since is None):
        _put_route(hands, state)
    if state.phase == "promoted":
        hands.tell(state)
    state = _record(hands, home, state)
    if state.phase != "returned":
        return state
    _clean_up(hands, state)
    state = settled(state, now)
    hands.rollouts.save(state)
    return _record(hands, home, state)


def _put_route(hands: Hands, state: RolloutState) -> None:
    """Make the gateway route as the state says, where it does not. Replicas come and go, so it may change again."""
    workload, gateway = state.workload, hands.parts.gateway
    found = gateway.current().routes.get(workload)
    serving = hands.parts.ledger.champion(workload)
    champion = _backend(hands, workload, serving, found)
    # On the way back it is not asked: it may hang.
    candidate = None if state.phase == "returned" else _backend(hands, workload, state.candidate, found)
    if (serving and champion is None) or (state.phase != "returned" and candidate is None):
        # With no replica known there is nothing better to route to; the engine restarts them.
        return
    wanted = route_of(state, candidate, champion)
    if found == wanted and gateway.settled():
        return
    if wanted:
        gateway.route(workload, wanted)
    else:
        gateway.remove(workload)


def _backend(hands: Hands, workload: str, version: Version | None, found: Route | None) -> Backend | None:
    """A version's service with its ready replicas, or with those that the route has where none is ready now."""
    if version is None:
        return None
    service = service_name(workload, version.digest_sha256)
    endpoints = tuple(sorted(hands.endpoints(workload, version)))
    if endpoints:
        return Backend(service=service, endpoints=endpoints)
    return found.services.get(service) if found else None


def _clean_up(hands: Hands, state: RolloutState) -> None:
    """Stop the candidate, unless it serves after all, and tell whoever must know."""
    serving = hands.parts.ledger.champion(state.workload)
    if serving is None or serving.digest_sha256 != state.candidate.digest_sha256:
        hands.stop(state.workload, state.candidate)
    hands.tell(state)


def _record(hands: Hands, home: Path, state: RolloutState) -> RolloutState:
    """Write the steps that are not in the ledger yet: each once, whoever was killed in between."""
    if state.recorded == len(state.history):
        return state
    ledger, back_at = hands.parts.ledger, _named(hands.parts.ledger.champion(state.workload))
    known = {
        row.detail.get("step")
        for row in ledger.history(state.workload)
        if row.kind == "event" and row.detail.get("rollout_id") == state.rollout_id
    }
    for index in range(state.recorded, len(state.history)):
        step = state.history[index]
        if index not in known:
            detail = {"rollout_id": state.rollout_id, "step": index, "stage": step.stage, "verdict": step.verdict}
            detail |= {"version": state.candidate.version, "digest_sha256": state.candidate.digest_sha256}
            ledger.record_event(state.workload, "rollout", state.actor, step.text, detail)
            if step.stage != "end":
                record_event(home, "rollout", message_of(state, step, back_at), actor=state.actor)
    state = state.model_copy(update={"recorded": len(state.history)})
    hands.rollouts.save(state)
    return state


def message_of(state: RolloutState, step: Step, back_at: str) -> str:
    """Return one line that a person can act on."""
    if step.stage == "begin":
        return f"{state.title}: {step.text}"
    word = {"pass": "passed", "inconclusive": "is inconclusive"}.get(step.verdict, step.verdict)
    text = f"{state.title}: {step.stage} {word}: {step.text}"
    return f"{text}; all traffic is back at {back_at}" if step.verdict in ENDS else text


def _named(version: Version | None) -> str:
    return f"version {version.version}" if version else "no version"


def _replay(hands: Hands, replayers: dict[str, Replayer], workload: str, state: RolloutState | None) -> None:
    wanted = state is not None and wants_replay(state, time.time())
    if not wanted and workload in replayers:
        replayers.pop(workload).stop()
    if wanted and workload not in replayers:
        assert state is not None
        rows = hands.rows(workload, state.candidate)
        replayers[workload] = Replayer(hands.gateway_url, workload, state.token, rows, hands.gateway_ca)
        replayers[workload].start()
