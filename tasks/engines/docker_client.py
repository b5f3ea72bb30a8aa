"""The Docker SDK at its seam: the connection, and its errors as ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from tasks.spec.errors import BadRequest, TryAgain

SECONDS = 60
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
