"""docker-compose.yaml as the tools read it, and the proxy's file as Envoy does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.release.gateway import command as gateway_command
from tasks.spec.settings import resolve

ROOT = Path(__file__).parents[2]


def test_compose_takes_the_file():
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed")
    done = subprocess.run(
        ["docker-compose", "--file", ROOT / "docker-compose.yaml", "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_envoy_takes_the_proxys_file():
    command = [gateway_command(resolve())[0], "--mode", "validate", "--config-path", ROOT / "images/envoy/proxy.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_dashboard_asks_for_metrics_that_the_server_has():
    board = json.loads((ROOT / "images/prometheus/dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"drydock_\w+", query)}
    told = (ROOT / "tasks/serve/metrics.py").read_text()
    assert asked
    assert [name for name in asked if re.sub(r"_(bucket|count|sum|total)$", "", name) not in told] == []
