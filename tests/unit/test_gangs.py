"""A gang as it is followed, on an engine of a few lines: its daemon goes away and comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import gangs
from tasks.engines.protocol import JobState, JobStatus
from tasks.gangs import Containers, Followed
from tasks.spec.errors import DrydockError, IntegrityLost, TryAgain
from tasks.store.manifest import write_manifest
from tasks.train.gang import ACCUMULATE
from tasks.train.history import History

FILES = {"weights.safetensors": b"w", "history.jsonl": b'{"epoch": 1}\n'}
FILES["done.json"] = json.dumps({"weights_sha256": hashlib.sha256(b"w").hexdigest()}).encode()
RUNNING, DONE = JobStatus(state=JobState.RUNNING), JobStatus(state=JobState.SUCCEEDED, exit_code=0)
DIED = JobStatus(state=JobState.FAILED, exit_code=137)
AWAY = TryAgain("no Docker daemon answers")


class Restarting:
    """An engine whose answers are scripted, one each time; an error is raised. What ran is known dead afterwards."""

    shares_room = True

    def __init__(self, polls: list[Any], submits: list[Any]) -> None:
        self.polls, self.submits, self.attempts, self.forgotten = iter(polls), iter(submits), [], 0
        self.ended = False

    def submit(self, job: Any) -> str:
        if (answer := next(self.submits)) is AWAY:
            raise AWAY
        self.attempts.append(job.attempt)
        return str(answer)

    def poll(self, handle: str) -> JobStatus:
        if (answer := next(self.polls)) is AWAY:
            raise AWAY
        self.ended = answer is DONE
        return answer

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        return "", since

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        if not self.ended or path not in FILES:
            return False
        target.write_bytes(FILES[path])
        return True

    def forget(self, handle: str) -> None:
        self.forgotten += 1


@pytest.fixture
def run(train_request, tmp_path, monkeypatch) -> Callable[[Restarting], list[str]]:
    monkeypatch.setattr(gangs.time, "sleep", lambda seconds: None)

    def go(engine: Restarting) -> list[str]:
        told: list[str] = []
        gang = Containers(engine, "a-key", {}, tmp_path / "logs", told.append)
        gang.run(train_request(), tmp_path, lambda line: None)
        return told

    return go


def restarted() -> Restarting:
    return Restarting([RUNNING, AWAY, AWAY, AWAY, DIED, RUNNING, DONE], ["job-a-key", AWAY, AWAY, "job-a-key"])


def test_a_daemon_that_restarts_is_waited_for_and_its_gang_started_again(run, tmp_path):
    engine = restarted()
    assert len(run(engine)) == 1
    assert engine.attempts == [1, 2], "one new attempt, with a higher token"
    assert engine.forgotten == 1
    assert (tmp_path / "done.json").exists()


def test_without_patience_it_fails(run, monkeypatch):
    """The same daemon, and a gang that waits for nobody: what the test before holds is the patience."""
    monkeypatch.setattr(gangs, "DAEMON_SECONDS", -1.0)
    with pytest.raises(TryAgain, match="no Docker daemon answers"):
        run(restarted())


def test_a_daemon_that_is_not_there_at_all_is_told_at_once(run):
    engine = Restarting([], [AWAY])
    with pytest.raises(TryAgain, match="no Docker daemon answers"):
        run(engine)
    assert engine.attempts == []


class Failing(Restarting):
    """An engine whose gangs fail, but for those that ``fits`` likes."""

    def __init__(self, status: JobStatus, fits: Callable[[Any], bool] = lambda job: False) -> None:
        super().__init__([], [])
        self.status, self.fits, self.jobs = status, fits, []

    def submit(self, job: Any) -> str:
        self.jobs.append(job)
        return "job-a-key"

    def poll(self, handle: str) -> JobStatus:
        self.ended = self.fits(self.jobs[-1])
        return DONE if self.ended else self.status


class Learning(Failing):
    """Of its gangs every second one gets an epoch further before it fails."""

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        return "a line", since + 6

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        if self.ended or path != "history.jsonl":
            return super().fetch(handle, path, target)
        lines = [json.dumps({"epoch": epoch}) for epoch in range(1, (len(self.jobs) + 1) // 2 + 1)]
        target.write_text("\n".join(lines))
        return True


STARVED = JobStatus(state=JobState.FAILED, exit_code=137, cause="out of memory")


def parts(engine: Failing) -> list[str]:
    return [job.environment[ACCUMULATE] for job in engine.jobs]


def test_out_of_memory_halves_the_micro_batch_until_it_fits(run):
    engine = Failing(STARVED, lambda job: job.environment[ACCUMULATE] == "4")
    assert [line.partition("again ")[2] for line in run(engine)] == [
        "with each rank's batch in 2 parts",
        "with each rank's batch in 4 parts",
    ]
    assert parts(engine) == ["1", "2", "4"]


def test_without_smaller_micro_batches_it_never_fits(run, monkeypatch):
    monkeypatch.setattr(gangs, "_smaller", lambda train, accumulate: accumulate)
    engine = Failing(STARVED, lambda job: job.environment[ACCUMULATE] == "4")
    with pytest.raises(DrydockError, match="the gang failed 4 times, the last time: out of memory"):
        run(engine)
    assert parts(engine) == ["1", "1", "1", "1"]


def test_starts_are_bounded_and_further_and_further_apart(run, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(gangs.time, "sleep", waits.append)
    engine = Failing(DIED)
    with pytest.raises(DrydockError, match="the gang failed 4 times, the last time: exit code 137; no checkpoint was"):
        run(engine)
    assert [job.attempt for job in engine.jobs] == [1, 2, 3, 4]
    assert waits == [1, 2, 4]


def test_failures_with_epochs_between_are_not_counted_together(run, monkeypatch):
    """A training of weeks may meet any number, as long as it gets further."""
    waits: list[float] = []
    monkeypatch.setattr(gangs.time, "sleep", waits.append)
    engine = Learning(DIED, lambda job: job.attempt == 8)
    run(engine)
    assert waits == [1, 2, 1, 2, 1, 2, 1]  # seconds, from every second start on an epoch more


def test_without_the_bound_a_storm_goes_on(run, monkeypatch):
    monkeypatch.setattr(gangs, "MAX_STARTS", 50)
    engine = Failing(DIED)
    with pytest.raises(DrydockError, match="the gang failed 50 times"):
        run(engine)
    assert len(engine.jobs) == 50


@pytest.mark.parametrize(("nodes", "shares_room", "says"), [(2, False, True), (2, True, False), (1, False, False)])
def test_only_launchers_that_share_no_room_restart_nothing(train_request, tmp_path, nodes, shares_room, says):
    job = gangs.gang_job(train_request(nodes=nodes), tmp_path, 1, 1, shares_room, key="a", folder="/x")
    assert ("--restarts=0" in job.command) is says


class Rotten(Restarting):
    """Its gang ends well with other weights than it says."""

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        found = super().fetch(handle, path, target)
        if found and path == "weights.safetensors":
            target.write_bytes(b"x")
        return found


def test_a_result_that_rotted_is_not_adopted_again(run, tmp_path):
    engine = Rotten(polls=[DONE], submits=["job-k"])
    with pytest.raises(IntegrityLost, match="weights have digest"):
        run(engine)
    assert engine.forgotten == 1


class Saving(Restarting):
    """Its gang has saved every epoch up to the last one that it told of."""

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        if not path.startswith("checkpoints/"):
            return False
        target.mkdir(parents=True)
        (target / "model").write_text(path)
        write_manifest(target)
        return True


def test_of_the_checkpoints_that_are_copied_as_many_are_kept_as_the_workload_says(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    history = History(tmp_path / "history.jsonl", lambda line: None)
    followed = Followed(Saving([], []), "job-k", tmp_path, history, keep=2)
    for epoch in (1, 2, 3, 4):
        history.seen = epoch
        followed.mirror()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-00003", "epoch-00004"]
