"""The watchdog over ranks, and the fence around a room."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tasks.train.fence import Fence, Fenced, newest_attempt
from tasks.train.watch import Watch, Watchdog

pytestmark = pytest.mark.timeout(30)


def forked(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def ended(pid: int) -> int:
    """Return the signal that ended a child, 0 where it ended by itself."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("how", [lambda: os.kill(os.getpid(), signal.SIGSTOP), lambda: time.sleep(30)])
def test_a_rank_that_is_stopped_or_hangs_is_killed(how):
    dog = Watchdog(2)
    dog.start()

    def hang() -> None:
        Watch(dog, 1, hang_seconds=0.3).beat()
        how()

    began = time.monotonic()
    assert ended(forked(hang)) == -signal.SIGKILL
    assert time.monotonic() - began < 5


def test_without_the_watchdog_a_stopped_rank_stays():
    """The same rank as above, and a watchdog that was never started: what ends it there is the watchdog."""
    dog = Watchdog(1)

    def hang() -> None:
        Watch(dog, 0, hang_seconds=0.3).beat()
        os.kill(os.getpid(), signal.SIGSTOP)

    pid = forked(hang)
    time.sleep(1.5)
    assert dog.late() == [pid]
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL


def test_a_rank_that_goes_on_and_one_that_is_done_are_left_alone():
    dog = Watchdog(1)
    dog.start()

    def work() -> None:
        watch = Watch(dog, 0, hang_seconds=0.5)
        for _ in range(10):
            time.sleep(0.1)
            watch.beat()
        watch.stop()
        time.sleep(1)

    assert ended(forked(work)) == 0


def test_a_slow_step_makes_the_limit_longer():
    dog = Watchdog(1)
    watch = Watch(dog, 0, hang_seconds=0.1)
    time.sleep(0.2)
    watch.beat()
    time.sleep(0.5)
    assert dog.late() == [], "ten times the longest step is 2 seconds"


def test_only_children_are_killed():
    """The number of a rank that died may be another process's by now."""
    dog = Watchdog(1)
    dog.expect(0, time.monotonic() - 1)  # this very process, which is no child of its own
    assert dog.late() == []


def test_without_a_watchdog_a_rank_runs_as_ever():
    watch = Watch(None, 0, hang_seconds=1)
    watch.beat()
    watch.stop()


def test_only_the_newest_attempt_writes(tmp_path):
    old, new = Fence(tmp_path, 1), Fence(tmp_path, 2)
    assert (old.claim(), old.claim()) == (True, False)
    with old.held():
        (tmp_path / "by").write_text("old")
    assert new.claim()
    for refused in (old.claim, old.check, old.held().__enter__):
        with pytest.raises(Fenced, match="attempt 1 woke up after attempt 2 began: its writes are refused"):
            refused()
    with new.held():
        (tmp_path / "by").write_text("new")
    assert ((tmp_path / "by").read_text(), newest_attempt(tmp_path)) == ("new", 2)


def test_without_the_check_an_old_attempt_writes_over_the_new_one(tmp_path, monkeypatch):
    old = Fence(tmp_path, 1)
    old.claim()
    Fence(tmp_path, 2).claim()
    monkeypatch.setattr(Fence, "check", lambda fence: None)
    with old.held():
        (tmp_path / "by").write_text("old")
    assert (tmp_path / "by").read_text() == "old"


def test_a_claim_waits_for_a_write_that_is_under_way(tmp_path):
    old, order = Fence(tmp_path, 1), []
    old.claim()

    def claim() -> None:
        Fence(tmp_path, 2).claim()
        order.append("claimed")

    with old.held():
        thread = threading.Thread(target=claim)
        thread.start()
        time.sleep(0.2)
        order.append("written")
    thread.join()
    assert order == ["written", "claimed"]
