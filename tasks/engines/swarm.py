"""The engine of many hosts: the nodes of a gang are services of a Docker Swarm, on different hosts.

    job <key>  → a volume drydock-<site>-<key>, an overlay network, a depot container, services …-<attempt>-<node>

Hosts share no disk. The depot, on this daemon, holds the room; each node brings it from there and takes back what it
writes (``depot``, ``porter``). A host that is lost is a node that failed; the next attempt is placed on the hosts that
are left, or waits for them (``hosts``). Replicas are containers of this daemon (``docker_services``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from tasks.engines import leases
from tasks.engines.container import LABEL, STOP_SECONDS
from tasks.engines.container_logs import entries
from tasks.engines.docker_client import tolerating_missing, translated
from tasks.engines.docker_jobs import DEVICES_LABEL, DockerJobs, Lines, Node, unix
from tasks.engines.hosts import HOLDING, Place, place, read_hosts
from tasks.engines.images import digest_of_image
from tasks.engines.porter import STARVED
from tasks.engines.protocol import Job
from tasks.engines.swarm_gang import SwarmGang, render_swarm
from tasks.spec.errors import BadRequest, DrydockError, TryAgain

# The manager assigns a task to its host within a blink, or can't.
ASSIGN_SECONDS = 10.0
# A host that is down ends nothing, and its network stays until it is back.
REMOVAL_SECONDS = STOP_SECONDS + 10.0
# How long a host may think about its log.
LOG_SECONDS = 5.0
LOOK_SECONDS = 0.1
ENDED = ("complete", "failed", "rejected", "orphaned", "shutdown", "remove")
Json = dict[str, Any]


class SwarmEngine(DockerJobs):
    """Jobs as services of the Swarm that this daemon manages."""

    shares_room = False

    def render(self, job: Job) -> SwarmGang:
        """Return a job's requests, as if the hosts were called 0, 1, …"""
        places = tuple(Place(str(node)) for node in range(job.nodes))
        return render_swarm(job, digest_of_image(job.image, self.home), self.site, places, "token")

    def _check(self, job: Job) -> None:
        state = self.api.info()["Swarm"]
        if not state.get("ControlAvailable"):
            raise BadRequest(
                f"job {job.key}: this Docker daemon manages no Swarm (it is {state['LocalNodeState']}); docker swarm "
                "init, or set DOCKER_HOST to a manager"
            )
        self.api.inspect_image(digest_of_image(job.image, self.home))
        if job.inside:
            raise BadRequest(f"job {job.key}: inside = true, a Swarm's jobs stand in no stack; set it to false")

    def _launch(self, job: Job) -> None:
        """Make network, depot and room, then all services; none stays where one finds no host."""
        leased = leases.leased(self._holders(), DEVICES_LABEL)
        places = place(job, read_hosts(self.api.nodes(), self.api.tasks(), leased))
        gang = render_swarm(job, digest_of_image(job.image, self.home), self.site, places, secrets.token_hex(24))
        network = gang.network
        if not self._networks(job.key):
            self.api.create_network(
                network["Name"], driver="overlay", internal=True, attachable=True, labels=network["Labels"]
            )
        if gang.volume:
            self.api.create_volume(gang.volume["Name"], labels=gang.volume["Labels"])
            depot = self.api.create_container_from_config(gang.depot, f"{network['Name']}-depot")["Id"]
            self._stage(depot, job)
            self.api.start(depot)
        ids = {self.api.create_service(name=name, **request)["ID"] for name, request in gang.services.items()}
        devices = tuple(f"{place.host}/{gpu}" for place in places for gpu in place.gpus)
        if devices:
            leases.confirm(job, ids, devices, self._holders(), DEVICES_LABEL)
        self._confirm(job)

    def _holders(self) -> list[Json]:
        """Every service of the Swarm, also another state folder's, that holds a GPU and may still use it: as leases
        know containers."""
        states: dict[str, list[str]] = {}
        for task in self.api.tasks():
            states.setdefault(task["ServiceID"], []).append(task["Status"]["State"])
        return [
            {"Id": one["ID"], "Created": one["CreatedAt"], "Labels": one["Spec"]["Labels"]}
            for one in self.api.services(filters={"label": DEVICES_LABEL})
            if any(state in HOLDING for state in states.get(one["ID"], HOLDING))
        ]

    def _confirm(self, job: Job) -> None:
        """Wait until each node has a host. Raises TryAgain where another gang was faster."""

        def waiting() -> list[str]:
            tasks = [self._task(service) for service in self._services(job.key)]
            return [
                (task or {}).get("Status", {}).get("Err", "")
                for task in tasks
                if task is None or task["Status"]["State"] in ("new", "pending")
            ]

        if left := _until_none(waiting, ASSIGN_SECONDS):
            raise TryAgain(f"job {job.key}: {left[0] or 'no host'}; another job was faster, it waits its turn")

    def _services(self, key: str) -> list[Json]:
        return list(self.api.services(filters={"label": [f"{LABEL}.site={self.site}", f"{LABEL}.job={key}"]}))

    def _task(self, service: Json) -> Json | None:
        """The task of a service; None before the manager has made it."""
        found = self.api.tasks({"service": service["ID"]})
        return max(found, key=lambda task: str(task["CreatedAt"]), default=None)

    def _nodes(self, key: str) -> list[Node]:
        services = self._services(key)
        hosts = {host["ID"]: host for host in self.api.nodes()} if services else {}
        found = [node_of(service, self._task(service), hosts) for service in services]
        return sorted(found, key=lambda node: node.rank)

    def _stop(self, key: str) -> None:
        """A Swarm ends a task by removing it, and its log with it: what it prints while it ends is not kept."""

    def _remove_nodes(self, key: str) -> None:
        """Remove a job's services, wait until their tasks have ended, and remove its depot; the room stays."""
        services = self._services(key)
        for service in services:
            with tolerating_missing():
                self.api.remove_service(service["ID"])
        ids = {service["ID"] for service in services}
        if ids:
            _until_none(lambda: [task for task in self._held() if task["ServiceID"] in ids], REMOVAL_SECONDS)
        self.remove(self.list(f"{LABEL}.job={key}"))

    def _held(self) -> list[Json]:
        """The tasks that still run somewhere, or may."""
        down = {host["ID"] for host in self.api.nodes() if host["Status"]["State"] != "ready"}
        tasks = self.api.tasks()
        return [task for task in tasks if task["Status"]["State"] in HOLDING and task.get("NodeID") not in down]

    def _lines(self, node: str, after: str) -> Lines:
        """The SDK would wait for ever for a host that died and is not known to be down yet."""
        import requests

        asked = {"stdout": "1", "stderr": "1", "timestamps": "1", "since": str(int(unix(after)))}
        url = f"{self.api.base_url}/v{self.api.api_version}/services/{node}/logs"
        try:
            answer = self.api.get(url, params=asked, timeout=LOG_SECONDS)
        except requests.exceptions.ReadTimeout:
            return
        if answer.status_code == 200:
            # Between the lines the daemon says which host it could not ask.
            yield from (line for line in entries(frames(answer.content)) if line[0][:1].isdigit())

    def remove_all(self) -> None:
        """Remove every service, container, network and volume of this state folder."""
        with translated("services"):
            found = self.api.services(filters={"label": [f"{LABEL}.site={self.site}"]})
            for key in {one["Spec"]["Labels"][f"{LABEL}.job"] for one in found}:
                self._remove(key)
        super().remove_all()


