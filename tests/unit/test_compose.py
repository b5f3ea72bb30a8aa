"""docker-compose.yaml by inspection: what every service must say, and what none may."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tasks.command.secrets import DRAWN, FOLDER, composed, write_secrets
from tasks.engines.places import OF_REPLICA, OF_STEP

ROOT = Path(__file__).parents[2]
STACK = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES = STACK["services"]
# It ends, and the others wait for its exit code.
ENDS = {"prepare"}
# The one that holds the Docker socket, which is root's.
HOLDER = "jobs"


def lines(entry: dict | list) -> list[str]:
    return [f"{key}={value}" for key, value in entry.items()] if isinstance(entry, dict) else list(entry)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_and_bounds(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit", "logging"} <= set(service)
    assert service["restart"] == ("no" if name in ENDS else "unless-stopped")
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode"} & set(service)
    assert ("user" in service) == (name == HOLDER)
    assert bool([mount for mount in service.get("volumes", []) if "docker.sock" in mount]) == (name == HOLDER)
    of_host = [mount for mount in service.get("volumes", []) if mount.startswith((".", "/", "$"))]
    assert not [mount for mount in of_host if mount[-3:] != ":ro" and "docker.sock" not in mount]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched(name):
    image = SERVICES[name]["image"].split(":")[0].removeprefix("drydock/")
    own = "HEALTHCHECK" in (ROOT / "images" / image / "Dockerfile").read_text()
    assert name in ENDS or own or SERVICES[name]["healthcheck"]["test"]


def test_nothing_is_published_beyond_this_machine():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    on_edge = {name for name, service in SERVICES.items() if "edge" in service["networks"]}
    assert on_edge == {name for name, service in SERVICES.items() if service.get("ports")}
    assert STACK["networks"]["internal"] == STACK["networks"]["registry"] == {"internal": True}


def test_the_only_way_to_mlflow_is_the_proxy():
    beside = {name for name, service in SERVICES.items() if "registry" in service["networks"]}
    assert SERVICES["mlflow"]["networks"] == ["registry"]
    assert beside == {"mlflow", "proxy", "postgres", "seaweedfs"}


def test_the_holder_of_the_socket_is_asked_from_inside_alone():
    assert SERVICES[HOLDER]["networks"] == ["internal"]
    assert "ports" not in SERVICES[HOLDER]
    given = {mount.rpartition(":ro")[0].rpartition(":")[2] for mount in SERVICES[HOLDER]["volumes"] if ":ro" in mount}
    assert set(OF_STEP) | set(OF_REPLICA) <= given


def test_no_secret_is_written_down():
    for service in SERVICES.values():
        for line in lines(service.get("environment", {})):
            if re.search(r"PASSWORD|SECRET|_KEY|ALCHEMY_CONN|BROKER|RESULT_BACKEND|STORE_URI", line.split("=")[0]):
                assert re.search(r"=(/run/secrets/|/tmp/)", line), line


def test_every_secret_is_made_once(tmp_path):
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    made = {*DRAWN, *composed(dict.fromkeys(DRAWN, "x"))}
    assert used == set(STACK["secrets"])
    assert made == used
    write_secrets(tmp_path)
    folder = tmp_path / FOLDER
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(before) == made
    assert ": 0 secrets made;" in write_secrets(tmp_path)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert folder.stat().st_mode & 0o777 == 0o700
    assert before["postgres-airflow"] in before["airflow-database"]
