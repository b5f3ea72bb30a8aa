"""HTTP/1.1 on a raw asyncio protocol: parsed by httptools, held to limits, answered in the order of the requests.

Why no framework: docs/adr/0009-http-layer.md. A connection's life:

    data_received ─ slices ─ httptools ─► on_headers_complete ─► Application.early   (refuse before the body)
                                          on_message_complete ─► Application.handle  (answers now or later)
    Request.send ─► _write_ready: the answers at the head of the line leave, the others wait for their turn

What a client sends becomes a 4xx with one line of JSON, never a 5xx. Times are of ``time.perf_counter``.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import httptools

from tasks.serve.message import Limits, Refusal, Request

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Smuggling and confusion begin where two parsers read another one of two fields.
ONCE = frozenset((b"host", b"content-encoding", b"content-type", b"expect", b"inference-header-content-length"))
HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
# So much is parsed before the answers that it caused are looked at.
SLICE_BYTES = 32 << 10
LINGER_SECONDS = 1.0


class Application(Protocol):
    def early(self, request: Request) -> Callable[[], None] | None:
        """Return what answers a request whose body shall not be kept, or None."""

    def handle(self, request: Request) -> None:
        """Call ``request.send`` once, now or later."""

    def refuse(self, request: Request, status: int, message: str) -> None:
        """Answer a request that ends its connection."""


class Connections:
    """All connections of one server; ``tick`` is called every second."""

    def __init__(self, app: Application, limits: Limits) -> None:
        self.app, self.limits, self.draining, self.date = app, limits, False, b""
        self.open: set[Connection] = set()
        self.tick()

    def __call__(self) -> Connection:
        return Connection(self)

    def tick(self) -> None:
        """Let go who is too slow; the time of day is written once a second too."""
        now = time.perf_counter()
        self.date = email.utils.formatdate(usegmt=True).encode()
        for connection in list(self.open):
            connection.check(now)


class Connection(asyncio.Protocol):
    def __init__(self, connections: Connections) -> None:
        self.connections, self._app, self._limits = connections, connections.app, connections.limits
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None  # the one that is being read
        self._parsed: deque[Request] = deque()  # and not handled yet: kept while their client reads no answers
        self._waiting: deque[Request] = deque()  # for their answers, in order
        self._head_bytes, self._in_head, self._spoke = 0, False, False
        self._unfed, self._advancing, self._paused, self._unread_at = b"", False, False, None
        self._refusal: Refusal | None = None
        self._usual, self._usual_head, self._usual_bytes = Request(self), b"", -1
        self._ended = False  # nothing more is read
        self.gone = False
        self._since = time.perf_counter()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._request or self._unfed)

    def ends_with(self, request: Request) -> bool:
        """Whether nothing came after this request."""
        last = self._waiting[-1] if self._waiting else None  # none: it was dropped, as its connection drains
        return last is request and self._request in (None, request) and not self._unfed

    # --- what the event loop calls ---

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.max_unsent_bytes)
        self.connections.open.add(self)
        if len(self.connections.open) > self._limits.max_connections:
            self._refuse(Refusal(503, f"{self._limits.max_connections} connections are open, the limit"))

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = self._ended = True
        self.connections.open.discard(self)
        self._waiting.clear()
        self._parsed.clear()
        self._unfed, self._parser, self._usual = b"", None, None  # these hold us: a cycle

    def data_received(self, data: bytes) -> None:
        if not self._ended:
            self._unfed = self._unfed + data if self._unfed else data
            self._advance()

    def eof_received(self) -> bool:
        """A client may close its side and still wait for the answers it is owed."""
        if self._waiting and self._request is None and not self._ended:
            self._ended = self._waiting[-1].close = True
            return True
        return bool(self._waiting) and self._ended

    def pause_writing(self) -> None:
        self._unread_at = time.perf_counter()
        self._regulate()

    def resume_writing(self) -> None:
        self._unread_at = None
        self._advance()

    # --- reading ---

    def _advance(self) -> None:
        """Parse what came, as long as its answers are read; then read on, or not."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while True:
                if self._parsed and self._unread_at is None:
                    self._handle(self._parsed.popleft())
                elif self._unfed and not self._parsed and not self._ended and not self._blocked:
                    part, self._unfed = self._unfed[:SLICE_BYTES], self._unfed[SLICE_BYTES:]
                    self._feed(part)
                else:
                    break
        finally:
            self._advancing = False
        self._regulate()

    @property
    def _blocked(self) -> bool:
        return self._unread_at is not None or len(self._waiting) > self._limits.max_pipelined

    def _regulate(self) -> None:
        if self.gone or self._blocked == self._paused:
            return
        self._paused = not self._paused
        with contextlib.suppress(RuntimeError):  # the transport is closing already
            self._transport.pause_reading() if self._paused else self._transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        """Parse one slice, and keep the requests that it completed: the parser hides what its callbacks raise."""
        between = self._request is None
        if between and len(data) == self._usual_bytes and data.startswith(self._usual_head):
            return self._repeat(data)
        refusal, self._refusal, self._spoke = None, None, True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # is not offered: what follows is not for us
            self._parsed[-1].close = True
        except httptools.HttpParserError as error:
            if self._refusal is None and isinstance(error, httptools.HttpParserCallbackError):
                self._transport.abort()
                raise
            refusal = self._refusal or Refusal(400, f"no HTTP/1.1 request: {str(error)[:80]}")
        if between and len(self._parsed) == 1:
            self._learn(self._parsed[0], data)
        if not refusal and self._in_head:
            refusal = self._judge_head(data)
        if refusal and not (self._parsed and self._parsed[-1].close):
            self._refuse(refusal)
        elif self._request is None:
            self._since = time.perf_counter()

    def _learn(self, request: Request, data: bytes) -> None:
        """Remember a request's head where it and its body are all of a slice: clients send the same one again."""
        length = int(request.headers.get(b"content-length", b"0"))
        head_bytes = data.find(b"\r\n\r\n") + 4
        plain = b"transfer-encoding" not in request.headers and b"expect" not in request.headers
        if plain and not request.close and length == request.size == len(data) - head_bytes:
            self._usual, self._usual_head, self._usual_bytes = request, data[:head_bytes], len(data)

    def _repeat(self, data: bytes) -> None:
        """Take a request whose head is the one before to the byte, and its body as long: the parser, which is
        between two messages, would find the same."""
        request, usual = Request(self), self._usual
        request.method, request.target, request.headers = usual.method, usual.target, usual.headers
        request.parts.append(data[len(self._usual_head) :])
        if usual.early:
            request.early = self._app.early(request)
        self._waiting.append(request)
        self._handle(request)
        self._since = request.started

    def _handle(self, request: Request) -> None:
        if request.close:
            self._ended, self._unfed = True, b""
        if request.early:
            request.early()
        else:
            self._app.handle(request)

    def _judge_head(self, data: bytes) -> Refusal | None:
        """Hold a head that has not ended to its limit; one whose first line ended without a version is HTTP/0.9."""
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.max_head_bytes + SLICE_BYTES:
            return Refusal(431, f"the head is over {self._limits.max_head_bytes} bytes, the limit")
        if self._request.target and data.endswith(b"\n") and self._parser.get_http_version() == "0.0":
            return Refusal(400, "no HTTP version, must be HTTP/1.1")
        return None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, and take nothing more: the rest of what was sent can't be told apart."""
        request = self._request or Request(self)
        self._request, self._ended, self._unfed, request.close = None, True, b"", True
        if request not in self._waiting:
            self._waiting.append(request)
        self._app.refuse(request, refusal.status, refusal.message)

    # --- what the parser calls; a refusal is kept, since the parser wraps what is raised ---

    def on_message_begin(self) -> None:
        self._request, self._in_head, self._head_bytes = Request(self), True, 0
        self._since = self._request.started

    def on_url(self, url: bytes) -> None:
        self._request.target += url
        if len(self._request.target) > self._limits.max_url_bytes:
            self._raise(414, f"the path is over {self._limits.max_url_bytes} bytes, the limit")

    def on_header(self, name: bytes, value: bytes) -> None:
        name, headers = name.lower(), self._request.headers
        self._request.size += len(name) + len(value)
        if name in headers and name in ONCE:
            self._raise(400, f"header {name.decode('latin-1')} is there twice, must be once")
        headers[name] = value
        if len(headers) > self._limits.max_headers or self._request.size > self._limits.max_head_bytes:
            limits = self._limits
            self._raise(431, f"the head is over {limits.max_headers} headers or {limits.max_head_bytes} bytes")

    def on_headers_complete(self) -> None:
        request, headers, self._in_head = self._request, self._request.headers, False
        request.method, request.size, request.started = self._parser.get_method(), 0, time.perf_counter()
        self._since = request.started
        self._judge_version(request, headers)
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            self._raise(400, "transfer-encoding must be chunked, or absent")
        if (length := headers.get(b"content-length")) and int(length) > self._limits.max_body_bytes:
            self._raise_too_large()
        request.early = self._app.early(request)
        if b"expect" in headers:
            self._expect(request, headers[b"expect"], length)
        self._waiting.append(request)

    def on_body(self, body: bytes) -> None:
        request = self._request
        request.size += len(body)
        if request.size > self._limits.max_body_bytes:
            self._raise_too_large()
        if request.early is None:
            request.parts.append(body)

    def on_message_complete(self) -> None:
        self._parsed.append(self._request)
        self._request = None

    def _judge_version(self, request: Request, headers: dict[bytes, bytes]) -> None:
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._raise(400, f"HTTP/{version}, must be HTTP/1.1")
        request.close = version == "1.0" or not self._parser.should_keep_alive()
        host = headers.get(b"host")
        if host is None and version == "1.1":
            self._raise(400, "no Host header, HTTP/1.1 needs one")
        if host and not HOST.fullmatch(host):
            self._raise(400, "the Host header is no host name")

    def _expect(self, request: Request, value: bytes, length: bytes | None) -> None:
        """Ask for the body; where it is refused anyhow, answer at once, and the client need not send it."""
        if value.lower() != b"100-continue":
            self._raise(417, "expect must be 100-continue, or absent")
        if request.early is not None:
            self._raise(417, "this request is refused without its body; send it without expect to see why")
        if length not in (None, b"0") or b"transfer-encoding" in request.headers:
            marker = Request(self)
            marker.answer = CONTINUE
            self._waiting.append(marker)
            self.write_ready()

    def _raise_too_large(self) -> None:
        self._raise(413, f"the body is over {self._limits.max_body_bytes} bytes, the limit")

    def _raise(self, status: int, message: str) -> None:
        self._refusal = Refusal(status, message)
        raise self._refusal

    # --- writing and ending ---

    def write_ready(self) -> None:
        """Write the answers whose turn it is."""
        waiting = self._waiting
        while waiting and (answer := waiting[0].answer) is not None:
            request = waiting.popleft()
            self._transport.write(answer)
            if request.close:
                return self._end()
        if (self._unfed or self._parsed) and not self._advancing:
            self._advance()
        elif self._paused:
            self._regulate()

    def _end(self) -> None:
        """Close after the last answer. Closed at once with bytes unread, the kernel would reset the connection and
        the client might never read why it was refused: so our side first, theirs a moment later."""
        self._ended = True
        self._waiting.clear()
        self._parsed.clear()
        if self.gone or self._transport.is_closing():
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)

    def check(self, now: float) -> None:
        """Let go of a client that sends or reads too slowly, or has been silent for too long."""
        limits, quiet = self._limits, now - self._since
        if self._unread_at is not None:
            if now - self._unread_at > limits.unread_seconds:
                self._transport.abort()
        elif self._ended or (self._waiting and self._request is None):
            return
        elif self._request is not None:
            seconds = limits.head_seconds if self._in_head else limits.body_seconds
            if quiet > seconds:
                part = "head" if self._in_head else "body"
                self._refuse(Refusal(408, f"the {part} took over {seconds:g} s"))
        elif quiet > (limits.idle_seconds if self._spoke else limits.head_seconds):
            self._transport.close()

    def close_idle(self) -> None:
        if not self.busy and not self._ended:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
