"""A job or a service as the Docker Engine's own requests, rendered purely.

Every container is held to the same rules: an image by digest, no root, no capability, no new privilege, a read-only
root, the declared mounts alone, limits on memory, processor, processes and logs, and no way to the outside.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tasks.engines.leases import DEVICES, VISIBLE
from tasks.engines.places import Places
from tasks.engines.protocol import MOUNT, ROOM, Job, Limits, Service
from tasks.spec.errors import BadRequest
from tasks.spec.value import Value

# The user that images/ makes; it owns what lies in a node's room.
UID = 10001
STOP_SECONDS = 10
TMP_BYTES = 2**28
LABEL = "drydock"
LOGS = {"Type": "json-file", "Config": {"max-size": "64m", "max-file": "2"}}


# The port of a replica that is asked inside the stack; there its name is its own.
REPLICA_PORT = 8080


class Gang(Value):
    """A job's requests: a network and a volume of its own, unless it works inside the stack, and one container a
    node."""

    network: dict[str, Any] | None
    volume: dict[str, Any] | None
    containers: dict[str, dict[str, Any]]


def site_id(home: Path) -> str:
    """Return what tells one state folder's containers from another's on the same daemon."""
    return hashlib.sha256(str(home).encode()).hexdigest()[:8]


def gang_name(site: str, key: str) -> str:
    return f"{LABEL}-{site}-{key}"


def render_gang(job: Job, image: str, site: str, devices: tuple[str, ...] = (), places: Places | None = None) -> Gang:
    """Return a job's requests for the Docker Engine. ``devices``: the leased GPUs, those of node 0 first; where none
    are named the daemon is asked for as many as the job wants.

    Raises:
        BadRequest: the job works inside the stack, and there is none.
    """
    name = gang_name(site, job.key)
    share = job.limits.gpus
    if job.inside:
        own = _inside(job, _node(job, 0, name, image, site, devices), places)
        return Gang(network=None, volume=None, containers={f"{name}-{job.attempt}-0": own})
    containers = {}
    for node in range(job.nodes):
        own = devices[node * share : (node + 1) * share]
        request = _node(job, node, name, image, site, own)
        request["Labels"] |= places.labels if places else {}
        containers[f"{name}-{job.attempt}-{node}"] = request
    labels = _labels(site, job.key)
    return Gang(
        network={"Name": name, "Driver": "bridge", "Internal": True, "CheckDuplicate": True, "Labels": labels},
        volume={"Name": name, "Labels": labels},
        containers=containers,
    )


def _node(job: Job, node: int, name: str, image: str, site: str, devices: tuple[str, ...]) -> dict[str, Any]:
    replace = {"{node}": str(node), "{first}": "node-0"}
    environment = {key: filled(value, replace) for key, value in job.environment.items()}
    # A runtime that is NVIDIA's by default gives every GPU to whoever asks for it so; none is given but by lease.
    environment.pop(VISIBLE, None)
    environment |= {} if job.limits.gpus else {VISIBLE: "void"}
    host = host_rules(job.limits) | {
        "NetworkMode": name,
        "Mounts": [{"Type": "volume", "Source": name, "Target": MOUNT}],
        "RestartPolicy": {"Name": "no"},
    }
    if job.limits.gpus:
        which = {"DeviceIDs": list(devices)} if devices else {"Count": job.limits.gpus}
        host["DeviceRequests"] = [{"Driver": "nvidia", "Capabilities": [["gpu"]]} | which]
    facts = {"rank": str(node), "attempt": str(job.attempt), "nodes": str(job.nodes)}
    facts |= {DEVICES: ",".join(devices)} if devices else {}
    return {
        "Image": image,
        "Hostname": f"node-{node}",
        "User": f"{UID}:{UID}",
        "WorkingDir": ROOM,
        "Entrypoint": [],
        "Cmd": [filled(part, replace) for part in job.command],
        "Env": [f"{key}={value}" for key, value in sorted(environment.items())],
        "Labels": prefixed(job.labels) | prefixed(facts) | _labels(site, job.key),
        "StopTimeout": STOP_SECONDS,
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {name: {"Aliases": [f"node-{node}"]}}},
    }


def _inside(job: Job, request: dict[str, Any], places: Places | None) -> dict[str, Any]:
    """Return a node's request with the stack's network, state and secrets in place of those of a gang."""
    if places is None:
        raise BadRequest(f"job {job.key}: inside = true, but this engine stands in no stack; set it to false")
    host = request["HostConfig"] | {"NetworkMode": places.network, "Mounts": list(places.of_step)}
    labels = request["Labels"] | places.labels
    return request | {"HostConfig": host, "WorkingDir": MOUNT, "Labels": labels, "NetworkingConfig": {}}


def replica_host(service: str, index: int) -> str:
    """Return the name of a replica inside the stack: a label of DNS holds 63 characters, a service's name 80."""
    return f"replica-{hashlib.sha256(f'{service}-{index}'.encode()).hexdigest()[:12]}"


