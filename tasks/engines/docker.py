"""The engine of one server: jobs and replicas are containers of a Docker daemon.

    job <key>           → a network and a volume drydock-<site>-<key>, containers …-<attempt>-<node>
    service, replica i  → container drydock-<site>-svc-<service>-<i>, published on 127.0.0.1

What exists is read from the containers' labels alone: whoever asks next (a retry, another process, the same one
after the daemon's restart) finds a job by its key. A job's volume is its room; it outlives the containers of one
attempt, so the next one goes on from its checkpoints, and goes with the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.engines import archive, leases
from tasks.engines.container import LABEL, UID, Gang, gang_name, render_gang
from tasks.engines.container_logs import Gathered, entries
from tasks.engines.docker_client import ALIVE, each, tolerating_missing, translated
from tasks.engines.docker_services import DockerServices
from tasks.engines.images import digest_of_image
from tasks.engines.protocol import MOUNT, ROOM, Job, JobState, JobStatus
from tasks.spec.errors import BadRequest

STAGED = "staged"
DEVICES_LABEL = f"{LABEL}.{leases.DEVICES}"
OUT_OF_MEMORY = "out of memory"
LOST = "lost"


class DockerEngine(DockerServices):
    """Jobs and services as containers; both protocols, and rooms by value.

    Every method may be called from any thread or process. All raise TryAgain where the daemon does not answer.
    """

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

    def submit(self, job: Job) -> str:
        """Start a gang, all of it or nothing, and return its handle; one that runs or has succeeded is adopted, one
        that failed is started again in the same room and goes on in the same log.

        Raises:
            BadRequest: an image that is not allowed or not in the daemon, more memory or GPUs than there are.
        """
        handle = f"job-{job.key}"
        self.render(job)  # what can't be rendered is refused before anything is touched
        with self.lock(job.key), translated(f"job {job.key}"):
            found = self._containers(job.key)
            if _status(found).state in (JobState.RUNNING, JobState.SUCCEEDED) and not _halfway(found):
                return handle
            self._check(job)
            self._gather(handle, found)
            self.remove(found)
            self._log(handle).begin(Path(job.folder) / "job.log")
            try:
                self._launch(job, self._leasing(job))
            except BaseException:
                self.remove(self._containers(job.key))
                if not found:
                    self._remove_room(job.key)
                raise
        return handle

    def poll(self, handle: str) -> JobStatus:
        """Return the state of the whole gang: it fails with its first node that failed, and where one is lost."""
        with translated(handle):
            return _status(self._containers(key_of_handle(handle)))

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        """Return what all nodes printed from byte ``since`` on, at most 1 MiB, and the offset to go on from."""
        if not _is_handle(handle):
            return "", since
        with self.lock(key_of_handle(handle)), translated(handle):
            self._gather(handle, self._containers(key_of_handle(handle)))
            return self._log(handle).read(since)

    def cancel(self, handle: str) -> None:
        """End all nodes (SIGTERM, SIGKILL after 10 s) and remove containers, network and volume; the log stays."""
        if not _is_handle(handle):
            return
        with self.lock(key_of_handle(handle)), translated(handle):
            found = self._containers(key_of_handle(handle))
            each(found, lambda one: self.stop_container(one["Id"]))
            self._gather(handle, found)
            self.remove(found)
            self._remove_room(key_of_handle(handle))

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
            for one in self._containers(key_of_handle(handle))[:1]:
                with tolerating_missing():
                    return self.api.get_archive(one["Id"], f"{ROOM}/{path}")[0]
        return None

    def has_room(self, key: str) -> bool:
        """Whether a job's room is there whole: the next attempt goes on in it, and needs no other."""
        with translated(f"job {key}"):
            for one in self._containers(key)[:1]:
                with tolerating_missing():
                    self.api.get_archive(one["Id"], f"{MOUNT}/{STAGED}")
                    return True
        return False

    def _launch(self, job: Job, gang: Gang) -> None:
        """Make network, room and containers, bring the room over, then start all nodes."""
        if gang.network and not self._networks(job.key):
            self.api.create_network(
                gang.network["Name"], driver="bridge", internal=True, labels=gang.network["Labels"]
            )
        if gang.volume:
            self.api.create_volume(gang.volume["Name"], labels=gang.volume["Labels"])
        ids = [
            self.api.create_container_from_config(request, name)["Id"] for name, request in gang.containers.items()
        ]
        if gang.volume:
            self._stage(ids[0], job)
        if devices := tuple(leases.leased(gang.containers.values(), DEVICES_LABEL)):
            leases.confirm(job, set(ids), devices, self._holders(), DEVICES_LABEL)
        for container in ids:
            self.api.start(container)

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

    def _check(self, job: Job) -> None:
        """Refuse at once what the daemon would find out late, or never."""
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

    def _containers(self, key: str | None) -> list[dict[str, Any]]:
        """A job's containers as the daemon inspects them, by node."""
        if key is None:
            return []
        found = []
        for one in self.list(f"{LABEL}.job={key}"):
            with tolerating_missing():
                found.append(self.api.inspect_container(one["Id"]))
        return sorted(found, key=lambda one: int(_label(one, "rank")))

    def _remove_room(self, key: str) -> None:
        for network in self._networks(key):
            with tolerating_missing():
                self.api.remove_network(network["Id"])
        with tolerating_missing():
            self.api.remove_volume(gang_name(self.site, key), force=True)

    def _networks(self, key: str) -> list[dict[str, Any]]:
        own = [f"{LABEL}.site={self.site}", f"{LABEL}.job={key}"]
        return list(self.api.networks(filters={"label": own}))

    def _gather(self, handle: str, found: list[dict[str, Any]]) -> None:
        log = self._log(handle)
        seen = log.seen()
        several = len(found) > 1
        log.gather(
            {one["Id"]: self._entries(one["Id"], seen.get(one["Id"])) for one in found},
            {one["Id"]: f"[node {_label(one, 'rank')}] ".encode() if several else b"" for one in found},
        )

    def _entries(self, container: str, after: str | None) -> Iterator[tuple[str, bytes]]:
        since = {"since": _unix(after)} if after else {}
        with tolerating_missing():
            yield from entries(self.api.logs(container, stream=True, follow=False, timestamps=True, **since))

    def _log(self, handle: str) -> Gathered:
        return Gathered(self.folder / "logs", handle)


