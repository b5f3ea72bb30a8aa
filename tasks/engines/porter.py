"""``python -m tasks.engines.porter COMMAND…``: a node of a gang on a host that shares no disk. Brings the room from the
depot, runs the command in it, and takes back what it writes while it runs: what is whole, as soon as it is.

A file goes when it was replaced or has grown, a folder once its manifest is there; one that was dropped here is dropped
there. The exit code is the command's, or STARVED where the kernel killed a process of this container for its memory,
which a Swarm does not tell. Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tasks.engines import archive
from tasks.engines.depot import PORT, TOKEN, Chunks
from tasks.engines.protocol import ROOM
from tasks.spec.errors import DrydockError, TryAgain
from tasks.store.manifest import NAME

HOST = "depot"
STARVED = 253
LOOK_SECONDS = 0.2
ANSWER_SECONDS = 60
# The depot starts beside us; an overlay network takes a while to know a name.
PATIENCE_SECONDS = 60.0
# History first: who follows it asks for the checkpoints that it tells of. done.json last: all before it is there.
FILES = ("progress.jsonl", "history.jsonl", "error.json", "weights.safetensors", "done.json")
FOLDERS = "checkpoints"
# Where the kernel counts what it killed for this container's memory: the second version's control groups, the first's.
COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


class Superseded(DrydockError):
    """Another attempt works in this room by now."""


class Porter:
    """Carries one room between a depot and a folder."""

    def __init__(self, room: Path, host: str, port: int, token: str) -> None:
        self.room, self.host, self.port, self.token = room, host, port, token
        self.sent: dict[Path, tuple[int, int]] = {}

    def bring(self) -> None:
        """Fetch the room, complete.

        Raises:
            OSError, DrydockError: the depot is not there yet, or gave half of it.
        """
        with contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/room", headers=self._headers())
            answer = self._checked(connection)
            archive.unpack(iter(lambda: answer.read(archive.CHUNK_BYTES), b""), self.room)
        self.sent = {path: _state(path) for path in self._outputs()}

    def take(self) -> None:
        """Send what is new, in its order, then drop what was dropped. Raises as ``bring``."""
        outputs = self._outputs()
        for path in outputs:
            if self.sent.get(path) != (state := _state(path)):
                self._send(path)
                self.sent[path] = state
        for path in set(self.sent) - set(outputs):
            self._drop(path)
            del self.sent[path]

    def _outputs(self) -> list[Path]:
        whole = [path for path in sorted((self.room / FOLDERS).glob("epoch-*")) if (path / NAME).exists()]
        files = [self.room / name for name in FILES if (self.room / name).exists()]
        history = [path for path in files if path.suffix == ".jsonl"]
        return [*history, *whole, *files[len(history) :]]

    def _send(self, path: Path) -> None:
        with contextlib.closing(self._connection()) as connection:
            connection.putrequest("PUT", self._name(path))
            for name, value in (self._headers() | {"Transfer-Encoding": "chunked"}).items():
                connection.putheader(name, value)
            connection.endheaders()
            # Refused half-way, it is the answer that says why.
            with contextlib.suppress(ConnectionError), Chunks(connection.send) as chunks:
                archive.write(chunks, path, path.name, os.getuid())
            self._checked(connection).read()

    def _drop(self, path: Path) -> None:
        with contextlib.closing(self._connection()) as connection:
            connection.request("DELETE", self._name(path), headers=self._headers())
            self._checked(connection).read()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_SECONDS)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _name(self, path: Path) -> str:
        return f"/room/{path.relative_to(self.room)}"

    def _checked(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answer = connection.getresponse()
        if answer.status == 401:
            raise Superseded("another attempt works in this room by now: what this one writes is refused")
        if answer.status != 200:
            raise OSError(f"the depot answers {answer.status}")
        return answer


def patiently(work: Callable[[], None]) -> None:
    """Do it, again where it fails, for PATIENCE_SECONDS. Raises what it raised the last time; Superseded at once."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return work()
        except Superseded:
            raise
        except (OSError, http.client.HTTPException, DrydockError):
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_SECONDS)


def run(porter: Porter, command: list[str]) -> int:
    """Run a command in the room, and take back what it writes; return its exit code, a signal as 128 + its number.

    Raises:
        Superseded: the command was ended.
    """
    with subprocess.Popen(command, cwd=porter.room) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while child.poll() is None:
                time.sleep(LOOK_SECONDS)
                # A depot that is away for a while, or a file that went, is asked for again at the next look.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    porter.take()
        finally:
            child.kill()
    patiently(porter.take)
    if child.returncode and starved():
        return STARVED
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def starved(counters: tuple[str, ...] = COUNTERS) -> bool:
    """Whether the kernel killed a process of this container for its memory."""
    lines = [line.split() for path in counters if os.path.exists(path) for line in Path(path).read_text().splitlines()]
    return any(words[0] == "oom_kill" and words[1] != "0" for words in lines if len(words) == 2)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_size


def main(command: list[str]) -> int:
    porter = Porter(Path(ROOM), HOST, PORT, os.environ.pop(TOKEN))
    try:
        patiently(porter.bring)
        return run(porter, command)
    except (DrydockError, OSError, http.client.HTTPException) as error:
        print(f"porter: {error}", file=sys.stderr)  # noqa: T201 - its log is all that a node has
        return getattr(error, "exit_code", TryAgain.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
