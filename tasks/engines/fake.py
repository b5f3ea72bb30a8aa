"""An engine in memory, of both protocols: for tests of what stands above an engine. Nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tasks.engines.protocol import Job, JobState, JobStatus, Replica, Service
from tasks.spec.errors import BadRequest

FIRST_PORT = 20_000


class FakeEngine:
    """Jobs end as the script says: ``behaviour(job)`` gives the exit code, or None for a job that goes on
    until ``finish``. Without one, every job succeeds at once. ``submitted`` counts each handle's starts."""

    def __init__(
        self, home: Path | None = None, behaviour: Callable[[Job], int | None] = lambda job: 0
    ) -> None:
        self.home = home
        self.behaviour = behaviour
        self.submitted: dict[str, int] = {}
        self._states: dict[str, JobStatus] = {}
        self._logs: dict[str, bytes] = {}
        self._replicas: dict[tuple[str, int], Replica] = {}
        self._next_port = FIRST_PORT

    def render(self, job: Job) -> Job:
        return job

    def submit(self, job: Job) -> str:
        handle = f"job-{job.key}"
        if self.poll(handle).state not in (JobState.RUNNING, JobState.SUCCEEDED):
            self.submitted[handle] = self.submitted.get(handle, 0) + 1
            self._states[handle] = JobStatus(state=JobState.RUNNING)
            code = self.behaviour(job)
            if code is not None:
                self.finish(handle, code)
        return handle

    def poll(self, handle: str) -> JobStatus:
        return self._states.get(handle, JobStatus(state=JobState.MISSING))

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        found = self._logs.get(handle, b"")[since:]
        return found.decode(errors="replace"), since + len(found)

    def cancel(self, handle: str) -> None:
        self._states.pop(handle, None)

    def forget(self, handle: str) -> None:
        if self.poll(handle).state is JobState.RUNNING:
            raise BadRequest(f"{handle}: still runs; cancel it first")
        self.cancel(handle)

    def finish(self, handle: str, exit_code: int) -> None:
        """Script: a running job ends with this code."""
        state = JobState.SUCCEEDED if exit_code == 0 else JobState.FAILED
        self._states[handle] = JobStatus(state=state, exit_code=exit_code)

    def write(self, handle: str, text: str) -> None:
        """Script: a job prints."""
        self._logs[handle] = self._logs.get(handle, b"") + text.encode()

    def start(self, service: Service) -> tuple[Replica, ...]:
        for replica in self.replicas(service.name):
            if replica.index >= service.replicas:
                del self._replicas[service.name, replica.index]
        for index in range(service.replicas):
            found = self._replicas.get((service.name, index))
            if found is None or not found.running:
                self._replicas[service.name, index] = self._start(service, index, found)
        return self.replicas(service.name)

    def replicas(self, name: str | None = None) -> tuple[Replica, ...]:
        return tuple(found for key, found in sorted(self._replicas.items()) if name in (None, key[0]))

    def drain(self, name: str) -> None:
        self.stop(name)

    def stop(self, name: str) -> None:
        for replica in self.replicas(name):
            del self._replicas[name, replica.index]

    def kill(self, service: str, index: int) -> None:
        """Script: a replica dies and does not come back until the service is started again."""
        found = self._replicas[service, index]
        self._replicas[service, index] = found.model_copy(update={"running": False})

    def _start(self, service: Service, index: int, found: Replica | None) -> Replica:
        port = found.port if found else self._next_port
        self._next_port += found is None
        return Replica(
            service=service.name,
            index=index,
            host="127.0.0.1",
            port=port,
            running=True,
            labels=service.labels,
        )
