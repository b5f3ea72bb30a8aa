"""The engine of the laptop size: jobs and replicas are local processes under supervisord.

    job <key>           → program job-<key>            runs once; log <folder>/job.log
    service, replica i  → program svc-<service>-<i>    stays, on its own port; log <folder>/replica-<i>.log

A replica's port and labels ride in its environment (DRYDOCK_PORT, DRYDOCK_LABELS), so that the replicas of a
service are known from the supervisor's own files alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
from pathlib import Path

from tasks.engines import forked as forked_script
from tasks.engines.log_file import lead_to, read_on
from tasks.engines.ports import HOST, choose_port, is_free
from tasks.engines.protocol import Job, JobState, JobStatus, Replica, Service
from tasks.engines.supervisor import Program, ProgramInfo, ProgramState, Supervisor
from tasks.spec.errors import BadRequest, DrydockError
from tasks.store.files import exclusive

STOP_SECONDS = 15
JOB_PRIORITY, REPLICA_PRIORITY = 900, 800
_JOB = re.compile(r"job-[a-z0-9][a-z0-9_-]{0,79}")
_REPLICA = re.compile(r"svc-(?P<service>[a-z][a-z0-9-]{0,79})-(?P<index>[0-9]+)")


class ProcessEngine:
    """Jobs and services as supervised processes of this machine; both protocols.

    Every method may be called from any thread or process. All raise TryAgain where the supervisor is down.
    """

    def __init__(self, home: Path) -> None:
        self.supervisor = Supervisor(home)
        self._logs = self.supervisor.folder / "logs"

    def render(self, job: Job) -> Program:
        """Return the program of a job. Pure.

        Raises:
            BadRequest: a relative folder, or a text that supervisord can't carry.
        """
        program = {
            "name": f"job-{job.key}",
            "command": forked(job.command, self.supervisor.folder),
            "environment": job.environment | {"DRYDOCK_LABELS": _labels_text(job.labels)},
            "folder": job.folder,
            "log": f"{job.folder}/job.log",
            "autorestart": False,
            "priority": JOB_PRIORITY,
        }
        return Program.parse(program, f"job {job.key}")

    def submit(self, job: Job) -> str:
        """Start a job and return its handle; one that runs or has succeeded is adopted, one that failed is
        started again and goes on in the same log."""
        program = self.render(job)
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        # A handle leads to its log, whatever the supervisor has forgotten.
        lead_to(self._logs / f"{program.name}.log", Path(program.log))
        self.supervisor.add(program)
        return program.name

    def poll(self, handle: str) -> JobStatus:
        """Return the state. MISSING is also what a restarted supervisor says: it has forgotten its jobs."""
        info = self.supervisor.info(handle) if _JOB.fullmatch(handle) else None
        if info is None:
            return JobStatus(state=JobState.MISSING)
        if not info.ended:
            return JobStatus(state=JobState.RUNNING)
        code = self._exit_code(info)
        return JobStatus(state=JobState.SUCCEEDED if code == 0 else JobState.FAILED, exit_code=code)

    def logs(self, handle: str, since: int = 0) -> tuple[str, int]:
        """Return what the job printed from byte ``since`` on, at most 1 MiB, and the offset to go on from:
        call until the offset stays. An unknown job has printed nothing."""
        if not _JOB.fullmatch(handle):
            return "", since
        return read_on(self._logs / f"{handle}.log", since)

    def cancel(self, handle: str) -> None:
        """End the job and all its children; its log stays, the job itself is MISSING from then on."""
        if _JOB.fullmatch(handle):
            self.supervisor.remove(handle)

    def forget(self, handle: str) -> None:
        """Drop an ended job, and end what children it left; its log stays. Idempotent.

        Raises:
            BadRequest: the job runs.
        """
        if self.poll(handle).state is JobState.RUNNING:
            raise BadRequest(f"{handle}: still runs; cancel it first")
        self.cancel(handle)

    def render_replica(self, service: Service, index: int, port: int) -> Program:
        """Return the program of one replica. Pure."""
        own = {"DRYDOCK_PORT": str(port), "DRYDOCK_LABELS": _labels_text(service.labels)}
        program = {
            "name": _replica_name(service.name, index),
            "command": [part.replace("{port}", str(port)) for part in service.command],
            "environment": service.environment | own,
            "folder": service.folder,
            "log": f"{service.folder}/replica-{index}.log",
            "stop_seconds": STOP_SECONDS,
            "priority": REPLICA_PRIORITY,
        }
        return Program.parse(program, f"service {service.name}")

    def start(self, service: Service) -> tuple[Replica, ...]:
        """Start the replicas that don't run, end those beyond the count, and return the rest. A replica that
        runs stays as it is; one that is started again keeps its port where that is free. Those that were drained
        and still answer are not waited for: new ones start beside them."""
        with self._lock(f"service-{service.name}"):
            known = {replica.index: replica for replica in self.replicas(service.name)}
            infos = self.supervisor.infos()
            beyond = sorted(known)[service.replicas :]
            self.supervisor.remove(*(_replica_name(service.name, index) for index in beyond))
            for index in self._indices(service, set(known) - set(beyond), infos):
                info = infos.get(_replica_name(service.name, index))
                if index not in known or info is None or not info.alive:
                    self._start_replica(service, index, known.get(index))
            return self.replicas(service.name)

    def _indices(self, service: Service, known: set[int], infos: dict[str, ProgramInfo]) -> list[int]:
        """The known replicas' numbers, and as many free ones as are wanted beside them."""
        def draining(index: int) -> bool:
            info = infos.get(_replica_name(service.name, index))
            return info is not None and not info.ended

        free = (index for index in itertools.count() if index not in known and not draining(index))
        return sorted([*known, *itertools.islice(free, max(service.replicas - len(known), 0))])

    def replicas(self, name: str | None = None) -> tuple[Replica, ...]:
        """Return the replicas of one service, or of all, by service and index."""
        infos = self.supervisor.infos()
        found = [
            _replica(program, infos.get(program.name))
            for program in self.supervisor.kept().values()
            if _REPLICA.fullmatch(program.name)
        ]
        wanted = [replica for replica in found if name in (None, replica.service)]
        return tuple(sorted(wanted, key=lambda replica: (replica.service, replica.index)))

    def drain(self, name: str) -> None:
        """Tell all replicas to end (SIGTERM, SIGKILL after 15 s) and return: they answer what they have, and are
        no replicas any more. Those that ended since an earlier drain are cleared away. Idempotent."""
        with self._lock(f"service-{name}"):
            self.supervisor.dismiss(*(_replica_name(name, replica.index) for replica in self.replicas(name)))
        for info in self.supervisor.infos().values():
            if info.ended and (service := _service_of(info.name)):
                with self._lock(f"service-{service}"):
                    if info.name not in self.supervisor.kept():
                        self.supervisor.remove(info.name)

    def stop(self, name: str) -> None:
        """End all replicas at once (SIGTERM, SIGKILL after 15 s) and remove the service. Idempotent."""
        with self._lock(f"service-{name}"):
            names = {_replica_name(name, replica.index) for replica in self.replicas(name)}
            names |= {info for info in self.supervisor.infos() if _service_of(info) == name}
            self.supervisor.remove(*sorted(names))

    def _start_replica(self, service: Service, index: int, known: Replica | None) -> None:
        # The port is taken once the program is written down, so two starters choose one after the other.
        with self._lock("ports"):
            taken = {replica.port for replica in self.replicas()}
            port = known.port if known is not None and is_free(known.port) else choose_port(taken)
            self.supervisor.add(self.render_replica(service, index, port))

    def _lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.supervisor.folder / "locks" / name)

    def _exit_code(self, info: ProgramInfo) -> int:
        if info.state is ProgramState.FATAL:
            return 127  # the command could not be run, in a shell's numbers
        if info.exit_status >= 0 and info.state is ProgramState.EXITED:
            return info.exit_status
        if info.state is ProgramState.STOPPED:
            return 128 + 15  # ended by us, whatever code it chose to end with
        if info.exit_status == -1:
            number = self.supervisor.killed_by(info.name)
            return 1 if number is None else 128 + number
        raise DrydockError(f"{info.name}: exit status {info.exit_status} in state {info.state} is not known")


def forked(command: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Return the command that has the fork server in ``folder`` run a Python module; any other stays. Pure."""
    if command[:2] != (sys.executable, "-m") or len(command) < 3:
        return command
    return (sys.executable, "-I", "-S", forked_script.__file__, str(folder), *command)


def _replica_name(service: str, index: int) -> str:
    return f"svc-{service}-{index}"


def _service_of(program: str) -> str | None:
    found = _REPLICA.fullmatch(program)
    return found["service"] if found else None


def _replica(program: Program, info: ProgramInfo | None) -> Replica:
    name = _REPLICA.fullmatch(program.name)
    if name is None:
        raise DrydockError(f"{program.name}: is no replica")
    return Replica(
        service=name["service"],
        index=int(name["index"]),
        host=HOST,
        port=int(program.environment["DRYDOCK_PORT"]),
        running=info is not None and info.state in (ProgramState.STARTING, ProgramState.RUNNING),
        labels=json.loads(program.environment["DRYDOCK_LABELS"]),
    )


def _labels_text(labels: dict[str, str]) -> str:
    """Labels as JSON, without the apostrophe that supervisord can't carry beside double quotes."""
    return json.dumps(labels, sort_keys=True).replace("'", "\\u0027")
