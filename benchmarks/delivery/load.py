"""``python load.py SPEC``: clients of three kinds that check every answer; until SIGTERM.

SPEC (JSON): ``port``, ``samples`` (a file: [[row, label], …]), ``out`` (a file), ``core``, ``rate`` (requests a
second), ``connections``, ``new_every`` (each so-many-th request has a connection of its own; 0: none), ``long``
(how many long requests at any time), ``long_seconds``, ``at_least`` (requests before it ends).

    kept   one connection for many requests, as long as the server keeps it
    new    a connection for one request
    long   a body that takes ``long_seconds`` to arrive; every other one an answer that takes as long to be read

One line a request in ``out``: kind, when it was sent and answered (``time.monotonic``), the version that answered,
and what came of it: ``ok``, ``status-N``, ``refused``, ``reset`` (no answer), ``truncated`` (part of one), ``late``,
``wrong`` (no JSON, another request's answer, another label than the sample's, no version or passport).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any

PATH = "/v2/models/digits/infer"
ANSWER_SECONDS = 30.0
LONG_PARTS = 16
LONG_ROWS = 64


class Broken(Exception):
    """A request that got no whole and right answer: what came of it."""


class Client:
    """One connection, opened when it is needed."""

    def __init__(self, load: Load, slow_reader: bool = False) -> None:
        self._load, self._slow_reader = load, slow_reader
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, kind: str, rows: int = 1, seconds: float = 0.0, close: bool = False) -> None:
        """Send one request, check its answer, and note it."""
        began, version = time.monotonic(), "-"
        name, samples = self._load.next_samples(rows)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._send(_body(name, samples), close, seconds)
                status, fields, body = await self._read(seconds)
            version = fields.get("x-drydock-version", "-")
            outcome = "ok" if status == 200 else f"status-{status}"
            if status == 200:
                _check(body, fields, name, samples)
            if close or fields.get("connection") == "close":
                self.close()
        except (Broken, TimeoutError) as error:
            outcome = str(error) or "late"
            self.close()
        self._load.note(kind, began, version, outcome)

    async def _send(self, body: bytes, close: bool, seconds: float) -> None:
        if self._writer is None:
            try:
                sock = socket.socket()
                sock.setblocking(False)
                # asyncio does it for sockets that it made itself.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._slow_reader:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._load.spec["port"]))
                limit = 256 if self._slow_reader else 1 << 16
                self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
            except OSError:
                raise Broken("refused") from None
        ending = "connection: close\r\n" if close else ""
        head = f"POST {PATH} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{ending}"
        head += f"content-length: {len(body)}\r\n\r\n"
        parts = _split(body, LONG_PARTS) if seconds and not self._slow_reader else [body]
        try:
            self._writer.write(head.encode())
            for number, part in enumerate(parts):
                if number:
                    await asyncio.sleep(seconds / (len(parts) - 1))
                self._writer.write(part)
            await self._writer.drain()
        except OSError:
            raise Broken("reset") from None

    async def _read(self, seconds: float) -> tuple[int, dict[str, str], bytes]:
        assert self._reader is not None
        try:
            head = await self._read_head()
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Broken("truncated" if getattr(error, "partial", b"") else "reset") from None
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        try:
            length = int(fields.get("content-length", ""))
        except ValueError:
            raise Broken("wrong") from None
        try:
            return int(first.split()[1]), fields, await self._read_body(length, seconds)
        except (asyncio.IncompleteReadError, OSError):
            raise Broken("truncated") from None

    async def _read_head(self) -> bytes:
        """A slow reader's buffer is too small for ``readuntil``."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await (self._reader.readline() if not self._slow_reader else self._reader.readexactly(1))
            if self._reader.at_eof() and not head.endswith(b"\r\n\r\n"):
                raise asyncio.IncompleteReadError(head, None)
        return head

    async def _read_body(self, length: int, seconds: float) -> bytes:
        if not self._slow_reader:
            return await self._reader.readexactly(length)
        body = b""
        step = max(1, length // LONG_PARTS)
        while len(body) < length:
            body += await self._reader.readexactly(min(step, length - len(body)))
            await asyncio.sleep(seconds / LONG_PARTS)
        return body

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Load:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        with open(spec["samples"]) as stream:
            self._samples = json.load(stream)
        self._lines: list[str] = []
        self._asked = 0
        self._stopped = False

    @property
    def ended(self) -> bool:
        return self._stopped and len(self._lines) >= self.spec["at_least"]

    def stop(self) -> None:
        self._stopped = True

    def next_samples(self, count: int) -> tuple[str, list[Any]]:
        """Return a name that no other request has, and its samples."""
        self._asked += 1
        return f"r{self._asked}", [self._samples[(self._asked * 7 + k) % len(self._samples)] for k in range(count)]

    def note(self, kind: str, began: float, version: str, outcome: str) -> None:
        self._lines.append(f"{kind} {began:.6f} {time.monotonic():.6f} {version} {outcome}")

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        workers = [self._steady(number) for number in range(self.spec["connections"])]
        workers += [self._long(number) for number in range(self.spec["long"])]
        await asyncio.gather(*workers)
        with open(self.spec["out"], "w") as stream:
            stream.write("".join(f"{line}\n" for line in self._lines))

    async def _steady(self, number: int) -> None:
        """Requests at an even pace; what was missed in a stall is not made up for."""
        interval = self.spec["connections"] / self.spec["rate"]
        due = time.monotonic() + interval * number / self.spec["connections"]
        kept, every, turn = Client(self), self.spec["new_every"], number
        while not self.ended:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            turn += 1
            if every and turn % every == 0:
                await Client(self).ask("new", close=True)
            else:
                await kept.ask("kept")
            due = max(due + interval, time.monotonic())
        kept.close()

    async def _long(self, number: int) -> None:
        # Spread, so that at any moment some have just begun and some are about to end.
        await asyncio.sleep(number * self.spec["long_seconds"] / self.spec["long"])
        while not self.ended:
            reads = number % 2 == 1
            await Client(self, slow_reader=reads).ask(
                "long", LONG_ROWS if reads else 1, self.spec["long_seconds"], close=True
            )


def _body(name: str, samples: list[Any]) -> bytes:
    data = [value for row, _ in samples for value in row]
    tensor = {"name": "input", "datatype": "FP32", "shape": [len(samples), len(samples[0][0])], "data": data}
    return json.dumps({"id": name, "inputs": [tensor]}).encode()


def _split(body: bytes, count: int) -> list[bytes]:
    step = -(-len(body) // count)
    return [body[at : at + step] for at in range(0, len(body), step)]


def _check(body: bytes, fields: dict[str, str], name: str, samples: list[Any]) -> None:
    """Raise Broken unless the answer is this request's, and the one that a good model gives."""
    try:
        answer = json.loads(body)
        labels = next(output["data"] for output in answer["outputs"] if output["name"] == "label")
    except (ValueError, KeyError, TypeError, StopIteration):
        raise Broken("wrong") from None
    right = labels == [label for _, label in samples] and answer.get("id") == name
    if not right or "x-drydock-version" not in fields or "x-drydock-passport" not in fields:
        raise Broken("wrong")


def main(spec: dict[str, Any]) -> None:
    if spec.get("core") is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {spec["core"]})
    asyncio.run(Load(spec).run())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
