"""What plans have read before: the digest of a file by what its file system says of it, so that an unchanged source is
not read again for every run.

    <home>/sources/<workload>.json    {name: {"state": …, "read_at": seconds, "sha256": …, "bytes": …}}

The state of a local file is its size, inode and times, the change time among them, which no program can set; of an
object in S3, size and time. A file that changed shortly before it was read may change again within the same tick of
the clock, so it is not remembered. Nothing depends on this file: it may be deleted, and the step that reads the source
does so where the bytes are not those that were planned.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.spec.requests import SourceFile
from tasks.store.files import write_json

# Local clocks tick every few milliseconds, and those of a file server may be some seconds off.
QUIET_SECONDS = 10.0
# Everything is read anew once a day, whatever a file system says.
MAX_AGE_SECONDS = 24 * 3600


class Known:
    """One workload's source files. Without a path it remembers nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._before, self._now = path, _load(path), dict[str, Any]()

    def read(self, name: str, state: str, changed: float, read: Callable[[], SourceFile]) -> SourceFile:
        """Return the file as it was read before in this ``state``, else as ``read`` finds it. ``changed``: when it
        last did, in seconds of the epoch; where that is hardly over nothing is remembered."""
        now = time.time()
        entry = self._before.get(name)
        if entry is None or entry["state"] != state or not 0 <= now - entry["read_at"] < MAX_AGE_SECONDS:
            found = read()
            entry = {"state": state, "read_at": now, "sha256": found.sha256, "bytes": found.bytes}
        if now - changed > QUIET_SECONDS:
            self._now[name] = entry
        return SourceFile(name=name, sha256=entry["sha256"], bytes=entry["bytes"])

    def save(self) -> None:
        """Keep what this plan found, and forget files that it did not ask for."""
        if self._path is not None and self._now != self._before:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self._now)


def known_path(home: Path, workload: str) -> Path:
    """Return where a workload's are kept."""
    return home / "sources" / f"{workload}.json"


def state_of(found: os.stat_result) -> str:
    """Return what tells one state of a local file from another."""
    parts = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    return " ".join(map(str, parts))


def changed_at(found: os.stat_result) -> float:
    """Return when a local file last changed, in seconds of the epoch."""
    return max(found.st_mtime, found.st_ctime)


def _load(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
        return {name: entry for name, entry in found.items() if {"state", "read_at", "sha256", "bytes"} <= set(entry)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
