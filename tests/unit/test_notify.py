"""Notifications: always an event, a webhook where one is named, and never a lost failure or a told secret."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.new import new_workload
from tasks.notify import notify, resolve_secrets
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.settings import resolve
from tasks.store.events import read_events

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "workloads").mkdir()
    return Site(resolve({"DRYDOCK_HOME": str(tmp_path / "home"), "DRYDOCK_WORKLOADS": str(tmp_path / "workloads")}))


class Webhook(http.server.ThreadingHTTPServer):
    """Keeps what was posted; answers ``status``."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.posted = status, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def declare(site: Site, *urls: str) -> None:
    path = new_workload(site, "boats", "table", own_model=False)
    notifiers = json.dumps([{"kind": "webhook", "url": url} for url in urls])
    path.write_text(path.read_text() + f"notify: {notifiers}\n")


def messages(site: Site) -> list[str]:
    return [event["message"] for event in read_events(site.home)]


def test_without_a_workload_it_is_an_event(site):
    notify(site, None, "failure", "it broke", run_id="r1")
    assert [(e["kind"], e["message"], e["run_id"]) for e in read_events(site.home)] == [("failure", "it broke", "r1")]


def test_what_concerns_the_whole_site_is_posted_once(site, webhook):
    declare(site, f"{webhook.url}/a", f"{webhook.url}/b", f"{webhook.url}/a")
    notify(site, None, "failure", "the disk is full")
    assert [path for path, _ in webhook.posted] == ["/a", "/b"]


def test_a_webhook_gets_the_event_and_the_secret_of_its_address(site, webhook, monkeypatch):
    monkeypatch.setenv("DRYDOCK_SECRET_BOATS_TOKEN", "t0k3n")
    declare(site, webhook.url + "/hook/${secret:boats-token}")
    notify(site, "boats", "failure", "it broke", attempt=2)
    ((path, posted),) = webhook.posted
    assert path == "/hook/t0k3n"
    assert posted.pop("at")
    assert posted == {"kind": "failure", "message": "it broke", "workload": "boats", "attempt": 2}
    assert "t0k3n" not in (site.home / "events.jsonl").read_text()


def test_a_secret_may_lie_in_a_file(site, webhook):
    (site.home / "secrets").mkdir(parents=True)
    (site.home / "secrets" / "hook").write_text(webhook.url + "\n")
    assert resolve_secrets("${secret:hook}/x", site) == webhook.url + "/x"
    assert resolve_secrets("plain", site) == "plain"


def test_a_secret_that_does_not_resolve_is_named_with_both_places(site):
    with pytest.raises(BadRequest, match=r"secret 'a-b' does not .* set DRYDOCK_SECRET_A_B or write .*secrets/a-b"):
        resolve_secrets("https://x/${secret:a-b}", site)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/t0k3n", "ConnectError"),
        ("http://127.0.0.1:notaport/t0k3n", "InvalidURL"),
        ("http://[::1/t0k3n", "InvalidURL"),
        ("t0k3n", "UnsupportedProtocol"),
        ("${secret:nowhere}", "secret 'nowhere' does not resolve"),
    ],
)
def test_a_webhook_that_fails_is_an_event_too_and_the_next_one_is_called(site, webhook, url, words):
    declare(site, url, webhook.url)
    notify(site, "boats", "failure", "it broke")
    first, second = messages(site)
    assert first == "it broke"
    assert words in second
    assert "t0k3n" not in second
    assert len(webhook.posted) == 1


def test_a_webhook_that_answers_an_error_is_an_event(site, webhook):
    webhook.status = 500
    declare(site, webhook.url)
    notify(site, "boats", "failure", "it broke")
    assert "HTTPStatusError" in messages(site)[1]


def test_a_workload_whose_file_is_wrong_loses_no_failure(site):
    declare(site)
    (site.workloads / "boats" / "workload.yaml").write_text("name: [")
    notify(site, "boats", "failure", "it broke")
    assert messages(site)[0] == "it broke"
    assert "no notifier was called" in messages(site)[1]
