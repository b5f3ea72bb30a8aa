"""``python -m tasks.engines.depot``: a gang's room for nodes on hosts that share no disk. Runs in a container of its
own on the gang's network, beside the volume that holds the room.

    GET /room            the room as a tar stream
    PUT /room/NAME       a file or a folder of it as a tar stream: whole, or not at all
    DELETE /room/NAME    a folder of it

Every request bears the token of its attempt. A new attempt is given a depot with a new token, so what an old one still
writes when it wakes up is refused. Standard library only.
"""

from __future__ import annotations

import hmac
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.engines import archive
from tasks.engines.protocol import ROOM
from tasks.spec.errors import DrydockError, IntegrityLost

PORT = 8071
TOKEN = "DRYDOCK_DEPOT_TOKEN"
# As tar writes them.
CHUNK_LIMIT_BYTES = 1 << 20


class Depot(BaseHTTPRequestHandler):
    """One request. The server has the room's folder and the token."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._may():
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with Chunks(self.wfile.write) as chunks:
                archive.write(chunks, self.server.room, "room", os.getuid())

    def do_PUT(self) -> None:
        if path := self._inside():
            self._answer(lambda: archive.unpack(read_chunks(self.rfile), path))

    def do_DELETE(self) -> None:
        if path := self._inside():
            self._answer(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))

    def log_message(self, *_: Any) -> None:
        """Say nothing of what went well."""

    def _may(self) -> bool:
        """Whether the request is one of ours; says so where it is not."""
        # Who is refused may have more to send; the connection is of no use then.
        self.close_connection = True
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._say(401)
        elif not f"{self.path}/".startswith("/room/"):
            self._say(404)
        else:
            return True
        return False

    def _inside(self) -> Path | None:
        """The path in the room that a request names; None where there is none, which is said."""
        if not self._may():
            return None
        parts = PurePosixPath(self.path.removeprefix("/room")).parts[1:]
        if not parts or ".." in parts:
            return self._say(400)
        return Path(self.server.room, *parts)

    def _answer(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (DrydockError, OSError) as error:
            sys.stderr.write(f"depot: {self.path}: {error}\n")
            return self._say(409)
        self._say(200)

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Chunks:
    """A file that is written once, forwards, as the chunks of HTTP/1.1 (RFC 9112, 7.1): its end shows that it is
    whole. Left by an error, it has none."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send

    def write(self, content: bytes) -> int:
        if content:
            self._send(b"%x\r\n%b\r\n" % (len(content), content))
        return len(content)

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._send(b"0\r\n\r\n")


def read_chunks(stream: Any) -> Iterator[bytes]:
    """Yield what ``Chunks`` wrote. Raises IntegrityLost where it was cut."""
    while True:
        try:
            size = int(stream.readline(18), 16)
        except ValueError:
            size = -1
        content = stream.read(size + 2)[:size] if 0 <= size <= CHUNK_LIMIT_BYTES else b""
        if len(content) != size:
            raise IntegrityLost("what was sent has no end")
        if not size:
            return
        yield content


def serve(room: Path, port: int, token: str, host: str = "0.0.0.0") -> ThreadingHTTPServer:
    """Return a depot that listens; ``serve_forever`` answers."""
    server = ThreadingHTTPServer((host, port), Depot)
    server.room, server.token = room, token  # type: ignore[attr-defined]
    return server


if __name__ == "__main__":
    serve(Path(ROOM), PORT, os.environ[TOKEN]).serve_forever()
