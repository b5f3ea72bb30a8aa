"""A step as an engine's job: its command, its folder, and what its end means. No Airflow here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tasks.engines.protocol import Job, JobState, JobStatus
from tasks.site import Site
from tasks.spec.errors import BY_EXIT_CODE, DrydockError, TryAgain
from tasks.spec.value import Value
from tasks.steps import finished, job_key
from tasks.store.files import write_json


def job_for(step: str, request: Value, site: Site) -> Job:
    """Return the job that runs one step as a container would: ``drydock step NAME request.json``."""
    key = job_key(step, request)
    folder = site.home / "jobs" / key
    return Job(
        key=key,
        command=(sys.executable, "-m", "tasks", "step", step, str(folder / "request.json")),
        environment=site.settings.environment | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
        folder=str(folder),
        labels={"step": step, "workload": str(getattr(request, "workload", "")), "key": key},
    )


def submit(step: str, request: Value, site: Site) -> str:
    """Write the request and start its job, or adopt the one that runs; return the handle."""
    job = job_for(step, request, site)
    folder = Path(job.folder)
    write_json(folder / "request.json", request.model_dump(mode="json"))
    return site.engine.submit(job)


def cancel(handle: str, site: Site) -> None:
    """End a step's job, and the gang that it may have started: its own way to do so may be cut off."""
    site.engine.cancel(handle)
    if site.settings.training_engine != "process":
        site.training_engine.cancel(handle)


def outcome(step: str, request: Value, status: JobStatus, site: Site) -> Value:
    """Return the result of a job that ended.

    Raises:
        DrydockError: the step's own error, by its exit code; TryAgain where the job was killed or lost.
    """
    if result := finished(step, request, site):
        return result
    if status.state is JobState.MISSING:
        raise TryAgain(f"{step}: its job is gone (the supervisor was restarted); it starts again")
    folder = Path(job_for(step, request, site).folder)
    raise failure(folder, status) or TryAgain(f"{step}: its job ended with exit code {status.exit_code}; see its log")


def failure(folder: Path, status: JobStatus) -> DrydockError | None:
    """Return the error that a step left beside its request, if it is the one of this exit."""
    try:
        error: dict[str, Any] = json.loads((folder / "error.json").read_text())
    except (OSError, ValueError):
        return None
    if error.get("exit_code") != status.exit_code:
        return None
    return BY_EXIT_CODE[error["exit_code"]](error["message"])
