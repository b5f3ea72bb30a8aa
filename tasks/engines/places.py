"""What a container of a stack may see of it: the network, the volumes and the secrets, by kind of container.

The job service reads them off itself. What is mounted in it, and is named here, is what it gives to others, so that a
client names no path of the host, no volume and no network.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tasks.spec.errors import BadRequest
from tasks.spec.value import Value

SECRETS = "/run/secrets/"
# Path in the container -> whether it may write there. A step does the platform's own work; a replica serves.
OF_STEP = {"/state": True, "/state/packages": True, "/state/predictions": False, "/workloads": False}
OF_REPLICA = {"/state/packages": False, "/state/predictions": True}
PROJECT, SERVICE = "com.docker.compose.project", "com.docker.compose.service"

Json = dict[str, Any]


class Places(Value):
    """One stack as its containers see it. ``of_step`` and ``of_replica`` are mounts as the Docker Engine takes them."""

    site: str
    network: str
    labels: dict[str, str]
    of_step: tuple[Json, ...]
    of_replica: tuple[Json, ...]


def places_of(own: Json, network: str) -> Places:
    """Return the places that a container, as the daemon inspects it, can give on: those of its own. Pure.

    Raises:
        BadRequest: it stands in no compose project, or in no network of that name, or has no state.
    """
    project = own["Config"]["Labels"].get(PROJECT)
    joined = [name for name in own["NetworkSettings"]["Networks"] if name == f"{project}_{network}"]
    if not project or not joined:
        raise BadRequest(f"the job service stands in no network {network!r} of a compose project; see its own labels")
    mounts = {mount["Destination"]: mount for mount in own["Mounts"]}
    if "/state" not in mounts:
        raise BadRequest("the job service has no volume at /state to give to steps; see docker-compose.yaml")
    secrets = {target: False for target in mounts if target.startswith(SECRETS)}
    return Places(
        site=hashlib.sha256(mounts["/state"]["Name"].encode()).hexdigest()[:8],
        network=joined[0],
        # `docker compose down --remove-orphans` takes along what bears these.
        labels={PROJECT: project, SERVICE: "jobs-own", "com.docker.compose.oneoff": "False"},
        of_step=_chosen(mounts, OF_STEP | secrets),
        of_replica=_chosen(mounts, OF_REPLICA),
    )


def _chosen(mounts: dict[str, Json], targets: dict[str, bool]) -> tuple[Json, ...]:
    return tuple(_mount(mounts[target], may_write) for target, may_write in sorted(targets.items()) if target in mounts)


def _mount(found: Json, may_write: bool) -> Json:
    source = found["Name"] if found["Type"] == "volume" else found["Source"]
    return {"Type": found["Type"], "Source": source, "Target": found["Destination"], "ReadOnly": not may_write}
