"""A rollout: how a new version earns the traffic, stage by stage, or loses it. A pure state machine.

    running ──► passed ──► promoted                 every stage passed; another hand moves what serves
       └───────────┴─────► returned ──► settled     a verdict sent the traffic back; then all is cleaned up

``advance`` takes what was seen since and the time, and says what holds now; ``route_of`` says what the gateway
does meanwhile. Whoever is killed in between, the next one reads the state and goes on.
"""

from __future__ import annotations

import secrets
from typing import Literal

from pydantic import Field

from tasks.gate.judge import SEVERITY
from tasks.release.evidence import Counts, plus, since, verdict_on
from tasks.release.model import Backend, Replay, Route, Version
from tasks.spec.rules import Verdict
from tasks.spec.value import Value
from tasks.spec.workload import Rollout

Phase = Literal["running", "passed", "promoted", "returned", "settled"]
Outcome = Literal["promoted", "failed", "inconclusive", "aborted", "abandoned"]
# How long the gateway may be silent, or the candidate without a ready replica.
PATIENCE_SECONDS = 10.0
# What a service takes in its first second counts for nothing: one stall of a machine that starts a process makes a
# row of slow answers, and the bounds take each for a draw of its own.
WARM_SECONDS = 1.0
SHADOW, REPLAY = "shadow", "replay"


class Seen(Value):
    """What was read just now: what both services did since their start; None where the gateway is silent."""

    candidate: Counts | None = None
    champion: Counts | None = None
    candidate_ready: bool = True


class Step(Value):
    """One thing that happened to a rollout, as the ledger keeps it."""

    stage: str
    verdict: str
    text: str
    at: float


class Side(Value):
    """What one service did in this stage, and the counters that it was last seen with."""

    last: Counts | None = None
    window: Counts = Counts()


class RolloutState(Value):
    """A rollout as it stands. Times are seconds since the epoch."""

    rollout_id: str = Field(min_length=1)
    workload: str
    candidate: Version
    champion: Version | None = Field(description="what served when it began")
    actor: str
    reason: str = ""
    plan: Rollout
    token: str = Field(repr=False, description="opens the gateway's side door to the replay")
    stages: tuple[str, ...]
    stage: int = 0
    phase: Phase = "running"
    began_at: float
    phase_at: float = Field(description="since when the stage or phase holds")
    seen_at: float = Field(description="when the counters were last seen")
    sides: tuple[Side, Side] = Field(default=(Side(), Side()), description="the candidate, the champion")
    silent_since: float | None = Field(default=None, description="the gateway")
    unready_since: float | None = Field(default=None, description="the candidate")
    history: tuple[Step, ...] = ()
    recorded: int = Field(default=0, description="so many steps of the history are in the ledger")
    outcome: Outcome | None = None
    why: str = ""

    @property
    def active(self) -> bool:
        """Whether the workload's route is the rollout's."""
        return self.phase in ("running", "passed", "returned")

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do: the way is free for the next one."""
        return self.phase in ("promoted", "settled") and self.recorded == len(self.history)

    @property
    def stage_name(self) -> str:
        return self.stages[self.stage]

    @property
    def title(self) -> str:
        """The rollout in a message: ``digits: rollout of version 4``."""
        return f"{self.workload}: rollout of version {self.candidate.version}"


def begin(
    *,
    rollout_id: str,
    workload: str,
    candidate: Version,
    champion: Version | None,
    actor: str,
    plan: Rollout,
    now: float,
    reason: str = "",
    token: str | None = None,
) -> RolloutState:
    """Return a rollout at its start."""
    state = RolloutState(
        rollout_id=rollout_id,
        workload=workload,
        candidate=candidate,
        champion=champion,
        actor=actor,
        reason=reason,
        plan=plan,
        token=token or secrets.token_hex(16),
        stages=stages_of(plan, champion),
        began_at=now,
        phase_at=now,
        seen_at=now,
    )
    state = _noted(state, "begin", "begun", f"begun: {', '.join(state.stages)}", now)
    if champion and champion.digest_sha256 == candidate.digest_sha256:
        same = f"the same package as version {champion.version}, which serves"
        return _entered(_noted(state, state.stage_name, "pass", same, now), "passed", now)
    return state


def stages_of(plan: Rollout, champion: Version | None) -> tuple[str, ...]:
    """Return the stages: without a champion, or without a shadow and steps, the replay alone decides."""
    if champion is None:
        return (REPLAY,)
    shadow = (SHADOW,) if plan.shadow_percent else ()
    return (*shadow, *(f"canary-{step}" for step in plan.steps)) or (REPLAY,)


def advance(state: RolloutState, seen: Seen, now: float) -> RolloutState:
    """Return the rollout after one more look. Silence is no evidence: it holds, and then is inconclusive."""
    if state.phase not in ("running", "passed"):
        return state
    state = _observed(state, seen, now)
    if state.silent_since is None:
        found = verdict_of(state)
        if found.verdict == "fail":
            return _returned(state, "failed", found.summary, now)
        if found.verdict == "pass" and state.phase == "running":
            return _passed(state, found.summary, now)
    return _out_of_time(state, now)


def verdict_of(state: RolloutState) -> Verdict:
    """Return what the stage's evidence says by now."""
    candidate, champion = state.sides
    return verdict_on(state.plan, candidate.window, champion.window if state.champion else None)


def abort(state: RolloutState, why: str, now: float) -> RolloutState:
    """Return the rollout with its traffic on the way back; one that is over stays as it is."""
    return _returned(state, "aborted", why, now) if state.phase in ("running", "passed") else state


