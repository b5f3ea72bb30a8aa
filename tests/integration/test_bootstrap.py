"""``./drydock`` before there is an environment: made once, continued after a kill, refused in one line.

The launcher and the bootstrap run as they are, on a repository of tiny wheels, without network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
import pathlib, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    while pathlib.Path("slow").exists():
        time.sleep(0.1)
    name = "drydock-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("stub.py", "def main(): print('hello')")
        info = "drydock-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: drydock\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\\ndrydock = stub:main\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
PYPROJECT = """
[project]
name = "drydock"
version = "1.0"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def make_wheel(folder: Path, name: str, version: str = "1.0") -> str:
    """Write a wheel of one empty module; return its locked requirement."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


class Repository:
    """A copy of the launcher and the bootstrap beside locks of tiny wheels."""

    def __init__(self, folder: Path) -> None:
        self.root, self.wheels, self.bin = folder / "repo", folder / "wheels", folder / "bin"
        for path in (self.root / "locks", self.wheels, self.bin):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "drydock", self.root)
        shutil.copy(ROOT / "locks/bootstrap.py", self.root / "locks")
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        make_wheel(self.wheels, "torch", "1.0+cpu")
        for lock, names in {"build": ["tool"], "platform": ["alpha", "beta"], "torch": ["torch"]}.items():
            pins = "".join(make_wheel(self.wheels, name) for name in names)
            (self.root / "locks" / f"{lock}.lock").write_text(pins)
        self.use_python(f'exec {os.path.realpath(sys.executable)} "$@"')
        self.venv = self.root / ".venv"

    def use_python(self, line: str) -> None:
        for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
            (self.bin / name).write_text(f"#!/bin/sh\n{line}\n")
            (self.bin / name).chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        pip = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.root.parent), **pip, **more}

    def start(self, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "drydock", "status"],
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def call(self, **more: str) -> tuple[int, str, str]:
        process = self.start(**more)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_two_calls_at_once_install_once_and_later_calls_need_no_python(repository: Repository) -> None:
    calls = [repository.start(), repository.start()]
    ends = [(*call.communicate(timeout=60), call.returncode) for call in calls]
    assert [(out, code) for out, _, code in ends] == [("hello\n", 0)] * 2
    lines = "".join(err for _, err, _ in ends)
    assert lines.count("[2/3] installing 3 packages, done") == 1
    assert lines.count("waiting for another ./drydock") >= 1

    repository.use_python("exit 99")
    assert repository.call() == (0, "hello\n", "")


def test_interrupted_installation_leaves_no_stamp_and_is_continued(repository: Repository) -> None:
    slow = repository.root / "slow"
    slow.touch()
    first = repository.start()
    await_file(repository.venv / "install-drydock.log", first)
    os.killpg(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=30)
    assert first.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1] == "drydock: interrupted; the same command goes on from here"
    assert "Traceback" not in err
    assert not (repository.venv / ".ready").exists()

    slow.unlink()
    halfway = next(repository.venv.glob("lib/python3*/site-packages/alpha-1.0.dist-info"))
    (halfway / "INSTALLER").unlink()
    (halfway.parent / "alpha.py").unlink()
    code, out, err = repository.call()
    assert (code, out) == (0, "hello\n")
    assert "making" not in err
    assert (halfway.parent / "alpha.py").exists()


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_package_that_is_not_what_the_lock_says_is_refused(repository: Repository) -> None:
    (repository.wheels / "beta-1.0-py3-none-any.whl").unlink()
    make_wheel(repository.wheels, "alpha", "1.0")
    with zipfile.ZipFile(repository.wheels / "alpha-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("more.py", "")
    lock = repository.root / "locks/platform.lock"
    lock.write_text("".join(re.findall(r"^alpha(?:.*\n    .*\n)", lock.read_text(), re.MULTILINE)))
    code, _, err = repository.call()
    assert code == 40
    assert err.splitlines()[-1].startswith("drydock: a package is not the one that was locked: alpha")


def test_index_out_of_reach_is_one_line_with_the_reason(repository: Repository) -> None:
    nowhere = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    code, _, err = repository.call(**nowhere, PIP_FIND_LINKS="")
    assert code == 20
    assert re.fullmatch(
        r"drydock: the package index cannot be reached: [^<]*refused[^<]*; log: .*install-pip\.log",
        err.splitlines()[-1],
    )


def test_no_suitable_python_says_what_to_install(repository: Repository) -> None:
    repository.use_python("exit 1")
    code, _, err = repository.call()
    assert code == 30
    assert err.endswith("install one: sudo apt-get install -y python3 python3-venv\n")
    assert err.count("\n") == 1


def test_missing_venv_module_says_what_to_install(repository: Repository) -> None:
    bootstrap = repository.root / "locks/bootstrap.py"
    arguments = ["bootstrap.py", "--venv", str(repository.venv), "--stamp", "s"]
    program = (
        f"import runpy, sys; sys.modules['ensurepip'] = None; sys.argv = {arguments!r}; "
        f"runpy.run_path({str(bootstrap)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 30
    assert re.search(r"install it: sudo apt-get install -y python3(\.\d+)?-venv\n$", done.stderr)
    assert done.stderr.count("\n") == 1


def test_folder_of_someone_else_is_not_touched(repository: Repository, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    code, _, err = repository.call(DRYDOCK_VENV=str(theirs))
    assert code == 30
    assert "holds files that drydock did not make" in err
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]


def test_torch_is_looked_for_as_a_cpu_build_first_where_there_is_no_gpu(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "locks/bootstrap.py")
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bench = bootstrap.Bench(tmp_path / "venv")
    configured, theirs, default = bootstrap.torch_ways(bench, "cpu")
    assert re.fullmatch(r"torch==[\d.]+\+cpu", configured[0][-1])
    assert bootstrap.TORCH_CPU_INDEX in theirs[0]
    assert "warning" in default[1]
    assert bootstrap.torch_ways(bench, "gpu") == [(default[0], "")]


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("name", ["mlflow", "great_expectations"])
def test_folders_at_the_root_do_not_shadow_their_packages(name: str, safe_path: str) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": safe_path}
    environment.pop("PYTHONPATH", None)
    program = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith(f"site-packages/{name}/__init__.py"), done.stderr


def test_the_installed_package_puts_nothing_but_itself_on_the_path(tmp_path: Path) -> None:
    try:
        metadata.distribution("drydock")
    except metadata.PackageNotFoundError:
        pytest.skip("drydock is not installed in this environment; ./drydock installs it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = (
        "import importlib.util as u, tasks; names = ('workloads', 'dags', 'locks', 'tests', 'docs'); "
        "print(tasks.__file__, [n for n in names if u.find_spec(n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{ROOT}/tasks/__init__.py []", done.stderr


def pins_of(lock: Path) -> dict[str, str]:
    """Return a lock's versions by name; each has a hash, and no index is named."""
    text, pins = lock.read_text(), {}
    assert "://" not in text
    for block in re.findall(r"^[a-z0-9].*(?:\n[ ].*)*", text, re.MULTILINE):
        name, version = re.match(r"([\w.-]+)(?:\[[^]]*\])?==(\S+)", block).groups()
        assert name not in pins, f"{name} is locked twice"
        assert "--hash=sha256:" in block, f"{name} has no hash"
        pins[name] = version
    return pins


def test_locks_cover_pyproject_and_name_no_index() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins: dict[str, str] = {}
    for path in (ROOT / "locks").glob("*.lock"):
        found = pins_of(path)
        assert not pins.keys() & found.keys(), f"{path.name}: locked in another file too"
        pins |= found
    # What only an image needs is locked with the image; it comes from the same resolution.
    for path in (ROOT / "images").glob("*/requirements.lock"):
        for name, version in pins_of(path).items():
            assert pins.setdefault(name, version) == version, f"{path}: {name} has another version than in locks/"
    for requirement in wanted:
        name, exact = re.match(r"([\w.-]+)(?:==(\S+))?", requirement).groups()
        found = pins.get(name.lower().replace("_", "-").replace(".", "-"))
        assert found, f"{requirement} is not locked: run locks/update"
        assert exact in (None, found), f"{requirement} is locked at {found}: run locks/update"
