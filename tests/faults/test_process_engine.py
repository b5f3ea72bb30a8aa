"""The process engine under fire: killed replicas and supervisors, two at once, children that won't end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ports import free_port

from tasks.engines.log_file import CHUNK_BYTES
from tasks.engines.process import ProcessEngine
from tasks.engines.program import Program, render_ini, succeeding
from tasks.engines.protocol import Job, JobState, Service
from tasks.engines.stray import has_ended, stray
from tasks.engines.supervisor import Supervisor
from tasks.spec.errors import BadRequest, TryAgain

pytestmark = pytest.mark.timeout(60)

HTTP = (sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path):
    built = ProcessEngine(tmp_path / "home")
    built.supervisor.start()
    yield built
    built.supervisor.stop()
    assert stray(tmp_path / "home") == []


def _until(true: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.03)


def _job(tmp_path: Path, script: str, key: str = "fault", **environment: str) -> Job:
    folder = tmp_path / key
    return Job(key=key, command=("sh", "-c", script), environment=environment, folder=str(folder))


def _service(tmp_path: Path, replicas: int = 1) -> Service:
    return Service(name="digits-0", command=HTTP, folder=str(tmp_path / "svc"), replicas=replicas)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def _daemon_pid(engine: ProcessEngine) -> int:
    return int((engine.supervisor.folder / "supervisord.pid").read_text())


def _programs_running(home: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for process in stray(home):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
            found[process.environ()["SUPERVISOR_PROCESS_NAME"]] += 1
    return found


def _in_processes(code: str, *arguments: Path, count: int) -> None:
    """Run the same code in several processes at once, and demand that each succeeds."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(count)]
    for process in started:
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 0, errors.decode()


def test_a_killed_replica_comes_back_on_its_port(engine, tmp_path):
    (replica,) = engine.start(_service(tmp_path))
    _until(lambda: _answers(replica.url))
    pid = engine.supervisor.info("svc-digits-0-0").pid
    os.kill(pid, signal.SIGKILL)
    _until(lambda: engine.supervisor.info("svc-digits-0-0").pid not in (0, pid))
    _until(lambda: _answers(replica.url))
    assert engine.replicas("digits-0") == (replica,)


def test_a_killed_launcher_leaves_no_child_on_its_port(engine, tmp_path):
    """As MLflow's: the process that supervisord started is not the one that listens."""
    port = free_port()
    listen = f"{sys.executable} -m http.server {port} --bind 127.0.0.1"
    launcher = ("sh", "-c", f"{listen} & wait")
    program = Program(
        name="launcher", command=succeeding(engine.supervisor.folder / "groups" / "launcher", launcher),
        folder=str(tmp_path), log=str(tmp_path / "launcher.log"),
    )  # fmt: skip
    engine.supervisor.add(program)
    url = f"http://127.0.0.1:{port}"
    _until(lambda: _answers(url))
    pid = engine.supervisor.info("launcher").pid
    (child,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    _until(lambda: has_ended(child) and _answers(url))
    assert psutil.Process(engine.supervisor.info("launcher").pid).children()
    assert "Address already in use" not in (tmp_path / "launcher.log").read_text()


def test_a_killed_supervisor_is_started_again_without_strays(engine, tmp_path):
    replicas = engine.start(_service(tmp_path, replicas=2))
    job = engine.submit(_job(tmp_path, "while :; do sleep 0.1; done"))
    programs = {"svc-digits-0-0", "svc-digits-0-1", "job-fault"}
    # What the daemon forked bears the name of its program from its exec on.
    _until(lambda: programs <= set(_programs_running(tmp_path / "home")))
    os.kill(_daemon_pid(engine), signal.SIGKILL)
    _until(lambda: not engine.supervisor.running())
    # Without the protection these would go on beside the new ones, on the ports that those need.
    assert programs <= set(_programs_running(tmp_path / "home"))
    with pytest.raises(TryAgain, match="drydock up starts it"):
        engine.poll(job)

    engine.supervisor.start()
    _until(lambda: all(_answers(replica.url) for replica in replicas))
    assert engine.replicas("digits-0") == replicas
    assert _programs_running(tmp_path / "home") == {"svc-digits-0-0": 1, "svc-digits-0-1": 1}
    assert engine.poll(job).state is JobState.MISSING


def test_a_process_that_renamed_itself_is_found_too(engine, tmp_path):
    pytest.importorskip("setproctitle")
    code = "import setproctitle, time; setproctitle.setproctitle('airflow scheduler'); time.sleep(600)"
    job = _job(tmp_path, "true").model_copy(update={"command": (sys.executable, "-c", code)})
    pid = engine.supervisor.info(engine.submit(job)).pid
    renamed = psutil.Process(pid)
    _until(lambda: renamed.cmdline()[:1] == ["airflow scheduler"])
    os.kill(_daemon_pid(engine), signal.SIGKILL)
    # Its environment is overwritten: only the session of the dead supervisor still names it.
    assert pid not in [process.pid for process in stray(tmp_path / "home")]
    _until(lambda: not engine.supervisor.running())
    engine.supervisor.start()
    assert has_ended(renamed)


def test_two_processes_that_submit_one_key_run_it_once(engine, tmp_path):
    code = """
        import sys
        from pathlib import Path
        from tasks.engines.process import ProcessEngine
        from tasks.engines.protocol import Job
        home, runs = map(Path, sys.argv[1:])
        script = f"echo run >> {runs}; sleep 1"
        job = Job(key="same", command=("sh", "-c", script), folder=str(runs.parent / "same"))
        handles = {ProcessEngine(home).submit(job) for _ in range(5)}
        assert handles == {"job-same"}, handles
    """
    runs = tmp_path / "runs"
    _in_processes(code, tmp_path / "home", runs, count=2)
    _until(lambda: engine.poll("job-same").state is JobState.SUCCEEDED)
    assert runs.read_text() == "run\n"


def test_processes_that_add_and_remove_at_once_do_not_disturb_each_other(engine, tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from tasks.engines.process import ProcessEngine
        from tasks.engines.protocol import Job
        home = Path(sys.argv[1])
        engine = ProcessEngine(home)
        for turn in range(6):
            key = f"p{os.getpid()}-{turn}"
            job = Job(key=key, command=("sleep", "600"), folder=str(home.parent / key))
            handle = engine.submit(job)
            assert engine.poll(handle).state == "running"
            engine.cancel(handle)
            assert engine.poll(handle).state == "missing"
    """
    _in_processes(code, tmp_path / "home", count=3)
    assert engine.supervisor.infos() == {}


def test_processes_that_start_the_supervisor_at_once_start_one(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from tasks.engines.supervisor import Supervisor
        Supervisor(Path(sys.argv[1])).start()
    """
    home = tmp_path / "home"
    _in_processes(code, home, count=4)
    config = str(home / "supervisor" / "supervisord.conf")
    assert len([p for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or ())]) == 1
    Supervisor(home).stop()
    assert not [p for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or ())]


