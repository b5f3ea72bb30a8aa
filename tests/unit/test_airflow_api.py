"""How the command asks Airflow: questions are asked again, orders are not, and whoever stops watching is told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.cli import main
from tasks.command.up import retrain
from tasks.orchestrate import api as asking
from tasks.orchestrate.api import AirflowApi
from tasks.site import Site
from tasks.spec.errors import BadRequest, TryAgain
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(30)
ROOT = Path(__file__).parents[2]
RUNS = "/api/v2/dags/retrain_digits/dagRuns"


class Late(ThreadingHTTPServer):
    """An Airflow of which each path fails so often before it answers: by a 500, or by an answer that is late."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.failing: dict[str, tuple[int, str]] = {}
        self.released = threading.Event()

    def answer(self, line: str) -> tuple[int, Any]:
        self.asked[line] += 1
        times, how = self.failing.get(line, (0, ""))
        if self.asked[line] <= times:
            if how == "late":
                self.released.wait(10)
            return 500, {}
        known = {f"GET {RUNS}/r": {"state": "running"}, f"GET {RUNS}/r/taskInstances": {"task_instances": []}}
        return 200, known.get(line, {"access_token": "t", "dag_run_id": "r"})


class Handler(BaseHTTPRequestHandler):
    server: Late

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code, body = self.server.answer(f"{self.command} {self.path.partition('?')[0]}")
        try:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())
        except BrokenPipeError:
            pass  # the client waited no longer

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    monkeypatch.setattr(asking, "PAUSE_SECONDS", 0.01)
    server = Late()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(airflow: Late, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("DRYDOCK_AIRFLOW_PORT", str(airflow.server_address[1]))
    monkeypatch.setenv("DRYDOCK_HOME", str(tmp_path))
    monkeypatch.setenv("DRYDOCK_WORKLOADS", str(ROOT / "workloads"))
    return Site(resolve())


@pytest.mark.parametrize("how", ["late", "broken"])
def test_a_question_is_asked_three_times_and_no_more(airflow: Late, site: Site, how: str) -> None:
    line = f"GET {RUNS}/r"
    airflow.failing = {line: (2, how), "POST /auth/token": (1, how)}
    assert AirflowApi(site, timeout_seconds=0.2).run("retrain_digits", "r") == {"state": "running"}
    assert (airflow.asked[line], airflow.asked["POST /auth/token"]) == (3, 2)
    airflow.failing = {line: (99, how)}
    with pytest.raises(TryAgain, match="Airflow"):
        AirflowApi(site, timeout_seconds=0.2).run("retrain_digits", "r")
    assert airflow.asked[line] == 6


def test_a_run_is_never_triggered_twice_and_doubt_is_told(airflow: Late, site: Site) -> None:
    airflow.failing = {f"POST {RUNS}": (1, "late")}
    with pytest.raises(TryAgain, match=r"did not say in time whether its run began: .*/retrain_digits/runs first"):
        AirflowApi(site, timeout_seconds=0.2).trigger("retrain_digits", {})
    assert airflow.asked[f"POST {RUNS}"] == 1


def test_a_parameter_that_is_not_known_triggers_nothing(airflow: Late, site: Site) -> None:
    known = "nosuch is not known, must be one of .*max_epochs"
    for params, told in (({"nosuch": 1}, known), ({"ranks": 0}, "train.ranks")):
        with pytest.raises(BadRequest, match=told):
            retrain(site, "digits", params, print)
    assert not airflow.asked


def test_who_watches_on_a_full_disk_is_told_and_not_kept_waiting(
    airflow: Late, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.command.follow.free_bytes", lambda home: 4096)
    with pytest.raises(TryAgain, match=f"the disk is full at {site.home}: .* retrain_digits goes on then"):
        retrain(site, "digits", {}, print)
    assert airflow.asked[f"POST {RUNS}"] == 1


def test_who_stops_watching_is_told_that_the_run_goes_on(
    airflow: Late, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.command.follow.time.sleep", interrupt)
    monkeypatch.setattr("sys.argv", ["drydock", "run", "digits"])
    assert main() == 20
    error = capsys.readouterr().err
    url = f"{site.settings.airflow_url}/dags/retrain_digits/runs/r"
    assert error == f"error: no longer followed; the run goes on in Airflow: {url}, or ./drydock status\n"
    assert airflow.asked[f"POST {RUNS}"] == 1
