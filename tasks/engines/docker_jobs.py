"""Jobs by a Docker API, whether their nodes are on one daemon (``docker``) or on the hosts of a Swarm (``swarm``): the
job protocol, and rooms by value.

What exists is read from labels alone: whoever asks next (a retry, another process, the same one after the daemon's
restart) finds a job by its key. A job's room is a volume of this daemon; it outlives the nodes of one attempt, so the
next one goes on from its checkpoints, and goes with the job.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks.engines import archive
from tasks.engines.container import LABEL, UID, gang_name
from tasks.engines.container_logs import Gathered
from tasks.engines.docker_client import tolerating_missing, translated
from tasks.engines.docker_services import DockerServices
from tasks.engines.leases import DEVICES
from tasks.engines.protocol import MOUNT, ROOM, Job, JobState, JobStatus
from tasks.spec.errors import BadRequest

STAGED = "staged"
DEVICES_LABEL = f"{LABEL}.{DEVICES}"
OUT_OF_MEMORY = "out of memory"
LOST = "lost"
Lines = Iterator[tuple[str, bytes]]


class Node(NamedTuple):
    """One node of a gang as the engine finds it."""

    id: str  # what its log is asked for by
    rank: int
    num_nodes: int  # of the whole gang
    alive: bool
    exit_code: int = 0
    ended_at: str = ""
    cause: str = ""  # why it ended, where the engine knows
    starved: bool = False  # the kernel killed something of it for its memory
    started: bool = True  # a submitter may die before it starts all nodes
    has_log: bool = True  # that can be asked for now


def status_of(nodes: list[Node]) -> JobStatus:
    """Return the state of the whole gang: it fails with its first node that failed, and where one is gone. Pure."""
    if not nodes:
        return JobStatus(state=JobState.MISSING)
    ended = [node for node in nodes if not node.alive]
    if failed := [node for node in ended if node.exit_code or node.cause or node.starved]:
        first = min(failed, key=lambda node: node.ended_at)
        # A node that the kernel killed for its memory takes the others along, whoever ended first.
        cause = OUT_OF_MEMORY if any(node.starved for node in nodes) else first.cause
        return JobStatus(state=JobState.FAILED, exit_code=first.exit_code or 137, cause=cause)
    if len(nodes) < nodes[0].num_nodes:
        return JobStatus(state=JobState.FAILED, exit_code=1, cause=LOST)
    if len(ended) == len(nodes):
        return JobStatus(state=JobState.SUCCEEDED, exit_code=0)
    return JobStatus(state=JobState.RUNNING)


class DockerJobs(DockerServices):
    """The job protocol, but for what is made of a job: the engine's own affair, below.

    Every method may be called from any thread or process. All raise TryAgain where the daemon does not answer.
    """

    @abstractmethod
    def render(self, job: Job) -> Any:
        """Return a job's requests. Pure. Raises BadRequest where its image is not on the list of allowed images."""

    @abstractmethod
    def _nodes(self, key: str) -> list[Node]:
        """A job's nodes by rank; none where there is no such job."""

    @abstractmethod
    def _check(self, job: Job) -> None:
        """Refuse at once what would be found out late, or never. Raises BadRequest."""

    @abstractmethod
    def _launch(self, job: Job) -> None:
        """Make network, room and nodes, all of them or an error."""

    @abstractmethod
    def _stop(self, key: str) -> None:
        """End all nodes (SIGTERM, SIGKILL after 10 s); what they printed can still be read."""

    @abstractmethod
    def _remove_nodes(self, key: str) -> None:
        """Remove all nodes, ended or not; network and room stay."""

    @abstractmethod
    def _lines(self, node: str, after: str) -> Lines:
        """What a node printed, from about the time ``after`` on: (time, line)."""

    def submit(self, job: Job) -> str:
        """Start a gang, all of it or nothing, and return its handle; one that runs or has succeeded is adopted, one
        that failed is started again in the same room and goes on in the same log.

        Raises:
            BadRequest: an image that is not allowed or not there, more memory or GPUs than there are.
            TryAgain: what it asks for is not free.
        """
        handle = f"job-{job.key}"
        self.render(job)  # what can't be rendered is refused before anything is touched
        with self.lock(job.key), translated(f"job {job.key}"):
            self._check(job)
            nodes, kept = self._nodes(job.key), self._has_volume(job.key)
            running = status_of(nodes).state in (JobState.RUNNING, JobState.SUCCEEDED)
            if running and all(node.started for node in nodes):
                return handle
            self._gather(handle, nodes)
            self._remove_nodes(job.key)
            self._log(handle).begin(Path(job.folder) / "job.log")
            try:
                self._launch(job)
            except BaseException:
                # A room from before has the checkpoints that the next try goes on from.
                if nodes or kept:
                    self._remove_nodes(job.key)
                else:
                    self._remove(job.key)
                raise
        return handle

    def poll(self, handle: str) -> JobStatus:
        """Return the state of the whole gang."""
        key = key_of_handle(handle)
        with translated(handle):
            return status_of(self._nodes(key) if key else [])

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        """Return what all nodes printed from byte ``since`` on, at most 1 MiB, and the offset to go on from."""
        if (key := key_of_handle(handle)) is None:
            return "", since
        with self.lock(key), translated(handle):
            self._gather(handle, self._nodes(key))
            return self._log(handle).read(since)

    def cancel(self, handle: str) -> None:
        """End all nodes (SIGTERM, SIGKILL after 10 s) and remove nodes, network and volume; the log stays."""
        if (key := key_of_handle(handle)) is None:
            return
        with self.lock(key), translated(handle):
            self._stop(key)
            self._gather(handle, self._nodes(key))
            self._remove(key)

    def forget(self, handle: str) -> None:
        """Drop an ended job with its room; its log stays. Idempotent.

        Raises:
            BadRequest: the job runs.
        """
        if self.poll(handle).state is JobState.RUNNING:
            raise BadRequest(f"{handle}: still runs; cancel it first")
        self.cancel(handle)

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        """Copy ``<path>`` in the room to ``target``; False where it is not there. ``target`` is complete or absent."""
        with translated(handle):
            chunks = self.read(handle, path)
            return chunks is not None and archive.unpack(chunks, target)

    def read(self, handle: str, path: str) -> Iterator[bytes] | None:
        """Return ``<path>`` in the room as a tar stream; None where it is not there."""
        with translated(handle):
            return self._in_volume(key_of_handle(handle), f"{ROOM}/{path}")

    def has_room(self, key: str) -> bool:
        """Whether a job's room is there whole: the next attempt goes on in it, and needs no other."""
        with translated(f"job {key}"):
            return self._in_volume(key, f"{MOUNT}/{STAGED}") is not None

    def _has_volume(self, key: str) -> bool:
        with tolerating_missing():
            self.api.inspect_volume(gang_name(self.site, key))
            return True
        return False

    def _in_volume(self, key: str | None, path: str) -> Iterator[bytes] | None:
        """A path as a tar stream, through a container that has the job's volume; None where it is not there."""
        for one in self.list(f"{LABEL}.job={key}")[:1] if key else ():
            with tolerating_missing():
                return self.api.get_archive(one["Id"], path)[0]
        return None

    def _stage(self, container: str, job: Job) -> None:
        """Copy the room into the job's volume, its mark last; a room that is there whole is gone on with."""
        with tolerating_missing():
            self.api.get_archive(container, f"{MOUNT}/{STAGED}")
            return
        source = Path(job.room) if job.room else self._nothing()
        with archive.pack(source, Path(ROOM).name, UID) as stream:
            self.api.put_archive(container, MOUNT, stream)
        self.api.put_archive(container, MOUNT, archive.pack_file(STAGED, job.key.encode(), UID))

    def _nothing(self) -> Path:
        empty = self.folder / "empty"
        empty.mkdir(parents=True, exist_ok=True)
        return empty

    def _remove(self, key: str) -> None:
        self._remove_nodes(key)
        for network in self._networks(key):
            with tolerating_missing():
                self.api.remove_network(network["Id"])
        with tolerating_missing():
            self.api.remove_volume(gang_name(self.site, key), force=True)

    def _networks(self, key: str) -> list[dict[str, Any]]:
        own = [f"{LABEL}.site={self.site}", f"{LABEL}.job={key}"]
        return list(self.api.networks(filters={"label": own}))

    def _gather(self, handle: str, nodes: list[Node]) -> None:
        log = self._log(handle)
        seen = log.seen()
        several = len(nodes) > 1
        nodes = [node for node in nodes if node.has_log]
        log.gather(
            {node.id: self._lines(node.id, seen.get(node.id, "")) for node in nodes},
            {node.id: f"[node {node.rank}] ".encode() if several else b"" for node in nodes},
        )

    def _log(self, handle: str) -> Gathered:
        return Gathered(self.folder / "logs", handle)


def key_of_handle(handle: str) -> str | None:
    """The key of a handle; None where it is none, so that no label or path is made of it."""
    key = handle.removeprefix("job-")
    return key if key != handle and key.replace("-", "").replace("_", "").isalnum() else None


def unix(time: str) -> float:
    """Return a log's time as seconds since 1970, a bit early; 0 for none."""
    import datetime as dt

    if not time:
        return 0.0
    whole, _, fraction = time.partition(".")
    return dt.datetime.fromisoformat(whole).replace(tzinfo=dt.UTC).timestamp() + float(f"0.{fraction}") - 0.001
