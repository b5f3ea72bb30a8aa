"""``drydock test``: installs what the tests need, once, and runs them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tasks.site import Site
from tasks.spec.errors import TryAgain


def run_tests(site: Site, arguments: list[str]) -> int:
    """Run pytest in the repository; return its exit code."""
    install(site.root)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRYDOCK_")}
    kept = {name: value for name, value in os.environ.items() if name.startswith("DRYDOCK_TEST")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *arguments], cwd=site.root, env=environment | kept, check=False
    )
    return done.returncode


def install(root: Path) -> None:
    """Install the tests' own packages from their lock, unless this lock was installed before.

    Raises:
        TryAgain: pip failed; its last line is told.
    """
    lock = root / "locks" / "test.lock"
    stamp = Path(sys.prefix) / "test.stamp"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TryAgain(f"the tests' packages: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    stamp.write_text(digest)
