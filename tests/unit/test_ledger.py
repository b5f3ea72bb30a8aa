"""The ledger: intents by compare-and-set, the history that it tells, and the chain that shows an edit."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.release.ledger import LeaseHeld, Ledger
from tasks.release.model import (
    Backend,
    Route,
    Version,
    aliases_of,
    champion_of,
    extended,
    previous_of,
    service_name,
    utc_text,
)
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost, Refused, TryAgain

pytestmark = pytest.mark.timeout(60)


def version(number: int | str) -> Version:
    return Version(version=str(number), digest_sha256=hashlib.sha256(str(number).encode()).hexdigest())


def serve(ledger: Ledger, number: int, action: str = "promote", workload: str = "digits") -> None:
    champion = ledger.champion(workload)
    target = None if action == "retire" else version(number)
    name = f"{action}-{number}-{time.monotonic_ns()}"
    ledger.open_intent(
        workload,
        action,
        target,
        champion and champion.version,
        actor="rita",
        reason="because",
        intent_id=name,
    )
    ledger.commit(name)


def open_promote(ledger: Ledger, number: int, intent_id: str, expected: str | None = None, **more):
    return ledger.open_intent("digits", "promote", version(number), expected, "rita", "", intent_id, **more)


def tamper(ledger: Ledger, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(ledger.home / "ledger.db")) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path)


class TestIntent:
    def test_commit_makes_the_target_champion(self, ledger):
        intent = open_promote(ledger, 1, "a")
        assert (intent.state, intent.champion, ledger.champion("digits")) == ("open", None, None)
        assert ledger.open_intents() == (intent,)
        assert ledger.commit("a").state == "committed"
        assert ledger.champion("digits") == version(1)
        assert ledger.open_intents() == ()

    def test_undo_changes_nothing(self, ledger):
        open_promote(ledger, 1, "a")
        assert ledger.undo("a", "gateway is down").state == "undone"
        assert ledger.champion("digits") is None
        assert ledger.history("digits")[-1].reason == "gateway is down"

    def test_commit_and_undo_twice_add_no_row(self, ledger):
        open_promote(ledger, 1, "a")
        assert ledger.commit("a") == ledger.commit("a")
        open_promote(ledger, 2, "b", "1")
        assert ledger.undo("b", "x") == ledger.undo("b", "y")
        assert [row.kind for row in ledger.history("digits")] == ["intent", "commit", "intent", "undo"]

    def test_same_id_again_returns_what_became_of_it(self, ledger):
        first = open_promote(ledger, 1, "a")
        assert open_promote(ledger, 1, "a") == first
        ledger.commit("a")
        assert open_promote(ledger, 1, "a", expected="another").state == "committed"
        assert len(ledger.history("digits")) == 2

    def test_undone_id_is_opened_again(self, ledger):
        open_promote(ledger, 1, "a")
        ledger.undo("a", "down")
        assert open_promote(ledger, 1, "a").state == "open"
        assert ledger.commit("a").state == "committed"

    def test_id_of_another_intent(self, ledger):
        open_promote(ledger, 1, "a")
        with pytest.raises(BadRequest, match=r"digits: promote of version 1 by rita; ask with another"):
            open_promote(ledger, 2, "a")

    def test_refused_while_another_is_open_and_says_whose(self, ledger):
        open_promote(ledger, 1, "a")
        with pytest.raises(Refused, match=r"digits: promote of version 1 by rita: intent a is open since 20"):
            open_promote(ledger, 2, "b")
        ledger.open_intent("fraud", "promote", version(1), None, "rita", "", "c")

    def test_refused_where_the_champion_is_another(self, ledger):
        serve(ledger, 1)
        with pytest.raises(Refused, match=r"the champion is version 1, expected none"):
            open_promote(ledger, 2, "b")
        with pytest.raises(Refused, match=r"the champion is version 1, expected version 7"):
            open_promote(ledger, 2, "b", "7")

    def test_rollback_wins_over_an_open_promotion(self, ledger):
        serve(ledger, 1)
        serve(ledger, 2)
        open_promote(ledger, 3, "p", "2")
        ledger.open_intent("digits", "rollback", version(1), "2", "vic", "wrong answers", "r")
        rows = ledger.history("digits")[-3:]
        assert [(row.kind, row.intent_id) for row in rows] == [
            ("intent", "p"),
            ("undo", "p"),
            ("intent", "r"),
        ]
        assert [intent.intent_id for intent in ledger.open_intents()] == ["r"]
        with pytest.raises(Refused, match="was undone by rollback r"):
            open_promote(ledger, 3, "p", "2")
        with pytest.raises(Refused, match="is undone and can't be committed"):
            ledger.commit("p")

    def test_rollback_does_not_win_over_a_rollback(self, ledger):
        serve(ledger, 1)
        ledger.open_intent("digits", "rollback", version(1), "1", "vic", "x", "r")
        with pytest.raises(Refused, match="intent r is open"):
            ledger.open_intent("digits", "rollback", version(1), "1", "vic", "x", "s")

    @pytest.mark.parametrize("reason", ["", "  \n"])
    def test_rollback_needs_a_reason(self, ledger, reason):
        with pytest.raises(BadRequest, match="reason is empty"):
            ledger.open_intent("digits", "rollback", version(1), None, "vic", reason, "r")

    def test_bad_requests(self, ledger):
        for call in (
            lambda: open_promote(ledger, 1, " "),
            lambda: ledger.open_intent("digits", "promote", version(1), None, "", "", "a"),
            lambda: ledger.open_intent("digits", "promote", None, None, "rita", "", "a"),
            lambda: ledger.open_intent("digits", "retire", version(1), None, "rita", "", "a"),
            lambda: ledger.open_intent("../x", "promote", version(1), None, "rita", "", "a"),
            lambda: ledger.open_intent("digits", "promote", version(1), None, "rita", "\0", "a"),
            lambda: ledger.open_intent("digits", "promote", version(1), None, "rita", "\ud800", "a"),
            lambda: ledger.commit("unknown"),
            lambda: ledger.undo("unknown", "x"),
        ):
            with pytest.raises(BadRequest):
                call()
        assert ledger.history("digits") == ()

    def test_keeps_the_route_to_put_back(self, ledger):
        route = Route(backends=(Backend(service="digits-a", endpoints=("127.0.0.1:80", "[::1]:81"), weight=3),))
        open_promote(ledger, 1, "a", route=route)
        assert ledger.open_intent_of("digits").route == route


class TestHistory:
    def test_rollback_goes_one_further_back_each_time(self, ledger):
        for number in (1, 2, 3):
            serve(ledger, number)
        assert ledger.previous("digits") == version(2)
        serve(ledger, 2, "rollback")
        assert (ledger.champion("digits"), ledger.previous("digits")) == (version(2), version(1))
        serve(ledger, 1, "rollback")
        assert (ledger.champion("digits"), ledger.previous("digits")) == (version(1), None)
        serve(ledger, 3, "rollback")
        assert (ledger.champion("digits"), ledger.previous("digits")) == (version(3), version(1))

    def test_retired_goes_back_to_the_last_that_served(self, ledger):
        serve(ledger, 1)
        serve(ledger, 0, "retire")
        assert (ledger.champion("digits"), ledger.previous("digits")) == (None, version(1))
        assert ledger.workloads() == ("digits",)

    def test_at_a_time(self, ledger):
        before = dt.datetime.now(dt.UTC)
        serve(ledger, 1)
        between = dt.datetime.now(dt.UTC)
        serve(ledger, 2)
        assert ledger.at("digits", before) is None
        assert ledger.at("digits", between) == version(1)
        east = dt.timezone(dt.timedelta(hours=9))
        assert ledger.at("digits", between.astimezone(east)) == version(1)
        assert ledger.at("digits", dt.datetime.now(dt.UTC)) == version(2)
        with pytest.raises(BadRequest, match="has no zone"):
            ledger.at("digits", dt.datetime(2026, 1, 1))

    def test_rows_say_who_what_why_when(self, ledger):
        serve(ledger, 1)
        serve(ledger, 2)
        row = ledger.history("digits")[-1]
        assert (row.kind, row.action, row.actor, row.reason) == ("commit", "promote", "rita", "because")
        assert (row.target, row.previous) == (version(2), version(1))
        assert dt.datetime.fromisoformat(row.at).utcoffset() == dt.timedelta(0)

    def test_a_text_is_data_and_never_sql(self, ledger):
        nasty = "'); DROP TABLE ledger; --\"%s :x {y} é 漢 \n"
        ledger.open_intent("digits", "promote", version(nasty[:60]), None, nasty, nasty, nasty)
        ledger.commit(nasty)
        assert ledger.champion("digits").version == nasty[:60]
        assert ledger.history("digits")[0].reason == nasty
        assert ledger.champion("' OR 1=1 --") is None
        ledger.verify()

    def test_a_second_reader_sees_it(self, ledger):
        serve(ledger, 1)
        assert Ledger(ledger.home).champion("digits") == version(1)


class TestApproval:
    def test_binds_to_the_evidence(self, ledger):
        row = ledger.record_approval("digits", version(1), "e1", "rita", "looks right")
        assert ledger.decision("digits", version(1)) == row
        assert row.detail == {"evidence_sha256": "e1"}
        assert ledger.decision("digits", version(2)) is None
        assert ledger.decision("fraud", version(1)) is None
        assert ledger.record_approval("digits", version(1), "e1", "rita") == row
        again = ledger.record_approval("digits", version(1), "e2", "rita")
        assert ledger.decision("digits", version(1)) == again != row, "other evidence is another decision"
        assert ledger.decision("digits", version(1), until=dt.datetime.fromisoformat(row.at)) == row

    def test_a_later_rejection_voids_it(self, ledger):
        ledger.record_approval("digits", version(1), "e1", "rita")
        ledger.record_rejection("digits", version(1), "e1", "vic", "wrong labels")
        decision = ledger.decision("digits", version(1))
        assert (decision.kind, decision.actor) == ("rejection", "vic")
        with pytest.raises(BadRequest, match="reason is empty"):
            ledger.record_rejection("digits", version(1), "e1", "vic", "")


class TestChain:
    @pytest.fixture
    def filled(self, ledger):
        for number in (1, 2, 3):
            serve(ledger, number)
        return ledger

    def test_verifies(self, filled):
        checked = filled.verify()
        assert (checked.rows, checked.unsigned) == (6, 0)
        assert filled.head().seq == 6

    def test_empty_verifies(self, ledger):
        assert ledger.verify().rows == 0

    @pytest.mark.parametrize(
        ("statement", "message"),
        [
            ("UPDATE ledger SET actor = 'eve' WHERE seq = 4", "row 4 was edited"),
            ("UPDATE ledger SET at = at || '0' WHERE seq = 1", "row 1 was edited"),
            ('UPDATE ledger SET detail = \'{"by":"x"}\' WHERE seq = 6', "row 6 was edited"),
            ("UPDATE ledger SET reason = x'00ff' WHERE seq = 2", "row 2 was edited"),
            ("UPDATE ledger SET row_hash = 'x' WHERE seq = 3", "row 3 was edited"),
            ("DELETE FROM ledger WHERE seq = 1", "row 1 is missing"),
            ("DELETE FROM ledger WHERE seq = 3", "row 3 is missing"),
            ("DELETE FROM ledger WHERE seq = 6", "row 6 to 6 were cut off"),
            ("DELETE FROM ledger WHERE seq > 2", "row 3 to 6 were cut off"),
            ("DELETE FROM ledger", "row 1 to 6 were cut off"),
        ],
    )
    def test_names_the_row_that_was_changed(self, filled, statement, message):
        tamper(filled, statement)
        with pytest.raises(IntegrityLost, match=message):
            filled.verify()

    def test_a_cut_tail_takes_no_more_rows(self, filled):
        tamper(filled, "DELETE FROM ledger WHERE seq > 4")
        with pytest.raises(IntegrityLost, match="row 5 to 6 were cut off"):
            serve(filled, 4)

    def test_a_chain_built_anew_is_not_the_signed_one(self, filled, tmp_path):
        other = Ledger(tmp_path / "other", keys=filled.chain.keys)
        for number in (1, 2, 9):
            serve(other, number)
        shutil.copy(other.home / "ledger.db", filled.home / "ledger.db")
        with pytest.raises(IntegrityLost, match="row 6 is not the one that was signed"):
            Ledger(filled.home).verify()
        # Nor is it signed with the next row: that would make it true for ever.
        with pytest.raises(IntegrityLost, match="row 6 was edited, or one before it"):
            Ledger(filled.home).record_event("digits", "test", "eve", "one more")
        with pytest.raises(IntegrityLost, match="row 6 is not the one that was signed"):
            Ledger(filled.home).verify()

    @pytest.mark.parametrize("change", ["seq", "row_hash", "ed25519"])
    def test_a_forged_head_does_not_verify(self, filled, change):
        data = json.loads(filled.chain.head_path.read_text())
        data[change] = 4 if change == "seq" else "A" * len(str(data[change]))
        filled.chain.head_path.write_text(json.dumps(data))
        with pytest.raises(IntegrityLost, match=r"ledger\.head: its signature does not verify"):
            filled.verify()

    def test_a_missing_head_is_not_made_anew(self, filled):
        filled.chain.head_path.unlink()
        with pytest.raises(IntegrityLost, match="is missing or can't be read"):
            Ledger(filled.home).verify()
        with pytest.raises(IntegrityLost, match="is missing or can't be read"):
            serve(Ledger(filled.home), 4)

    def test_a_head_that_lags_is_a_crash_and_heals(self, filled):
        head = filled.chain.head_path.read_bytes()
        serve(filled, 4)
        filled.chain.head_path.write_bytes(head)
        assert filled.verify().unsigned == 2
        serve(filled, 5)
        assert filled.verify().unsigned == 0

    def test_a_file_that_is_no_database(self, filled):
        (filled.home / "ledger.db").write_bytes(b"no database at all" * 1000)
        with pytest.raises(IntegrityLost, match=r"ledger .* can't be read"):
            filled.verify()

    def test_a_clock_set_back_dates_no_row_before_its_forerunner(self, filled, monkeypatch):
        last = filled.history("digits")[-1].at
        monkeypatch.setattr(
            "tasks.release.chain.utc_text", lambda _time: utc_text(dt.datetime(2001, 1, 1, tzinfo=dt.UTC))
        )
        serve(filled, 4)
        assert filled.history("digits")[-1].at == last


KILLED = """
import os, signal, sys
from pathlib import Path
import tasks.release.chain as chain
from tasks.release.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
chain.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ledger.record_event("digits", "test", "child", "killed before the head is written")
"""


def test_killed_between_the_row_and_its_head(ledger):
    serve(ledger, 1)
    done = subprocess.run([sys.executable, "-c", KILLED, str(ledger.home)], check=False)
    assert done.returncode == -9
    assert ledger.verify().model_dump() == {"rows": 3, "unsigned": 1}
    serve(ledger, 2)
    assert ledger.verify().unsigned == 0


class TestLease:
    def test_is_exclusive_for_a_workload(self, ledger):
        with ledger.lease("digits"):
            with (
                pytest.raises(LeaseHeld, match="digits: another change is in progress"),
                ledger.lease("digits", 0.05),
            ):
                pass
            with ledger.lease("fraud", 0):
                pass
        with ledger.lease("digits", 0):
            pass

    def test_names_the_change_in_progress(self, ledger):
        open_promote(ledger, 1, "a")
        with ledger.lease("digits"), pytest.raises(TryAgain, match="promote of version 1 by rita"):
            ledger.lease("digits", 0).__enter__()

    def test_ends_with_its_process(self, ledger):
        code = (
            "import sys, time; from pathlib import Path; from tasks.release.ledger import Ledger\n"
            "with Ledger(Path(sys.argv[1])).lease('digits'): print('held', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(ledger.home)], stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            with pytest.raises(LeaseHeld), ledger.lease("digits", 0):
                pass
            child.kill()
            child.wait()
        with ledger.lease("digits", 1):
            pass


def test_many_writers_one_wins(ledger):
    """Compare-and-set without a lease: of eight at once exactly one opens each round."""
    opened: list[str] = []

    def race(name: str) -> None:
        mine = Ledger(ledger.home)
        for number in range(5):
            with contextlib.suppress(Refused):
                champion = mine.champion("digits")
                intent_id = f"{name}-{number}"
                mine.open_intent(
                    "digits",
                    "promote",
                    version(intent_id),
                    champion and champion.version,
                    name,
                    "",
                    intent_id,
                )
                opened.append(intent_id)
                assert len(mine.open_intents()) == 1
                mine.commit(intent_id)

    threads = [threading.Thread(target=race, args=(f"t{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = ledger.history("digits")
    assert [row.kind for row in rows] == ["intent", "commit"] * len(opened)
    commits = [row for row in rows if row.kind == "commit"]
    assert [row.previous for row in commits[1:]] == [row.target for row in commits[:-1]]
    assert ledger.verify().unsigned == 0
    assert opened


@given(
    st.lists(st.tuples(st.sampled_from(["promote", "rollback", "retire"]), st.integers(1, 4)), max_size=12)
)
def test_lineage_laws(moves):
    """Whatever came before: the target serves, previous differs from it, and both served once."""
    line, served = (), set()
    for action, number in moves:
        target = None if action == "retire" else version(number)
        served.add(target)
        line = extended(line, action, target)
        assert champion_of(line) == target
        assert previous_of(line) != target or target is None
        assert {previous_of(line)} <= served | {None}
        assert all(one != two for one, two in itertools.pairwise(line))
        assert set(aliases_of(line)) == {"champion", "previous"}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["open", "rollback", "commit", "undo"]), st.integers(1, 3)), max_size=10
    )
)
def test_any_order_of_calls_keeps_the_ledger_whole(tmp_path_factory, steps):
    """At most one open intent; every close follows its intent; the champion is the last commit's target."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    for step, number in steps:
        champion = ledger.champion("digits")
        with contextlib.suppress(DrydockError):
            if step in ("open", "rollback"):
                action = "promote" if step == "open" else "rollback"
                expected = champion and champion.version
                ledger.open_intent("digits", action, version(number), expected, "h", "r", f"{action}{number}")
            else:
                for action in ("promote", "rollback"):
                    with contextlib.suppress(DrydockError):
                        getattr(ledger, step)(f"{action}{number}", *(["why"] if step == "undo" else []))
        assert len(ledger.open_intents()) <= 1
    state = None
    for row in ledger.history("digits"):
        assert (row.kind == "intent") == (state is None)
        assert row.kind == "intent" or row.intent_id == state
        state = row.intent_id if row.kind == "intent" else None
    commits = [row for row in ledger.history("digits") if row.kind == "commit"]
    assert ledger.champion("digits") == (commits[-1].target if commits else None)
    assert ledger.verify().unsigned == 0


def test_service_name():
    assert service_name("digits", "0123456789abcdef" * 4) == "digits-0123456789ab"
