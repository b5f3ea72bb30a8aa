"""A step as an engine's job: its command, its folder, and what its end means. No Airflow here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tasks.engines.protocol import Job, JobState, JobStatus, Limits
from tasks.site import Site
from tasks.spec.errors import BY_EXIT_CODE, DrydockError, TryAgain
from tasks.spec.value import Value
from tasks.steps import finished, gang_key, job_key
from tasks.store.files import write_json

# What a step needs torch for runs where torch is; MLflow, DVC and Great Expectations are in the other image.
TRAINER, PLATFORM = "drydock/trainer", "drydock/airflow"
NEED_TORCH = ("compress",)
# Of our own environment: how a step in a container finds MLflow and the store. Secrets are named by their files.
PASSED_ON = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD_FILE"),
    *("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID_FILE", "AWS_SECRET_ACCESS_KEY_FILE"),
)


def job_for(step: str, request: Value, site: Site) -> Job:
    """Return the job that runs one step: ``drydock step NAME request.json``, as a process or in a container."""
    key = job_key(step, request)
    folder = site.home / "jobs" / key
    job = Job(
        key=key,
        command=(sys.executable, "-m", "tasks", "step", step, str(folder / "request.json")),
        environment=site.settings.environment | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
        folder=str(folder),
        labels={"step": step, "workload": str(getattr(request, "workload", "")), "key": key},
    )
    return job if site.settings.engine == "process" else _in_container(step, job, site)


def _in_container(step: str, job: Job, site: Site) -> Job:
    """Return a step's job as a container of the stack: it works in the same state, in the image that it needs."""
    needs_torch = step in NEED_TORCH
    program = ("python",) if needs_torch else ("with-secrets", "python")
    passed = {} if needs_torch else {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    limits = Limits(cpus=site.settings.cores, memory_bytes=site.settings.step_memory_bytes, pids=1024)
    own = {"image": TRAINER if needs_torch else PLATFORM, "inside": True, "limits": limits}
    # Its /tmp is memory; what a room is packed into may be larger.
    passed |= {"TMPDIR": job.folder}
    own |= {"command": (*program, *job.command[1:]), "environment": job.environment | passed}
    return job.model_copy(update=own)


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
        site.training_engine.cancel(gang_key(handle))


def forget(step: str, request: Value, site: Site) -> None:
    """Drop the job of a step whose result is there: its task may have been killed before it could. Idempotent."""
    with contextlib.suppress(DrydockError):
        site.engine.forget(f"job-{job_key(step, request)}")


def outcome(step: str, request: Value, status: JobStatus, site: Site) -> Value:
    """Return the result of a job that ended.

    Raises:
        DrydockError: the step's own error, by its exit code; TryAgain where the job was killed or lost.
    """
    if result := finished(step, request, site, just_now=True):
        return result
    if status.state is JobState.MISSING:
        raise TryAgain(f"{step}: its job is gone (the supervisor was restarted); it starts again")
    folder = Path(job_for(step, request, site).folder)
    if status.exit_code == 0:
        raise TryAgain(
            f"{step}: its job ended well, but with other code than this process has, so its result is not the one "
            "asked for: the sources changed, or the images are of different trees (images/build makes them all)"
        )
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