def render_replica_inside(service: Service, index: int, image: str, places: Places) -> dict[str, Any]:
    """Return the request of one replica of a stack: it is asked by its name, and published nowhere."""
    request = render_replica(service, index, REPLICA_PORT, image, places.site, places.network)
    host = {name: value for name, value in request["HostConfig"].items() if name != "PortBindings"}
    name = replica_host(service.name, index)
    return request | {
        "Hostname": name,
        "Labels": request["Labels"] | places.labels | {f"{LABEL}.host": name},
        "HostConfig": host | {"Mounts": list(places.of_replica)},
        # Prometheus finds them all by the name that they share.
        "NetworkingConfig": {"EndpointsConfig": {places.network: {"Aliases": ["replica", name]}}},
    }


def render_replica(service: Service, index: int, port: int, image: str, site: str, network: str) -> dict[str, Any]:
    """Return the request of one replica, which answers on 127.0.0.1:``port`` of this machine."""
    inside = f"{port}/tcp"
    host = host_rules(service.limits) | {
        "NetworkMode": network,
        "PortBindings": {inside: [{"HostIp": "127.0.0.1", "HostPort": str(port)}]},
        "RestartPolicy": {"Name": "unless-stopped"},
        "Mounts": [
            {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
            for target, source in sorted(service.mounts.items())
        ],
    }
    facts = {"service": service.name, "index": str(index), "port": str(port), "facts": json.dumps(service.labels)}
    return {
        "Image": image,
        "User": f"{UID}:{UID}",
        "Entrypoint": [],
        "Cmd": [part.replace("{port}", str(port)) for part in service.command],
        "Env": [f"{key}={value}" for key, value in sorted(service.environment.items())],
        "Labels": {f"{LABEL}.site": site} | prefixed(facts),
        "ExposedPorts": {inside: {}},
        "StopTimeout": STOP_SECONDS,
        "HostConfig": host,
    }


def host_rules(limits: Limits) -> dict[str, Any]:
    """Return the part of every container's request that holds it."""
    return {
        "Memory": limits.memory_bytes,
        "MemorySwap": limits.memory_bytes,  # the sum with swap, so: no swap
        "NanoCpus": int(limits.cpus * 1e9),
        "PidsLimit": limits.pids,
        "ShmSize": limits.shm_bytes,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "ReadonlyRootfs": True,
        "Tmpfs": {"/tmp": f"rw,nosuid,nodev,size={TMP_BYTES}"},
        "Init": True,
        "LogConfig": LOGS,
    }


def prefixed(labels: dict[str, str]) -> dict[str, str]:
    return {f"{LABEL}.{name}": value for name, value in labels.items()}


def _labels(site: str, key: str) -> dict[str, str]:
    return {f"{LABEL}.site": site, f"{LABEL}.job": key}


def filled(text: str, replace: dict[str, str]) -> str:
    for mark, value in replace.items():
        text = text.replace(mark, value)
    return text
