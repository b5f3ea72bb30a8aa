"""Where things happen on this machine: resolved once, arguments before environment before default.

What to do (a workload, a request; part of keys and digests) and where to do it (these settings; never part
of a key) are two objects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tasks.spec.errors import BadRequest
from tasks.spec.value import Value

SCHEMA_VERSION = 1


class Settings(Value):
    """Folders, addresses and sizes. Each field is also ``DRYDOCK_<FIELD>`` in the environment."""

    home: str = Field(description="the state folder")
    root: str = Field(description="the folder that holds workloads/, dags/, mlflow/ and great_expectations/")
    workloads: str = Field(description="the folder of workload folders")
    host: str = "127.0.0.1"
    airflow_port: int = Field(default=8080, ge=1, le=65535)
    mlflow_port: int = Field(default=5000, ge=1, le=65535)
    gateway_port: int = Field(default=10000, ge=1, le=65535)
    gateway_admin_port: int = Field(default=9901, ge=1, le=65535)
    cores: int = Field(default=2, ge=1, description="device slots of this machine; sizes the pools")
    training_slots: int = Field(default=2, ge=1, description="ranks that may train at once: the training pool")

    @property
    def home_path(self) -> Path:
        return Path(self.home)

    @property
    def airflow_url(self) -> str:
        return f"http://{self.host}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://{self.host}:{self.gateway_port}"

    @property
    def gateway_admin_url(self) -> str:
        # It can stop Envoy, so it stays on the loopback whatever the host is.
        return f"http://127.0.0.1:{self.gateway_admin_port}"

    @property
    def ports(self) -> dict[str, int]:
        """The ports that ``up`` needs, by the setting that names each."""
        return {
            "airflow_port": self.airflow_port,
            "mlflow_port": self.mlflow_port,
            "gateway_port": self.gateway_port,
            "gateway_admin_port": self.gateway_admin_port,
        }

    @property
    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for the processes that we start."""
        return {f"DRYDOCK_{name.upper()}": str(value) for name, value in self.model_dump().items()}


def resolve(environ: Mapping[str, str] | None = None, **arguments: str | int | None) -> Settings:
    """Resolve the settings of this process.

    Raises:
        BadRequest: a value of the wrong type or out of range, or one port for two services.
    """
    environ = os.environ if environ is None else environ
    root = Path(environ.get("DRYDOCK_ROOT") or Path(__file__).resolve().parents[2])
    home = Path(environ.get("DRYDOCK_HOME") or root / ".drydock").absolute()
    found: dict[str, str | int] = {
        "home": str(home),
        "root": str(root),
        "workloads": str(environ.get("DRYDOCK_WORKLOADS") or root / "workloads"),
        "cores": os.cpu_count() or 1,
    }
    found["training_slots"] = max(2, int(found["cores"]))
    for name, field in Settings.model_fields.items():
        text = environ.get(f"DRYDOCK_{name.upper()}")
        if text and name not in ("home", "root", "workloads"):
            found[name] = _number(name, text) if field.annotation is int else text
    found |= {name: value for name, value in arguments.items() if value is not None}
    settings = Settings.parse(found, "settings")
    taken: dict[int, str] = {}
    for name, port in settings.ports.items():
        if other := taken.get(port):
            raise BadRequest(f"settings: {name} = {port}, is the port of {other} too; set DRYDOCK_{name.upper()}")
        taken[port] = name
    return settings


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"settings: DRYDOCK_{name.upper()} = {text!r}, must be a whole number")
    return int(text)
