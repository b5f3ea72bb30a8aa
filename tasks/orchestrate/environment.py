"""Airflow's configuration, all of it by environment, and the secrets that set-up makes once."""

from __future__ import annotations

import base64
import json
import secrets
import sys
from pathlib import Path

from tasks.registry.client import no_proxy
from tasks.site import Site
from tasks.store.files import exclusive, write_whole

USER = "admin"
# The platform's own; a workload's ${secret:NAME} is looked for elsewhere and can't name these.
PRIVATE = "private"


def secret(home: Path, name: str, make: object = None) -> str:
    """Return a secret of the state folder, made on first use, readable by us alone."""
    path = home / PRIVATE / name
    with exclusive(home / "locks" / "secrets.lock"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, make() if callable(make) else secrets.token_urlsafe(48), mode=0o600)
    return path.read_text()


def password(home: Path, file: str = "") -> str:
    """Return the password of the Airflow user ``admin``: what ``file`` holds, or what set-up made."""
    if file:
        return Path(file).read_text().strip()
    return secret(home, "airflow-password", lambda: secrets.token_urlsafe(9))


def airflow_environment(site: Site) -> dict[str, str]:
    """Return the environment of every Airflow process: SQLite, LocalExecutor, 127.0.0.1, one shared JWT secret."""
    home, settings = site.home, site.settings
    passwords = home / PRIVATE / "airflow-passwords.json"
    write_whole(passwords, json.dumps({USER: password(home)}), mode=0o600)
    fernet = secret(home, "airflow-fernet", lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    sections = {
        "CORE__DAGS_FOLDER": str(site.root / "dags"),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "CORE__EXECUTOR": "LocalExecutor",
        # LocalExecutor forks all of them at start; each step is a job of its own, so few suffice.
        "CORE__PARALLELISM": str(max(4, settings.cores)),
        "CORE__EXECUTION_API_SERVER_URL": f"{settings.airflow_url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "CORE__FERNET_KEY": fernet,
        "CORE__LAZY_LOAD_PLUGINS": "True",
        "CORE__TEST_CONNECTION": "Disabled",
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow/airflow.db",
        "API__HOST": settings.host,
        "API__PORT": str(settings.airflow_port),
        "API__BASE_URL": settings.airflow_url,
        "API__WORKERS": "1",
        "API__SECRET_KEY": secret(home, "airflow-secret-key"),
        "API_AUTH__JWT_SECRET": secret(home, "airflow-jwt"),
        "LOGGING__BASE_LOG_FOLDER": str(home / "airflow" / "logs"),
        "DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "10",
        # The default second between two looks would be most of the time of a short task.
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        # After a scheduler's death its tasks are taken up again within a minute; the defaults are five.
        "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "40",
        # An executor slot often stays taken that long after its task has ended; the default is 5 s.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    environment = {f"AIRFLOW__{name}": value for name, value in sections.items()}
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return environment | settings.environment | {
        "AIRFLOW_HOME": str(home / "airflow"),
        "PATH": path,
        "PYTHONSAFEPATH": "1",
        "NO_PROXY": no_proxy(),
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
