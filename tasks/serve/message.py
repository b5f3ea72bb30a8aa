"""What passes over a connection: a request, its one answer, a refusal; and the limits they are held to."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tasks.serve.http import Connection

JSON = b"application/json"
STATUS = {int(status): b"%d %b" % (status, status.phrase.encode()) for status in HTTPStatus}


class Limits(NamedTuple):
    max_batch_rows: int = 64
    max_body_bytes: int = 4 << 20
    max_head_bytes: int = 16 << 10
    max_headers: int = 100
    max_url_bytes: int = 4096
    head_seconds: float = 10.0  # a client that sends slower than this is let go
    body_seconds: float = 10.0
    # Longer than a gateway keeps an idle connection, so that it is never us who close one just as it is used.
    idle_seconds: float = 620.0
    unread_seconds: float = 30.0  # a client that does not read its answers
    max_unsent_bytes: int = 64 << 10
    max_pipelined: int = 32
    max_connections: int = 2048


class Refusal(Exception):
    """A request that ends its connection: the status, and what is wrong in one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Request:
    """One request; ``close`` says that its answer is the connection's last."""

    __slots__ = ("answer", "close", "connection", "early", "headers", "method", "parts", "size", "started", "target")

    def __init__(self, connection: Connection) -> None:
        self.connection, self.started = connection, time.perf_counter()
        self.method, self.target, self.headers, self.parts, self.size = b"", b"", {}, [], 0
        self.close, self.early, self.answer = False, None, None

    @property
    def body(self) -> bytes:
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    @property
    def gone(self) -> bool:
        return self.connection.gone

    def send(self, status: int, body: bytes, content_type: bytes = JSON, fields: bytes = b"") -> None:
        """Answer; ``fields`` are further header lines, each with its line end. It waits for its turn."""
        connection = self.connection
        if connection.connections.draining and connection.ends_with(self):
            self.close = True
        closing = b"connection: close\r\n" if self.close else b""
        self.answer = b"HTTP/1.1 %b\r\ndate: %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
            STATUS[status], connection.connections.date, content_type, len(body), fields, closing,
            b"" if self.method == b"HEAD" else body,
        )  # fmt: skip
        connection.write_ready()
