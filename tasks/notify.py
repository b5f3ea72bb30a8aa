"""Notifications: an event for everyone, and the webhooks that a workload names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.site import Site
from tasks.spec.errors import BadRequest, DrydockError
from tasks.spec.load import load_workload, workload_names
from tasks.spec.source import SECRET, secrets_of
from tasks.spec.workload import Workload
from tasks.store.events import record_event

TIMEOUT_SECONDS = 5


def notify(site: Site, workload: str | None, kind: str, message: str, **facts: Any) -> None:
    """Record the event, then post it to the workload's notifiers; one that can't be reached is an event too.

    Where it concerns no workload but the whole site, every notifier is told, once.
    """
    event = record_event(site.home, kind, message, workload=workload, **facts)
    concerned = workload_names(site.workloads) if workload is None else [workload]
    for url in dict.fromkeys(url for name in concerned for url in _webhooks(site, name)):
        _post(site, url, event)


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


def _webhooks(site: Site, workload: str) -> list[str]:
    """The workload's webhook addresses, resolved; what is wrong with them is an event, never a lost failure."""
    urls: list[str] = []
    with _told(site, workload, "no notifier was called"):
        for number, notifier in enumerate(load_workload(site.workloads, workload).notify):
            with _told(site, workload, f"notify.{number} was not called"):
                urls.append(resolve_secrets(notifier.url, site))
    return urls


@contextlib.contextmanager
def _told(site: Site, workload: str, what: str) -> Iterator[None]:
    try:
        yield
    except DrydockError as error:
        record_event(site.home, "notification", f"{workload}: {what}: {error}", workload=workload)


def _post(site: Site, url: str, event: dict[str, Any]) -> None:
    import httpx

    try:
        httpx.post(url, json=event, timeout=TIMEOUT_SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # The address may hold a secret, so the event tells the kind of failure only.
        record_event(site.home, "notification", f"a webhook did not take the event: {type(error).__name__}")
