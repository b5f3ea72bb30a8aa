"""What a linter can hold, and the size of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_linter_has_nothing_to_say() -> None:
    folders = ["tasks", "dags", "tests", "benchmarks", "locks", "images"]
    folders += ["images/build", "images/airflow/prepare-stack"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_no_file_holds_two_ideas() -> None:
    long = {path: len(path.read_text().splitlines()) for path in (ROOT / "tasks").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in long.items() if lines > 360} == {}


def test_nothing_names_a_machine_or_a_registry_host() -> None:
    hosts = ("files.pythonhosted.org", "pypi.org/simple", "deb.debian.org", "registry.npmjs.org")
    tracked = [p for p in ROOT.rglob("*") if p.is_file() and not {".git", ".venv", ".drydock"} & set(p.parts)]
    texts = [p for p in tracked if p.suffix in (".py", ".md", ".yaml", ".toml", ".lock", ".j2", ".json", "")]
    wrong = [p for p in texts if p != Path(__file__) and any(h in p.read_text(errors="ignore") for h in hosts)]
    assert wrong == []
