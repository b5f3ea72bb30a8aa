"""The hosts of a Swarm: what each has free, and which of them take the nodes of a gang."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tasks.engines.protocol import Job
from tasks.spec.errors import BadRequest, TryAgain

# The generic resource that a daemon offers: --node-generic-resource gpu=GPU-… for each.
GPU = "gpu"
# A task in one of these holds what it reserved.
HOLDING = ("new", "pending", "assigned", "accepted", "preparing", "ready", "starting", "running")
Json = dict[str, Any]


class Host(NamedTuple):
    """A host: what it has, and what of it nothing holds."""

    id: str
    name: str
    is_ready: bool
    memory_bytes: int
    gpus: tuple[str, ...]
    free_memory_bytes: int
    free_gpus: tuple[str, ...]
    num_tasks: int = 0


class Place(NamedTuple):
    """Where a node of a gang goes: a host by its id, and GPUs of it."""

    host: str
    gpus: tuple[str, ...] = ()

    def leases(self) -> str:
        """What a label says of it; every GPU of a Swarm has a name of its own there."""
        return ",".join(f"{self.host}/{gpu}" for gpu in self.gpus)


def read_hosts(nodes: Iterable[Json], tasks: Iterable[Json], leased: set[str]) -> list[Host]:
    """Return the hosts as a Swarm's manager lists its nodes and tasks. ``leased``: what labels say. Pure."""
    held: dict[str, list[Json]] = {}
    for task in tasks:
        if task["Status"]["State"] in HOLDING and task.get("NodeID"):
            held.setdefault(task["NodeID"], []).append(task)
    return [_host(node, held.get(node["ID"], []), leased) for node in nodes]


def _host(node: Json, held: list[Json], leased: set[str]) -> Host:
    there = node["Description"]["Resources"]
    memory, gpus = there.get("MemoryBytes", 0), _gpus(there)
    reserved = [task["Spec"].get("Resources", {}).get("Reservations", {}).get("MemoryBytes", 0) for task in held]
    # What others let the Swarm give them.
    given = {gpu for task in held for gpu in _gpus(task)}
    return Host(
        id=node["ID"],
        name=node["Description"]["Hostname"],
        is_ready=node["Status"]["State"] == "ready" and node["Spec"]["Availability"] == "active",
        memory_bytes=memory,
        gpus=gpus,
        free_memory_bytes=memory - sum(reserved),
        free_gpus=tuple(gpu for gpu in gpus if gpu not in given and f"{node['ID']}/{gpu}" not in leased),
        num_tasks=len(held),
    )


def _gpus(resources: Json) -> tuple[str, ...]:
    """The GPUs among generic resources: by their ids, or by their numbers where they are only counted."""
    found: list[str] = []
    for one in resources.get("GenericResources") or []:
        named, counted = one.get("NamedResourceSpec"), one.get("DiscreteResourceSpec")
        if named and named["Kind"] == GPU:
            found.append(named["Value"])
        elif counted and counted["Kind"] == GPU:
            found += map(str, range(counted["Value"]))
    return tuple(found)


def place(job: Job, hosts: list[Host]) -> tuple[Place, ...]:
    """Return the place of each node: different hosts as long as there are, those with the least to do first.

    Pure. A host that is down counts for what the Swarm has, not for what it has now.

    Raises:
        BadRequest: the Swarm has not so much, however long one waits. TryAgain: it has not now.
    """
    idle = [host._replace(free_memory_bytes=host.memory_bytes, free_gpus=host.gpus) for host in hosts]
    if lacking := _lacking(job, idle):
        raise BadRequest(f"job {job.key}: {lacking}, none of the Swarm's {len(hosts)} hosts has; lower train.resources")
    ready = [host for host in hosts if host.is_ready]
    if lacking := _lacking(job, ready):
        raise TryAgain(
            f"job {job.key}: {lacking}, no host has free now ({len(hosts) - len(ready)} of {len(hosts)} are down); it "
            "waits its turn"
        )
    return _fitted(job, ready)


def _lacking(job: Job, hosts: list[Host]) -> str:
    """Say which node fits nowhere; nothing where all do."""
    placed = len(_fitted(job, hosts))
    if placed == job.nodes:
        return ""
    asked = f"{job.limits.memory_bytes} bytes of memory" + (f" and {job.limits.gpus} GPUs" if job.limits.gpus else "")
    return f"{asked} for node {placed} of {job.nodes}"


def _fitted(job: Job, hosts: list[Host]) -> tuple[Place, ...]:
    """Place as many nodes as fit."""
    placed: list[Place] = []
    left = {host.id: host for host in hosts}
    for _ in range(job.nodes):
        fit = [
            host
            for host in left.values()
            if host.free_memory_bytes >= job.limits.memory_bytes and len(host.free_gpus) >= job.limits.gpus
        ]
        if not fit:
            break
        taken = [place.host for place in placed]
        best = min(fit, key=lambda host: (taken.count(host.id), host.num_tasks, host.id))
        placed.append(Place(best.id, best.free_gpus[: job.limits.gpus]))
        left[best.id] = best._replace(
            free_memory_bytes=best.free_memory_bytes - job.limits.memory_bytes,
            free_gpus=best.free_gpus[job.limits.gpus :],
        )
    return tuple(placed)
