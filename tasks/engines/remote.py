"""The engine of a stack: a client of the job service, which alone holds the Docker socket. Both protocols, and rooms
by value; what it may ask for is ``orders``."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from tasks.engines import archive
from tasks.engines.orders import JobOrder, order_of_job, order_of_service
from tasks.engines.protocol import Job, JobState, JobStatus, Replica, Service
from tasks.spec.errors import BY_EXIT_CODE, BadRequest, DrydockError, TryAgain

# A cancel waits for containers to end; a room is copied into one.
SECONDS = 120
HANDLE = re.compile(r"job-[a-z0-9][a-z0-9_-]{0,79}")
Body = bytes | IO[bytes] | None


class RemoteEngine:
    """Jobs and services by the job service at ``url``; ``token``: the file of its token.

    Every method may be called from any thread or process. All raise TryAgain where it does not answer.
    """

    shares_room = True

    def __init__(self, home: Path, url: str = "", token: str = "") -> None:
        self.home, self.url, self.token = home, url, token

    def render(self, job: Job) -> JobOrder:
        """Return the order of a job. Pure.

        Raises:
            BadRequest: it names no image, or asks for what an order can't say.
        """
        return order_of_job(job)

    def submit(self, job: Job) -> str:
        """Start a job and return its handle; its room is sent first, unless it is there from an earlier attempt."""
        order, handle = self.render(job), f"job-{job.key}"
        if self.poll(handle).state in (JobState.RUNNING, JobState.SUCCEEDED):
            # Adopted; the job service itself decides between two who ask at once.
            return self._post_order(order.model_copy(update={"room": False}))
        if job.room and not self._call("GET", f"/rooms/{job.key}")["whole"]:
            self._send_room(job.key, Path(job.room))
        return self._post_order(order)

    def poll(self, handle: str) -> JobStatus:
        """Return the state as the job service sees it."""
        if not HANDLE.fullmatch(handle):
            return JobStatus(state=JobState.MISSING)
        return JobStatus.parse(self._call("GET", f"/jobs/{handle}"), "the job service's answer")

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        """Return what the job printed from byte ``since`` on, at most 1 MiB, and the offset to go on from."""
        if not HANDLE.fullmatch(handle):
            return "", since
        found = self._call("GET", f"/jobs/{handle}/log?since={since}")
        return found["text"], found["offset"]

    def cancel(self, handle: str) -> None:
        """End the job and remove what it has. Idempotent."""
        if HANDLE.fullmatch(handle):
            self._call("POST", f"/jobs/{handle}/cancel")

    def forget(self, handle: str) -> None:
        """Drop an ended job; its log stays. Idempotent. Raises BadRequest where it runs."""
        if HANDLE.fullmatch(handle):
            self._call("POST", f"/jobs/{handle}/forget")

    def fetch(self, handle: str, path: str, target: Path) -> bool:
        """Copy ``<path>`` in the room to ``target``; False where it is not there. ``target`` is complete or absent."""
        with self._asked("GET", f"/jobs/{handle}/files?{urlencode({'path': path})}") as answer:
            if answer.status == 404:
                return False
            _check(answer)
            return archive.unpack(iter(lambda: answer.read(archive.CHUNK_BYTES), b""), target)

    def start(self, service: Service) -> tuple[Replica, ...]:
        """Start the replicas that don't run, and return all."""
        body = order_of_service(service).model_dump_json().encode()
        return _replicas(self._call("PUT", "/services", body))

    def replicas(self, name: str | None = None) -> tuple[Replica, ...]:
        """Return the replicas of one service, or of all, by service and index."""
        return _replicas(self._call("GET", f"/services?{urlencode({'name': name})}" if name else "/services"))

    def drain(self, name: str) -> None:
        """Tell a service's replicas to end and return at once. Idempotent."""
        self._call("POST", f"/services/{quote(name, safe='')}/drain")

    def stop(self, name: str) -> None:
        """Drain and remove a service. Idempotent."""
        self._call("POST", f"/services/{quote(name, safe='')}/stop")

    def _post_order(self, order: JobOrder) -> str:
        return str(self._call("POST", "/jobs", order.model_dump_json().encode())["handle"])

    def _send_room(self, key: str, folder: Path) -> None:
        with archive.pack(folder, key, 0) as stream:
            self._call("PUT", f"/rooms/{key}", stream)

    def _call(self, method: str, path: str, body: Body = None) -> Any:
        with self._asked(method, path, body) as answer:
            _check(answer)
            return json.loads(answer.read())

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, body: Body = None) -> Iterator[http.client.HTTPResponse]:
        """Ask; plain http.client heeds no proxy and costs a task no import."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self._secret()}"})
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the disk that a room comes to is ours
            what = f"{type(error).__name__}: {error}"
            raise TryAgain(f"the job service at {self.url or 'no URL'} does not answer: {what}") from error
        finally:
            connection.close()

    def _secret(self) -> str:
        try:
            return Path(self.token).read_text().strip()
        except OSError:
            raise BadRequest(f"jobs_token = {self.token!r}, must be the file of the job service's token") from None


def _check(answer: http.client.HTTPResponse) -> None:
    """Raise the job service's own error, of its own kind."""
    if answer.status < 400:
        return
    try:
        error = json.loads(answer.read())
        kind, message = BY_EXIT_CODE[error["exit_code"]], str(error["message"])
    except (ValueError, KeyError, TypeError):
        raise DrydockError(f"the job service answers {answer.status}, without a word") from None
    raise kind(message)


def _replicas(found: Any) -> tuple[Replica, ...]:
    return tuple(Replica.parse(one, "the job service's answer") for one in found)
