"""A room holds one step's result: ``result.json``, its files, and a manifest written last.

    <home>/rooms/<step>/<key>/            a published room: whole, never changed; it may be replaced by another
    <home>/rooms/<step>/.<key>/           the work in progress; a retry finds what it left
    <home>/rooms/<step>/.<key>.lock       held while a process works on the key
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from tasks.spec.errors import IntegrityLost
from tasks.spec.value import RoomRef
from tasks.store.files import sync_folder, write_json
from tasks.store.manifest import NAME, digest_of, verify, write_manifest

RESULT = "result.json"


def open_room(ref: RoomRef) -> Path:
    """Return a room's folder after every byte was held against its manifest.

    Raises:
        IntegrityLost: the room is gone, or its bytes changed.
    """
    folder = Path(ref.uri)
    if not folder.is_dir():
        raise IntegrityLost(f"{ref.uri}: the room is gone; run the step that made it again")
    verify(folder, ref.digest_sha256)
    return folder


class Room:
    """The room of one key: work in ``self.path``, then ``publish``."""

    def __init__(self, base: Path, key: str) -> None:
        self.key = key
        self.final = base / key
        self.path = base / f".{key}"
        self.lock = base / f".{key}.lock"

    def published(self) -> RoomRef | None:
        """Return the finished room, or None where the step has yet to finish."""
        if not (self.final / NAME).is_file():
            return None
        return RoomRef(uri=str(self.final), digest_sha256=digest_of(self.final))

    def result(self) -> dict[str, Any]:
        """Return the result that was published with the room."""
        try:
            return json.loads((self.final / RESULT).read_text())
        except (OSError, ValueError):
            raise IntegrityLost(f"{self.final}: its {RESULT} can't be read") from None

    def begin(self) -> Path:
        """Make the working folder; what a killed attempt left stays (a step may resume from it)."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def publish(self, result: dict[str, Any]) -> RoomRef:
        """Write result and manifest, then move the folder to its final name. The caller holds the lock."""
        write_json(self.path / RESULT, result)
        digest = write_manifest(self.path)
        if self.final.exists():
            # Never whole (a copy by hand, say), or what the step did outside it no longer holds.
            shutil.rmtree(self.final)
        os.rename(self.path, self.final)
        sync_folder(self.final.parent)
        return RoomRef(uri=str(self.final), digest_sha256=digest)

    def set_aside(self) -> Path:
        """Take a published room out of use, and return where it lies now."""
        aside = self.final.with_name(f".{self.key}.rotten-{time.time_ns()}")
        os.rename(self.final, aside)
        sync_folder(self.final.parent)
        return aside

    def discard(self) -> None:
        """Remove the work in progress."""
        shutil.rmtree(self.path, ignore_errors=True)
