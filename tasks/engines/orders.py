"""What the job service is asked over HTTP: the whole schema. A field that is not here can't be asked for.

A job or a service names its image by the list, its limits, and nothing of the host: no path, device, network, user,
capability or runtime. The job service alone says what else a container gets (``container.host_rules``, ``places``).

    GET    /health                               no token
    POST   /jobs                  JobOrder       -> {handle}
    GET    /jobs/HANDLE                          -> JobStatus
    GET    /jobs/HANDLE/log?since=N              -> {text, offset}
    GET    /jobs/HANDLE/files?path=P             -> a tar stream, or 404
    POST   /jobs/HANDLE/cancel, /jobs/HANDLE/forget
    GET    /rooms/KEY                            -> {whole}
    PUT    /rooms/KEY             a tar stream
    PUT    /services              ServiceOrder   -> [Replica]
    GET    /services?name=N                      -> [Replica]
    POST   /services/NAME/drain, /services/NAME/stop

An error is ``{exit_code, message}``: the kinds of ``tasks.spec.errors``, there and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from tasks.engines.protocol import Job, Limits, Service
from tasks.spec.value import Value

KEY = r"^[a-z0-9][a-z0-9_-]{0,79}$"
NAME = r"^[a-z][a-z0-9-]{0,79}$"


# What the engines themselves write on a container, and go by.
OWN_LABELS = ("attempt", "devices", "facts", "gang", "host", "index", "job", "nodes", "port", "rank", "service", "site")


def _not_ours(labels: dict[str, str]) -> dict[str, str]:
    if own := sorted(set(labels) & set(OWN_LABELS)):
        raise ValueError(f"{own[0]!r} is the engine's own label, must be another name")
    return labels


Labels = Annotated[dict[str, str], AfterValidator(_not_ours)]


class Bounds(Value):
    """The limits of a container, each said: a default would be a limit that nobody chose."""

    cpus: float = Field(gt=0)
    memory_bytes: int = Field(ge=2**26)
    shm_bytes: int = Field(ge=2**20)
    pids: int = Field(ge=16, le=32768)
    gpus: int = Field(ge=0)


class JobOrder(Value):
    """A job as it is asked for; ``room``: it has one, sent before."""

    key: str = Field(pattern=KEY)
    command: tuple[str, ...] = Field(min_length=1)
    environment: dict[str, str] = {}
    labels: Labels = {}
    nodes: int = Field(default=1, ge=1, le=1024)
    attempt: int = Field(default=1, ge=1)
    image: str
    room: bool = False
    inside: bool = False
    limits: Bounds


class ServiceOrder(Value):
    """A service as it is asked for. What its replicas may read is the stack's affair."""

    name: str = Field(pattern=NAME)
    command: tuple[str, ...] = Field(min_length=1)
    environment: dict[str, str] = {}
    replicas: int = Field(default=1, ge=1, le=1024)
    labels: Labels = {}
    image: str
    limits: Bounds


def order_of_job(job: Job) -> JobOrder:
    """Return what a client sends for a job. Pure."""
    data = job.model_dump(mode="json", exclude={"folder"})
    return JobOrder.parse(data | {"room": job.room is not None}, f"job {job.key}")


def job_of(order: JobOrder, folder: Path, room: Path | None) -> Job:
    """Return the job that an order asks for; its log lies in ``folder``, what was sent for it in ``room``. Pure."""
    places = {"folder": str(folder), "room": str(room) if room else None}
    return Job.parse(order.model_dump(mode="json") | places, f"job {order.key}")


def order_of_service(service: Service) -> ServiceOrder:
    """Return what a client sends for a service. Pure."""
    data = service.model_dump(mode="json", exclude={"folder", "mounts"})
    return ServiceOrder.parse(data, f"service {service.name}")


def service_of(order: ServiceOrder) -> Service:
    """Return the service that an order asks for. Pure."""
    return Service.parse(order.model_dump(mode="json") | {"folder": "/"}, f"service {order.name}")


assert set(Bounds.model_fields) == set(Limits.model_fields), "a limit that could not be asked for"
