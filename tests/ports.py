"""Ports of 127.0.0.1 that nobody holds at this moment."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that the system hands to outgoing connections: one of these may take a port before its server does.
RANGE = range(12_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Return as many, each another."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            # A generator of its own: tests that seed the common one would all begin at the same port.
            port = random.SystemRandom().choice(RANGE)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    return free_ports(1)[0]
