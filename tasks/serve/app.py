"""The HTTP face of one model: routes, limits and headers, as a bare ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from tasks.serve import protocol
from tasks.serve.metrics import CONTENT_TYPE, Metrics
from tasks.serve.model import Model
from tasks.serve.passport import Ulids, passport
from tasks.serve.predictions import PredictionLog
from tasks.spec.errors import BadRequest, DrydockError, TryAgain

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

CLIENT_GONE = 499  # nobody reads this code but the metrics


class Limits(NamedTuple):
    max_batch_rows: int = 64
    max_body_bytes: int = 4 << 20
    body_seconds: float = 10.0  # a client that sends slower than this is let go


class Response(NamedTuple):
    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Headers = []


class HttpError(Exception):
    """An answer that is no success, decided before or beside the model."""

    def __init__(self, status: int, message: str, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.response = _error(status, message, headers)


class App:
    """``draining`` is set by the server: then ready says no, and every answer closes its connection."""

    def __init__(
        self, model: Model, version: str, metrics: Metrics, log: PredictionLog | None, limits: Limits
    ) -> None:
        self.draining = False
        self._model, self._version, self._limits = model, version, limits
        self._metrics, self._log = metrics, log
        self._digest = model.package.digest_sha256
        self._name = model.package.signature.workload
        self._new_ulid = Ulids()
        self._routes = self._make_routes()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        method, handler = self._routes.get(scope["path"], (None, None))
        if handler is None:
            return await self._send(send, _error(404, self._unknown(scope["path"])))
        if scope["method"] != method:
            message = f"{scope['method']} is not allowed here, must be {method}"
            return await self._send(send, _error(405, message, [(b"allow", method.encode())]))
        if method == "GET":
            return await self._send(send, handler())
        return await self._infer(scope, receive, send)

    def _make_routes(self) -> dict[str, tuple[str, Callable[[], Response] | None]]:
        model = f"/v2/models/{self._name}"
        routes: dict[str, Any] = {
            "/v2": ("GET", self._server),
            "/v2/health/live": ("GET", lambda: _json(200, {"live": True})),
            "/v2/health/ready": ("GET", self._ready),
            "/metrics": ("GET", lambda: Response(200, self._metrics.text(), CONTENT_TYPE.encode())),
        }
        for base in (model, f"{model}/versions/{self._version}"):
            routes[base] = ("GET", self._metadata)
            routes[f"{base}/ready"] = ("GET", self._model_ready)
            routes[f"{base}/infer"] = ("POST", self._infer)
        return routes

    async def _infer(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one inference request, whatever comes in; count it."""
        started, mark = time.perf_counter(), passport(self._digest, self._new_ulid())
        status = 500
        try:
            response = await self._answer(_headers(scope), receive, mark)
            status = response.status
            if status != CLIENT_GONE:
                headers = [
                    (b"x-drydock-passport", mark.encode()),
                    (b"x-drydock-version", self._version.encode()),
                ]
                await self._send(send, response._replace(headers=[*response.headers, *headers]))
        finally:
            self._metrics.observe(status, time.perf_counter() - started)

    async def _answer(self, headers: dict[bytes, bytes], receive: Receive, mark: str) -> Response:
        try:
            self._model.refuse_if_full()  # before its body costs anything
            body = await read_body(headers, receive, self._limits)
            request = protocol.read_infer(
                body, _json_bytes(headers), self._feature, self._limits.max_batch_rows
            )
            answer = await self._model.predict(request.rows)
        except HttpError as error:
            return error.response
        except BadRequest as error:
            return _error(400, str(error))
        except TryAgain as error:
            return _error(503, str(error), [(b"retry-after", b"1")])
        except DrydockError as error:
            return _error(500, str(error))
        self._metrics.count_rows(len(answer.labels))
        if self._log:
            self._log.record(mark, answer)
        content, json_bytes = protocol.write_infer(request, answer, self._name, self._version)
        if json_bytes is None:
            return Response(200, content)
        length = [(b"inference-header-content-length", b"%d" % json_bytes)]
        return Response(200, content, b"application/octet-stream", length)

    @property
    def _feature(self) -> Any:
        return self._model.package.signature.feature

    def _server(self) -> Response:
        return _json(200, protocol.server_metadata(self._version))

    def _metadata(self) -> Response:
        return _json(200, protocol.model_metadata(self._model.package.signature, self._version, self._digest))

    def _ready(self) -> Response:
        return _json(503 if self.draining else 200, {"ready": not self.draining})

    def _model_ready(self) -> Response:
        return _json(503 if self.draining else 200, {"name": self._name, "ready": not self.draining})

    def _unknown(self, path: str) -> str:
        if path.startswith("/v2/models/"):
            return f"no such model or version here; this server has {self._name}, version {self._version}"
        return "no such path; the inference protocol begins at /v2"

    async def _send(self, send: Send, response: Response) -> None:
        headers = [(b"content-type", response.content_type), (b"content-length", b"%d" % len(response.body))]
        headers += response.headers
        if self.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})


async def read_body(headers: dict[bytes, bytes], receive: Receive, limits: Limits) -> bytes:
    """Return the request's body.

    Raises:
        HttpError: 413 too large, 415 compressed, 408 too slow, 499 the client went away.
    """
    if (encoding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise HttpError(415, f"content-encoding {encoding.decode('latin-1')!r}, must be identity")
    if int(headers.get(b"content-length", b"0")) > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _collect(receive, limits)
    except TimeoutError:
        raise HttpError(408, f"the body took over {limits.body_seconds:g} s", CLOSE) from None


CLOSE: Headers = [(b"connection", b"close")]


async def _collect(receive: Receive, limits: Limits) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(CLIENT_GONE, "the client went away")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limits.max_body_bytes:
            raise _too_large(limits)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limits: Limits) -> HttpError:
    # The rest of the body is not read, so the connection can't be used again.
    return HttpError(413, f"the body is over {limits.max_body_bytes} bytes, the limit", CLOSE)


def _headers(scope: Message) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _json_bytes(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise BadRequest(
            f"Inference-Header-Content-Length = {text[:40].decode('latin-1')!r}, must be a number"
        )
    return int(text)


def _json(status: int, data: Any) -> Response:
    return Response(status, protocol.write_json(data))


def _error(status: int, message: str, headers: Headers | None = None) -> Response:
    return Response(status, protocol.write_json({"error": message}), headers=headers or [])
