"""The space that is left on the state folder's disk: a run asks before it begins, people are told before it is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.spec.errors import TryAgain

# A run of the default workload leaves 3 MB; Airflow and MLflow write their databases and logs on the same disk, and
# stand still without.
LEAST_BYTES = 64 << 20
LOW_BYTES = 256 << 20


def free_bytes(home: Path) -> int:
    """Return what is free on the disk of ``home``, which may not be there yet."""
    while not home.is_dir():
        home = home.parent
    return shutil.disk_usage(home).free


def require_space(home: Path) -> None:
    """Refuse to begin what would stop half way.

    Raises:
        TryAgain: less than ``LEAST_BYTES`` are free.
    """
    free = free_bytes(home)
    if free < LEAST_BYTES:
        raise TryAgain(
            f"the disk is full: {free / 1e6:.1f} MB are free at {home}, a run needs {LEAST_BYTES / 1e6:.0f}: "
            "free some space and ask again; nothing is lost"
        )


def warning(home: Path) -> str:
    """Return what a person should know of the disk, or nothing."""
    free = free_bytes(home)
    return f"{free / 1e6:.1f} MB are free at {home}; make room before the next run" if free < LOW_BYTES else ""
