"""The one seam to MLflow: the client, and its errors made ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from tasks.spec.errors import BadRequest, TryAgain

# MLflow's own defaults wait for minutes when the server is down; a task retries with back-off instead.
PATIENT_SECONDS = 30
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENT_SECONDS),
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


def connect(uri: str, seconds: int = PATIENT_SECONDS) -> Any:
    """Return an MLflow client for the tracking and registry server at ``uri``.

    Every request of this process may take ``seconds``; an impatient process does not repeat them either.
    """
    os.environ.update(ENVIRONMENT | {"NO_PROXY": no_proxy()})
    if seconds < PATIENT_SECONDS:
        os.environ.update(MLFLOW_HTTP_REQUEST_TIMEOUT=str(seconds), MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def no_proxy() -> str:
    """Return ``NO_PROXY`` with the loopback in it: our own services are never asked through a proxy."""
    return ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn MLflow's errors into ours: what does not exist is a bad request, anything else may pass."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        line = str(error).splitlines()[0]
        if error.error_code in MISSING:
            raise BadRequest(f"MLflow: {what}: {line}") from error
        raise TryAgain(f"MLflow: {what}: {_short(line)}; is the server up? see ./drydock logs mlflow") from error
    except OSError as error:
        raise TryAgain(f"MLflow: {what}: {_short(str(error))}") from error


def _short(line: str) -> str:
    return line if len(line) <= 160 else line[:157] + "..."
