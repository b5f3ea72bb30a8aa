"""The engine of one server: jobs and replicas are containers of a Docker daemon.

    job <key>           → a network and a volume drydock-<site>-<key>, containers …-<attempt>-<node>
    service, replica i  → container drydock-<site>-svc-<service>-<i>, published on 127.0.0.1

All nodes of a gang work in the one volume.
"""

from __future__ import annotations

from typing import Any

from tasks.engines import leases
from tasks.engines.container import LABEL, Gang, render_gang
from tasks.engines.container_logs import entries
from tasks.engines.docker_client import ALIVE, each, tolerating_missing
from tasks.engines.docker_jobs import DEVICES_LABEL, DockerJobs, Lines, Node, unix
from tasks.engines.images import digest_of_image
from tasks.engines.protocol import Job
from tasks.spec.errors import BadRequest


class DockerEngine(DockerJobs):
    """Jobs and services as containers; both protocols, and rooms by value."""

    shares_room = True

    def render(self, job: Job) -> Gang:
        """Return a job's requests for the daemon.

        Raises:
            BadRequest: its image is not on the list of allowed images.
        """
        return self._render(job, ())

    def _render(self, job: Job, devices: tuple[str, ...]) -> Gang:
        return render_gang(job, digest_of_image(job.image, self.home), self.site, devices, self.places)

    def _leasing(self, job: Job) -> Gang:
        """Return a job's requests with GPUs that nobody holds; its containers hold them from their creation on.

        Raises:
            BadRequest: there are not so many. TryAgain: they are held by others.
        """
        return self._render(job, leases.choose(job, self.devices, leases.leased(self._holders(), DEVICES_LABEL)))

    def _holders(self) -> list[dict[str, Any]]:
        """Every container of this daemon, also another state folder's, that holds a device and may still use it."""
        found = self.api.containers(all=True, filters={"label": DEVICES_LABEL})
        return [one for one in found if one["State"] in ALIVE]

    def _launch(self, job: Job) -> None:
        """Make network, room and containers, bring the room over, then start all nodes."""
        gang = self._leasing(job)
        if gang.network and not self._networks(job.key):
            self.api.create_network(gang.network["Name"], driver="bridge", internal=True, labels=gang.network["Labels"])
        if gang.volume:
            self.api.create_volume(gang.volume["Name"], labels=gang.volume["Labels"])
        ids = [self.api.create_container_from_config(request, name)["Id"] for name, request in gang.containers.items()]
        if gang.volume:
            self._stage(ids[0], job)
        if devices := tuple(leases.leased(gang.containers.values(), DEVICES_LABEL)):
            leases.confirm(job, set(ids), devices, self._holders(), DEVICES_LABEL)
        for container in ids:
            self.api.start(container)

    def _check(self, job: Job) -> None:
        info = self.api.info()
        asked, there = job.nodes * job.limits.memory_bytes, int(info["MemTotal"])
        if asked > there:
            raise BadRequest(
                f"job {job.key}: {job.nodes} nodes x {job.limits.memory_bytes} bytes of memory = {asked}, this machine "
                f"has {there}; lower train.resources.memory_bytes"
            )
        if job.limits.gpus and "nvidia" not in info.get("Runtimes", {}):
            raise BadRequest(
                f"job {job.key}: {job.limits.gpus} GPUs a node, this Docker daemon offers none; set "
                "train.resources.gpus to 0, or install the NVIDIA container toolkit"
            )

    def _nodes(self, key: str) -> list[Node]:
        found = []
        for one in self.list(f"{LABEL}.job={key}"):
            with tolerating_missing():
                found.append(_node(self.api.inspect_container(one["Id"])))
        return sorted(found, key=lambda node: node.rank)

    def _stop(self, key: str) -> None:
        each(self.list(f"{LABEL}.job={key}"), lambda one: self.stop_container(one["Id"]))

    def _remove_nodes(self, key: str) -> None:
        self.remove(self.list(f"{LABEL}.job={key}"))

    def _lines(self, node: str, after: str) -> Lines:
        since = {"since": unix(after)} if after else {}
        with tolerating_missing():
            yield from entries(self.api.logs(node, stream=True, follow=False, timestamps=True, **since))


def _node(one: dict[str, Any]) -> Node:
    state, labels = one["State"], one["Config"]["Labels"]
    return Node(
        id=one["Id"],
        rank=int(labels[f"{LABEL}.rank"]),
        num_nodes=int(labels[f"{LABEL}.nodes"]),
        alive=state["Status"] in ALIVE,
        exit_code=state["ExitCode"],
        ended_at=state["FinishedAt"],
        starved=state["OOMKilled"],
        started=state["Status"] != "created",
    )
