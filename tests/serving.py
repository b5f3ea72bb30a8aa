"""A server of a test's own, as the platform starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def serving(package: Path, keys: Path, log: Path, *options: str) -> Iterator[httpx.Client]:
    """Serve a package until the block ends, in which the server must not have said any error."""
    command = [sys.executable, "-m", "tasks.serve", "--package", str(package), "--digest", package.name]
    command += ["--keys", str(keys), "--port", "0", "--log-folder", str(log), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=20) as client:
            yield client
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert not errors
