"""A job as Docker Swarm's own requests, rendered purely: one service of one task for each node of the gang, pinned
to the host that it was given, and never restarted by the Swarm.

Swarm knows no-new-privileges from Docker 25 on; before, it is the daemons' own default that says it
(``"no-new-privileges": true`` in daemon.json). All else is as for containers of one daemon.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tasks.engines.container import LABEL, LOGS, STOP_SECONDS, TMP_BYTES, UID, filled, gang_name, host_rules, prefixed
from tasks.engines.depot import PORT, TOKEN
from tasks.engines.hosts import Place
from tasks.engines.leases import DEVICES, VISIBLE
from tasks.engines.protocol import MOUNT, ROOM, Job, Limits
from tasks.spec.value import Value

Json = dict[str, Any]
PORTER = ("python", "-m", "tasks.engines.porter")
DEPOT = ("python", "-m", "tasks.engines.depot")
# What NVIDIA's runtime, the default one of a host with GPUs, heeds.
# Of a depot: it holds nothing in memory but what it is sending.
DEPOT_LIMITS = Limits(cpus=1.0, memory_bytes=2**28, shm_bytes=2**20, pids=256)


class SwarmGang(Value):
    """A job's requests: an overlay network, a volume and a depot where it has a room, and one service a node."""

    network: Json
    volume: Json | None
    depot: Json | None
    services: dict[str, Json]


def render_swarm(job: Job, image: str, site: str, places: tuple[Place, ...], token: str) -> SwarmGang:
    """Return a job's requests. ``places``: of its nodes, in their order."""
    name = _short_name(site, job.key)
    labels = {f"{LABEL}.site": site, f"{LABEL}.job": job.key}
    network = {"Name": name, "Driver": "overlay", "Internal": True, "Attachable": True, "Labels": labels}
    services = {
        f"{name}-{job.attempt}-{node}": _service(job, node, name, image, labels, place, token)
        for node, place in enumerate(places)
    }
    if job.room is None:
        return SwarmGang(network=network, volume=None, depot=None, services=services)
    volume = {"Name": gang_name(site, job.key), "Labels": labels}
    depot = _depot(name, volume["Name"], image, labels, token)
    return SwarmGang(network=network, volume=volume, depot=depot, services=services)


def _short_name(site: str, key: str) -> str:
    """A key has up to 80 characters, and a name in a Swarm 63 with all that is added to it."""
    return f"{LABEL}-{site}-{key[:20]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _service(job: Job, node: int, network: str, image: str, labels: Json, place: Place, token: str) -> Json:
    # A name of this attempt's own: a host that is gone may be known by the old one for a while.
    alias = f"node-{job.attempt}-{node}"
    fill = {"{node}": str(node), "{first}": f"node-{job.attempt}-0"}
    carried = job.room is not None
    environment = {key: filled(value, fill) for key, value in job.environment.items()}
    environment |= {TOKEN: token} if carried else {}
    environment |= {VISIBLE: ",".join(place.gpus) or "void"}
    facts = {"rank": str(node), "attempt": str(job.attempt), "nodes": str(job.nodes)}
    facts |= {DEVICES: place.leases()} if place.gpus else {}
    container = {
        "Image": image,
        "Hostname": alias,
        "User": f"{UID}:{UID}",
        "Command": [*(PORTER if carried else ()), *(filled(part, fill) for part in job.command)],
        "Env": [f"{key}={value}" for key, value in sorted(environment.items())],
        "Dir": MOUNT if carried else ROOM,
        "ReadOnly": True,
        "Init": True,
        "CapabilityDrop": ["ALL"],
        "Privileges": {"NoNewPrivileges": True},
        "StopGracePeriod": STOP_SECONDS * 10**9,
        "Mounts": _mounts(job.limits),
        # Not the job's own labels: on the manager's host it would be taken for a depot.
        "Labels": prefixed(job.labels | facts | {"gang": network}),
    }
    template = {
        "ContainerSpec": container,
        "Resources": _resources(job.limits),
        "RestartPolicy": {"Condition": "none"},
        "Placement": {"Constraints": [f"node.id=={place.host}"]},
        "Networks": [{"Target": network, "Aliases": [alias]}],
        "LogDriver": {"Name": LOGS["Type"], "Options": LOGS["Config"]},
    }
    return {
        "labels": prefixed(job.labels | facts) | labels,
        "task_template": template,
        # Not replicated-job: with Docker 20.10 such a task, and its container, outlive their removed service.
        "mode": {"Replicated": {"Replicas": 1}},
        # A virtual address needs IPVS in the kernel; a name that leads to the one task needs nothing.
        "endpoint_spec": {"Mode": "dnsrr"},
    }


def _resources(limits: Limits) -> Json:
    bounds = {"NanoCPUs": int(limits.cpus * 1e9), "MemoryBytes": limits.memory_bytes, "Pids": limits.pids}
    # No generic resource: Swarm evicts a task that reserves one and has a network too (moby/moby issue 44378).
    return {"Limits": bounds, "Reservations": {"MemoryBytes": limits.memory_bytes}}


def _mounts(limits: Limits) -> list[Json]:
    def memory(target: str, size: int) -> Json:
        return {"Type": "tmpfs", "Target": target, "TmpfsOptions": {"SizeBytes": size, "Mode": 0o1777}}

    # A volume without a name is the node's own, takes its owner from the image's folder, and goes with the task.
    return [{"Type": "volume", "Target": MOUNT}, memory("/tmp", TMP_BYTES), memory("/dev/shm", limits.shm_bytes)]


def _depot(network: str, volume: str, image: str, labels: Json, token: str) -> Json:
    host = host_rules(DEPOT_LIMITS) | {
        "NetworkMode": network,
        "Mounts": [{"Type": "volume", "Source": volume, "Target": MOUNT}],
        "RestartPolicy": {"Name": "unless-stopped"},
    }
    return {
        "Image": image,
        "Hostname": "depot",
        "User": f"{UID}:{UID}",
        "WorkingDir": ROOM,
        "Entrypoint": [],
        "Cmd": list(DEPOT),
        "Env": [f"{TOKEN}={token}"],
        "ExposedPorts": {f"{PORT}/tcp": {}},
        "Labels": labels,
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {network: {"Aliases": ["depot"]}}},
    }
