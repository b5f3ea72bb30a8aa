"""What the containers of a job printed, gathered into one file, so that it can be read from an offset.

A container's own log goes with the container. Each line comes over once, in the order of its time; where a job has
several nodes a line begins with the node that printed it.
"""

from __future__ import annotations

import codecs
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.store.files import write_json

CHUNK_BYTES = 1 << 20


class Gathered:
    """The log of one job: ``gather`` appends what is new, ``read`` reads on. The caller holds the job's lock."""

    def __init__(self, folder: Path, handle: str) -> None:
        self.link = folder / f"{handle}.log"
        self.cursor = folder / f"{handle}.cursor.json"

    def begin(self, target: Path) -> None:
        """Let the handle lead to ``target``, the file in the job's folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.link.is_symlink() and os.readlink(self.link) == str(target):
            return
        self.link.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.link.with_name(f".{self.link.name}.{secrets.token_hex(4)}")
        temporary.symlink_to(target)
        temporary.replace(self.link)
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
        try:
            with self.link.open("rb") as stream:
                stream.seek(since)
                chunk = stream.read(CHUNK_BYTES)
        except FileNotFoundError:
            return "", since
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(chunk)
        # A character cut by the end of the chunk is left for the next call.
        return text, since + len(chunk) - len(decoder.getstate()[0])


def entries(frames: Iterable[Any]) -> Iterable[tuple[str, bytes]]:
    """Return (time, line) of a log stream with times, one frame a line; times are RFC 3339 and sort as text."""
    for frame in frames:
        time, _, line = bytes(frame).partition(b" ")
        yield _padded(time.decode()), line


def _padded(time: str) -> str:
    """The daemon cuts trailing zeros of the fraction; without them times of unlike length sort wrongly."""
    whole, _, fraction = time.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}"