def promoted(state: RolloutState, now: float) -> RolloutState:
    """Return the rollout whose candidate is the champion by now."""
    if state.phase in ("promoted", "settled"):
        return state
    state = state.model_copy(update={"outcome": "promoted", "why": ""})
    return _noted(_entered(state, "promoted", now), "end", "promoted", "promoted: it serves all traffic", now)


def settled(state: RolloutState, now: float) -> RolloutState:
    """Return a returned rollout whose candidate was stopped and whose end was told."""
    if state.phase != "returned":
        return state
    text = f"{state.outcome}: its replicas are stopped"
    return _noted(_entered(state, "settled", now), "end", state.outcome or "", text, now)


def route_of(state: RolloutState, candidate: Backend | None, champion: Backend | None) -> Route | None:
    """Return the route that belongs to the state; None: the workload has none.

    ``champion`` is what serves now; weights of both are set here.
    """
    if state.phase in ("returned", "settled"):
        return Route(backends=(_weighed(champion, 100),)) if champion else None
    assert candidate is not None
    if state.phase == "promoted":
        return Route(backends=(_weighed(candidate, 100),))
    if champion is None:
        return Route(replay=Replay(token=state.token, backends=(_weighed(candidate, 100),)))
    if champion.service == candidate.service:
        return Route(backends=(_weighed(champion, 100),))
    share = int(state.stage_name.removeprefix("canary-")) if state.stage_name.startswith("canary-") else 0
    canary = (_weighed(candidate, share),) if share else ()
    halves = (_weighed(champion, 50), _weighed(candidate, 50))
    return Route(
        backends=(_weighed(champion, 100 - share), *canary),
        shadow=_weighed(candidate, state.plan.shadow_percent) if state.stage_name == SHADOW else None,
        replay=Replay(token=state.token, backends=halves),
    )


def wants_replay(state: RolloutState, now: float) -> bool:
    """Return whether live requests had their time and did not suffice.

    The first version has no live requests to wait for.
    """
    if state.phase != "running":
        return False
    if state.champion is None or state.stage_name == REPLAY:
        return state.champion is None or not state.plan.live_only
    return not state.plan.live_only and now - state.phase_at >= state.plan.step_seconds


def _weighed(backend: Backend, weight: int) -> Backend:
    return backend.model_copy(update={"weight": weight})


def _observed(state: RolloutState, seen: Seen, now: float) -> RolloutState:
    """Add what was done since the last look, and note since when somebody is missing."""
    silent = seen.candidate is None
    changes = {
        "silent_since": (state.silent_since or now) if silent else None,
        "unready_since": None if seen.candidate_ready else (state.unready_since or now),
    }
    if seen.candidate is not None:
        candidate, champion = state.sides
        warm = now - state.began_at >= WARM_SECONDS
        changes["sides"] = (_grown(candidate, seen.candidate, warm), _grown(champion, seen.champion or Counts(), warm))
        changes["seen_at"] = now
    return state.model_copy(update=changes)


def _grown(side: Side, now: Counts, warm: bool) -> Side:
    if not now.answers and side.last:
        # A server that can't be asked at the moment was not reset.
        now = now.model_copy(update={"answers": side.last.answers})
    done = since(now, side.last) if side.last else Counts()
    if not warm:
        done = done.model_copy(update={"latency": ()})
    return Side(last=now, window=plus(side.window, done))


def _passed(state: RolloutState, text: str, now: float) -> RolloutState:
    """The next stage begins with a fresh window; behind the last one, judging goes on with its window."""
    state = _noted(state, state.stage_name, "pass", text, now)
    if state.stage + 1 == len(state.stages):
        return _entered(state, "passed", now)
    fresh = tuple(Side(last=side.last) for side in state.sides)
    return _entered(state.model_copy(update={"stage": state.stage + 1, "sides": fresh}), "running", now)


def _out_of_time(state: RolloutState, now: float) -> RolloutState:
    plan, running = state.plan, state.phase == "running"
    if state.unready_since is not None and now - state.unready_since > PATIENCE_SECONDS:
        return _returned(state, "failed", f"no replica is ready for {PATIENCE_SECONDS:g} s", now)
    if state.silent_since is not None and now - state.silent_since > PATIENCE_SECONDS:
        return _returned(state, "inconclusive", f"the gateway gave no numbers for {PATIENCE_SECONDS:g} s", now)
    if running and now - state.phase_at > plan.stage_seconds:
        return _returned(state, "inconclusive", f"{_missing(state)}, after {plan.stage_seconds} s", now)
    if not running and now - state.phase_at > plan.promote_seconds:
        return _returned(state, "abandoned", f"passed, but nobody promoted it in {plan.promote_seconds} s", now)
    return state


def _missing(state: RolloutState) -> str:
    """What the evidence lacks: the summary of the reasons that are no pass."""
    found = verdict_of(state)
    worst = next(kind for kind in SEVERITY if kind == found.verdict)
    return "; ".join(reason.text for reason in found.reasons if reason.verdict == worst)


def _returned(state: RolloutState, outcome: Outcome, why: str, now: float) -> RolloutState:
    stage = state.stage_name if state.phase == "running" else state.phase
    state = state.model_copy(update={"outcome": outcome, "why": f"{stage}: {why}"})
    return _noted(_entered(state, "returned", now), stage, outcome, why, now)


def _entered(state: RolloutState, phase: Phase, now: float) -> RolloutState:
    return state.model_copy(update={"phase": phase, "phase_at": now})


def _noted(state: RolloutState, stage: str, verdict: str, text: str, now: float) -> RolloutState:
    step = Step(stage=stage, verdict=verdict, text=text, at=now)
    return state.model_copy(update={"history": (*state.history, step)})
