"""Send the holdout's rows through the gateway's side door, so that an idle workload has evidence too."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

CONNECTIONS = 2
# A bound for quick models; slow ones are bounded by the connections, each with one request at a time.
REQUESTS_PER_SECOND = 400.0
BACK_OFF_SECONDS = 0.5
TIMEOUT_SECONDS = 30.0
TOKEN_HEADER = "x-drydock-replay"
BUSY = (429, 503)


class Replayer:
    """Sends ``bodies`` in a circle until it is stopped; ``ca`` is trusted where the gateway speaks TLS."""

    def __init__(
        self, gateway_url: str, workload: str, token: str, bodies: Sequence[bytes], ca: str | None = None
    ) -> None:
        self._ca = ca
        self._host = urlsplit(gateway_url).netloc
        self._path = f"/v2/models/{workload}/infer"
        self._headers = {"content-type": "application/json", TOKEN_HEADER: token}
        self._bodies = itertools.cycle(bodies)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CONNECTIONS if bodies else 0)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send nothing more. Returns at once: a request under way ends by itself, and may take long."""
        self._stopped.set()

    def _run(self) -> None:
        interval = CONNECTIONS / REQUESTS_PER_SECOND
        connection = self._connect()
        with contextlib.closing(connection):
            due = time.monotonic()
            while not self._stopped.wait(max(due - time.monotonic(), 0)):
                pause = 0.0 if self._send(connection) else BACK_OFF_SECONDS
                # From now, so that what was missed in a stall is not made up for in a burst.
                due = max(due + interval, time.monotonic()) + pause

    def _connect(self) -> http.client.HTTPConnection:
        if self._ca is None:
            return http.client.HTTPConnection(self._host, timeout=TIMEOUT_SECONDS)
        context = ssl.create_default_context(cafile=self._ca)
        return http.client.HTTPSConnection(self._host, timeout=TIMEOUT_SECONDS, context=context)

    def _send(self, connection: http.client.HTTPConnection) -> bool:
        """Whether the gateway can take more."""
        try:
            connection.request("POST", self._path, self._next(), self._headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return False
        return response.status not in BUSY

    def _next(self) -> bytes:
        with self._lock:
            return next(self._bodies)
