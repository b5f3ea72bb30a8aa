"""What the containers of a job printed, gathered into one file, so that it can be read from an offset.

A container's own log goes with the container. Each line comes over once, in the order of its time; where a job has
several nodes a line begins with the node that printed it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.engines.log_file import lead_to, read_on
from tasks.store.files import write_json


class Gathered:
    """The log of one job: ``gather`` appends what is new, ``read`` reads on. The caller holds the job's lock."""

    def __init__(self, folder: Path, handle: str) -> None:
        self.link = folder / f"{handle}.log"
        self.cursor = folder / f"{handle}.cursor.json"

    def begin(self, target: Path) -> None:
        """Let the handle lead to ``target``, the file in the job's folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if lead_to(self.link, target):
            self.cursor.unlink(missing_ok=True)

    def gather(self, entries: dict[str, Iterable[tuple[str, bytes]]], prefixes: dict[str, bytes]) -> None:
        """Append what each container (by id) printed: (time, line) from its last known time on."""
        if not self.link.is_symlink():
            return
        seen = self.seen()
        fresh = []
        for container, lines in entries.items():
            after = seen.get(container, "")
            for time, line in lines:
                if time > after:
                    seen[container] = max(time, seen.get(container, ""))
                    fresh.append((time, prefixes[container] + line))
        if not fresh:
            return
        with self.link.open("ab") as stream:
            stream.write(b"".join(line for _, line in sorted(fresh, key=lambda item: item[0])))
        write_json(self.cursor, seen)

    def seen(self) -> dict[str, str]:
        """Return the time of the last line of each container."""
        try:
            return dict(json.loads(self.cursor.read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def read(self, since: int) -> tuple[str, int]:
        """Return the text from byte ``since`` on, at most 1 MiB of it, and where it ends."""
        return read_on(self.link, since)


def entries(frames: Iterable[Any]) -> Iterable[tuple[str, bytes]]:
    """Return (time, line) of a log stream with times, one frame a line; times are RFC 3339 and sort as text."""
    for frame in frames:
        time, _, line = bytes(frame).partition(b" ")
        yield _padded(time.decode()), line


def _padded(time: str) -> str:
    """The daemon cuts trailing zeros of the fraction; without them times of unlike length sort wrongly."""
    whole, _, fraction = time.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}"
