"""What the ranks learn, epoch by epoch, as it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


class History:
    """Reads ``history.jsonl`` as it grows and passes each epoch on once, also after a restart cut the file."""

    def __init__(self, path: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
        self.path, self.on_epoch, self.seen = path, on_epoch, 0

    def follow(self) -> None:
        if not self.path.exists():
            return
        for text in self.path.read_text().splitlines():
            if not text.endswith("}"):
                return
            line = json.loads(text)
            if line["epoch"] > self.seen:
                self.seen = line["epoch"]
                self.on_epoch(line)
