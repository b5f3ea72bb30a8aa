"""``python load.py SPEC``: closed-loop load on one address, as lean as Python goes; prints what it saw as JSON.

SPEC (JSON): ``port``, ``path``, ``body`` (a file), ``connections``, ``seconds``, ``warm_seconds``, ``core``,
``pids`` (whose processor time is read too), ``until_closed`` (go on until every connection was closed).

Raw sockets and epoll, nothing else: asyncio would be slower than the servers that it measures. Each connection
has one request in flight. A request is *lost* where it was sent and no whole answer came; *refused* where the
answer is no 200. An answer with ``connection: close`` ends its connection, as it does a gateway's.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import select
import socket
import sys
import time
from typing import Any

BUFFER_BYTES = 1 << 16
FINISH_SECONDS = 10.0
OK = b"HTTP/1.1 200"
TICKS = os.sysconf("SC_CLK_TCK")


class Load:
    """The connections and what was counted. Times are of ``perf_counter``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        with open(spec["body"], "rb") as file:
            body = file.read()
        head = f"POST {spec['path']} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        self.request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self.address = ("127.0.0.1", spec["port"])
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.sent_at: dict[int, float] = {}
        self.partial: dict[int, bytes] = {}
        self.seconds = array.array("d")
        self.lost = self.refused = 0
        for _ in range(spec["connections"]):
            self.connect()

    def connect(self) -> None:
        sock = socket.create_connection(self.address, timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sockets[sock.fileno()] = sock
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def start(self) -> None:
        for fd in list(self.sockets):
            self.send(fd)

    def send(self, fd: int) -> None:
        self.sent_at[fd] = time.perf_counter()
        try:
            count = self.sockets[fd].send(self.request)
        except OSError:
            return self.drop(fd, lost=1)
        if count != len(self.request):  # the body is meant to fit a socket's buffer
            sys.exit(f"error: only {count} of {len(self.request)} bytes could be sent")

    def drop(self, fd: int, lost: int) -> None:
        self.lost += lost
        self.epoll.unregister(fd)
        self.sockets.pop(fd).close()
        self.partial.pop(fd, None)

    def run(self, until: float) -> None:
        """Go round until a time or until no connection is left. The loop is flat: every call costs."""
        buffer = bytearray(BUFFER_BYTES)
        clock, poll, request, size = time.perf_counter, self.epoll.poll, self.request, len(self.request)
        sent_at, sockets, partial, note = self.sent_at, self.sockets, self.partial, self.seconds.append
        usual_length = -1  # of the last answer that was read with care: the next of that length needs none
        now = clock()
        while now < until and sockets:
            # Never asleep: it has a core of its own, and the way back from sleep would count as the server's.
            for fd, _ in poll(0):
                try:
                    length = sockets[fd].recv_into(buffer)
                except OSError:
                    length = 0
                now = clock()
                if length != usual_length or partial or not buffer.startswith(OK):
                    if not self.read(fd, bytes(buffer[:length]), now):
                        continue
                    if fd in sockets and buffer.startswith(OK):
                        usual_length = length
                else:
                    note(now - sent_at[fd])
                if fd not in sockets:
                    continue
                sent_at[fd] = now
                try:
                    if sockets[fd].send(request) != size:
                        sys.exit("error: a request could not be sent whole")
                except OSError:
                    self.drop(fd, lost=1)
            now = clock()

    def read(self, fd: int, data: bytes, now: float) -> bool:
        """Take what came in with care; return whether it ended an answer."""
        if not data:
            self.drop(fd, lost=1)
            return False
        data = self.partial.pop(fd, b"") + data
        head, found, rest = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        if not found or len(rest) < int(fields[b"content-length"]):
            self.partial[fd] = data
            return False
        good = head[9:12] == b"200"
        self.refused += not good
        if good:
            self.seconds.append(now - self.sent_at[fd])
        if fields.get(b"connection", b"").strip() == b"close":
            self.drop(fd, lost=0)
        return True

    def finish(self, until: float) -> None:
        """Take the answers still on their way: what a server does for nobody would weigh on who comes next."""
        waiting = set(self.sockets)
        while waiting & self.sockets.keys() and time.perf_counter() < until:
            for fd, _ in self.epoll.poll(0.1):
                try:
                    data = self.sockets[fd].recv(BUFFER_BYTES)
                except OSError:
                    data = b""
                if self.read(fd, data, time.perf_counter()):
                    waiting.discard(fd)


def processor_seconds(pids: list[int]) -> float:
    """Return what the processes have used of the processor, in user and system mode."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            ticks += sum(int(part) for part in file.read().rpartition(")")[2].split()[11:13])
    return ticks / TICKS


def main(spec: dict[str, Any]) -> dict[str, float]:
    os.sched_setaffinity(0, {spec["core"]})
    gc.disable()
    load = Load(spec)
    load.start()
    load.run(time.perf_counter() + spec["warm_seconds"])
    load.seconds = array.array("d")
    began, used = time.perf_counter(), processor_seconds(spec["pids"])
    load.run(began + spec["seconds"])
    wall, times = time.perf_counter() - began, sorted(load.seconds) or [float("nan")]
    answers = len(load.seconds)
    server_busy = processor_seconds(spec["pids"]) - used
    if spec["until_closed"]:
        load.lost += len(load.sockets)  # sent, and neither answered nor closed in all that time
    else:
        load.finish(time.perf_counter() + FINISH_SECONDS)
    return {
        "rate": answers / wall,
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[int(len(times) * 0.99)],
        "answers": answers,
        "lost": load.lost,
        "refused": load.refused,
        "server_busy": server_busy / wall,
        "per_processor_second": answers / max(server_busy, 1 / TICKS),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
