"""The services of the laptop size: which programs run, how they are started, watched and stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tasks import UNTOLD
from tasks.engines.program import succeeding
from tasks.engines.supervisor import Program, Supervisor
from tasks.orchestrate.api import AirflowApi
from tasks.orchestrate.environment import airflow_environment
from tasks.registry.client import ENVIRONMENT as MLFLOW_ENVIRONMENT
from tasks.release.gateway import Gateway, command
from tasks.site import Site
from tasks.spec.errors import BadRequest, TryAgain
from tasks.spec.settings import SCHEMA_VERSION
from tasks.store.files import write_json, write_whole

AIRFLOW = ("api-server", "scheduler", "dag-processor", "triggerer")
# These start while Airflow's database is migrated: they need none, or not before the first request.
EARLY = ("gateway", "mlflow", "airflow-api-server")
HEALTH_SECONDS = 120
# Airflow loads this before it forks a process for each task, which then need not import the same again.
LOCAL_SETTINGS = "import tasks.notify\nimport tasks.plan  # noqa: F401\n"
# A file rather than an entry point of the package: it holds without a new installation.
PLUGIN = "from tasks.orchestrate.plugin import DrydockPlugin  # noqa: F401\n"
# What steps import, most of it for seconds; a step is forked from a process that has.
PRELOADED = (
    *("tasks.cli", "tasks.command.step", "pyarrow.parquet", "ibis", "duckdb", "pandas", "great_expectations"),
    *("sklearn.linear_model", "sklearn.neighbors", "cleanlab.filter", "mlflow.tracking", "torch", "safetensors.torch"),
    *("onnx", "onnxruntime.quantization", "matplotlib.figure", "matplotlib.backends.backend_agg", "dvc.repo", "jinja2"),
)
Say = Callable[[str], None]


def programs(site: Site) -> list[Program]:
    """Return every supervised program of the platform. Pure but for the secrets made at first use."""
    airflow = airflow_environment(site)
    skip_log_server = {"scheduler", "triggerer"}  # theirs would listen on every address
    found = [
        _program(
            site,
            f"airflow-{name}",
            (_tool("airflow"), name, *(["--skip-serve-logs"] if name in skip_log_server else [])),
            airflow,
            stop_seconds=20,
        )
        for name in AIRFLOW
    ]
    own = site.settings.environment | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return [
        _program(site, "gateway", command(site.settings), _gateway_ports(site), priority=100),
        _program(site, "mlflow", _mlflow_command(site), _mlflow_environment(), priority=100),
        _program(site, "fork-server", _fork_server_command(site), own | MLFLOW_ENVIRONMENT, priority=400),
        _program(site, "reconciler", (sys.executable, "-m", "tasks.reconciler"), own),
        *found,
    ]


def up(site: Site, say: Say) -> None:
    """Start what does not run, and wait until all of it is healthy. Idempotent.

    Raises:
        BadRequest: a port is taken by someone else, or the state is of another schema.
        TryAgain: a component is not healthy in time; its log is named.
    """
    prepare_home(site)
    supervisor = Supervisor(site.home)
    if not supervisor.running():
        check_ports(site)
        supervisor.start()
    Gateway(site.settings).prepare()
    wanted = programs(site)
    # One that serves an older Airflow's tables would be in the way of their migration.
    early = EARLY if is_migrated(site) or not _database(site).exists() else EARLY[:-1]
    for program in wanted:
        if program.name in early:
            supervisor.add(program)
    migrate(site, say)
    for program in wanted:
        supervisor.add(program)
    say("waiting for Airflow, MLflow and the gateway")
    await_healthy(site, say)


def down(site: Site, purge: bool) -> None:
    """Stop everything that ``up`` started; with ``purge`` forget the state too."""
    Supervisor(site.home).stop()
    if site.settings.training_engine != "process":
        site.training_engine.remove_all()
    if purge and site.home.is_dir():
        # A command that was refused before ``up`` may have left a lock, and no state yet.
        foreign = {path.name for path in site.home.iterdir()} - {"events.jsonl", "locks", "logs", "private"}
        if foreign and not (site.home / "state.json").is_file():
            raise BadRequest(f"{site.home}: holds no state.json, so it is no state of ours; remove it by hand")
        shutil.rmtree(site.home)


def prepare_home(site: Site) -> None:
    """Make the state folder, or check that it is of our schema.

    Raises:
        BadRequest: its schema is another one; the message tells the way out.
    """
    path = site.home / "state.json"
    if not path.exists():
        site.home.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA_VERSION})
    found = json.loads(path.read_text()).get("schema")
    if found != SCHEMA_VERSION:
        raise BadRequest(
            f"{site.home}: its state has schema {found}, must be {SCHEMA_VERSION}; use the release that wrote it, "
            "or another DRYDOCK_HOME, or ./drydock down --purge"
        )
    for name in ("airflow", "mlflow", "logs", "jobs", "rooms"):
        (site.home / name).mkdir(exist_ok=True)
    write_whole(site.home / "airflow" / "config" / "airflow_local_settings.py", LOCAL_SETTINGS)
    write_whole(site.home / "airflow" / "plugins" / "drydock_plugin.py", PLUGIN)
    _ = site.keys


def check_ports(site: Site) -> None:
    """Raise BadRequest where a port that we need is taken."""
    for name, port in site.settings.ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((site.settings.host, port))
            except OSError:
                variable = f"DRYDOCK_{name.upper()}"
                raise BadRequest(f"port {port} ({name}) is taken by another program; set {variable}") from None


def migrate(site: Site, say: Say) -> None:
    """Bring Airflow's database to its schema; done once for each version of Airflow."""
    if is_migrated(site):
        return
    say("migrating Airflow's database")
    log = site.home / "logs" / "airflow-migrate.log"
    environment = os.environ | airflow_environment(site)
    with log.open("wb") as stream:
        done = subprocess.run(
            [_tool("airflow"), "db", "migrate"], env=environment, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        raise TryAgain(f"Airflow's database: the migration failed; see {log}")
    _stamp(site).write_text(version("apache-airflow-core"))


def is_migrated(site: Site) -> bool:
    """Return whether Airflow's database is there and of this Airflow's schema."""
    stamp = _stamp(site)
    return stamp.exists() and stamp.read_text() == version("apache-airflow-core") and _database(site).exists()


def _stamp(site: Site) -> Path:
    return site.home / "airflow" / "migrated"


def _database(site: Site) -> Path:
    return site.home / "airflow" / "airflow.db"


def await_healthy(site: Site, say: Say) -> None:
    """Wait until every component says that it is healthy."""
    until = time.monotonic() + HEALTH_SECONDS
    told: set[str] = set()
    while True:
        states = health(site)
        for name in sorted(set(name for name, state in states.items() if state == "healthy") - told):
            told.add(name)
            say(f"{name} is up")
        if all(state == "healthy" for state in states.values()):
            return
        if time.monotonic() > until:
            name, state = next((n, s) for n, s in states.items() if s != "healthy")
            raise TryAgain(f"{name} is {state} after {HEALTH_SECONDS} s; see ./drydock logs {log_name(name)}")
        time.sleep(0.3)


def health(site: Site) -> dict[str, str]:
    """Return each component's state: ``healthy``, or what is wrong."""
    airflow = AirflowApi(site).health()
    states = {f"airflow {name}": state for name, state in airflow.items()} or {"airflow": "not answering"}
    # Tasks report to this part of the API server; it is built at its first request, which takes seconds.
    states["airflow execution API"] = (
        "healthy" if _answers(f"{site.settings.airflow_url}/execution/health") else "not answering"
    )
    states["mlflow"] = "healthy" if _answers(f"{site.settings.mlflow_url}/health") else "not answering"
    states["gateway"] = "healthy" if _answers(f"{site.settings.gateway_admin_url}/ready") else "not answering"
    return states


def log_name(component: str) -> str:
    """Return the program whose log tells about a component of the health page."""
    known = dict.fromkeys(("airflow", "airflow execution API", "airflow metadatabase"), "airflow-api-server")
    return known.get(component, component.replace(" ", "-").replace("_", "-"))


def _program(
    site: Site,
    name: str,
    line: tuple[str, ...],
    environment: dict[str, str],
    stop_seconds: int = 10,
    priority: int = 500,
) -> Program:
    return Program(
        name=name,
        command=succeeding(Supervisor(site.home).folder / "groups" / name, line),
        environment=environment,
        folder=str(site.home),
        log=str(site.home / "logs" / f"{name}.log"),
        stop_seconds=stop_seconds,
        priority=priority,
    )


def _gateway_ports(site: Site) -> dict[str, str]:
    """What Envoy reads from its files at its start: with other ports it is another program, and is started anew."""
    settings = site.settings
    return {"GATEWAY_PORT": str(settings.gateway_port), "GATEWAY_ADMIN_PORT": str(settings.gateway_admin_port)}


def _mlflow_command(site: Site) -> tuple[str, ...]:
    settings, folder = site.settings, site.home / "mlflow"
    hosts = f"127.0.0.1:*,localhost:*,{settings.host}:*"
    return (
        *(_tool("mlflow"), "server", "--host", settings.host, "--port", str(settings.mlflow_port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"),
        *("--allowed-hosts", hosts, "--cors-allowed-origins", settings.airflow_url),
    )


def _fork_server_command(site: Site) -> tuple[str, ...]:
    folder = Supervisor(site.home).folder
    return (
        *(sys.executable, "-m", "tasks.engines.forkserver", str(folder)),
        *("--watch", str(Path(__file__).parent), *PRELOADED),
    )


def _mlflow_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return UNTOLD | MLFLOW_ENVIRONMENT | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONSAFEPATH": "1",
        "PATH": path,
    }


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, timeout=3, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
