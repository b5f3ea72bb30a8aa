"""Hostile and hurried clients against a real server process, over raw sockets: each bad request with its answer."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(90)
START_SECONDS = 30
INFER = b"/v2/models/digits/infer"


class Running:
    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.port = process, port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, raw: bytes, close: bool = True) -> list[tuple[int, dict[str, str], bytes]]:
        """Send bytes, end our side, and return the answers until the server ends its own."""
        with self.connect() as sock, contextlib.suppress(ConnectionError):
            sock.sendall(raw)
            if close:
                sock.shutdown(socket.SHUT_WR)
            return answers(received(sock))
        return []

    def memory_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@contextlib.contextmanager
def running(made, *more: str) -> Iterator[Running]:
    command = [
        sys.executable, "-m", "tasks.serve", "--package", str(made.folder), "--digest", made.digest_sha256,
        "--keys", str(made.keys), "--port", "0", *more,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line, "the server did not start"
        yield Running(process, int(line.rpartition(":")[2]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert process.stderr.read() == ""  # nothing was ever a fault of ours
    finally:
        process.kill()
        process.communicate()


def received(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def answers(raw: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split what a server sent into status, headers and body; anything left over fails."""
    found = []
    while raw:
        head, end, raw = raw.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers.get("content-length", 0))
        assert len(raw) >= size
        found.append((int(first.split()[1]), headers, raw[:size]))
        raw = raw[size:]
    return found


def body(rows=1, value=1.0, **changes) -> bytes:
    tensor = {"name": "input", "shape": [rows, 64], "datatype": "FP32", "data": [value] * (64 * rows)}
    return json.dumps({"inputs": [tensor | changes]}).encode()


def post(content: bytes, *fields: bytes, target: bytes = INFER, length: bool = True) -> bytes:
    size = (b"content-length: %d" % len(content),) if length else ()
    return b"\r\n".join([b"POST %b HTTP/1.1" % target, b"host: x", *fields, *size, b"", content])


def get(target: bytes, method: bytes = b"GET", host: bytes = b"host: x\r\n") -> bytes:
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, host)


