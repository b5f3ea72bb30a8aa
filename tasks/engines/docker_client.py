"""The Docker SDK at its seam: the connection, its errors as ours, and a state folder's own containers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.engines.container import LABEL, STOP_SECONDS, site_id
from tasks.engines.leases import found_devices
from tasks.engines.places import Places
from tasks.spec.errors import BadRequest, TryAgain
from tasks.store.files import exclusive

SECONDS = 60
# Containers that were created and not started, or run in any way.
ALIVE = ("created", "running", "paused", "restarting")
SOCKET = "unix:///var/run/docker.sock"


def address() -> str:
    return os.environ.get("DOCKER_HOST") or SOCKET


def connect() -> Any:
    """Return the low-level client of the daemon at ``DOCKER_HOST``.

    Raises:
        TryAgain: it does not answer.
    """
    import docker

    with translated("containers"):
        return docker.APIClient(base_url=address(), version="auto", timeout=SECONDS)


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn the SDK's errors into ours, the most specific first.

    Raises:
        BadRequest: the daemon refuses the request itself. TryAgain: it does not answer, or is at odds with itself.
    """
    import docker.errors
    import requests.exceptions

    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise BadRequest(f"{what}: its image is not in this Docker daemon; run images/build") from error
    except docker.errors.APIError as error:
        kind = BadRequest if error.is_client_error() and error.status_code != 409 else TryAgain
        raise kind(f"{what}: the Docker daemon says {error.explanation or error}") from error
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, requests.exceptions.RequestException | ConnectionError):
            raise
        raise TryAgain(f"{what}: no Docker daemon answers at {address()}; start it, or set DOCKER_HOST") from error


@contextlib.contextmanager
def tolerating_missing() -> Iterator[None]:
    """Go on where the daemon knows no such thing: somebody else has removed it, which is what was wanted."""
    import docker.errors

    try:
        yield
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as error:
        if error.status_code == 409 and "removal" in str(error.explanation):
            return  # is being removed
        raise


class Daemon:
    """The containers of one state folder, or of one stack, on a Docker daemon, known by their labels."""

    def __init__(self, home: Path, places: Places | None = None) -> None:
        self.home, self.folder, self.places = home, home / "containers", places
        self.site = places.site if places else site_id(home)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The GPUs that are leased to jobs."""
        return found_devices()

    @cached_property
    def api(self) -> Any:
        return connect()

    def stop_container(self, container: str) -> None:
        with tolerating_missing():
            # A container that is paused can't hear a signal.
            if self.api.inspect_container(container)["State"]["Paused"]:
                self.api.unpause(container)
            self.api.stop(container, timeout=STOP_SECONDS)

    def remove(self, containers: list[dict[str, Any]]) -> None:
        def remove(one: dict[str, Any]) -> None:
            with tolerating_missing():
                self.api.remove_container(one["Id"], force=True, v=False)

        each(containers, remove)

    def list(self, *labels: str) -> list[dict[str, Any]]:
        wanted = [f"{LABEL}.site={self.site}", *labels]
        return list(self.api.containers(all=True, filters={"label": wanted}))

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.folder / "locks" / name)

    def remove_all(self) -> None:
        """Remove every container, network and volume of this state folder: what ``down`` leaves."""
        with translated("containers"):
            self.remove(self.list())
            own = {"label": f"{LABEL}.site={self.site}"}
            for network in self.api.networks(filters=own):
                self.api.remove_network(network["Id"])
            for volume in self.api.volumes(filters=own)["Volumes"] or []:
                self.api.remove_volume(volume["Name"], force=True)


def each(items: list[Any], work: Callable[[Any], None]) -> None:
    """Do the same to all, side by side: the waits of a gang's nodes must not add up."""
    if items:
        with ThreadPoolExecutor(min(16, len(items))) as pool:
            list(pool.map(work, items))
