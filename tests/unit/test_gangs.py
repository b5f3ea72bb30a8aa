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
from tasks.gangs import Containers
from tasks.spec.errors import TryAgain

FILES = {"weights.safetensors": b"w", "history.jsonl": b'{"epoch": 1}\n'}
FILES["done.json"] = json.dumps({"weights_sha256": hashlib.sha256(b"w").hexdigest()}).encode()
RUNNING, DONE = JobStatus(state=JobState.RUNNING), JobStatus(state=JobState.SUCCEEDED, exit_code=0)
DIED = JobStatus(state=JobState.FAILED, exit_code=137)
AWAY = TryAgain("no Docker daemon answers")


class Restarting:
    """An engine whose answers are scripted, one each time; an error is raised. What ran is known dead afterwards."""

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