def test_cancel_ends_a_child_that_ignores_sigterm(engine, tmp_path):
    script = "(trap '' TERM; sh -c 'echo $PPID' > child; while :; do sleep 0.1; done) & wait"
    handle = engine.submit(_job(tmp_path, script))
    path = tmp_path / "fault" / "child"
    _until(lambda: path.exists() and path.read_text().strip())
    child = psutil.Process(int(path.read_text()))
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert child.is_running(), "the fault must bite: the child ignores SIGTERM"
    began = time.monotonic()
    engine.cancel(handle)
    assert time.monotonic() - began < 8
    assert has_ended(child)
    assert stray(tmp_path / "home", name=handle) == []


def test_cancel_ends_a_child_in_its_own_session(engine, tmp_path):
    handle = engine.submit(_job(tmp_path, "setsid sleep 600 & sleep 600"))
    _until(lambda: len(stray(tmp_path / "home", name=handle)) >= 3)
    engine.cancel(handle)
    assert stray(tmp_path / "home", name=handle) == []


def test_a_job_cancelled_at_once_gets_its_sigterm(engine, tmp_path):
    for turn in range(12):
        job = Job(key=f"brief-{turn}", command=("sleep", "600"), folder=str(tmp_path))
        began = time.monotonic()
        engine.cancel(engine.submit(job))
        # Lost between fork and exec, it would take the 10 stop_seconds until SIGKILL.
        assert time.monotonic() - began < 8


def test_stop_leaves_nothing(tmp_path):
    engine = ProcessEngine(tmp_path / "home")
    engine.supervisor.start()
    engine.start(_service(tmp_path, replicas=2))
    engine.submit(_job(tmp_path, "(trap '' TERM; while :; do sleep 0.1; done) & sleep 600"))
    _until(lambda: len(stray(tmp_path / "home")) >= 4)
    engine.supervisor.stop()
    assert stray(tmp_path / "home") == []
    engine.supervisor.stop()
    with pytest.raises(TryAgain, match="drydock up"):
        engine.replicas()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGSEGV, 139)])
def test_a_signal_shows_as_128_and_its_number(engine, tmp_path, number, code):
    handle = engine.submit(_job(tmp_path, f"kill -{int(number)} $$"))
    _until(lambda: engine.poll(handle).state is JobState.FAILED)
    assert engine.poll(handle).exit_code == code


