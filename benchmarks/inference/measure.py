"""Servers started on one core and loaded from the other, in turns; all that was started is ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.spec.errors import DrydockError

LOAD = Path(__file__).with_name("load.py")
WARM_SECONDS = 0.15
START_SECONDS, DRAIN_SECONDS = 30.0, 15.0
SIGTERM_CONNECTIONS = 16

Seen = dict[tuple[str, int], list[dict[str, float]]]  # (server, connections) -> what load.py saw in each round


class Candidate(NamedTuple):
    """A server that can be started on any port and asked at ``path``."""

    name: str
    command: tuple[str, ...]  # {port} stands for the port
    path: str
    body: Path
    environment: dict[str, str] = {}


class Running(NamedTuple):
    candidate: Candidate
    process: subprocess.Popen[bytes]
    port: int


class Measure:
    """Starts servers on one core and loads them from the other; ends what it started."""

    def __init__(self, server_core: int, client_core: int, base: Path, stack: contextlib.ExitStack) -> None:
        self.server_core, self.client_core, self.base, self._stack = server_core, client_core, base, stack
        self._own_cores = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, self._own_cores)
        os.sched_setaffinity(0, {client_core})

    def spawn(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a process (a group of its own) on the server's core; it is ended with the benchmark."""
        # A child inherits the cores of the thread that starts it.
        os.sched_setaffinity(0, {self.server_core})
        try:
            with (self.base / "servers.log").open("ab") as log:
                process = subprocess.Popen(
                    command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        finally:
            os.sched_setaffinity(0, {self.client_core})
        self._stack.callback(end, process)
        return process

    def start(self, candidate: Candidate) -> Running:
        """Start a server; return once it has answered one request.

        Raises:
            DrydockError: it ended, or did not answer in time; with the end of its log.
        """
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in candidate.command]
        running = Running(candidate, self.spawn(command, candidate.environment), port)
        body, until = candidate.body.read_bytes(), time.monotonic() + START_SECONDS
        while not answers(port, candidate.path, body):
            if running.process.poll() is not None or time.monotonic() > until:
                log = (self.base / "servers.log").read_text(errors="replace")[-600:]
                raise DrydockError(f"bench serving: {candidate.name} did not answer; its log ends: {log}")
            time.sleep(0.002)
        return running

    def on_server_core(self, command: Sequence[str]) -> bytes:
        os.sched_setaffinity(0, {self.server_core})
        try:
            return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        finally:
            os.sched_setaffinity(0, {self.client_core})

    def rounds(
        self, model: str, all_of: Sequence[Running], connections: Sequence[int], rounds: int, seconds: float
    ) -> Seen:
        """Load every server with every number of connections, in turns."""
        seen: Seen = {}
        for turn in range(rounds):
            say(f"{model}: round {turn + 1} of {rounds}, {len(all_of)} servers")
            for count in connections:
                for running in all_of:
                    found = self.load(running, count, seconds)
                    seen.setdefault((running.candidate.name, count), []).append(found)
        return seen

    def load(self, running: Running, connections: int, seconds: float) -> dict[str, float]:
        with self._client(running, connections, seconds, WARM_SECONDS, False) as client:
            return result(client)

    def lost_at_sigterm(self, running: Running) -> float:
        """Return how many requests got no answer though they were sent, when the server is told to end."""
        with self._client(running, SIGTERM_CONNECTIONS, DRAIN_SECONDS, 0.5, True) as client:
            time.sleep(1.5)
            os.kill(running.process.pid, signal.SIGTERM)
            return result(client)["lost"]

    @contextlib.contextmanager
    def _client(
        self, running: Running, connections: int, seconds: float, warm_seconds: float, until_closed: bool
    ) -> Iterator[subprocess.Popen[bytes]]:
        spec = {
            "port": running.port,
            "path": running.candidate.path,
            "body": str(running.candidate.body),
            "connections": connections,
            "seconds": seconds,
            "warm_seconds": warm_seconds,
            "core": self.client_core,
            "pids": family(running.process.pid),
            "until_closed": until_closed,
        }
        # Isolated and without site: the client needs nothing of what is installed, and starts in 20 ms.
        command = (sys.executable, "-I", "-S", str(LOAD), json.dumps(spec))
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            yield client


def result(client: subprocess.Popen[bytes]) -> dict[str, float]:
    out = client.communicate()[0]
    if client.returncode:
        raise DrydockError(f"bench serving: the load client ended with {client.returncode}; see above")
    return dict(json.loads(out))


def answers(port: int, path: str, body: bytes) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all it started; twice is once."""
    # Once it was waited for, its number may be another's.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def family(pid: int) -> list[int]:
    import psutil

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def proportional_bytes(pid: int) -> int:
    """The sum of PSS (shared pages divided among their sharers) of a process and its children."""
    import psutil

    return sum(psutil.Process(each).memory_full_info().pss for each in family(pid))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
