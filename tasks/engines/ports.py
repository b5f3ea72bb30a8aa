"""Ports for replicas: free now, and free again when a replica is restarted."""

from __future__ import annotations

import random
import socket

from tasks.spec.errors import TryAgain

HOST = "127.0.0.1"
# Below the range that the kernel uses for outgoing connections: a restarted replica finds its port free.
PORTS = range(20_000, 32_000)


def choose_port(taken: set[int]) -> int:
    """Return a free port that is not in ``taken``. Raises TryAgain where there is none."""
    first = random.randrange(len(PORTS))
    for port in (*PORTS[first:], *PORTS[:first]):
        if port not in taken and is_free(port):
            return port
    raise TryAgain(f"no free port from {PORTS.start} to {PORTS.stop - 1}; stop a service")


def is_free(port: int) -> bool:
    """Whether a server could listen here."""
    with socket.socket() as probe:
        # As servers bind: connections that linger after a restart are no hindrance, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
