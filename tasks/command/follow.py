"""Following a run of a DAG: a line for each task that ends, and the error of the one that failed."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from typing import Any

from tasks.orchestrate.api import ENDED, AirflowApi
from tasks.spec.errors import DrydockError, TryAgain, full_disk, heard
from tasks.store.space import free_bytes

POLL_SECONDS = 0.4
# So long nothing ended: then what runs is told.
QUIET_SECONDS = 20
# With less, Airflow's own database takes no writes and the run stands still.
STUCK_BYTES = 256 << 10
Say = Callable[[str], None]
MARKS = {
    "success": "done",
    "failed": "FAILED",
    "skipped": "skipped",
    "upstream_failed": "not run",
    "removed": "removed",
}


def follow(
    api: AirflowApi,
    dag_id: str,
    run_id: str,
    say: Say,
    until: frozenset[str] = frozenset(),
    seconds: float = 3600,
) -> str:
    """Tell each task's end; return the run's state, or ``reached`` once all tasks of ``until`` have succeeded.

    Raises:
        DrydockError: the run failed; kind and message are those of the failed task.
        TryAgain: it has not ended in time, or the person who watches stopped: in either case the run goes on; or the
            disk is full: it goes on once there is space.
    """
    try:
        return _follow(api, dag_id, run_id, say, until, seconds)
    except KeyboardInterrupt:
        where = f"{api.site.settings.airflow_url}/dags/{dag_id}/runs/{run_id}"
        raise TryAgain(f"no longer followed; the run goes on in Airflow: {where}, or ./drydock status") from None


def _follow(
    api: AirflowApi, dag_id: str, run_id: str, say: Say, until: frozenset[str], seconds: float
) -> str:
    told: set[tuple[Any, ...]] = set()
    deadline, said_at = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < deadline:
        tasks, run = api.tasks(dag_id, run_id), api.run(dag_id, run_id)
        before = len(told)
        for task in sorted(tasks, key=lambda t: (t["end_date"] or "", t["task_id"])):
            _tell(task, told, say)
            if task["state"] == "up_for_retry":
                _tell_retry(api, dag_id, run_id, task, told, say)
        if len(told) > before:
            said_at = time.monotonic()
        elif time.monotonic() - said_at > QUIET_SECONDS:
            _tell_running(tasks, say)
            said_at = time.monotonic()
        if until and until <= {task["task_id"] for task in tasks if task["state"] == "success"}:
            return "reached"
        if run["state"] in ENDED:
            if run["state"] == "failed":
                raise failure(api, dag_id, run_id, tasks)
            return str(run["state"])
        if free_bytes(api.site.home) < STUCK_BYTES:
            raise TryAgain(full_disk(api.site.home) + f"; {dag_id} goes on then")
        time.sleep(POLL_SECONDS)
    raise TryAgain(f"{dag_id}: run {run_id} has not ended after {seconds:.0f} s; it goes on in Airflow")


def failure(api: AirflowApi, dag_id: str, run_id: str, tasks: list[dict[str, Any]]) -> DrydockError:
    """Return the error of a failed run: the message of its first failed task."""
    failed = [task for task in tasks if task["state"] == "failed"]
    if not failed:
        return DrydockError(f"{dag_id}: run {run_id} failed without a failed task")
    task = failed[0]
    error = last_error(api.task_log(dag_id, run_id, task))
    return type(error)(f"{dag_id}.{task_name(task)}: {error}")


def last_error(log: str) -> DrydockError:
    """Return the error that a task's log ends with; one that we don't know is told by its last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if error := heard(line):
            return error
    return DrydockError(lines[-1] if lines else "its log is empty")


def _tell_retry(
    api: AirflowApi, dag_id: str, run_id: str, task: dict[str, Any], told: set[tuple[Any, ...]], say: Say
) -> None:
    """Say once a try why it failed and that it is tried again."""
    key = (task["task_id"], task["map_index"], task["try_number"])
    if key not in told:
        told.add(key)
        try:
            why: object = last_error(api.task_log(dag_id, run_id, task))
        except DrydockError:  # the log is not there yet, say; the run goes on
            why = "its log tells why"
        say(f"{task_name(task):<20} {'waits':<8} try {task['try_number']} failed: {why}; it is tried again")


def _tell_running(tasks: list[dict[str, Any]], say: Say) -> None:
    now = dt.datetime.now(dt.UTC)
    for task in tasks:
        if task["state"] in ("running", "deferred") and task["start_date"]:
            seconds = (now - dt.datetime.fromisoformat(task["start_date"])).total_seconds()
            say(f"{task_name(task):<20} {'runs':<8} {seconds:>6.0f} s")


def _tell(task: dict[str, Any], told: set[tuple[Any, ...]], say: Say) -> None:
    key = (task["task_id"], task["map_index"])
    if task["state"] not in MARKS or key in told:
        return
    told.add(key)
    seconds = f"{task['duration']:.1f} s" if task["duration"] else ""
    say(f"{task_name(task):<20} {MARKS[task['state']]:<8} {seconds:>8}")


def task_name(task: dict[str, Any]) -> str:
    return task["task_id"] if task["map_index"] < 0 else f"{task['task_id']}[{task['map_index']}]"
