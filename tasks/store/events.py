"""The event log: one JSON line for each thing a person may want to know. ``drydock status`` reads it."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import Any


def record_event(home: Path, kind: str, message: str, **facts: Any) -> dict[str, Any]:
    """Append one event and return it. ``kind`` is a noun: ``failure``, ``refusal``, ``promotion``, ``alias``. Where
    the disk takes none it goes to stderr: what it tells of is not undone for it, and others are still told."""
    event = {"at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"), "kind": kind, "message": message}
    event |= facts
    line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
    try:
        _append(home, line)
    except OSError as error:
        sys.stderr.write(f"no event could be recorded ({error.strerror}): {line}")
    return event


def _append(home: Path, line: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    # One write to a file opened for appending: lines of two processes never mix.
    descriptor = os.open(home / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # A file name that is no UTF-8 comes as surrogates; as an escape it is still JSON.
        os.write(descriptor, line.encode(errors="backslashreplace"))
    finally:
        os.close(descriptor)


def read_events(home: Path, last: int = 50) -> list[dict[str, Any]]:
    """Return the newest events, oldest first; a line cut by a crash is left out."""
    try:
        # Only a newline ends an event: str.splitlines would also cut at characters inside a message.
        lines = (home / "events.jsonl").read_bytes().splitlines()[-last:]
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
