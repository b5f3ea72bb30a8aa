"""The end: down leaves nothing."""

from __future__ import annotations

import socket
from typing import Any

import pytest


@pytest.mark.timeout(120)
def test_down_leaves_no_process_and_no_port(stack: Any) -> None:
    assert stack.processes()
    stack.drydock("down")
    assert stack.processes() == []
    for name, port in stack.environment.items():
        if name.startswith("DRYDOCK_") and name.endswith("_PORT"):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(port)))
    stack.drydock("down")
