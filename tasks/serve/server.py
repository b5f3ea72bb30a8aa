"""The server process: its socket, uvicorn around the application, and the drain when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from tasks.serve.app import App
from tasks.spec.errors import TryAgain

# Longer than a gateway keeps an idle connection, so that it is never us who close one just as it is used.
KEEP_ALIVE_SECONDS = 620
GRACE_SECONDS = 7


class Server(uvicorn.Server):
    """Drains on SIGTERM: not ready at once, still answering for ``drain_seconds``, then closing.

    In between, the gateway sees that we are not ready, and every answer tells its client to open the next
    connection elsewhere; so no request is caught by the closing. uvicorn would end by the signal itself; a
    drained server ends with code 0.
    """

    def __init__(self, config: uvicorn.Config, app: App, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin_drain, loop)
        yield

    def _begin_drain(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._app.draining:
            self._app.draining = True
            loop.call_later(self._drain_seconds, self._end)

    def _end(self) -> None:
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take the address without listening: until the model is ready a client is refused, not kept waiting.

    Raises:
        TryAgain: the port is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise TryAgain(f"{host}:{port}: {error.strerror}; give another --port or end what holds it") from None
    return listener


def serve(app: App, listener: socket.socket, drain_seconds: float) -> None:
    """Serve until told to stop; return after the drain."""
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    Server(config, app, drain_seconds).run(sockets=[listener])
