"""The two protocols of an engine.

A job ends; a service stays. Both are values, rendered purely into the back end's request, so that tests
compare the whole request without an engine. A back end's own errors become ours at this seam.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

from pydantic import Field

from tasks.spec.value import Value


class Job(Value):
    """One command that ends. Its key names it: the same key twice is the same job."""

    key: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,79}$")
    command: tuple[str, ...] = Field(min_length=1)
    environment: dict[str, str] = {}
    folder: str = Field(description="the working folder; the job's log lies in it")
    labels: dict[str, str] = Field(default={}, description="workload, step, key")


class JobState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    MISSING = "missing"


class JobStatus(Value):
    """A job as the engine sees it. ``exit_code`` is set where it ended; a signal shows as 128 + its number."""

    state: JobState
    exit_code: int | None = None


class JobEngine(Protocol):
    def render(self, job: Job) -> Any:
        """Return the back end's request for a job. Pure."""

    def submit(self, job: Job) -> str:
        """Start a job and return its handle. A job of this key that runs or has succeeded is adopted; one
        that failed is started again."""

    def poll(self, handle: str) -> JobStatus:
        """Return the state; an unknown handle is MISSING, never SUCCEEDED."""

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        """Return what the job printed from byte ``since`` on, and the offset to go on from."""

    def cancel(self, handle: str) -> None:
        """End the job and all its children. Idempotent; leaves nothing behind."""


class Service(Value):
    """One model package served by replicas that the engine keeps alive."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,79}$", description="<workload>-<first 12 of the package digest>")
    command: tuple[str, ...] = Field(description="``{port}`` stands for the replica's port")
    environment: dict[str, str] = {}
    folder: str = Field(description="where the replicas' logs lie")
    replicas: int = Field(default=1, ge=1)
    labels: dict[str, str] = Field(default={}, description="workload, version, digest")


class Replica(Value):
    """One running copy of a service."""

    service: str
    index: int
    host: str
    port: int
    running: bool
    labels: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class ServiceEngine(Protocol):
    def start(self, service: Service) -> tuple[Replica, ...]:
        """Start the replicas (those that run stay as they are) and return them. Idempotent."""

    def replicas(self, name: str | None = None) -> tuple[Replica, ...]:
        """Return the replicas of one service, or of all; an unknown service has none."""

    def drain(self, name: str) -> None:
        """Tell a service's replicas to end and return at once: they answer what they have. Idempotent."""

    def stop(self, name: str) -> None:
        """Drain (SIGTERM, then a bounded wait) and remove a service. Idempotent."""
