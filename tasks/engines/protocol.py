"""The two protocols of an engine.

A job ends; a service stays. Both are values, rendered purely into the back end's request, so that tests
compare the whole request without an engine. A back end's own errors become ours at this seam.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, model_validator

from tasks.spec.value import Value

# Where a container finds its room, which it may write: below the folder that every image has, empty, and our user owns.
MOUNT, ROOM = "/work", "/work/room"


class Limits(Value):
    """What one node of a job may use. A container is held to them; a process of this machine is not."""

    cpus: float = Field(default=1.0, gt=0)
    memory_bytes: int = Field(default=2 * 2**30, ge=2**26)
    shm_bytes: int = Field(default=2**28, ge=2**20, description="of the memory; NCCL and data loaders share by it")
    pids: int = Field(default=512, ge=16)
    gpus: int = Field(default=0, ge=0)


class Job(Value):
    """One command that ends, on one node or on several that live and die together: a gang.

    Its key names it: the same key twice is the same job. In ``command`` and ``environment`` ``{node}`` stands for
    the node's number and ``{first}`` for the host name of node 0.
    """

    key: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,79}$")
    command: tuple[str, ...] = Field(min_length=1)
    environment: dict[str, str] = {}
    folder: str = Field(description="the working folder on this machine; the job's log lies in it")
    labels: dict[str, str] = Field(default={}, description="workload, step, key")
    nodes: int = Field(default=1, ge=1)
    attempt: int = Field(default=1, ge=1, description="the fencing token: which start of this key it is")
    image: str | None = Field(default=None, description="a container's: its name on the list of allowed images")
    room: str | None = Field(default=None, description="a folder that a container finds as ROOM, copied by value")
    inside: bool = Field(default=False, description="a container's: it works in the stack's own state, as a step does")
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _gang_needs_containers(self) -> Job:
        if self.nodes > 1 and self.image is None:
            raise ValueError(f"nodes = {self.nodes}, must be 1 without an image: one machine is one node")
        if self.inside and (self.nodes > 1 or self.room is not None):
            raise ValueError("inside = true, must be false for a gang and for a job with a room of its own")
        return self


class JobState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    MISSING = "missing"


class JobStatus(Value):
    """A job as the engine sees it. ``exit_code`` is set where it ended; a signal shows as 128 + its number."""

    state: JobState
    exit_code: int | None = None
    cause: str = Field(default="", description="what the engine knows of a failure: out of memory, lost")


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

    def forget(self, handle: str) -> None:
        """Drop an ended job; its log stays. Idempotent."""


class RoomEngine(JobEngine, Protocol):
    """An engine whose nodes have no disk in common with us: rooms go there and come back by value."""

    shares_room: bool
    """Whether all nodes of a gang work in one room, so that what one of them writes the others find."""

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        """Copy ``<path>`` in the room of node 0 to ``target`` (a file, or a folder's content); False where it is not
        there. ``target`` is complete or absent."""


class Service(Value):
    """One model package served by replicas that the engine keeps alive."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,79}$", description="<workload>-<first 12 of the package digest>")
    command: tuple[str, ...] = Field(description="``{port}`` stands for the replica's port")
    environment: dict[str, str] = {}
    folder: str = Field(description="where the replicas' logs lie")
    replicas: int = Field(default=1, ge=1)
    labels: dict[str, str] = Field(default={}, description="workload, version, digest")
    image: str | None = Field(default=None, description="a container's: its name on the list of allowed images")
    mounts: dict[str, str] = Field(default={}, description="a container's: folders it may read, by their path in it")
    limits: Limits = Limits()


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
