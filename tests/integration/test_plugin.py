"""The page inside a real Airflow API server: who may see what, who may roll back, and what is refused."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from ports import free_port

from tasks.orchestrate.environment import airflow_environment
from tasks.release.model import Backend, GatewayState, Route, Version, service_name
from tasks.release.rollout import Seen, advance, begin
from tasks.release.series import Series
from tasks.release.stats import ServiceStats
from tasks.site import Site
from tasks.spec.settings import resolve
from tasks.spec.workload import Rollout
from tasks.stack import prepare_home
from tasks.store.files import write_whole

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]
USERS = {"admin": "admin", "rita": "op", "vic": "viewer"}
TOKEN = "0123456789abcdef0123456789abcdef"
VERSIONS = {str(n): Version(version=str(n), digest_sha256=str(n) * 64) for n in (1, 2, 3)}

# Both in one process, for the imports are most of the time.
SET_UP = """
from airflow.utils.db import initdb
from airflow.utils.session import create_session
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.dag_processing.bundles.manager import DagBundlesManager
initdb()
DagBundlesManager().sync_bundles_to_db()
sync_bag_to_db(DagBag({path!r}, bundle_path=__import__("pathlib").Path({folder!r})), "dags-folder", None)
"""


class Server(NamedTuple):
    """An API server on a made-up home, and a token for each user."""

    site: Site
    url: str
    tokens: dict[str, str]

    def ask(self, path: str, user: str | None = "admin", method: str = "GET", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens[user]}"} if user else {}
        return self.send(method, path, headers | more.pop("headers", {}), **more)

    def as_browser(self, path: str, user: str, method: str = "GET", **more: Any) -> httpx.Response:
        """As a page asks: the session is the cookie, which the browser adds whoever wants the request."""
        return self.send(method, path, {"Cookie": f"_token={self.tokens[user]}"} | more.pop("headers", {}), **more)

    def send(self, method: str, path: str, headers: dict[str, str], **more: Any) -> httpx.Response:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=20) as client:
            return client.request(method, path, headers=headers, **more)


def service(number: str) -> str:
    return service_name("digits", VERSIONS[number].digest_sha256)


def furnish(site: Site, now: dt.datetime) -> None:
    """Version 2 serves after 1, version 3 has a quarter of the traffic, and the last minute was counted."""
    for number, champion in (("1", None), ("2", "1")):
        intent = f"release:{number}"
        site.ledger.open_intent("digits", "promote", VERSIONS[number], champion, "rita", f"release {number}", intent)
        site.ledger.commit(intent)
    site.ledger.record_event("digits", "alias", "reconciler", "<b>put back</b>")
    weights = {"2": 75, "3": 25}
    backends = tuple(
        Backend(service=service(n), endpoints=(f"127.0.0.1:2000{n}",), weight=w) for n, w in weights.items()
    )
    state = GatewayState(revision=1, routes={"digits": Route(backends=backends)})
    write_whole(site.home / "gateway" / "state.json", state.model_dump_json())
    plan = Rollout(shadow_percent=0, steps=(25, 50))
    seconds = now.timestamp()
    rollout = begin(
        rollout_id="r1", workload="digits", candidate=VERSIONS["3"], champion=VERSIONS["2"], actor="rita", plan=plan,
        now=seconds, token=TOKEN,
    )  # fmt: skip
    site.rollouts.save(advance(rollout, Seen(), seconds))
    series, shares = Series(site.home), {service(n): w / 100 for n, w in weights.items()}
    for step in range(13):
        stats = {
            service("2"): counted(300 * step, 3 * step, 2 * step),
            service("3"): counted(100 * step, 20 * step, 60 * step),
        }
        series.record(stats, shares, now - dt.timedelta(seconds=5 * (12 - step)))


def counted(requests: int, failures: int, slow: int) -> ServiceStats:
    latency = (
        (5.0, 0),
        (10.0, requests - failures - slow),
        (1000.0, requests - failures),
        (math.inf, requests - failures),
    )
    return ServiceStats(requests=requests, failures=failures, latency=latency if requests else ())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("plugin") / "home"
    with started(home) as running:
        yield running


class started:
    """An API server of its own Airflow, for the length of a block."""

    def __init__(self, home: Path) -> None:
        settings = {"home": str(home), "root": str(ROOT), "workloads": str(ROOT / "workloads")}
        self.site = Site(resolve({}, **settings, airflow_port=free_port()))

    def __enter__(self) -> Server:
        site, home = self.site, self.site.home
        prepare_home(site)
        furnish(site, dt.datetime.now(dt.UTC))
        passwords = home / "passwords.json"
        passwords.write_text(json.dumps({user: f"{user}-secret" for user in USERS}))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DRYDOCK_", "AIRFLOW_"))}
        environment = (
            kept
            | airflow_environment(site)
            | {
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:{role}" for user, role in USERS.items()),
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
            }
        )
        code = SET_UP.format(path=str(ROOT / "dags" / "rollback.py"), folder=str(ROOT / "dags"))
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.log = (home / "logs" / "api-server.log").open("w+")
        airflow = str(Path(sys.executable).with_name("airflow"))
        self.process = subprocess.Popen(
            [airflow, "api-server"], env=environment, cwd=home, stdout=self.log, stderr=self.log
        )
        return Server(site, site.settings.airflow_url, {user: self._login(user) for user in USERS})

    def _login(self, user: str) -> str:
        until = time.monotonic() + 60
        while True:
            body = {"username": user, "password": f"{user}-secret"}
            try:
                url = f"{self.site.settings.airflow_url}/auth/token"
                return httpx.post(url, json=body, trust_env=False).json()["access_token"]
            except httpx.HTTPError:
                assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
                assert time.monotonic() < until, Path(self.log.name).read_text()[-3000:]
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


ROLLBACK = "/api/v2/dags/rollback/dagRuns"
ASKED = {"logical_date": None, "conf": {"workload": "digits", "to": None, "reason": "too many errors"}}
FOREIGN = [
    {"Origin": "http://evil.test"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:5000"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:5000"},
]


def routes() -> list[str]:
    """Every path of the app, as it is built for Airflow."""
    code = "import json; from tasks.orchestrate.page import build_app; "
    code += "print(json.dumps([route.path for route in build_app().routes]))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return [f"/drydock{path}".replace("{workload}", "digits") for path in json.loads(done.stdout.splitlines()[-1])]


def test_nothing_answers_without_a_user_and_nothing_takes_a_forged_one(server: Server) -> None:
    found = routes()
    assert {"/drydock/", "/drydock/page.js", "/drydock/api/workloads/digits/series"} <= set(found)
    for path in [*found, "/drydock/docs", "/drydock/openapi.json"]:
        wanted = {401} if path in found else {404}
        assert {server.ask(path, user=None).status_code} == wanted, path
        forged = {"Authorization": "Bearer " + server.tokens["admin"][:-8] + "AAAAAAAA"}
        assert server.send("GET", path, forged).status_code in {401, 403, 404}, path
        if path in found:
            assert server.ask(path).status_code == 200, path
            assert server.as_browser(path, "vic").status_code == 200, path


def test_every_answer_is_framed_by_airflow_alone_and_kept_by_nobody(server: Server) -> None:
    for path in ("/drydock/", "/drydock/api/workloads", "/drydock/api/workloads/boats"):
        headers = server.ask(path).headers
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'self'" in server.ask("/drydock/", user=None).headers["content-security-policy"]


def test_the_page_is_in_the_navigation(server: Server) -> None:
    plugins = server.ask("/api/v2/plugins", user="vic").json()["plugins"]
    own = next(plugin for plugin in plugins if plugin["name"] == "drydock")
    assert own["external_views"][0]["href"] == "drydock/"
    assert server.ask("/api/v2/plugins/importErrors").json()["total_entries"] == 0


def test_the_picture_is_the_ledgers_the_gateways_and_the_rollouts(server: Server) -> None:
    found = server.ask("/drydock/api/workloads/digits", user="vic")
    assert TOKEN not in found.text
    data = found.json()
    assert (data["champion"], data["previous"], data["served"]) == ("2", "1", ["1"])
    assert [(s["version"], s["role"], s["traffic_ratio"]) for s in data["services"]] == [
        ("2", "champion", 0.75),
        ("3", "candidate", 0.25),
    ]
    rollout = data["rollout"]
    assert (rollout["version"], rollout["stages"], rollout["stage"]) == ("3", ["canary-25", "canary-50"], 0)
    assert [(row["action"], row["version"], row["actor"], row["state"]) for row in data["history"]] == [
        ("alias", None, "reconciler", "recorded"),
        ("promote", "2", "rita", "committed"),
        ("promote", "1", "rita", "committed"),
    ]


def test_the_curves_are_the_recorded_counts(server: Server) -> None:
    points = server.ask("/drydock/api/workloads/digits/series?seconds=900", user="vic").json()["points"]
    rates = points[-1]["services"][service("2")]
    assert rates["requests_per_second"] == pytest.approx(60, rel=0.01)
    assert rates["error_ratio"] == pytest.approx(0.01)
    assert 5 < rates["p50_ms"] < rates["p99_ms"] < 1000
    assert rates["traffic_ratio"] == 0.75
    others = server.ask("/drydock/api/workloads/mnist/series").json()["points"]
    assert all(point["services"] == {} for point in others)


@pytest.mark.parametrize("path", ["boats", "boats/series", "..%2F..%2Fprivate", "digits/series?seconds=1"])
def test_what_is_no_workload_or_no_time_is_refused(server: Server, path: str) -> None:
    assert server.ask(f"/drydock/api/workloads/{path}").status_code in {404, 422}


def test_a_look_makes_no_ledger_and_changes_nothing(server: Server) -> None:
    before = server.site.ledger.head()
    assert server.ask("/drydock/api/workloads/mnist").json()["champion"] is None
    assert server.site.ledger.head() == before


def test_a_viewer_sees_and_cannot_roll_back(server: Server) -> None:
    assert server.ask("/drydock/api/workloads", user="vic").json()["may_roll_back"] is False
    assert server.as_browser(ROLLBACK, "vic", "POST", json=ASKED).status_code == 403
    assert server.as_browser(ROLLBACK, "vic").json()["total_entries"] == 0


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("path", [ROLLBACK, "/drydock/", "/api/v2/variables"])
def test_a_page_of_another_origin_changes_nothing(server: Server, headers: dict[str, str], path: str) -> None:
    answer = server.as_browser(path, "admin", "POST", headers=headers, json=ASKED)
    assert (answer.status_code, "another origin" in answer.text) == (403, True)


def test_a_form_of_any_page_changes_nothing(server: Server) -> None:
    """What a page may send without asking first is no JSON, and Airflow takes nothing else."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind} if kind else {}
        answer = server.as_browser(ROLLBACK, "admin", "POST", headers=headers, content=json.dumps(ASKED).encode())
        assert answer.status_code == 422, kind


