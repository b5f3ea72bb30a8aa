"""Notifications: always an event, a webhook where one is named, and never a lost failure or a told secret."""

from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from certificates import certificate
from ports import free_port

from tasks.new import new_workload
from tasks.notify import notify, resolve_secrets
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload
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
    declare_all(site, *({"kind": "webhook", "url": url} for url in urls))


def declare_all(site: Site, *notifiers: dict[str, object]) -> None:
    path = new_workload(site, "boats", "table", own_model=False)
    path.write_text(path.read_text() + f"notify: {json.dumps(notifiers)}\n")


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


def test_a_channel_gets_one_line(site, webhook):
    declare_all(site, {"kind": "slack", "url": f"{webhook.url}/services/T0"})
    notify(site, "boats", "failure", "retrain_boats.train:\n<!channel> broke")
    text = "Drydock: failure: retrain_boats.train: &lt;!channel&gt; broke"
    assert webhook.posted == [("/services/T0", {"text": text})]


class Mailbox:
    """What a mail server was given, and who said to be who."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], EmailMessage]] = []

    async def handle_DATA(self, server, session, envelope) -> str:
        mail = message_from_bytes(envelope.content, policy=default)
        self.mails.append((envelope.rcpt_tos, mail))
        return "250 OK"


@contextlib.contextmanager
def mail_server(folder: Path, encrypted: bool = True) -> Iterator[tuple[Mailbox, int, str]]:
    """A real mail server that takes one user's password; a mailbox, its port, and the certificate to trust."""
    trusted, key = certificate(folder, "mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, key)

    def authenticate(server, session, envelope, mechanism, said) -> AuthResult:
        return AuthResult(success=(said.login, said.password) == (b"ann@boats", b"w0rd/x"))

    more = {"tls_context": context, "authenticator": authenticate} if encrypted else {}
    mailbox, port = Mailbox(), free_port()
    controller = Controller(mailbox, hostname="127.0.0.1", port=port, **more)
    controller.start()
    try:
        yield mailbox, port, trusted
    finally:
        controller.stop()


def email(url: str) -> dict[str, object]:
    return {"kind": "email", "url": url, "sender": "drydock@boats.example", "to": ["ann@boats.example", "b@c.example"]}


def test_a_mail_goes_encrypted_with_its_password(site, tmp_path, monkeypatch):
    monkeypatch.setenv("DRYDOCK_SECRET_MAIL", "w0rd/x")
    with mail_server(tmp_path / "tls") as (mailbox, port, trusted):
        monkeypatch.setenv("SSL_CERT_FILE", trusted)
        declare_all(site, email("smtp://ann%40boats:${secret:mail}@127.0.0.1:" + str(port)))
        notify(site, "boats", "refusal", "judge: accuracy = 0.8\nSubject: forged", attempt=2)
    assert messages(site) == ["judge: accuracy = 0.8\nSubject: forged"]
    ((to, mail),) = mailbox.mails
    assert to == ["ann@boats.example", "b@c.example"]
    assert mail["Subject"] == "Drydock: refusal: judge: accuracy = 0.8 Subject: forged"
    assert mail["From"] == "drydock@boats.example"
    assert "attempt: 2" in mail.get_content()
    assert mail["Date"]
    assert mail["Message-ID"].endswith("@boats.example>")
    assert "w0rd" not in mail.as_string() + (site.home / "events.jsonl").read_text()


def test_a_server_without_encryption_gets_mails_but_no_password(site, tmp_path, monkeypatch):
    with mail_server(tmp_path / "tls", encrypted=False) as (mailbox, port, _):
        declare_all(site, email(f"smtp://127.0.0.1:{port}"), email(f"smtp://ann:word@127.0.0.1:{port}"))
        notify(site, "boats", "failure", "it broke")
    assert len(mailbox.mails) == 1
    assert messages(site)[1] == "a notifier (email) did not take the event: SMTPNotSupportedError"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("smtp://127.0.0.1:9", "ConnectionRefusedError"),
        ("http://127.0.0.1:9", "ValueError"),
        ("smtp://127.0.0.1:none", "ValueError"),
        ("smtp://", "ValueError"),
    ],
)
def test_a_mail_that_can_not_be_sent_is_an_event(site, url, words):
    declare_all(site, email(url))
    notify(site, "boats", "failure", "it broke")
    assert messages(site) == ["it broke", f"a notifier (email) did not take the event: {words}"]


def test_what_is_no_mail_address_is_refused_when_the_file_is_read(site):
    declare_all(site, email("smtp://host") | {"to": ["ann"]})
    with pytest.raises(BadRequest, match=r"notify.0.*'ann', must be an e-mail address"):
        load_workload(site.workloads, "boats")