CHUNKED = b"transfer-encoding: chunked"
BAD = {
    "a wrong content type": (post(body(), b"content-type: text/plain"), 415),
    "no body": (post(b""), 400),
    "a list": (post(b"[]"), 400),
    "an empty object": (post(b"{}"), 400),
    "null": (post(b"null"), 400),
    "a missing field": (post(b'{"inputs":[{"name":"input","shape":[1,64],"data":[]}]}'), 400),
    "an extra field": (post(body(extra=1)), 400),
    "strings for numbers": (post(body(data=["1"] * 64)), 400),
    "a NaN literal": (post(body(data=[float("nan")] * 64)), 400),
    "an Infinity literal": (post(body(data=[float("inf")] * 64)), 400),
    "1e400": (post(body().replace(b"1.0", b"1e400", 1)), 400),
    "beyond the feature": (post(body(value=1e39)), 400),
    "an integer beyond 64 bits": (post(body().replace(b"1.0", b"9" * 40, 1)), 400),
    "5000 digits": (post(body().replace(b"1.0", b"9" * 5000, 1)), 400),
    "a wrong rank": (post(body(shape=[64])), 400),
    "a wrong shape": (post(body(shape=[1, 63])), 400),
    "ragged": (post(body(data=[[1] * 32, [1] * 31])), 400),
    "nested otherwise than its shape": (post(body(data=[[1, 1], [], *[1] * 62])), 400),
    "batch 0": (post(body(shape=[0, 64], data=[])), 400),
    "batch 1000000": (post(body(shape=[1_000_000, 64])), 400),
    "another datatype": (post(body(datatype="BYTES")), 400),
    "fractions as INT64": (post(body(datatype="INT64", value=0.5)), 400),
    "null for a pixel": (post(body(data=[None] * 64)), 400),
    "true for a pixel": (post(body(data=[True, *[1.5] * 63])), 400),
    "nested 100000 deep": (post(b"[" * 100_000), 400),
    "nested deep in parameters": (
        post(body(parameters={"a": 1}).replace(b"1}", b"[" * 5000 + b"]" * 5000 + b"}")),
        400,
    ),
    "duplicate keys": (post(b'{"inputs":[],"inputs":[]}'), 400),
    "duplicate keys in a tensor": (post(body().replace(b'"datatype"', b'"name":"input","datatype"')), 400),
    "invalid UTF-8": (post(b'{"id":"\xff"}'), 400),
    "half a surrogate pair": (post(b'{"id":"\\ud800"}'), 400),
    "a gzip bomb": (post(b"\x1f\x8b" + bytes(999), b"content-encoding: gzip"), 415),
    "a body over the limit": (post(bytes(100_001)), 413),
    "chunks over the limit": (post(b"20000\r\n" + bytes(0x20000), CHUNKED, length=False), 413),
    "a chunk that lies": (post(b"5\r\nabc\r\n0\r\n\r\n", CHUNKED, length=False), 400),
    "a chunk of a huge size": (post(b"fffffffffffffffff\r\n", CHUNKED, length=False), 400),
    "length and chunks": (post(b"0\r\n\r\n", CHUNKED, b"content-length: 5", length=False), 400),
    "two lengths": (post(b"ab", b"content-length: 1", b"content-length: 2", length=False), 400),
    "a length below zero": (post(b"", b"content-length: -1", length=False), 400),
    "another transfer encoding": (post(b"0\r\n\r\n", b"transfer-encoding: gzip, chunked", length=False), 400),
    "a body that lies about its JSON": (post(body(), b"inference-header-content-length: 999999"), 400),
    "a JSON length that is none": (post(body(), b"inference-header-content-length: -1"), 400),
    "HTTP/0.9": (b"GET /v2\r\n", 400),
    "HTTP/2.0": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/2.0 in words": (b"GET /v2 HTTP/2.0\r\nhost: x\r\n\r\n", 400),
    "TLS": (bytes.fromhex("160301020001000"[:14]) + bytes(99), 400),
    "NUL bytes": (bytes(99), 400),
    "an upgrade": (get(b"/v2", host=b"host: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n"), 200),
    "100000 headers": (get(b"/v2", host=b"host: x\r\n" + b"a: b\r\n" * 100_000), 431),
    "101 headers": (get(b"/v2", host=b"host: x\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(101))), 431),
    "a long header": (get(b"/v2", host=b"host: x\r\na: " + b"b" * 20_000 + b"\r\n"), 431),
    "a header without an end": (b"GET /v2 HTTP/1.1\r\nhost: x\r\na: " + b"b" * 200_000, 431),
    "a long path": (get(b"/" + b"a" * 5000), 414),
    "TRACE": (get(b"/v2", b"TRACE"), 405),
    "PUT": (get(INFER, b"PUT"), 405),
    "GET of infer": (get(INFER), 405),
    "CONNECT": (get(b"x:443", b"CONNECT"), 404),
    "no such method": (get(b"/v2", b"BREW"), 400),
    "//": (get(b"//v2"), 404),
    "%00": (get(b"/v2%00"), 404),
    "..;/": (get(b"/v2/..;/v2"), 404),
    "a path of other letters": (get("/v2/é".encode()), 400),
    "a unicode host": (get(b"/v2", host="host: é\r\n".encode()), 400),
    "no host": (get(b"/v2", host=b""), 400),
    "two hosts": (get(b"/v2", host=b"host: x\r\nhost: y\r\n"), 400),
    "a folded header": (get(b"/v2", host=b"host: x\r\na: b\r\n c\r\n"), 400),
    "bare line feeds": (b"GET /v2 HTTP/1.1\nhost: x\n\n", 400),
    "another expectation": (post(body(), b"expect: a-miracle"), 417),
}


@pytest.fixture(scope="module")
def kept():
    """What the tests of this file share: a stack that is left at their end, and what stands on it."""
    with contextlib.ExitStack() as stack:
        yield stack, {}


@pytest.fixture
def server(kept, digits_package):
    """One server for all of them, over the package of the first."""
    stack, found = kept
    if not found:
        found["server"] = stack.enter_context(running(digits_package(), "--max-body-bytes", "100000"))
    return found["server"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_its_answer_in_one_line(server, name):
    raw, status = BAD[name]
    found = server.send(raw)
    assert [code for code, _, _ in found[:1]] == [status]
    if status != 200:
        assert list(json.loads(found[0][2])) == ["error"]
    assert b"\n" not in found[0][2]
    assert all(code < 500 for code, _, _ in found)
    assert [code for code, _, _ in server.send(post(body()))] == [200]


@pytest.mark.parametrize(
    "content", [body(value=-0.0), body(data=[[1] * 64]), body(data=[[[1] * 8] * 8], shape=[1, 8, 8])]
)
def test_what_only_looks_odd_is_answered(server, content):
    assert server.send(post(content))[0][0] == 200
    chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (9, content[:9], len(content) - 9, content[9:])
    assert server.send(post(chunks, CHUNKED, length=False))[0][0] == 200
    assert server.send(b"\r\n\r\n" + get(b"http://x/v2"))[0][0] == 200
    assert server.send(b"GET /v2 HTTP/1.0\r\n\r\n", close=False)[0][1]["connection"] == "close"


def test_head_is_refused_without_a_body(server):
    with server.connect() as sock:
        sock.sendall(get(b"/v2", b"HEAD", b"host: x\r\nconnection: close\r\n"))
        raw = received(sock)
    assert raw.startswith(b"HTTP/1.1 405")
    assert b"allow: GET\r\n" in raw
    assert raw.endswith(b"\r\n\r\n")


def test_pipelined_requests_are_answered_in_order(server):
    rows = [1, 2, 3, 0, 5] * 20  # none at all is a bad request
    raw = b"".join(post(body(number)) + get(b"/v2/health/live") for number in rows)
    found = server.send(raw)
    assert [code for code, _, _ in found] == [code for n in rows for code in (200 if n else 400, 200)]
    shapes = [
        json.loads(content)["outputs"][0]["shape"] for (_, _, content), n in zip(found[::2], rows, strict=True) if n
    ]
    assert shapes == [[number] for number in rows if number]


def test_the_same_key_with_another_body_is_another_question(server):
    one, two = (post(body(value=value), b"idempotency-key: 7") for value in (0.0, 16.0))
    first, second = (server.send(raw)[0] for raw in (one, two))
    assert first[0] == second[0] == 200
    assert first[1]["x-drydock-passport"] != second[1]["x-drydock-passport"]


def test_expect_continue_is_answered_and_refused_early_where_it_must_be(server):
    content = body()
    with server.connect() as sock:
        sock.sendall(post(content, b"expect: 100-continue")[: -len(content)])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(content)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999\r\n\r\n" % INFER)
        assert answers(received(sock))[0][0] == 413


def test_clients_that_leave_early_are_counted_and_harm_nobody(server):
    for part in (0.3, 0.9, 1.0):
        raw = post(body(64))
        with server.connect() as sock:
            sock.sendall(raw[: int(len(raw) * part)])
    assert server.send(post(body()))[0][0] == 200


def test_a_client_that_does_not_read_costs_bounded_memory(server):
    before = server.memory_bytes()
    raw = get(b"/metrics") * 2000
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(server.connect())
            sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                for _ in range(50):  # of answers this would be 5 GB in all
                    sock.sendall(raw)
        assert server.send(post(body()))[0][0] == 200
        assert server.memory_bytes() - before < 50 << 20, "30 MiB were measured"


def test_slow_and_many_clients_do_not_slow_the_good_ones(digits_package):
    """500 slow connections (each drips, or stops in its head, its body, or before a promised body), then a flood
    of connections: good clients are answered as before, the slow get a 408, those too many a 503."""
    half = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nhalf" % INFER
    expecting = b"POST %b HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 50\r\n\r\n" % INFER
    starts = (b"GET /v2 HT", b"GET /v2 HTTP/1.1\r\nhost: x\r\na: ", half, expecting)
    with running(digits_package(), "--max-connections", "520") as server, contextlib.ExitStack() as stack:
        quiet = p99(server)
        slow = [stack.enter_context(server.connect()) for _ in range(500)]
        began = time.monotonic()
        for number, sock in enumerate(slow):
            sock.sendall(starts[number % 4])
        dripped = slow[1::4]
        times = []
        while time.monotonic() < began + 9:
            times.append(p99(server, 100))
            for sock in dripped:
                sock.sendall(b"x")
            time.sleep(0.3)
        # Twice as long, and what a busy machine of two cores adds to anything.
        assert sorted(times)[len(times) // 2] <= 2 * quiet + 0.003
        for _ in range(40):
            stack.enter_context(server.connect())
        assert server.send(get(b"/v2"))[0][0] == 503
        found = [answers(received(sock))[-1] for sock in (slow[0], *slow[1:40])]
        assert {code for code, _, _ in found} == {408}
        assert time.monotonic() - began < 15
        assert server.memory_bytes() < 300 << 20


def p99(server, num_requests: int = 300) -> float:
    raw, times = post(body()), []
    with server.connect() as sock:
        for _ in range(num_requests):
            started = time.perf_counter()
            sock.sendall(raw)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            times.append(time.perf_counter() - started)
    return sorted(times)[int(0.99 * num_requests) - 1]


class Caller(threading.Thread):
    """Calls without a pause over one connection, and opens the next one where it is told to, or at each call."""

    def __init__(self, server: Running, keep: bool) -> None:
        super().__init__(daemon=True)
        self.server, self.keep, self.raw = server, keep, post(body())
        self.answered, self.lost = 0, 0

    def run(self) -> None:
        while True:
            try:
                sock = self.server.connect()
            except ConnectionError:
                return  # nobody listens any more: no request was sent
            with sock:
                if not self.ask(sock):
                    return

    def ask(self, sock: socket.socket) -> bool:
        while True:
            try:
                sock.sendall(self.raw)
                raw = sock.recv(65536)
            except ConnectionError:
                raw = b""
            if not raw.startswith(b"HTTP/1.1 200"):
                self.lost += 1
                return False
            self.answered += 1
            if not self.keep or b"connection: close" in raw:
                return True


def test_sigterm_under_load_loses_nothing(digits_package):
    with running(digits_package(), "--drain-seconds", "0.5") as server:
        callers = [Caller(server, keep=number % 2 == 0) for number in range(8)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        for caller in callers:
            caller.join(15)
        assert [caller.lost for caller in callers] == [0] * 8
        assert all(caller.answered > 20 for caller in callers)
        assert server.process.wait(10) == 0


def test_a_batch_answers_as_one_row_does(server):
    rows = np.random.default_rng(0).integers(0, 17, (32, 64)).astype(float)
    alone = [json.loads(server.send(post(body(data=row.tolist())))[0][2])["outputs"][1]["data"] for row in rows]
    found = server.send(b"".join(post(body(data=row.tolist())) for row in rows))
    together = [json.loads(content)["outputs"][1]["data"] for _, _, content in found]
    assert np.allclose(alone, together, atol=1e-6)
