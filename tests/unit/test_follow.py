"""What a person reads while a run goes on: ends, tries that failed, and that something still runs."""

from __future__ import annotations

import datetime as dt
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.command import follow as module
from tasks.command.follow import follow
from tasks.spec.errors import TryAgain


class Airflow:
    """Answers with one round of states after the other, the last one for ever."""

    def __init__(self, home: Any, *rounds: dict[str, str]) -> None:
        self.site = SimpleNamespace(home=home)
        self._rounds, self._at = rounds, 0

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        states = self._rounds[min(self._at, len(self._rounds) - 1)]
        self._at += 1
        began = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=65)).isoformat()
        common = {"map_index": -1, "try_number": 1, "start_date": began, "end_date": None, "duration": 1.0}
        return [common | {"task_id": name, "state": state} for name, state in states.items()]

    def run(self, dag_id: str, run_id: str) -> dict[str, str]:
        return {"state": "success" if self._at > len(self._rounds) else "running"}

    def task_log(self, dag_id: str, run_id: str, task: dict[str, Any]) -> str:
        return "starting\nTryAgain: MLflow does not answer\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


def lines(airflow):
    said = []
    assert follow(airflow, "retrain_w", "r", said.append) == "success"
    return [" ".join(line.split()) for line in said]


def test_a_try_that_failed_is_told_once_with_its_error(tmp_path):
    waits = {"plan": "success", "ingest": "up_for_retry"}
    said = lines(Airflow(tmp_path, {"plan": "running"}, waits, waits, {"plan": "success", "ingest": "success"}))
    assert sorted(said) == [
        "ingest done 1.0 s",
        "ingest waits try 1 failed: MLflow does not answer; it is tried again",
        "plan done 1.0 s",
    ]


def test_what_runs_long_is_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    said = lines(Airflow(tmp_path, {"train": "running"}, {"train": "deferred"}, {"train": "success"}))
    assert said == ["train runs 65 s", "train runs 65 s", "train done 1.0 s"]


def test_a_run_that_does_not_end_in_time_goes_on(tmp_path):
    with pytest.raises(TryAgain, match="has not ended after 0 s; it goes on in Airflow"):
        follow(Airflow(tmp_path, {"train": "running"}, {"train": "running"}), "retrain_w", "r", print, seconds=0)
