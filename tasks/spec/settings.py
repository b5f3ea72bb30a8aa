"""Where things happen on this machine: resolved once, arguments before environment before default.

What to do (a workload, a request; part of keys and digests) and where to do it (these settings; never part
of a key) are two objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.spec.errors import BadRequest
from tasks.spec.value import Value

SCHEMA_VERSION = 1
# A folder for each GPU that NVIDIA's driver drives.
GPUS = Path("/proc/driver/nvidia/gpus")
FILES = ("api_keys", "tls_certificate", "tls_key", "tls_ca", "dataset_remote")
FILES += ("jobs_token", "ledger_database", "airflow_password")


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
    airflow_at: str = Field(default="", description="Airflow's URL where that is no process of ours beside us")
    mlflow_at: str = Field(default="", description="MLflow's URL, likewise")
    gateway_at: str = Field(default="", description="the gateway's URL, likewise")
    gateway_admin_at: str = Field(default="", description="the URL of the harmless part of its admin page, likewise")
    api_keys: str = Field(default="", description="a JSON file of client names and keys; none: no key is asked for")
    tls_certificate: str = Field(default="", description="the gateway's certificate chain in PEM; none: plain HTTP")
    tls_key: str = Field(default="", description="its private key in PEM")
    tls_ca: str = Field(default="", description="what our own clients trust at the gateway; none: the certificate")
    mlflow_seconds: int = Field(default=30, ge=1, description="how long MLflow may take to answer a request")
    engine: Literal["process", "remote"] = Field(default="process", description="where steps and replicas run")
    training_engine: Literal["process", "docker", "swarm", "remote"] = Field(
        default="process", description="where ranks run"
    )
    jobs_url: str = Field(default="", description="the job service's URL, for the engine `remote`")
    jobs_token: str = Field(default="", description="the file of its token")
    ledger_database: str = Field(default="", description="a file with the ledger's URL; none: SQLite in the home")
    airflow_password: str = Field(default="", description="a file with the password of Airflow's user admin")
    dataset_remote: str = Field(default="", description="a folder or s3://bucket/prefix that revisions are pushed to")
    dataset_remote_endpoint: str = Field(default="", description="the URL of an S3 server that is not Amazon's")
    cores: int = Field(default=2, ge=1, description="device slots of this machine; sizes the pools")
    data_memory_bytes: int = Field(
        default=384 << 20, ge=128 << 20, description="what cleaning may hold in memory; beyond it, it goes to disk"
    )
    spark_master: str = Field(
        default="", description="the Spark that cleans: spark://host:7077, or local[*] for this machine; none: DuckDB"
    )
    step_memory_bytes: int = Field(default=2 << 30, ge=256 << 20, description="of a step that runs in a container")
    training_slots: int = Field(default=2, ge=1, description="ranks that may train at once: the training pool")
    gpus: int = Field(default=0, ge=0, description="GPUs of this machine: the pool of those who ask for one")

    core_watts: float = Field(
        default=10, gt=0, description="what a busy core takes, for estimates where no counter of energy can be read"
    )
    co2_grams_per_kwh: float = Field(default=400, ge=0, description="of the grid that this machine hangs on")
    price_per_kwh: float = Field(default=0.25, ge=0, description="of energy, in the currency of your reports")

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> Settings:
        if bool(self.tls_certificate) != bool(self.tls_key):
            given, lacking = ("tls_certificate", "tls_key") if self.tls_certificate else ("tls_key", "tls_certificate")
            raise ValueError(f"{given} is set, {lacking} is not; set DRYDOCK_{lacking.upper()}, or neither")
        if self.tls_ca and not self.tls_certificate:
            raise ValueError("tls_ca is set, tls_certificate is not; set DRYDOCK_TLS_CERTIFICATE and DRYDOCK_TLS_KEY")
        return self

    @model_validator(mode="after")
    def _remote_is_somewhere(self) -> Settings:
        asked = [name for name in ("engine", "training_engine") if getattr(self, name) == "remote"]
        lacking = [name for name in ("jobs_url", "jobs_token") if not getattr(self, name)]
        if asked and lacking:
            raise ValueError(f"{asked[0]} = 'remote' needs {lacking[0]}; set DRYDOCK_{lacking[0].upper()}")
        return self

    @property
    def home_path(self) -> Path:
        return Path(self.home)

    @property
    def airflow_url(self) -> str:
        return self.airflow_at or f"http://{self.host}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        return self.mlflow_at or f"http://{self.host}:{self.mlflow_port}"

    @property
    def gateway_url(self) -> str:
        scheme = "https" if self.tls_certificate else "http"
        return self.gateway_at or f"{scheme}://{self.host}:{self.gateway_port}"

    @property
    def gateway_ca(self) -> str | None:
        """The certificates that a client of the gateway trusts; None: it speaks plain HTTP."""
        return self.tls_ca or self.tls_certificate or None

    @property
    def gateway_admin_url(self) -> str:
        # It can stop Envoy, so it stays on the loopback whatever the host is.
        return self.gateway_admin_at or f"http://127.0.0.1:{self.gateway_admin_port}"

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
    found: dict[str, str | int | float] = {
        "home": str(home),
        "root": str(root),
        "workloads": str(environ.get("DRYDOCK_WORKLOADS") or root / "workloads"),
        "cores": os.cpu_count() or 1,
    }
    found["training_slots"] = max(2, int(found["cores"]))
    found["gpus"] = len(list(GPUS.glob("*")))
    for name, field in Settings.model_fields.items():
        text = environ.get(f"DRYDOCK_{name.upper()}")
        if text and name not in ("home", "root", "workloads"):
            found[name] = READ.get(field.annotation, _text)(name, text)
    found |= {name: value for name, value in arguments.items() if value is not None}
    # Processes with other working folders get these settings too.
    files = [name for name in FILES if found.get(name) and "://" not in str(found[name])]
    found |= {name: str(Path(str(found[name])).absolute()) for name in files}
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


def _decimal(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadRequest(f"settings: DRYDOCK_{name.upper()} = {text!r}, must be a number") from None


def _text(name: str, text: str) -> str:
    return text


READ: dict[Any, Callable[[str, str], str | int | float]] = {int: _number, float: _decimal}
