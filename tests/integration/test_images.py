"""The images: built from this tree, lawful by inspection, and able to do their one job without rights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The first test that asks for the images waits for their builds, and for a base from debootstrap before them.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
BUILD, BOOTSTRAP = ROOT / "images/build", ROOT / "images/base/bootstrap"
NAMES = ("base", "trainer", "server")
WITHOUT_RIGHTS = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")
KNOWN_ENVIRONMENT = {
    *("PATH", "HOME", "LANG", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
    "NVIDIA_DRIVER_CAPABILITIES",
}


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def call(*command: str | Path, home: Path, **environment: str) -> tuple[int, str]:
    """Run a script of images/ with its own state; return its exit code and its last line of stderr."""
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"DRYDOCK_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture(scope="session")
def home(images_home: Path) -> Path:
    return images_home


@pytest.fixture(scope="session")
def images(build_images: Any) -> dict[str, str]:
    """The images under test; the digest of each, by name."""
    return build_images(*(f"drydock/{name}" for name in NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_lawful(images, name):
    found = json.loads(docker("image", "inspect", images[f"drydock/{name}"]))[0]
    assert found["Id"] == images[f"drydock/{name}"]
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config["WorkingDir"] == "/work"
    environment = dict(pair.split("=", 1) for pair in config["Env"])
    assert environment["PYTHONSAFEPATH"] == "1"
    assert set(environment) <= KNOWN_ENVIRONMENT
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == f"drydock/{name}"
    assert labels["version"] != "0"
    assert {"source", "revision", "created", "licenses"} <= set(labels)
    assert bool(config.get("Healthcheck")) == (name == "server")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_holds_no_secret_and_no_setuid_program(images, name):
    image = images[f"drydock/{name}"]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).lower()
    assert not [word for word in ("password", "token", "index-url", "pip.conf", "_key=") if word in history]
    search = "find / -xdev '(' -perm /6000 -type f -o -name pip.conf -o -name wheelhouse ')' -print"
    assert docker("run", "--rm", "--user=0", "--network=none", "--entrypoint=", image, "sh", "-c", search) == ""


def test_the_trainer_trains_and_has_no_platform(images, tmp_path):
    # A folder with the name of a package lies where the container works: it must not become that package.
    (tmp_path / "mlflow").mkdir()
    tmp_path.chmod(0o755)
    script = (
        "import importlib.util as u, torch, tasks.train.rank, tasks.compress.compress;"
        "absent = ('airflow', 'mlflow', 'great_expectations', 'pip');"
        "print(torch.ones(2).sum().item(), [n for n in absent if u.find_spec(n)])"
    )
    run = ("run", "--rm", *WITHOUT_RIGHTS, "--network=none", f"--volume={tmp_path}:/here:ro", "--workdir=/here")
    assert docker(*run, images["drydock/trainer"], "python", "-c", script) == "2.0 []"


def test_the_server_image_has_neither_torch_nor_platform(images):
    script = "import importlib.util as u; print([n for n in ('torch', 'airflow', 'mlflow', 'pip') if u.find_spec(n)])"
    run = ("run", "--rm", "--network=none", "--entrypoint=python", images["drydock/server"], "-c", script)
    assert docker(*run) == "[]"


@pytest.fixture
def serving(images, digits_package) -> Iterator[tuple[str, str, list]]:
    made = digits_package()
    # Only the public key: the folder of keys is its owner's alone.
    mounts = (f"--volume={made.folder}:/package:ro", f"--volume={made.keys}/signing.pub:/keys/signing.pub:ro")
    options = ("--detach", "--publish=127.0.0.1::8080", "--memory=256m", "--pids-limit=64", *WITHOUT_RIGHTS, *mounts)
    name = docker("run", *options, images["drydock/server"], "--digest", made.digest_sha256)
    try:
        yield name, f"http://{docker('port', name, '8080').splitlines()[0]}", made.rows
    finally:
        docker("rm", "--force", "--volumes", name)


def test_a_package_is_served_without_rights(serving):
    name, url, rows = serving
    until = time.monotonic() + 60
    while docker("inspect", "--format", "{{.State.Health.Status}}", name) != "healthy":
        assert time.monotonic() < until, docker("logs", name)
        time.sleep(0.2)
    tensor = {"name": "input", "shape": [1, 64], "datatype": "FP32", "data": rows[0]}
    body, kind = json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v2/models/digits/infer", body, kind)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["x-drydock-passport"]


def test_a_wheelhouse_is_enough(images, home):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
    code, line = call(BUILD, "server", "--wheelhouse", home / "wheelhouse", home=home, **nowhere)
    assert code == 0, line


def test_bad_input_is_one_line(docker_daemon, home, tmp_path):
    assert call(BUILD, "nothing", home=home)[0] == 30
    code, line = call(BUILD, "server", "--wheelhouse", tmp_path, home=home)
    assert (code, "--fetch-only" in line) == (30, True)
    code, line = call(BUILD, "base", home=home, DOCKER_HOST="unix:///nowhere.sock")
    assert (code, "daemon does not answer" in line) == (20, True)
    code, line = call(BOOTSTRAP, home=home, DOCKER_HOST="unix:///nowhere.sock")
    assert (code, "daemon does not answer" in line) == (20, True)


def test_a_wheel_that_is_not_the_locked_one_is_refused(tmp_path):
    sys.path.append(str(ROOT / "images"))
    from wheelhouse import Pin

    (tmp_path / "small-1.0-py3-none-any.whl").write_bytes(b"other")
    pin = Pin("small==1.0 \\\n    --hash=sha256:" + "0" * 64)
    assert pin.file(tmp_path) is None
