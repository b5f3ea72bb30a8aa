"""A process that has imported what steps import, and forks itself for each: a step starts in a moment.

    python -m tasks.engines.forkserver FOLDER --watch PACKAGE MODULE…

Its client is ``forked.py``, which a job runs as. A fork runs ``python -m MODULE`` with the client's arguments,
environment, streams, folder and process group. It dies with its client and with the server. When a source under PACKAGE
has changed since the server started, a client is declined and starts an interpreter of its own; the server
ends when its forks have, and its supervisor starts a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import tasks
from tasks.engines.forked import FORKED, SOCKET

PR_SET_PDEATHSIG = 1
REQUEST_SECONDS = 5.0
MAX_REQUEST_BYTES = 4 << 20


class Fork(NamedTuple):
    """What a client asks for, and the streams that it sent along."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]
    group: int


class ForkServer:
    """Forks itself for each client of a unix socket in ``folder``; ``serve`` returns in each fork, with its task."""

    def __init__(self, folder: Path, watched: Path) -> None:
        self._watched, self._sources = watched, _sources(watched)
        address = folder / SOCKET
        address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._listener.bind(f"/proc/self/fd/{place}/{SOCKET}")
        os.close(place)
        self._listener.listen(64)
        self._clients: dict[socket.socket, int] = {}
        self._ended, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> Fork | None:
        """Serve clients; return a fork's task in each fork, and None in the server when its sources have changed."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        stale = False
        while not stale or self._clients:
            new = [] if stale else [self._listener]
            ready, _, _ = select.select([*new, self._ended, *self._clients], [], [])
            if self._ended in ready:
                os.read(self._ended, 4096)
                self._reap()
            for client in [one for one in ready if one in self._clients]:
                # A client says nothing more; what can be read is that it is gone.
                os.kill(self._clients[client], signal.SIGKILL)
            if self._listener in ready:
                client, _ = self._listener.accept()
                stale = _sources(self._watched) != self._sources
                if fork := self._fork(client, stale):
                    return fork
                if stale:
                    self._listener.close()
        return None

    def _fork(self, client: socket.socket, decline: bool) -> Fork | None:
        """Make a fork for a client; return its task in the fork, and None in the server."""
        client.settimeout(REQUEST_SECONDS)
        fork = _receive(client)
        if fork is None or decline:
            for stream in fork.streams if fork else ():
                os.close(stream)
            client.close()
            return None
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _leave(server, [self._listener, client, *self._clients], [self._ended, self._woken])
            return fork
        self._clients[client] = pid
        _tell(client, FORKED)
        for stream in fork.streams:
            os.close(stream)
        return None

    def _reap(self) -> None:
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            for client in [one for one, theirs in self._clients.items() if theirs == pid]:
                del self._clients[client]
                _tell(client, json.dumps(os.waitstatus_to_exitcode(status)).encode())
                client.close()


def become(fork: Fork) -> None:
    """Make this process look as if the client had started it, and run the module to its end (SystemExit)."""
    os.setpgid(0, fork.group)
    for number, stream in enumerate(fork.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(tasks.UNTOLD | fork.environment)
    os.chdir(fork.folder)
    sys.argv = [fork.module, *fork.arguments]
    runpy.run_module(fork.module, run_name="__main__", alter_sys=True)


def main(arguments: list[str]) -> None:
    """Import what is asked for, then serve until a source changes."""
    parser = argparse.ArgumentParser(prog="tasks.engines.forkserver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("modules", nargs="+", help="imported before the first fork; one that is not there is left out")
    parser.add_argument("--watch", type=Path, required=True, help="the package whose sources must stay as they are")
    options = parser.parse_args(arguments)
    # Looked at first: a source that changes while we import is noticed too.
    before = _sources(options.watch)
    for name in options.modules:
        with contextlib.suppress(ImportError):
            import_module(name)
    gc.freeze()  # so that a fork's collector does not write into pages it shares
    if before != _sources(options.watch):
        return
    fork = ForkServer(options.folder, options.watch).serve()
    if fork is not None:
        become(fork)


def _leave(server: int, sockets: list[socket.socket], pipes: list[int]) -> None:
    """In a fork: nothing of the server's stays, but that it dies with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in sockets:
        each.close()
    for pipe in pipes:
        os.close(pipe)


def _receive(client: socket.socket) -> Fork | None:
    """Read one request; None where it is none, or its sender is of another session: its group can't be joined."""
    streams: list[int] = []
    try:
        head, streams, _, _ = socket.recv_fds(client, 8, 3)
        size = int.from_bytes(head, "big")
        if len(head) == 8 and len(streams) == 3 and size <= MAX_REQUEST_BYTES:
            data: dict[str, Any] = json.loads(_read(client, size))
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if os.getsid(pid) == os.getsid(0):
                return Fork(**data, streams=streams, group=os.getpgid(pid))
    except (OSError, ValueError, TypeError):
        pass  # declined like any other that is no request
    for stream in streams:
        os.close(stream)
    return None


def _read(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (part := client.recv(size - len(found))):
            raise ValueError("the request ends early")
        found += part
    return found


def _tell(client: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # it has gone meanwhile
        client.sendall(answer)


def _sources(package: Path) -> dict[str, tuple[int, int]]:
    facts = ((path, path.stat()) for path in package.rglob("*.py"))
    return {str(path): (stat.st_mtime_ns, stat.st_size) for path, stat in facts}


if __name__ == "__main__":
    main(sys.argv[1:])