def test_the_logged_in_user_triggers_the_rollback(server: Server) -> None:
    assert server.ask("/drydock/api/workloads", user="rita").json()["may_roll_back"] is True
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin", "Referer": f"{server.url}/drydock/"}
    run = server.as_browser(ROLLBACK, "rita", "POST", headers=own, json=ASKED)
    assert run.status_code == 200, run.text
    assert (run.json()["triggering_user_name"], run.json()["triggered_by"]) == ("rita", "ui")
    assert run.json()["conf"] == ASKED["conf"]
    seen = server.as_browser(f"{ROLLBACK}/{run.json()['dag_run_id']}", "rita").json()
    assert seen["state"] == "queued"
    short = {"logical_date": None, "conf": ASKED["conf"] | {"reason": ""}}
    assert server.as_browser(ROLLBACK, "rita", "POST", headers=own, json=short).status_code == 400


def test_the_plugin_costs_the_other_components_nothing() -> None:
    """The scheduler and every task load it: neither FastAPI nor the page comes with it."""
    code = "import sys, time, airflow.plugins_manager; known = set(sys.modules); started = time.perf_counter(); "
    code += "import tasks.orchestrate.plugin; seconds = time.perf_counter() - started; "
    code += "print(seconds, *sorted(set(sys.modules) - known))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.splitlines()[-1].split()
    assert {name.partition(".")[0] for name in loaded} == {"tasks"}
    assert float(seconds) < 0.05


def test_changing_requests_at_once_wait_for_each_other_and_none_fails(server):
    """SQLite's lock, held by one request, once stopped the event loop on which the other had to go on."""
    writes = 40

    def write(number: int) -> tuple[int, float]:
        began = time.monotonic()
        body = {"key": f"once-{number}", "value": "x"}
        status = server.ask("/api/v2/variables", method="POST", json=body).status_code
        return status, time.monotonic() - began

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, range(writes)))
    assert [status for status, _ in found] == [201] * writes
    assert max(seconds for _, seconds in found) < 4
