"""Where the logs are: services, replicas and jobs by name, runs by Airflow's id."""

from __future__ import annotations

from pathlib import Path

from tasks.command.follow import task_name
from tasks.orchestrate.api import AirflowApi
from tasks.site import Site
from tasks.spec.errors import BadRequest


def known_logs(site: Site) -> dict[str, Path]:
    """Return every log by the name that ``drydock logs`` takes."""
    logs = site.home / "logs"
    found = {path.stem: path for path in logs.glob("*.log")}
    found |= {f"{path.parent.name}-{path.stem.split('-')[-1]}": path for path in logs.glob("*/replica-*.log")}
    found |= {path.parent.name: path for path in (site.home / "jobs").glob("*/job.log")}
    if (access := site.home / "gateway" / "access.log").exists():
        found["access"] = access
    return found


def read_log(site: Site, name: str) -> str:
    """Return the text of a log, or the logs of a run's tasks in the order in which they ended.

    Raises:
        BadRequest: no such log or run. TryAgain: Airflow, which has a run's logs, does not answer.
    """
    # Airflow's ids of runs: manual__2026-…, scheduled__…, asset_triggered__…
    if "__" in name and (found := run_log(AirflowApi(site), name)):
        return found
    return log_path(site, name).read_text(errors="replace")


def run_log(api: AirflowApi, run_id: str) -> str:
    """Return the logs of all of a run's tasks that have begun; empty where there is no such run."""
    dag_id = api.dag_of(run_id)
    if dag_id is None:
        return ""
    begun = [task for task in api.tasks(dag_id, run_id) if task["start_date"]]
    begun.sort(key=lambda task: (task["end_date"] or "9", task["task_id"]))
    return "\n".join(f"--- {task_name(task)}: {task['state']}\n{api.task_log(dag_id, run_id, task)}" for task in begun)


def log_path(site: Site, name: str) -> Path:
    """Return one log's path; a service's name means its first replica.

    Raises:
        BadRequest: no such log; the message lists the services' logs.
    """
    known = known_logs(site)
    for candidate in (name, f"{name}-0", f"airflow-{name}"):
        if candidate in known:
            return known[candidate]
    names = ", ".join(sorted(n for n, p in known.items() if p.parent == site.home / "logs")) or "none yet"
    raise BadRequest(f"log {name!r} is not there; services: {names}; ./drydock logs lists all")
