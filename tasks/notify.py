"""Notifications: an event for everyone, and the webhooks, channels and mailboxes that a workload names."""

from __future__ import annotations

import contextlib
import html
import os
import smtplib
import ssl
from collections.abc import Iterator
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tasks.site import Site
from tasks.spec.errors import BadRequest, DrydockError
from tasks.spec.load import load_workload, workload_names
from tasks.spec.source import SECRET, secrets_of
from tasks.spec.workload import EmailNotifier, Notifier, Workload
from tasks.store.events import record_event

TIMEOUT_SECONDS = 5


def notify(site: Site, workload: str | None, kind: str, message: str, **facts: Any) -> None:
    """Record the event, then tell the workload's notifiers; one that can't be reached is an event too.

    Where it concerns no workload but the whole site, every notifier is told, once.
    """
    event = record_event(site.home, kind, message, workload=workload, **facts)
    concerned = workload_names(site.workloads) if workload is None else [workload]
    for notifier, url in dict.fromkeys(pair for name in concerned for pair in _notifiers(site, name)):
        _send(site, notifier, url, event)


def resolve_secrets(text: str, site: Site) -> str:
    """Replace each ``${secret:NAME}``: from ``DRYDOCK_SECRET_NAME``, else from ``<home>/secrets/NAME``.

    Raises:
        BadRequest: the secret is in neither place; its name is told, never a value.
    """
    return SECRET.sub(lambda match: _secret(match.group(1), site.home / "secrets"), text)


def check_secrets(workload: Workload, site: Site) -> None:
    """Resolve every secret that a workload names, before a run needs it.

    Raises:
        BadRequest: one does not resolve.
    """
    for text in (*(notifier.url for notifier in workload.notify), *secrets_of(workload.data.source)):
        resolve_secrets(text, site)


def _secret(name: str, folder: Path) -> str:
    variable = f"DRYDOCK_SECRET_{name.upper().replace('-', '_').replace('.', '_')}"
    if value := os.environ.get(variable):
        return value
    try:
        return (folder / name).read_text().strip()
    except OSError:
        raise BadRequest(f"secret {name!r} does not resolve: set {variable} or write {folder / name}") from None


def _notifiers(site: Site, workload: str) -> list[tuple[Notifier, str]]:
    """The workload's notifiers, each with its address resolved; what is wrong with them is an event, never a lost
    failure."""
    found: list[tuple[Notifier, str]] = []
    with _told(site, workload, "no notifier was called"):
        for number, notifier in enumerate(load_workload(site.workloads, workload).notify):
            with _told(site, workload, f"notify.{number} was not called"):
                found.append((notifier, _address(notifier, site)))
    return found


def _address(notifier: Notifier, site: Site) -> str:
    """The address with its secrets; within one of e-mail their signs are escaped, for a password may hold any."""
    if notifier.kind != "email" or SECRET.fullmatch(notifier.url):
        return resolve_secrets(notifier.url, site)
    return SECRET.sub(lambda found: quote(resolve_secrets(found.group(), site), safe=""), notifier.url)


@contextlib.contextmanager
def _told(site: Site, workload: str, what: str) -> Iterator[None]:
    try:
        yield
    except DrydockError as error:
        record_event(site.home, "notification", f"{workload}: {what}: {error}", workload=workload)


def _send(site: Site, notifier: Notifier, url: str, event: dict[str, Any]) -> None:
    import httpx

    try:
        if notifier.kind == "email":
            _mail(notifier, url, event)
        else:
            body = event if notifier.kind == "webhook" else {"text": html.escape(_line(event), quote=False)}
            httpx.post(url, json=body, timeout=TIMEOUT_SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, smtplib.SMTPException, OSError, ValueError) as error:
        # The address may hold a secret, so the event tells the kind of failure only.
        message = f"a notifier ({notifier.kind}) did not take the event: {type(error).__name__}"
        record_event(site.home, "notification", message)


def _line(event: dict[str, Any]) -> str:
    return " ".join(f"Drydock: {event['kind']}: {event['message']}".split())


def _mail(notifier: EmailNotifier, url: str, event: dict[str, Any]) -> None:
    """Hand the event to a mail server; encrypted where the server offers it, and a password never otherwise."""
    place = urlsplit(url)
    if place.scheme not in ("smtp", "smtps") or not place.hostname:
        raise ValueError("an address of e-mail begins with smtp:// or smtps://")
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = notifier.sender, ", ".join(notifier.to), _line(event)[:200]
    mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain=notifier.sender.rpartition("@")[2])
    mail.set_content("\n".join(f"{name}: {value}" for name, value in event.items()))
    trusted = ssl.create_default_context()
    if place.scheme == "smtps":
        server = smtplib.SMTP_SSL(place.hostname, place.port or 465, timeout=TIMEOUT_SECONDS, context=trusted)
    else:
        server = smtplib.SMTP(place.hostname, place.port or 25, timeout=TIMEOUT_SECONDS)
    with server:
        is_encrypted = place.scheme == "smtps"
        server.ehlo()
        if not is_encrypted and server.has_extn("starttls"):
            server.starttls(context=trusted)
            is_encrypted = True
        if place.username:
            if not is_encrypted:
                raise smtplib.SMTPNotSupportedError("the server offers no encryption for the password")
            server.login(unquote(place.username), unquote(place.password or ""))
        if refused := server.send_message(mail):
            raise smtplib.SMTPRecipientsRefused(refused)
