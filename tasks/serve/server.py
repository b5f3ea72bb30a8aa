"""The server process: its socket, its loop, and the drain when it is told to stop.

On SIGTERM: not ready at once, still answering for ``drain_seconds``, then closing. In between the gateway sees that we
are not ready, and every answer tells its client to open the next connection elsewhere; so no request is caught by the
closing. What is in flight then is answered, for at most ``GRACE_SECONDS``. A drained server ends with code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
import struct
from collections.abc import Callable

import uvloop

from tasks.serve.app import App
from tasks.serve.http import Connections
from tasks.serve.message import Limits
from tasks.spec.errors import TryAgain

# Longer than a slow body may take (message.Limits.body_seconds): what was let in is answered.
GRACE_SECONDS = 12.0
BACKLOG = 2048
GARBAGE_OBJECTS = 50_000  # cycles are rare here: connections that ended
TICK_SECONDS = 1.0
SO_ATTACH_FILTER, BPF_RETURN = 26, 0x06  # linux/socket.h, linux/bpf_common.h
LAST_TURNS_SECONDS = 0.02


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


def serve(
    app: App, listener: socket.socket, drain_seconds: float, limits: Limits, on_listening: Callable[[], None]
) -> None:
    """Serve until told to stop; return after the drain. ``on_listening`` is called once clients can connect."""
    # What was made so far stays; the collector need not look at it again while someone waits for an answer.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    uvloop.run(_serve(app, listener, drain_seconds, limits, on_listening))


async def _serve(
    app: App, listener: socket.socket, drain_seconds: float, limits: Limits, on_listening: Callable[[], None]
) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    connections = Connections(app, limits)
    server = await loop.create_server(connections, sock=listener, backlog=BACKLOG)
    ticking = loop.create_task(_tick(connections))
    on_listening()
    await told.wait()
    app.draining = connections.draining = True
    await asyncio.sleep(drain_seconds)
    await _stop_listening(server, listener, connections)
    await _finish(connections)
    ticking.cancel()


async def _tick(connections: Connections) -> None:
    while True:
        await asyncio.sleep(TICK_SECONDS)
        connections.tick()


async def _stop_listening(server: asyncio.Server, listener: socket.socket, connections: Connections) -> None:
    """Close the door, but let in who stands before it: the kernel would reset connections that it took for us."""
    spare = listener.dup()
    spare.setblocking(False)
    _take_no_more(spare)
    server.close()
    with contextlib.closing(spare), contextlib.suppress(BlockingIOError):
        while True:
            accepted, _ = spare.accept()
            await asyncio.get_running_loop().connect_accepted_socket(connections, accepted)


def _take_no_more(listener: socket.socket) -> None:
    """Have the kernel drop what comes to the listener from now on: a connection made between the last look and the
    close would be reset with a request in it. Who knocks now knocks again, and finds the door closed."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, 0), 8)
    with contextlib.suppress(OSError):
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


async def _finish(connections: Connections) -> None:
    """Wait for what is in flight, close what is idle, and cut off who never ends."""
    await asyncio.sleep(LAST_TURNS_SECONDS)  # what was sent before now is read, and is no idle connection
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_SECONDS):
            while connections.open:
                for connection in list(connections.open):
                    connection.close_idle()
                await asyncio.sleep(LAST_TURNS_SECONDS)
    for connection in list(connections.open):
        connection.abort()
