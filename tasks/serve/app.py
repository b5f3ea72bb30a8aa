"""The HTTP face of one model: routes, and the way of an inference request from its bytes to its answer.

early   (head read)  ─ route, method, type, queue ─► refuse, or keep the body
handle  (body read)  ─ read_infer ─► cache? ─► batch ─► deliver ─► passport, log, metrics, answer
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tasks.serve import protocol
from tasks.serve.batch import Batcher, Outcome, Prediction
from tasks.serve.cache import Cache
from tasks.serve.message import JSON, Limits, Request
from tasks.serve.metrics import CONTENT_TYPE, Metrics
from tasks.serve.passport import Ulids, passport
from tasks.serve.predictions import PredictionLog
from tasks.serve.protocol import Answer, InferRequest
from tasks.spec.errors import BadRequest, DrydockError

CLIENT_GONE = 499  # nobody reads this code but the metrics
BINARY = b"application/octet-stream"
RETRY = b"retry-after: 1\r\n"
REPLAYED = b"x-drydock-replayed"

Route = tuple[bytes, Callable[[Request], None]]


class App:
    """``draining`` is set by the server: then ready says no."""

    def __init__(
        self,
        batcher: Batcher,
        version: str,
        metrics: Metrics,
        log: PredictionLog | None,
        limits: Limits,
        cache: Cache | None = None,
    ) -> None:
        self.draining = False
        self.metrics = metrics
        self._batcher, self._version, self._log, self._cache = batcher, version, log, cache
        package = batcher.package
        self._digest, self._signature = package.digest_sha256, package.signature
        self._name, self._labels, self._best = package.signature.workload, package.labels, package.best
        self._new_ulid = Ulids()
        self._read = protocol.Reader(
            self._signature.feature, limits.max_batch_rows, protocol.outputs_of(self._signature)
        )
        self._counted = package.signature.counted
        self._fields = b"x-drydock-version: %b\r\nx-drydock-passport: %b" % (
            version.encode(),
            passport(self._digest, "").encode(),
        )
        self._routes = self._make_routes()
        batcher.on_batch = metrics.batch_rows.observe

    def early(self, request: Request) -> Callable[[], None] | None:
        """Return what answers a request whose body is not worth keeping: it needs no more than the head."""
        method, handler = self._route(request.target)
        if handler is None:
            return partial(self._fail, request, 404, self._unknown(request.target))
        if request.method != method:
            message = f"{request.method.decode()} is not allowed here, must be {method.decode()}"
            return partial(self._fail, request, 405, message, b"allow: %b\r\n" % method)
        if method == b"GET":
            return partial(handler, request)
        if problem := _unreadable(request.headers):
            return partial(self._infer_fails, request, 415, problem)
        if self._batcher.full:
            return partial(self._infer_fails, request, 503, self._full(), RETRY)
        return None

    def handle(self, request: Request) -> None:
        """Answer an inference request now, or let the batch do it."""
        if self._batcher.full:
            return self._infer_fails(request, 503, self._full(), RETRY)
        try:
            ask = self._read(request.body, _json_bytes(request.headers))
            key = self._cache.key(ask.rows) if self._cache and not ask.more else b""
            job = Inference(self, request, ask, key)
            if key and (found := self._cache.get(key)) is not None:
                self.metrics.cache_hits += 1
                return job.deliver(Prediction(self._best(found), found))
            self.metrics.cache_misses += bool(key)
            self._batcher.submit(job)
        except BadRequest as error:
            self._infer_fails(request, 400, str(error))

    def refuse(self, request: Request, status: int, message: str) -> None:
        self.metrics.codes[status] += 1
        self._fail(request, status, message, RETRY if status == 503 else b"")

    def complete(self, request: Request, ask: InferRequest, key: bytes, outcome: Outcome) -> None:
        """Send the answer to one request, under a passport of its own; count and log it."""
        if isinstance(outcome, BadRequest):
            return self._infer_fails(request, 400, str(outcome))
        if isinstance(outcome, DrydockError):
            return self._infer_fails(request, 500, str(outcome))
        if key:
            self._cache.put(key, outcome.probabilities)
        labels = self._labels(ask.rows, outcome.best, outcome.probabilities)
        answer = Answer(labels, outcome.probabilities, outcome.continuations)
        content, json_bytes = protocol.write_infer(ask, answer, self._name, self._version)
        ulid = self._new_ulid()
        fields = b"%b%b\r\n" % (self._fields, ulid.encode())
        if json_bytes is not None:
            fields += b"inference-header-content-length: %d\r\n" % json_bytes
        self._count(request, ulid, answer, outcome.best)
        request.send(200, content, JSON if json_bytes is None else BINARY, fields)

    def _count(self, request: Request, ulid: str, answer: Answer, best: list[int]) -> None:
        metrics, replayed = self.metrics, REPLAYED in request.headers
        metrics.codes[200] += 1
        metrics.rows += len(answer.labels)
        counted = metrics.replayed_labels if replayed else metrics.labels
        names = self._counted
        for k in best:
            counted[names[k]] += 1
        metrics.seconds.observe(time.perf_counter() - request.started)
        if self._log:
            self._log.record(passport(self._digest, ulid), answer, replayed)

    def _infer_fails(self, request: Request, status: int, message: str, fields: bytes = b"") -> None:
        self.metrics.codes[status] += 1
        ulid = self._new_ulid().encode()
        self._fail(request, status, message, b"%b%b\r\n%b" % (self._fields, ulid, fields))

    def _fail(self, request: Request, status: int, message: str, fields: bytes = b"") -> None:
        request.send(status, protocol.write_json({"error": message}), fields=fields)

    # --- routes ---

    def _make_routes(self) -> dict[bytes, Route]:
        model = f"/v2/models/{self._name}"
        routes: dict[str, Any] = {
            "/v2": (b"GET", lambda request: _json(request, 200, protocol.server_metadata(self._version))),
            "/v2/health/live": (b"GET", lambda request: _json(request, 200, {"live": True})),
            "/v2/health/ready": (b"GET", self._ready),
            "/metrics": (b"GET", lambda request: request.send(200, self.metrics.text(), CONTENT_TYPE)),
        }
        for base in (model, f"{model}/versions/{self._version}"):
            routes[base] = (b"GET", self._metadata)
            routes[f"{base}/ready"] = (b"GET", self._model_ready)
            routes[f"{base}/infer"] = (b"POST", self.handle)
        return {path.encode(): route for path, route in routes.items()}

    def _route(self, target: bytes) -> tuple[bytes, Callable[[Request], None] | None]:
        if route := self._routes.get(target):
            return route
        path = target.partition(b"?")[0]
        if path.startswith(b"http://"):  # the absolute form, which RFC 9112 wants understood
            path = b"/" + path.removeprefix(b"http://").partition(b"/")[2]
        return self._routes.get(path, (b"", None))

    def _metadata(self, request: Request) -> None:
        _json(request, 200, protocol.model_metadata(self._signature, self._version, self._digest))

    def _ready(self, request: Request) -> None:
        _json(request, 503 if self.draining else 200, {"ready": not self.draining})

    def _model_ready(self, request: Request) -> None:
        _json(request, 503 if self.draining else 200, {"name": self._name, "ready": not self.draining})

    def _unknown(self, target: bytes) -> str:
        if target.startswith(b"/v2/models/"):
            return f"no such model or version here; this server has {self._name}, version {self._version}"
        return "no such path; the inference protocol begins at /v2"

    def _full(self) -> str:
        return f"the queue is full: {self._batcher.max_queue} requests wait"


class Inference:
    """One request as the batch sees it."""

    __slots__ = ("_app", "_ask", "_key", "_request", "more", "rows")

    def __init__(self, app: App, request: Request, ask: InferRequest, key: bytes) -> None:
        self._app, self._request, self._ask, self._key = app, request, ask, key
        self.rows, self.more = ask.rows, ask.more

    @property
    def gone(self) -> bool:
        return self._request.connection.gone

    def deliver(self, outcome: Outcome) -> None:
        if self._request.connection.gone:
            self._app.metrics.codes[CLIENT_GONE] += 1
        else:
            self._app.complete(self._request, self._ask, self._key, outcome)


def _unreadable(headers: dict[bytes, bytes]) -> str | None:
    """Say why a body can't be read, by its headers; a body without a type is taken for JSON."""
    if (encoding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        return f"content-encoding {_shown(encoding)}, must be identity"
    kind = headers.get(b"content-type", JSON)
    if kind != JSON and kind.partition(b";")[0].strip().lower() not in (JSON, BINARY):
        return f"content-type {_shown(kind)}, must be application/json or application/octet-stream"
    return None


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))


def _json_bytes(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise BadRequest(f"Inference-Header-Content-Length = {_shown(text)}, must be a number")
    return int(text)


def _json(request: Request, status: int, data: Any) -> None:
    request.send(status, protocol.write_json(data))
