"""The law of imports: one way only, no platform in what runs in a container, no folder that shadows a package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tasks"
# A room -> the rooms that it may import, itself apart.
LAW = {
    "spec": set(),
    "store": {"spec"},
    "gate": {"spec"},
    "engines": {"store", "spec"},
    "serve": {"spec", "store"},
    "train": {"spec", "store"},
    "data": {"engines", "gate", "store", "spec"},
    "compress": {"engines", "gate", "store", "spec", "serve", "train"},
    "evaluate": {"engines", "gate", "store", "spec", "serve", "train"},
    "registry": {"engines", "gate", "store", "spec", "serve"},
    "release": {"engines", "gate", "store", "spec"},
}
# A package that is heavy, or that a container lacks -> the only places that may import it.
HOMES = {
    "mlflow": ("tasks/registry/",),
    "great_expectations": ("tasks/data/",),
    "dvc": ("tasks/data/version",),
    "airflow": ("tasks/orchestrate/", "dags/"),
    "torch": ("tasks/train/", "tasks/compress/"),
    "docker": ("tasks/engines/",),
    "fastapi": ("tasks/orchestrate/",),
}
IN_CONTAINERS = ("spec", "store", "serve", "train", "gate")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; relative imports are refused."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    return sorted([*TASKS.rglob("*.py"), *(ROOT / "dags").rglob("*.py")])


def test_every_room_is_in_the_law():
    rooms = {path.parent.name for path in TASKS.glob("*/__init__.py")}
    above = {"orchestrate", "command"}  # they stand on top and may import every room
    assert rooms - above == set(LAW)


@pytest.mark.parametrize("room", sorted(LAW))
def test_imports_run_one_way(room):
    wrong = []
    for path in sorted((TASKS / room).rglob("*.py")):
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("tasks.")}
        wrong += [f"{path.relative_to(ROOT)} imports tasks.{name}" for name in sorted(ours - LAW[room] - {room})]
    assert not wrong, wrong


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_package_has_one_home(package):
    wrong = []
    for path in sources():
        name = str(path.relative_to(ROOT))
        if any(item.split(".")[0] == package for item in imports_of(path)) and not name.startswith(HOMES[package]):
            wrong.append(name)
    assert not wrong, f"{package} is imported outside of {HOMES[package]}: {wrong}"


@pytest.mark.parametrize("package", ["airflow", "mlflow", "great_expectations", "dvc", "sqlalchemy", "pandas", "click"])
def test_what_runs_in_a_container_imports_no_platform(package):
    for room in IN_CONTAINERS:
        for path in (TASKS / room).rglob("*.py"):
            assert package not in {name.split(".")[0] for name in imports_of(path)}, path


def test_no_home_made_pickle():
    for path in sources():
        found = imports_of(path)
        # Only the error is named, which the restricted load of our own checkpoints raises.
        assert "pickle" not in found or "pickle.UnpicklingError" in found, path
        assert not {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle", "joblib", "dill"} & found, path


def test_the_data_folders_hold_no_code():
    for name in ("mlflow", "great_expectations"):
        assert (ROOT / name).is_dir()
        assert not [path for path in (ROOT / name).rglob("*.py*") if path.suffix in (".py", ".pyc", ".pyi")]
        assert not list((ROOT / name).rglob("__pycache__"))


def test_from_the_root_the_installed_packages_win():
    """Both as our processes are started (``-P``); the folders of the same names would import as empty packages."""
    code = "import mlflow, great_expectations; print(mlflow.__version__, great_expectations.__version__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word[0].isdigit() for word in done.stdout.split())


def test_the_rooms_do_nothing_at_import():
    """Importing the pipeline and the command loads no heavy library: they are imported in the functions."""
    heavy = ["torch", "mlflow", "great_expectations", "pandas", "sklearn", "onnxruntime", "matplotlib", "pyarrow"]
    code = f"import sys, tasks.steps, tasks.plan, tasks.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
