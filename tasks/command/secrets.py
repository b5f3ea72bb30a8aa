"""``drydock up --secrets-only``: the files of secrets that docker-compose.yaml mounts, made once."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable
from pathlib import Path

from tasks.store.files import exclusive, write_whole

FOLDER = "private/compose"
Make = Callable[[], str]


def write_secrets(home: Path) -> str:
    """Make the secrets that are not there yet; return a line that tells where they lie and how many were made.

    The folder is ours alone. The files in it can be read by anyone who gets so far, because in a container they
    are read by a user that this machine does not know.
    """
    folder = home / FOLDER
    with exclusive(home / "locks" / "secrets.lock"):
        folder.mkdir(parents=True, exist_ok=True)
        for closed in (folder.parent, folder):
            closed.chmod(0o700)
        drawn = [name for name, make in DRAWN.items() if _write(folder / name, make)]
        value = {name: (folder / name).read_text() for name in DRAWN}
        made = [name for name, text in composed(value).items() if _write(folder / name, lambda text=text: text)]
    return f"{folder}: {len(drawn) + len(made)} secrets made; log in as admin with the airflow-password there"


def _write(path: Path, make: Make) -> bool:
    if path.exists():
        return False
    write_whole(path, make(), mode=0o444)
    return True


def _word() -> str:
    return secrets.token_hex(24)


def _fernet() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


DRAWN: dict[str, Make] = {
    "postgres-password": _word,
    "postgres-airflow": _word,
    "postgres-mlflow": _word,
    "postgres-drydock": _word,
    "valkey-password": _word,
    "airflow-password": lambda: secrets.token_urlsafe(12),
    "airflow-fernet": _fernet,
    "airflow-secret-key": _word,
    "airflow-jwt": _word,
    "jobs-token": _word,
    "mlflow-password": lambda: secrets.token_urlsafe(16),
    "mlflow-secret-key": _word,
    "s3-access-key": lambda: secrets.token_hex(10),
    "s3-secret-key": _word,
}


def composed(value: dict[str, str]) -> dict[str, str]:
    """Return the secrets that hold other ones. Pure."""
    airflow = f"airflow:{value['postgres-airflow']}@postgres:5432/airflow"
    mlflow = f"postgresql+psycopg2://mlflow:{value['postgres-mlflow']}@postgres:5432"
    keys = {"accessKey": value["s3-access-key"], "secretKey": value["s3-secret-key"]}
    s3 = {"identities": [{"name": "drydock", "credentials": [keys], "actions": ["Admin"]}]}
    return {
        "airflow-database": f"postgresql+psycopg2://{airflow}",
        "airflow-passwords": json.dumps({"admin": value["airflow-password"]}),
        "celery-broker": f"redis://:{value['valkey-password']}@valkey:6379/0",
        "celery-results": f"db+postgresql+psycopg2://{airflow}",
        "ledger-database": f"postgresql+psycopg2://drydock:{value['postgres-drydock']}@postgres:5432/drydock",
        "mlflow-database": f"{mlflow}/mlflow",
        "mlflow-accounts": f"{mlflow}/mlflow_accounts",
        "s3": json.dumps(s3),
    }
