"""What orchestration costs: the retrain through Airflow beside the same steps in one process.

Starts a stack of its own on free ports in a temporary state folder, so nothing of the user's is touched. The
reference for Airflow itself is a DAG of as many empty tasks in a chain, on the same scheduler.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.command.follow import follow
from tasks.orchestrate.api import AirflowApi
from tasks.site import Site
from tasks.spec.settings import resolve

EMPTY = '''"""As many empty tasks in a chain as the retrain's longest path has."""
from airflow.sdk import DAG, chain
from airflow.providers.standard.operators.python import PythonOperator


def nothing():
    """What an empty task does."""


with DAG("bench_empty", schedule=None):
    chain(*[PythonOperator(task_id=f"task_{n}", python_callable=nothing) for n in range(10)])
'''
UPSTREAM = {
    "ingest": ["plan"],
    "clean": ["ingest"],
    "validate_data": ["clean"],
    "validate_labels": ["clean"],
    "version": ["validate_data", "validate_labels"],
    "train": ["version"],
    "evaluate_champion": ["version"],
    "compress": ["train"],
    "evaluate": ["compress"],
    "judge": ["evaluate", "evaluate_champion"],
    "register": ["judge"],
}


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows. Seconds unless the name says otherwise."""
    base = Path(tempfile.mkdtemp(prefix="drydock-bench-"))
    environment = _environment(site, base)
    own = Site(resolve(environment))
    try:
        up_seconds = _command(environment, "up")
        api = AirflowApi(own)
        wall, tasks = _first_run(api)
        unchanged = _command(environment, "run", "digits")
        api.wait_for_dag("bench_empty")
        empty = [_run(api, "bench_empty", {})[0] for _ in range(2)][-1]
        time.sleep(20)
        idle_bytes = _proportional_bytes(own)
        local = _command(environment | {"DRYDOCK_HOME": str(base / "local")}, "run", "digits", "--local")
    finally:
        _command(environment, "down")
        shutil.rmtree(base, ignore_errors=True)
    path, on_path = critical_path(tasks)
    overhead = wall - path
    return [
        _row("cold start of an installed machine: up to a live prediction", up_seconds, 90),
        _row("retrain through Airflow, wall", wall, None),
        _row("its critical path of the tasks' own durations", path, None),
        _row("orchestration, ratio of the wall", overhead / wall, 0.15),
        _row("orchestration per task on that path", overhead / on_path, 2),
        _row("the same steps in one process (run --local)", local, None),
        _row("ratio: Airflow / one process", wall / local, 2),
        _row("reference: bare Airflow, 10 empty tasks in a chain, per task", empty / 10, None),
        _row("an unchanged run", unchanged, 10),
        _row("idle stack, GB of proportional memory", idle_bytes / 1e9, 2.5),
    ]


def critical_path(tasks: list[dict[str, Any]]) -> tuple[float, int]:
    """Return the longest chain of task durations, and how many tasks are on it. Mapped tasks count as the
    longest of their mapping."""
    seconds: dict[str, float] = {}
    for task in tasks:
        seconds[task["task_id"]] = max(seconds.get(task["task_id"], 0.0), task["duration"] or 0.0)
    ends: dict[str, tuple[float, int]] = {}

    def end(name: str) -> tuple[float, int]:
        if name not in ends:
            before = max((end(up) for up in UPSTREAM.get(name, [])), default=(0.0, 0))
            ends[name] = (before[0] + seconds.get(name, 0.0), before[1] + 1)
        return ends[name]

    return end("register")


def _first_run(api: AirflowApi) -> tuple[float, list[dict[str, Any]]]:
    """The retrain that ``up`` triggered: every step was new."""
    run = api.runs("retrain_digits", 1)[0]
    return _seconds(run["start_date"], run["end_date"]), api.tasks("retrain_digits", run["dag_run_id"])


def _run(api: AirflowApi, dag_id: str, conf: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    run_id = api.trigger(dag_id, conf)
    follow(api, dag_id, run_id, lambda line: None)
    run = api.run(dag_id, run_id)
    return _seconds(run["start_date"], run["end_date"]), api.tasks(dag_id, run_id)


def _seconds(start: str, end: str) -> float:
    return (dt.datetime.fromisoformat(end) - dt.datetime.fromisoformat(start)).total_seconds()


def _command(environment: dict[str, str], *arguments: str) -> float:
    started = time.monotonic()
    command = [sys.executable, "-P", "-m", "tasks", *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _environment(site: Site, base: Path) -> dict[str, str]:
    root = base / "root"
    for name in ("dags", "mlflow", "great_expectations"):
        shutil.copytree(site.root / name, root / name)
    shutil.copytree(site.root / "workloads" / "digits", base / "workloads" / "digits")
    (root / "dags" / "bench_empty.py").write_text(EMPTY)
    ports = ("AIRFLOW", "MLFLOW", "GATEWAY", "GATEWAY_ADMIN")
    own = {f"DRYDOCK_{name}_PORT": str(port) for name, port in zip(ports, _free_ports(len(ports)), strict=True)}
    own |= {"DRYDOCK_HOME": str(base / "home"), "DRYDOCK_ROOT": str(root)}
    own |= {"DRYDOCK_WORKLOADS": str(base / "workloads")}
    return {name: value for name, value in os.environ.items() if not name.startswith("DRYDOCK_")} | own


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _proportional_bytes(site: Site) -> float:
    """The sum of PSS (shared pages divided among their sharers) of every process of the stack."""
    import psutil

    daemon = psutil.Process(int((site.home / "supervisor" / "supervisord.pid").read_text()))
    return float(sum(process.memory_full_info().pss for process in [daemon, *daemon.children(recursive=True)]))


def _row(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "limit": limit, "ok": limit is None or value <= limit}


if __name__ == "__main__":
    print(json.dumps(bench(Site()), indent=2))
