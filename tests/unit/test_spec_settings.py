"""Settings: arguments beat the environment, the environment beats the default; a clash or a wrong value is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.spec.errors import BY_EXIT_CODE, BadRequest, DrydockError, retryable
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(30)


def test_the_default_is_the_repository_on_the_loopback():
    found = resolve({})
    assert (Path(found.root) / "workloads" / "digits" / "workload.yaml").is_file()
    assert found.home == str(Path(found.root) / ".drydock")
    assert found.host == "127.0.0.1"
    assert found.mlflow_url == "http://127.0.0.1:5000"
    assert len(set(found.ports.values())) == len(found.ports)
    assert found.training_slots >= 2


def test_arguments_beat_the_environment_and_that_the_default():
    environ = {"DRYDOCK_MLFLOW_PORT": "5001", "DRYDOCK_AIRFLOW_PORT": "8081", "DRYDOCK_HOME": "/state"}
    found = resolve(environ, mlflow_port=5002, host=None)
    assert (found.mlflow_port, found.airflow_port, found.gateway_port) == (5002, 8081, 10000)
    assert (found.home, found.host) == ("/state", "127.0.0.1")


def test_an_empty_variable_is_none(monkeypatch):
    assert resolve({"DRYDOCK_MLFLOW_PORT": "", "DRYDOCK_HOME": ""}).mlflow_port == 5000


def test_a_relative_home_is_made_absolute():
    assert resolve({"DRYDOCK_HOME": "state"}).home == f"{os.getcwd()}/state"


def test_the_environment_that_we_hand_on_gives_the_same_settings():
    found = resolve({"DRYDOCK_MLFLOW_PORT": "5001", "DRYDOCK_WORKLOADS": "/w"}, cores=3)
    assert resolve(found.environment) == found


def test_the_gateway_speaks_tls_where_it_has_a_certificate():
    assert resolve({}).gateway_url == "http://127.0.0.1:10000"
    assert resolve({}).gateway_ca is None
    found = resolve({"DRYDOCK_TLS_CERTIFICATE": "c.pem"}, tls_key="/k.pem", api_keys="keys.json")
    assert found.gateway_url == "https://127.0.0.1:10000"
    # Absolute: processes with other working folders get the same settings.
    assert (found.tls_certificate, found.gateway_ca) == (f"{os.getcwd()}/c.pem", f"{os.getcwd()}/c.pem")
    assert (found.tls_key, found.api_keys) == ("/k.pem", f"{os.getcwd()}/keys.json")
    assert resolve(found.environment) == found
    assert resolve(found.environment, tls_ca="/ca.pem").gateway_ca == "/ca.pem"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DRYDOCK_TLS_CERTIFICATE": "/c"}, ["tls_certificate is set, tls_key is not; set DRYDOCK_TLS_KEY"]),
        ({"DRYDOCK_TLS_KEY": "/k"}, ["tls_key is set, tls_certificate is not; set DRYDOCK_TLS_CERTIFICATE"]),
        ({"DRYDOCK_TLS_CA": "/a"}, ["tls_ca is set, tls_certificate is not"]),
        ({"DRYDOCK_MLFLOW_PORT": "many"}, ["DRYDOCK_MLFLOW_PORT = 'many'", "whole number"]),
        ({"DRYDOCK_MLFLOW_PORT": "-1"}, ["DRYDOCK_MLFLOW_PORT = '-1'", "whole number"]),
        ({"DRYDOCK_MLFLOW_PORT": "5²"}, ["DRYDOCK_MLFLOW_PORT = '5²'", "whole number"]),
        ({"DRYDOCK_MLFLOW_PORT": "65536"}, ["mlflow_port = 65536", "65535"]),
        ({"DRYDOCK_MLFLOW_PORT": "0"}, ["mlflow_port = 0"]),
        ({"DRYDOCK_MLFLOW_PORT": "8080"}, ["mlflow_port = 8080", "airflow_port", "DRYDOCK_MLFLOW_PORT"]),
        ({"DRYDOCK_CORES": "0"}, ["cores = 0"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(environ, words):
    with pytest.raises(BadRequest) as caught:
        resolve(environ)
    for word in words:
        assert word in str(caught.value)


def test_an_error_is_one_line_and_its_kind_an_exit_code():
    assert str(BadRequest("a\n  b\tc")) == "a b c"
    assert sorted(BY_EXIT_CODE) == [1, 10, 11, 20, 30, 40]
    assert all(issubclass(kind, DrydockError) for kind in BY_EXIT_CODE.values())
    assert [code for code in (*BY_EXIT_CODE, 137, -9) if retryable(code)] == [1, 20, 137, -9]


def test_services_may_live_elsewhere():
    at = {"DRYDOCK_MLFLOW_AT": "http://proxy:5000", "DRYDOCK_GATEWAY_AT": "http://gateway:10000"}
    found = resolve(at | {"DRYDOCK_GATEWAY_ADMIN_AT": "http://gateway:9902", "DRYDOCK_HOST": "0.0.0.0"})
    assert (found.mlflow_url, found.gateway_url) == ("http://proxy:5000", "http://gateway:10000")
    assert found.gateway_admin_url == "http://gateway:9902"
    assert found.airflow_url == "http://0.0.0.0:8080"


@pytest.mark.parametrize("name", ["engine", "training_engine"])
def test_the_job_service_must_be_somewhere(name):
    with pytest.raises(BadRequest, match=f"{name} = 'remote' needs jobs_url; set DRYDOCK_JOBS_URL"):
        resolve({f"DRYDOCK_{name.upper()}": "remote"})
    with pytest.raises(BadRequest, match="needs jobs_token"):
        resolve({f"DRYDOCK_{name.upper()}": "remote", "DRYDOCK_JOBS_URL": "http://jobs:8070"})