def _status(found: list[dict[str, Any]]) -> JobStatus:
    if not found:
        return JobStatus(state=JobState.MISSING)
    ended = [one for one in found if one["State"]["Status"] not in ALIVE]
    failed = [one for one in ended if one["State"]["ExitCode"] or one["State"]["OOMKilled"]]
    if failed:
        first = min(failed, key=lambda one: one["State"]["FinishedAt"])
        # A node that the kernel killed for its memory takes the others along, whoever ended first.
        starved = any(one["State"]["OOMKilled"] for one in found)
        code = first["State"]["ExitCode"] or 137
        return JobStatus(state=JobState.FAILED, exit_code=code, cause=OUT_OF_MEMORY if starved else "")
    if len(found) < int(_label(found[0], "nodes")):
        return JobStatus(state=JobState.FAILED, exit_code=1, cause=LOST)
    if len(ended) == len(found):
        return JobStatus(state=JobState.SUCCEEDED, exit_code=0)
    return JobStatus(state=JobState.RUNNING)


def _halfway(found: list[dict[str, Any]]) -> bool:
    """Whether a submitter died before it had started all nodes; who asks holds the job's lock."""
    return any(one["State"]["Status"] == "created" for one in found)


def _label(one: dict[str, Any], name: str) -> str:
    return str(one["Config"]["Labels"][f"{LABEL}.{name}"])


def _is_handle(handle: str) -> bool:
    return key_of_handle(handle) is not None


def key_of_handle(handle: str) -> str | None:
    """The key of a handle; None where it is none, so that no label or path is made of it."""
    key = handle.removeprefix("job-")
    return key if key != handle and key.replace("-", "").replace("_", "").isalnum() else None


def _unix(time: str) -> float:
    import datetime as dt

    whole, _, fraction = time.partition(".")
    return dt.datetime.fromisoformat(whole).replace(tzinfo=dt.UTC).timestamp() + float(f"0.{fraction}") - 0.001
