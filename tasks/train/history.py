"""What the ranks learn, as it is written: a line an epoch, and within long ones a line every few seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

HISTORY, PROGRESS = "history.jsonl", "progress.jsonl"


class History:
    """Reads ``history.jsonl``, and ``progress.jsonl`` beside it, as they grow and passes each line on once, also after
    a restart cut the files. An epoch's line has a ``validation_loss``, one from within an epoch has none."""

    def __init__(self, path: Path, on_line: Callable[[dict[str, float]], None]) -> None:
        self.path, self.on_line = path, on_line
        # The newest epoch, and the newest step within one, that were passed on.
        self.seen, self.seen_step = 0, 0

    def follow(self) -> None:
        for line in _lines(self.path.with_name(PROGRESS)):
            if line["step"] > self.seen_step:
                self.seen_step = int(line["step"])
                self.on_line(line)
        for line in _lines(self.path):
            if line["epoch"] > self.seen:
                self.seen = int(line["epoch"])
                self.on_line(line)


def _lines(path: Path) -> list[dict[str, float]]:
    """The whole lines of a file, up to one that is being written."""
    found: list[dict[str, float]] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        if not text.endswith("}"):
            break
        found.append(json.loads(text))
    return found
