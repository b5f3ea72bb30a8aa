"""Steps forked from a process that has imported for them: the same ends as without, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.engines.process import ProcessEngine, forked
from tasks.engines.program import Program
from tasks.engines.protocol import Job, JobState, JobStatus
from tasks.engines.stray import has_ended, stray

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
# ``bench.loaded`` is imported by the server alone; a step tells whether it finds it there.
STEP = """
import json, os, signal, sys, time
facts = {"warm": "bench.loaded" in sys.modules, "parent": os.getppid(), "arguments": sys.argv[1:],
         "level": os.environ.get("LEVEL"), "server_only": os.environ.get("SERVER_ONLY"), "folder": os.getcwd()}
print(json.dumps(facts), flush=True)
if sys.argv[1] == "sleep":
    time.sleep(600)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def package(tmp_path):
    """A package whose module ``bench.loaded`` takes its time, as torch does."""
    folder = tmp_path / "path" / "bench"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "loaded.py").write_text("VALUE = 1\n")
    (folder / "__main__.py").write_text(STEP)
    return folder


@pytest.fixture
def engine(tmp_path, package):
    built = ProcessEngine(tmp_path / "home")
    built.supervisor.start()
    yield built
    built.supervisor.stop()
    assert stray(tmp_path / "home") == []


@pytest.fixture
def server(engine, tmp_path, package):
    folder = engine.supervisor.folder
    line = (sys.executable, "-m", "tasks.engines.forkserver", str(folder), "--watch", str(package), "bench.loaded")
    environment = {"PYTHONPATH": f"{ROOT}:{package.parent}", "SERVER_ONLY": "1"}
    log = str(tmp_path / "server.log")
    engine.supervisor.add(
        Program(name="fork-server", command=line, environment=environment, folder=str(folder), log=log)
    )
    _until(lambda: (folder / "fork.sock").exists())
    return lambda: engine.supervisor.info("fork-server").pid


def _until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def _job(package: Path, tmp_path: Path, *arguments: str, key: str = "step") -> Job:
    environment = {"PYTHONPATH": str(package.parent), "LEVEL": "2"}
    command = (sys.executable, "-m", "bench", *arguments)
    return Job(key=key, command=command, environment=environment, folder=str(tmp_path / key))


def _ended(engine: ProcessEngine, handle: str) -> JobStatus:
    _until(lambda: engine.poll(handle).state is not JobState.RUNNING)
    return engine.poll(handle)


def _facts(engine: ProcessEngine, handle: str) -> dict:
    _until(lambda: "\n" in engine.logs(handle)[0])
    return json.loads(engine.logs(handle)[0].splitlines()[-1])


def _the_fork(server) -> psutil.Process:
    _until(lambda: psutil.Process(server()).children())
    (fork,) = psutil.Process(server()).children()
    return fork


def test_a_fork_looks_as_if_the_supervisor_had_started_it(engine, server, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "3", "a b"))
    assert _ended(engine, handle) == JobStatus(state=JobState.FAILED, exit_code=3)
    facts = _facts(engine, handle)
    assert (facts["warm"], facts["parent"]) == (True, server())
    assert (facts["arguments"], facts["level"], facts["server_only"]) == (["3", "a b"], "2", None)
    assert facts["folder"] == str(tmp_path / "step")


def test_a_fork_that_dies_by_a_signal_ends_its_job_by_it(engine, server, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "die"))
    assert _ended(engine, handle).exit_code == 128 + signal.SIGSEGV


def test_a_cancelled_job_takes_its_fork_along(engine, server, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "sleep"))
    fork = _the_fork(server)
    engine.cancel(handle)
    assert has_ended(fork)
    assert engine.poll(handle).state is JobState.MISSING


def test_a_fork_ends_with_the_process_that_asked_for_it(engine, server, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "sleep"))
    fork = _the_fork(server)
    os.kill(engine.supervisor.info(handle).pid, signal.SIGKILL)
    _until(lambda: not psutil.Process(server()).children())
    assert has_ended(fork)
    assert engine.poll(handle).exit_code == 128 + signal.SIGKILL


def test_a_server_that_dies_fails_its_jobs_and_comes_back(engine, server, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "sleep"))
    before, fork = server(), _the_fork(server)
    os.kill(before, signal.SIGKILL)
    assert _ended(engine, handle).exit_code == 70
    _until(lambda: has_ended(fork))
    _until(lambda: server() not in (0, before))
    _until(lambda: _facts(engine, engine.submit(_job(package, tmp_path, "0", key=f"k{time.time_ns()}")))["warm"])


def test_after_a_source_changed_no_job_runs_the_old_one(engine, server, package, tmp_path):
    before = server()
    sleeper = engine.submit(_job(package, tmp_path, "sleep", key="sleeper"))
    fork = _the_fork(server)
    (package / "loaded.py").write_text("VALUE = 22\n")
    facts = _facts(engine, engine.submit(_job(package, tmp_path, "0", key="after")))
    assert not facts["warm"]
    assert fork.is_running(), "what had begun goes on"
    engine.cancel(sleeper)
    _until(lambda: server() not in (0, before))


def test_without_a_server_a_job_runs_by_itself(engine, package, tmp_path):
    handle = engine.submit(_job(package, tmp_path, "0"))
    assert _ended(engine, handle).exit_code == 0
    assert not _facts(engine, handle)["warm"]


def test_a_client_of_another_session_runs_by_itself(engine, server, package):
    line = forked((sys.executable, "-m", "bench", "0"), engine.supervisor.folder)
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(line, env=environment, capture_output=True, timeout=20, check=True, start_new_session=True)
    assert not json.loads(done.stdout)["warm"]


def test_a_command_that_is_no_module_stays_as_it_is(tmp_path):
    assert forked(("sh", "-c", "true"), tmp_path) == ("sh", "-c", "true")