def node_of(service: Json, task: Json | None, hosts: dict[str, Json]) -> Node:
    """Return a node as its service, its task and the Swarm's hosts tell it. Pure.

    Raises:
        DrydockError: the task is in a state that no Swarm is known to have.
    """
    labels = service["Spec"]["Labels"]
    rank, num_nodes = (int(labels[f"{LABEL}.{name}"]) for name in ("rank", "nodes"))
    base = Node(service["ID"], rank, num_nodes, alive=True, has_log=False)
    if task is None:
        return base
    status, host = task["Status"], hosts.get(task.get("NodeID", ""))
    container = status.get("ContainerStatus") or {}
    state = status["State"]
    if state not in (*HOLDING, *ENDED):
        raise DrydockError(f"service {service['Spec']['Name']}: its task is {state!r}, which is not known")
    # A host that is down would be waited for.
    has_log = bool(container.get("ContainerID") and host and host["Status"]["State"] == "ready")
    base = base._replace(has_log=has_log)
    ended = base._replace(alive=False, ended_at=status["Timestamp"])
    if state == "complete":
        return ended
    if task.get("NodeID") and (host is None or host["Status"]["State"] == "down"):
        name = host["Description"]["Hostname"] if host else task["NodeID"]
        return ended._replace(cause=f"host {name} is down")
    if state in HOLDING:
        return base
    code = container.get("ExitCode", 0)
    if code == STARVED:
        return ended._replace(exit_code=137, starved=True)
    return ended._replace(exit_code=code, cause="" if code else status.get("Err") or state)


def frames(content: bytes) -> Iterator[bytes]:
    """Yield what was printed of a log as the Docker Engine sends it: a header of 8 bytes, its last 4 the length."""
    while len(content) >= 8:
        end = 8 + int.from_bytes(content[4:8], "big")
        yield content[8:end]
        content = content[end:]


def _until_none(found: Callable[[], list[Any]], seconds: float) -> list[Any]:
    """Return what is still found after so many seconds; nothing as soon as nothing is."""
    until = time.monotonic() + seconds
    while (left := found()) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return left
