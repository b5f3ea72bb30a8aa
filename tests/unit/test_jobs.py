"""A step as a job: a process on a laptop, a container in a stack. Pure."""

from __future__ import annotations

import sys

import pytest

from tasks.orchestrate.jobs import job_for
from tasks.plan import request_for
from tasks.site import Site
from tasks.spec.load import load_workload
from tasks.spec.settings import resolve

STACK = {"DRYDOCK_ENGINE": "remote", "DRYDOCK_JOBS_URL": "http://jobs:8070", "DRYDOCK_JOBS_TOKEN": "/run/secrets/t"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD_FILE", "/run/secrets/mlflow-password")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")

    def make(step: str = "ingest", **environ: str):
        site = Site(resolve({"DRYDOCK_HOME": str(tmp_path)} | environ))
        request = request_for("ingest", load_workload(site.workloads, "digits"), {}, site)
        return job_for(step, request, site)

    return make


def test_a_process_runs_this_python(job):
    found = job()
    assert found.command[0] == sys.executable
    assert (found.image, found.inside) == (None, False)


def test_a_container_works_inside_the_stack_with_secrets_named_by_their_files(job):
    found = job(**STACK, DRYDOCK_STEP_MEMORY_BYTES=str(1 << 30))
    assert (found.image, found.inside, found.limits.memory_bytes) == ("drydock/airflow", True, 1 << 30)
    assert found.command[:5] == ("with-secrets", "python", "-m", "tasks", "step")
    assert found.environment["MLFLOW_TRACKING_PASSWORD_FILE"] == "/run/secrets/mlflow-password"
    assert "hush" not in str(found)
    assert found.environment["TMPDIR"] == found.folder, "its /tmp is memory"


def test_what_needs_torch_runs_where_torch_is(job, monkeypatch):
    monkeypatch.setattr("tasks.orchestrate.jobs.job_key", lambda step, request: f"{step}-1")
    found = job("compress", **STACK)
    assert (found.image, found.command[0]) == ("drydock/trainer", "python")
    assert "MLFLOW_TRACKING_PASSWORD_FILE" not in found.environment
