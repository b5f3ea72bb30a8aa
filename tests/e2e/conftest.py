"""One stack for the end-to-end tests: started as a user starts it, on free ports, in a state folder of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ports import free_ports

ROOT = Path(__file__).parents[2]
PORTS = ("AIRFLOW_PORT", "MLFLOW_PORT", "GATEWAY_PORT", "GATEWAY_ADMIN_PORT")


@dataclasses.dataclass
class Stack:
    """The command in a state folder of its own."""

    home: Path
    workloads: Path
    environment: dict[str, str]
    session: int | None = None

    def drydock(self, *arguments: str, expect: int | None = 0, timeout: float = 300) -> Any:
        """Run ``drydock`` and check its exit code (None: any)."""
        done = subprocess.run(
            [str(ROOT / "drydock"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert expect is None or done.returncode == expect, said
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.drydock(*arguments, "--json").stdout)

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.environment['DRYDOCK_GATEWAY_PORT']}"

    @property
    def airflow(self) -> str:
        return f"http://127.0.0.1:{self.environment['DRYDOCK_AIRFLOW_PORT']}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.environment['DRYDOCK_MLFLOW_PORT']}"

    @property
    def password(self) -> str:
        return (self.home / "private" / "airflow-password").read_text()

    def api(self) -> Any:
        """Airflow's REST API as a user's script would call it."""
        from tasks.orchestrate.api import AirflowApi
        from tasks.site import Site
        from tasks.spec.settings import resolve

        return AirflowApi(Site(resolve(self.environment)))

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.home / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def processes(self) -> list[psutil.Process]:
        """All processes of this stack; the supervisor's session also holds those that renamed themselves."""
        from tasks.engines.stray import stray

        pidfile = self.home / "supervisor" / "supervisord.pid"
        if pidfile.exists():
            self.session = int(pidfile.read_text())
        return stray(self.home, self.session)

    def predict(self, workload: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.gateway}/v2/models/{workload}/infer", json=body, timeout=10, trust_env=False)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with the default workload live; it is down, without a trace, when the session ends."""
    base = tmp_path_factory.mktemp("e2e")
    shutil.copytree(ROOT / "workloads", base / "workloads")
    ports = dict(zip((f"DRYDOCK_{name}" for name in PORTS), map(str, free_ports(len(PORTS))), strict=True))
    foreign = ("DRYDOCK_", "AIRFLOW", "MLFLOW")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {"DRYDOCK_HOME": str(base / "home"), "DRYDOCK_WORKLOADS": str(base / "workloads"), "DRYDOCK_USER": "rita"}
    own |= {"DRYDOCK_VENV": sys.prefix}
    found = Stack(base / "home", base / "workloads", clean | own | ports)
    try:
        yield found
    finally:
        found.drydock("down", expect=None)
