"""supervisord's XML-RPC over its unix socket. Its faults become our errors here, once."""

from __future__ import annotations

import http.client
import socket
import xmlrpc.client
from enum import StrEnum
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from tasks.spec.errors import DrydockError, TryAgain
from tasks.spec.value import Value

DOWN = "the process supervisor is not running; ./drydock up starts it"
CALL_SECONDS = 30.0

# Fault codes of supervisor.xmlrpc.Faults.
SHUTDOWN_STATE, BAD_NAME, ALREADY_STARTED, NOT_RUNNING = 6, 10, 60, 70
ALREADY_ADDED, STILL_RUNNING, CANT_REREAD = 90, 91, 92


class ProgramState(StrEnum):
    """supervisord's own states; its UNKNOWN is not one we go on from."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    EXITED = "EXITED"
    FATAL = "FATAL"


class ProgramInfo(Value):
    """A program as supervisord sees it. ``exit_status`` counts where it ended; -1 stands for a signal."""

    name: str
    state: ProgramState
    pid: int = 0
    started: bool
    exit_status: int = 0
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether it has been started and no longer runs. A new program is STOPPED until its first start."""
        return self.state in (ProgramState.EXITED, ProgramState.FATAL) or (
            self.state is ProgramState.STOPPED and self.started
        )

    @property
    def alive(self) -> bool:
        """Whether it runs, or supervisord is about to start it."""
        return not self.ended and self.state is not ProgramState.STOPPING


def call(address: Path, method: str, *arguments: Any, tolerate: tuple[int, ...] = ()) -> Any:
    """Call supervisord; a tolerated fault gives None. Connections are not shared, so any thread may call.

    Raises:
        TryAgain: it is down, or shutting down.
        DrydockError: any other fault, with its text.
    """
    try:
        with xmlrpc.client.ServerProxy("http://localhost", _Transport(str(address))) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)
    except xmlrpc.client.Fault as fault:
        if fault.faultCode in tolerate:
            return None
        if fault.faultCode == SHUTDOWN_STATE:
            raise TryAgain("the process supervisor is shutting down; ./drydock up starts it again") from fault
        shown = ", ".join(map(str, arguments))
        raise DrydockError(f"supervisord refuses {method}({shown}): {fault.faultString}") from fault
    except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError, ExpatError) as error:
        raise TryAgain(DOWN) from error


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CALL_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        self._connection = host, _Connection(self._path)
        return self._connection[1]


def program_info(found: dict[str, Any]) -> ProgramInfo:
    """Return supervisord's answer as a value; a state we don't know raises."""
    try:
        state = ProgramState(found["statename"])
    except ValueError:
        raise DrydockError(
            f"{found['name']}: supervisord's {found['statename']!r} is no known state"
        ) from None
    return ProgramInfo(
        name=found["name"],
        state=state,
        pid=found["pid"],
        started=found["start"] > 0,
        exit_status=found["exitstatus"],
        reason=found["spawnerr"],
    )
