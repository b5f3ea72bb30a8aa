"""The rollout's state machine and its store: every look leads somewhere, and nothing but evidence promotes."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.release.evidence import Counts
from tasks.release.model import Backend, GatewayState, Version
from tasks.release.rollout import (
    RolloutState,
    Seen,
    abort,
    advance,
    begin,
    promoted,
    route_of,
    settled,
    wants_replay,
)
from tasks.release.rollouts import MAX_ENDED, RolloutActive, Rollouts
from tasks.spec.errors import IntegrityLost
from tasks.spec.workload import Rollout

pytestmark = pytest.mark.timeout(30)
PLAN = Rollout(steps=(5, 50), stage_seconds=60, promote_seconds=100)


def version(number: int) -> Version:
    return Version(version=str(number), digest_sha256=hashlib.sha256(str(number).encode()).hexdigest())


def backend(number: int) -> Backend:
    return Backend(service=f"digits-{number}", endpoints=(f"127.0.0.1:{8000 + number}",))


def started(plan: Rollout = PLAN, champion: int | None = 3, rollout_id: str = "r1") -> RolloutState:
    return begin(
        rollout_id=rollout_id, workload="digits", candidate=version(4), actor="rita", plan=plan, now=0.0,
        champion=version(champion) if champion else None,
    )  # fmt: skip


def counts(requests: int, failures: int = 0) -> Counts:
    good = requests - failures
    latency = ((5, good), (10, good), (500, good), (math.inf, good))
    return Counts(requests=requests, failures=failures, latency=latency, answers={"a": good})


def seen(requests: int, failures: int = 0, ready: bool = True) -> Seen:
    return Seen(candidate=counts(requests, failures), champion=counts(requests), candidate_ready=ready)


def look(state: RolloutState, now: float, *sights: Seen) -> RolloutState:
    for sight in sights:
        state = advance(state, sight, now)
    return state


def test_a_good_candidate_goes_through_every_stage_with_a_fresh_window_in_each():
    state = look(started(), 1, seen(0), seen(600))
    assert (state.stage_name, state.phase_at) == ("canary-5", 1)
    assert look(state, 2, seen(900)).stage_name == "canary-5"
    state = look(state, 2, seen(1200))
    assert state.stage_name == "canary-50"
    state = look(state, 3, seen(1800))
    assert (state.phase, state.active, state.outcome) == ("passed", True, None)
    assert [(step.stage, step.verdict) for step in state.history] == [
        ("begin", "begun"), ("shadow", "pass"), ("canary-5", "pass"), ("canary-50", "pass"),
    ]  # fmt: skip
    state = promoted(state, 4)
    assert (state.phase, state.outcome, state.active) == ("promoted", "promoted", False)
    assert promoted(state, 5) == state == abort(state, "late", 5) == advance(state, seen(9999, 9999), 5)


def test_what_was_counted_before_it_began_is_no_evidence():
    assert look(started(), 1, seen(5000, 4000)).phase == "running"
    assert look(started(), 1, seen(5000, 4000), seen(5600, 4000)).stage_name == "canary-5"


def test_a_candidate_that_fails_is_returned_and_says_why():
    state = look(started(), 1, seen(0), Seen(candidate=counts(26, 8), champion=counts(500)))
    assert (state.phase, state.outcome, state.active) == ("returned", "failed", True)
    assert state.why.startswith("shadow: error_ratio = 0.3077, must be at most 0.02 (n = 26)")
    assert look(state, 2, seen(9999)) == state
    state = settled(state, 3)
    assert (state.phase, state.outcome, state.active) == ("settled", "failed", False)
    assert settled(state, 4) == state


def test_one_that_passed_is_judged_until_it_is_promoted():
    state = look(started(), 1, seen(0), seen(600), seen(1200), seen(1800))
    assert state.phase == "passed"
    assert look(state, 2, seen(2500)).phase == "passed"
    assert look(state, 2, seen(2500, 600)).outcome == "failed"
    abandoned = look(state, 102, seen(2500))
    assert (abandoned.phase, abandoned.outcome) == ("returned", "abandoned")
    assert "nobody promoted it in 100 s" in abandoned.why


def test_too_little_evidence_in_the_stages_time_is_inconclusive():
    state = look(started(), 59, seen(0), seen(50))
    assert state.phase == "running"
    state = look(state, 60.5, seen(60))
    assert (state.phase, state.outcome) == ("returned", "inconclusive")
    assert "champion_requests (overall): 60 samples, needs 100" in state.why


def test_a_silent_gateway_is_no_evidence_and_then_inconclusive():
    state = look(started(), 1, seen(0), seen(300))
    assert look(state, 5, Seen()).phase == "running"
    silent = look(look(state, 5, Seen()), 14.9, Seen())
    assert silent.phase == "running"
    assert look(silent, 15.0, seen(600)).stage_name == "canary-5"
    ended = look(silent, 15.1, Seen())
    assert (ended.phase, ended.outcome) == ("returned", "inconclusive")
    assert "gave no numbers for 10 s" in ended.why


def test_a_candidate_without_a_ready_replica_fails():
    state = look(started(), 1, seen(0), seen(10, ready=False))
    assert look(look(state, 5, seen(11)), 12, seen(12)).phase == "running"
    ended = look(state, 11.5, seen(12, ready=False))
    assert (ended.outcome, "no replica is ready" in ended.why) == ("failed", True)


def test_an_abort_wins_at_any_time():
    for state in (started(), look(started(), 1, seen(0), seen(600), seen(1200), seen(1800))):
        ended = abort(state, "rolled back by ann: bad answers", 5)
        assert (ended.phase, ended.outcome) == ("returned", "aborted")
        assert "rolled back by ann" in ended.why
        assert abort(ended, "again", 6) == ended


def test_a_server_that_does_not_tell_its_answers_for_a_while_was_not_reset():
    mute = Seen(candidate=counts(200).model_copy(update={"answers": {}}), champion=counts(200))
    state = look(started(), 1, seen(100), seen(150), mute, seen(250))
    assert state.sides[0].window == state.sides[1].window == counts(150)


def test_a_reset_of_envoy_keeps_what_was_counted_before():
    state = look(started(), 1, seen(1000), seen(1200), seen(30))
    assert state.sides[0].window.requests == 230
    assert state.phase == "running"


def test_the_same_package_again_needs_no_judging():
    state = begin(
        rollout_id="r", workload="digits", actor="rita", plan=PLAN, now=0.0, champion=version(3),
        candidate=Version(version="4", digest_sha256=version(3).digest_sha256),
    )  # fmt: skip
    assert state.phase == "passed"
    route = route_of(state, backend(3), backend(3))
    assert [b.service for b in route.backends] == ["digits-3"]


@pytest.mark.parametrize(
    ("champion", "plan", "stages"),
    [
        (3, Rollout(), ("shadow", "canary-5", "canary-25", "canary-50")),
        (3, Rollout(shadow_percent=0), ("canary-5", "canary-25", "canary-50")),
        (3, Rollout(steps=()), ("shadow",)),
        (3, Rollout(shadow_percent=0, steps=()), ("replay",)),
        (None, Rollout(), ("replay",)),
    ],
)
def test_the_stages(champion, plan, stages):
    assert started(plan, champion).stages == stages


# --- routes -------------------------------------------------------------------------------------------------


def shares(backends) -> dict[str, int]:
    return {backend.service: backend.weight for backend in backends}


def test_the_route_of_each_stage():
    state = started(Rollout(shadow_percent=30, steps=(5,)))
    shadow = route_of(state, backend(4), backend(3))
    assert shares(shadow.backends) == {"digits-3": 100}
    assert (shadow.shadow.service, shadow.shadow.weight) == ("digits-4", 30)
    assert shares(shadow.replay.backends) == {"digits-3": 50, "digits-4": 50}
    state = look(state, 1, seen(0), seen(600))
    canary = route_of(state, backend(4), backend(3))
    assert (shares(canary.backends), canary.shadow) == ({"digits-3": 95, "digits-4": 5}, None)
    assert canary.replay.token == state.token
    passed = look(state, 1, seen(1200))
    assert passed.phase == "passed"
    assert route_of(passed, backend(4), backend(3)) == canary
    back = route_of(abort(passed, "x", 2), None, backend(3))
    assert (shares(back.backends), back.shadow, back.replay) == ({"digits-3": 100}, None, None)
    assert shares(route_of(promoted(passed, 2), backend(4), backend(3)).backends) == {"digits-4": 100}


def test_the_first_version_is_reached_by_the_replay_alone():
    state = started(champion=None)
    route = route_of(state, backend(4), None)
    assert (route.backends, shares(route.replay.backends)) == ((), {"digits-4": 100})
    assert route_of(abort(state, "x", 1), None, None) is None


def test_when_the_holdout_is_replayed():
    state = started()
    assert not wants_replay(state, 9.9)
    assert wants_replay(state, 10)
    assert not wants_replay(started(PLAN.model_copy(update={"live_only": True})), 50)
    assert wants_replay(started(champion=None), 0)
    assert wants_replay(started(PLAN.model_copy(update={"live_only": True}), champion=None), 0)
    assert not wants_replay(abort(state, "x", 10), 50)


# --- properties ---------------------------------------------------------------------------------------------

SIGHTS = st.lists(
    st.tuples(
        st.floats(0, 30),
        st.none() | st.tuples(st.integers(0, 800), st.integers(0, 20), st.integers(0, 800)),
        st.booleans(),
        st.sampled_from(["", "", "", "", "abort", "promote", "settle", "restart"]),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(sights=SIGHTS, champion=st.sampled_from([None, 3]), live_only=st.booleans())
def test_whatever_is_seen_it_stays_whole(sights, champion, live_only):
    """Phases only go on, a route can always be made, the file holds all of it, and no pass is without evidence."""
    order = ("running", "passed", "promoted", "returned", "settled")
    state, now, totals = started(PLAN.model_copy(update={"live_only": live_only}), champion), 0.0, [0, 0, 0]
    for seconds, more, ready, act in sights:
        before, now = state, now + seconds
        totals = [a + b for a, b in zip(totals, more or (0, 0, 0), strict=True)]
        if act == "restart":
            totals = [0, 0, 0]
        sight = Seen(candidate_ready=ready)
        if more is not None:
            sight = Seen(
                candidate=counts(totals[0] + totals[1], totals[1]), champion=counts(totals[2]), candidate_ready=ready
            )
        state = advance(state, sight, now)
        if act == "abort":
            state = abort(state, "x", now)
        elif act == "promote" and state.phase == "passed":
            state = promoted(state, now)
        elif act == "settle":
            state = settled(state, now)
        assert RolloutState.model_validate_json(state.model_dump_json()) == state
        assert order.index(state.phase) >= order.index(before.phase)
        assert state.history[: len(before.history)] == before.history
        route = route_of(state, backend(4), backend(3) if champion else None)
        GatewayState(routes={"digits": route} if route else {})
        if before.phase == "running" and state.phase == "passed":
            assert state.sides[0].window.requests >= PLAN.min_requests
        if (state.phase, before.phase) == ("returned", "running"):
            assert state.why


# --- the store ----------------------------------------------------------------------------------------------


def finished(state: RolloutState) -> RolloutState:
    state = settled(abort(state, "x", 1), 2)
    return state.model_copy(update={"recorded": len(state.history)})


def test_one_rollout_of_a_workload_at_a_time(tmp_path):
    store = Rollouts(tmp_path)
    first = store.begin(started())
    assert store.begin(started()) == first
    with pytest.raises(RolloutActive, match="the rollout of version 4 by rita is under way"):
        store.begin(started(rollout_id="r2"))
    assert store.active("digits") == first
    assert store.open_workloads() == ("digits",)
    store.save(finished(first))
    assert (store.active("digits"), store.open_workloads()) == (None, ())
    second = store.begin(started(rollout_id="r2"))
    assert store.find("digits", "r1").outcome == "aborted"
    assert store.begin(started()).phase == "settled"
    assert store.active("digits") == second


def test_an_end_that_is_not_in_the_ledger_yet_still_keeps_the_next_one_waiting(tmp_path):
    store = Rollouts(tmp_path)
    store.begin(started())
    store.save(settled(abort(started(), "x", 1), 2))
    assert (store.active("digits"), store.open_workloads()) == (None, ("digits",))
    with pytest.raises(RolloutActive):
        store.begin(started(rollout_id="r2"))


def test_an_abort_without_a_rollout_is_none(tmp_path):
    store = Rollouts(tmp_path)
    assert store.abort("digits", "x") is None
    store.begin(started())
    assert store.abort("digits", "rolled back").outcome == "aborted"
    assert store.abort("digits", "rolled back").outcome == "aborted"
    assert store.last("digits").why == "shadow: rolled back"


def test_the_past_is_bounded_and_the_token_is_for_its_owner_alone(tmp_path):
    store = Rollouts(tmp_path)
    for number in range(MAX_ENDED + 3):
        store.save(finished(store.begin(started(rollout_id=f"r{number}"))))
    assert store.find("digits", "r0") is None
    assert store.find("digits", f"r{MAX_ENDED}") is not None
    files = [path for path in (tmp_path / "rollouts").rglob("*.json")]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
    assert started().token not in repr(started())


def test_a_file_that_is_torn_is_told_and_other_workloads_go_on(tmp_path):
    store = Rollouts(tmp_path)
    store.begin(started())
    path = tmp_path / "rollouts" / "digits.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(IntegrityLost, match="remove it to end the rollout"):
        store.active("digits")
    assert store.open_workloads() == ("digits",)
