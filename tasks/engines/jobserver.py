"""``python -m tasks.engines.jobserver``: the one holder of the Docker socket. It gives containers to who has its token,
by the schema of ``orders`` alone.

    <home>/images.json   what may run        <home>/rooms/   rooms on their way into a container
    <home>/jobs/         logs of jobs        <home>/containers/   locks and logs by handle
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tasks.engines import archive
from tasks.engines.docker import DockerEngine
from tasks.engines.docker_client import connect, translated
from tasks.engines.orders import JobOrder, ServiceOrder, job_of, service_of
from tasks.engines.places import Places, places_of
from tasks.spec.errors import BadRequest, DrydockError, Refused, TryAgain, from_os

PORT = 8070
NETWORK = "internal"
MAX_ORDER_BYTES = 1 << 20
# A replica answers what it has, and the daemon's SIGKILL never comes to one that is only told.
DRAIN_SECONDS = 20
# What is left on the disk of rooms: the daemon and its logs need some too.
RESERVE_BYTES = 256 << 20
STATUS = {10: 403, 20: 503, 30: 400, 40: 409}
Answer = Callable[[Request], Awaitable[Response]]


class JobServer:
    """The routes of ``orders`` over one engine. ``token``: what every request but /health must bear."""

    def __init__(self, engine: DockerEngine, token: str) -> None:
        self.engine, self.token, self.rooms = engine, token, engine.home / "rooms"

    def app(self) -> Starlette:
        handle, key, name = "/jobs/{handle}", "/rooms/{key}", "/services/{name}"
        routes = [
            Route("/health", self.health),
            Route("/jobs", self.guarded(self.submit), methods=["POST"]),
            Route(handle, self.guarded(self.poll)),
            Route(f"{handle}/log", self.guarded(self.log)),
            Route(f"{handle}/files", self.guarded(self.files)),
            Route(f"{handle}/cancel", self.guarded(self.cancel), methods=["POST"]),
            Route(f"{handle}/forget", self.guarded(self.forget), methods=["POST"]),
            Route(key, self.guarded(self.room)),
            Route(key, self.guarded(self.send_room), methods=["PUT"]),
            Route("/services", self.guarded(self.start), methods=["PUT"]),
            Route("/services", self.guarded(self.replicas)),
            Route(f"{name}/drain", self.guarded(self.drain), methods=["POST"]),
            Route(f"{name}/stop", self.guarded(self.stop), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def guarded(self, answer: Answer) -> Answer:
        """Let nobody in without the token, and give every error of ours its one line."""

        @functools.wraps(answer)
        async def guard(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return _failed(Refused("the job service: no token, or a wrong one"), 401)
            try:
                return await answer(request)
            except DrydockError as error:
                return _failed(error, STATUS.get(error.exit_code, 500))
            except OSError as error:
                return _failed(from_os(error), 503)

        return guard

    async def health(self, request: Request) -> Response:
        with contextlib.suppress(DrydockError):
            await run_in_threadpool(_ping, self.engine)
            return JSONResponse({"healthy": True})
        return JSONResponse({"healthy": False}, 503)

    async def submit(self, request: Request) -> Response:
        order = JobOrder.parse(await _json(request), "the job")
        room = self.rooms / order.key if order.room else None

        def submit() -> str:
            if room and not room.is_dir() and not self.engine.has_room(order.key):
                raise BadRequest(f"job {order.key}: its room was not sent; PUT /rooms/{order.key} first")
            is_over = True
            try:
                return self.engine.submit(job_of(order, self.engine.home / "jobs" / order.key, room))
            except TryAgain:
                is_over = False  # It is asked for again, in the room that was sent.
                raise
            finally:
                if room and is_over:
                    shutil.rmtree(room, ignore_errors=True)

        return JSONResponse({"handle": await run_in_threadpool(submit)})

    async def poll(self, request: Request) -> Response:
        status = await run_in_threadpool(self.engine.poll, request.path_params["handle"])
        return JSONResponse(status.model_dump(mode="json"))

    async def log(self, request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not (since.isascii() and since.isdigit()):
            raise BadRequest(f"since = {since!r}, must be a whole number")
        text, offset = await run_in_threadpool(self.engine.logs, request.path_params["handle"], int(since))
        return JSONResponse({"text": text, "offset": offset})

    async def files(self, request: Request) -> Response:
        path = request.query_params.get("path", "")
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise BadRequest(f"path = {path!r}, must lie in the room")
        chunks = await run_in_threadpool(self.engine.read, request.path_params["handle"], path)
        if chunks is None:
            return _failed(BadRequest(f"{path}: is not there"), 404)
        return StreamingResponse(chunks, media_type="application/x-tar")

    async def cancel(self, request: Request) -> Response:
        await run_in_threadpool(self.engine.cancel, request.path_params["handle"])
        return JSONResponse({})

    async def forget(self, request: Request) -> Response:
        await run_in_threadpool(self.engine.forget, request.path_params["handle"])
        return JSONResponse({})

    async def room(self, request: Request) -> Response:
        return JSONResponse({"whole": await run_in_threadpool(self.engine.has_room, _key(request))})

    async def send_room(self, request: Request) -> Response:
        """Keep a room until its job is submitted: complete, or not at all."""
        key = _key(request)
        self.rooms.mkdir(parents=True, exist_ok=True)
        part = self.rooms / f".{key}.{secrets.token_hex(4)}.tar"
        try:
            with part.open("wb") as stream:
                async for chunk in request.stream():
                    self._check_space(len(chunk))
                    stream.write(chunk)
            await run_in_threadpool(_unpack, part, self.rooms / key)
        finally:
            part.unlink(missing_ok=True)
        return JSONResponse({})

    async def start(self, request: Request) -> Response:
        order = ServiceOrder.parse(await _json(request), "the service")
        return _replicas(await run_in_threadpool(self.engine.start, service_of(order)))

    async def replicas(self, request: Request) -> Response:
        return _replicas(await run_in_threadpool(self.engine.replicas, request.query_params.get("name")))

    async def drain(self, request: Request) -> Response:
        await run_in_threadpool(self.engine.drain, request.path_params["name"])
        return JSONResponse({}, background=BackgroundTask(self.clear_drained))

    async def stop(self, request: Request) -> Response:
        await run_in_threadpool(self.engine.stop, request.path_params["name"])
        return JSONResponse({})

    async def clear_drained(self) -> None:
        """Remove what was drained once it has ended: nobody else comes by for a while."""
        await asyncio.sleep(DRAIN_SECONDS)
        with contextlib.suppress(DrydockError):
            await run_in_threadpool(self.engine.clear_drained)

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self.rooms).free
        if free < RESERVE_BYTES + size:
            raise TryAgain(f"the disk of the job service is full: {free} bytes are free; free some and ask again")


def _failed(error: DrydockError, status: int) -> Response:
    return JSONResponse({"exit_code": error.exit_code, "message": str(error)}, status)


def _replicas(found: Any) -> Response:
    return JSONResponse([replica.model_dump(mode="json") for replica in found])


def _key(request: Request) -> str:
    key = request.path_params["key"]
    if not key.replace("-", "").replace("_", "").isalnum() or len(key) > 80:
        raise BadRequest(f"key = {key[:90]!r}, must be up to 80 letters, digits and dashes")
    return key


def _ping(engine: DockerEngine) -> None:
    with translated("the job service"):
        engine.api.ping()


def _unpack(part: Path, target: Path) -> None:
    with part.open("rb") as stream:
        if not archive.unpack(iter(lambda: stream.read(archive.CHUNK_BYTES), b""), target):
            raise BadRequest("the room is an empty archive")


async def _json(request: Request) -> Any:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ORDER_BYTES:
            raise BadRequest(f"the order is longer than {MAX_ORDER_BYTES} bytes")
    try:
        return json.loads(body)
    except ValueError:
        raise BadRequest("the order is no JSON") from None


def own_places() -> Places:
    """Return what this container can give on, as the daemon describes it."""
    with translated("the job service's own container"):
        return places_of(connect().inspect_container(socket.gethostname()), NETWORK)


def main() -> int:
    import uvicorn

    try:
        token = Path(os.environ["DRYDOCK_JOBS_TOKEN"]).read_text().strip()
        engine = DockerEngine(Path(os.environ["DRYDOCK_HOME"]), own_places())
    except KeyError as error:
        sys.stderr.write(f"error: {error.args[0]} is not set\n")
        return BadRequest.exit_code
    except DrydockError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    uvicorn.run(JobServer(engine, token).app(), host="0.0.0.0", port=PORT, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