def test_a_command_that_does_not_exist_fails_with_127(engine, tmp_path):
    handle = engine.submit(Job(key="none", command=("/no/such/command",), folder=str(tmp_path)))
    _until(lambda: engine.poll(handle).state is JobState.FAILED)
    assert engine.poll(handle).exit_code == 127


def test_a_job_may_print_50_mb(engine, tmp_path):
    script = "yes 'a line of forty characters, with number' 2>/dev/null | head -c 50000000; echo; echo ü-end"
    handle = engine.submit(_job(tmp_path, script))
    _until(lambda: engine.poll(handle).state is JobState.SUCCEEDED, 30)
    offset = pieces = 0
    last = ""
    while True:
        text, following = engine.logs(handle, offset)
        if following == offset:
            break
        assert len(text) <= CHUNK_BYTES
        offset, last, pieces = following, text, pieces + 1
    assert last.endswith("\nü-end\n")
    assert offset == 50_000_000 + len("\nü-end\n".encode()) == (tmp_path / "fault" / "job.log").stat().st_size
    assert pieces == 48


def test_a_log_folder_that_went_away_blocks_nobody(engine, tmp_path):
    engine.start(_service(tmp_path))
    (tmp_path / "svc" / "replica-0.log").unlink()
    (tmp_path / "svc").rmdir()
    handle = engine.submit(_job(tmp_path, "exit 0"))
    _until(lambda: engine.poll(handle).state is JobState.SUCCEEDED)


def test_a_job_whose_submitter_died_halfway_does_not_run_later(tmp_path):
    engine = ProcessEngine(tmp_path / "home")
    engine.supervisor.start()
    engine.supervisor.stop()
    program = engine.render(_job(tmp_path, "true"))
    (engine.supervisor.programs / "job-fault.ini").write_text(render_ini(program, engine.supervisor.home))
    engine.supervisor.start()
    assert engine.supervisor.infos() == {}
    engine.supervisor.stop()


def test_a_service_that_cannot_live_is_not_running_and_its_neighbour_is(engine, tmp_path):
    engine.start(_service(tmp_path))
    broken = Service(name="broken", command=("false",), folder=str(tmp_path / "broken"))
    engine.start(broken)
    _until(lambda: engine.supervisor.info("svc-broken-0").state == "BACKOFF")
    assert [replica.running for replica in engine.replicas("broken")] == [False]
    assert [replica.running for replica in engine.replicas("digits-0")] == [True]
    engine.stop("broken")
    assert engine.supervisor.info("svc-broken-0") is None


@pytest.mark.parametrize("name", ["x" * 120, "a b; c # d %(here)s [e]"])
def test_a_home_may_have_a_long_or_an_odd_name(tmp_path, name, monkeypatch):
    engine = ProcessEngine(tmp_path / name)
    engine.supervisor.start()
    # Another process may have another TMPDIR, and must find the same supervisor.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (replica,) = engine.start(_service(tmp_path))
    _until(lambda: _answers(replica.url))
    os.kill(_daemon_pid(engine), signal.SIGKILL)
    _until(lambda: not engine.supervisor.running())
    engine.supervisor.start()
    assert engine.replicas() == (replica,)
    engine.supervisor.stop()
    assert stray(tmp_path / name) == []


def test_programs_are_added_changed_restarted_and_removed(engine, tmp_path):
    supervisor = engine.supervisor
    fields = {"name": "gateway", "command": ("sleep", "600"), "folder": str(tmp_path)}
    program = Program(**fields, log=str(tmp_path / "gateway.log"))
    assert supervisor.add(program) is True
    first = supervisor.info("gateway")
    assert supervisor.add(program) is False
    assert supervisor.info("gateway").pid == first.pid

    changed = program.model_copy(update={"environment": {"LEVEL": "2"}})
    assert supervisor.add(changed) is True
    second = supervisor.info("gateway")
    assert psutil.Process(second.pid).environ()["LEVEL"] == "2"
    supervisor.restart("gateway")
    _until(lambda: supervisor.info("gateway").pid not in (0, second.pid))
    _until(lambda: "LEVEL" in psutil.Process(supervisor.info("gateway").pid).environ())
    third = supervisor.info("gateway")
    supervisor.signal("gateway", signal.SIGKILL)
    _until(lambda: supervisor.info("gateway").pid not in (0, third.pid))

    supervisor.remove("gateway")
    supervisor.remove("gateway")
    assert supervisor.info("gateway") is None
    assert supervisor.kept() == {}
    with pytest.raises(BadRequest, match="no program 'gateway'; known: none"):
        supervisor.restart("gateway")
