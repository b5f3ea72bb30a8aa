"""The log of served predictions: JSON lines in files of bounded size and number. It never holds a request up.

    <folder>/<ULID>.jsonl     {"passport", "row", "at", "label", "probability"}: no inputs

A server that can't write drops lines and counts them: an answer is worth more than its log line.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import queue
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.serve.passport import Ulids
from tasks.serve.protocol import Answer

MAX_WAITING = 2048
MAX_FILE_BYTES = 8 << 20
MAX_FILES = 16


class PredictionLog:
    """Writes from a thread of its own. Replicas may share the folder; the bound is the folder's."""

    def __init__(
        self,
        folder: Path,
        on_drop: Callable[[], None],
        sample_ratio: float = 1.0,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_files: int = MAX_FILES,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._on_drop, self._sample_ratio = folder, on_drop, sample_ratio
        self._max_file_bytes, self._max_files = max_file_bytes, max_files
        self._new_name = Ulids()
        self._path, self._bytes = folder / f"{self._new_name()}.jsonl", 0
        self._waiting: queue.Queue[tuple[str, dt.datetime, Answer] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="predictions", daemon=True)
        self._thread.start()

    def record(self, passport: str, answer: Answer) -> None:
        """Hand an answer to the writer; sampled, and dropped where the writer lags."""
        if self._sample_ratio < 1 and random.random() >= self._sample_ratio:
            return
        try:
            self._waiting.put_nowait((passport, dt.datetime.now(dt.UTC), answer))
        except queue.Full:
            self._on_drop()

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, for at most ``seconds``."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
        self._thread.join(timeout=seconds)

    def _write_all(self) -> None:
        while (first := self._waiting.get()) is not None:
            entries, ended = [first], False
            with contextlib.suppress(queue.Empty):
                while not ended and len(entries) < MAX_WAITING:
                    entry = self._waiting.get_nowait()
                    ended = entry is None
                    entries += [] if entry is None else [entry]
            self._write(entries)
            if ended:
                return

    def _write(self, entries: list[Any]) -> None:
        content = "".join(line for entry in entries for line in _lines(*entry)).encode()
        try:
            self._rotate(len(content))
            with self._path.open("ab", buffering=0) as stream:
                stream.write(content)
            self._bytes += len(content)
        except OSError:
            for _ in entries:
                self._on_drop()

    def _rotate(self, num_bytes: int) -> None:
        """Begin a new file where the current one would grow too large; forget the folder's oldest."""
        if not self._path.exists() or self._bytes + num_bytes > self._max_file_bytes:
            self._path, self._bytes = self._folder / f"{self._new_name()}.jsonl", 0
            self._path.touch()
            for path in sorted(self._folder.glob("*.jsonl"))[: -self._max_files]:
                path.unlink(missing_ok=True)


def _lines(passport: str, at: dt.datetime, answer: Answer) -> list[str]:
    top = answer.probabilities.max(axis=1).tolist()
    stamp = at.isoformat(timespec="milliseconds")
    return [
        json.dumps(
            {"passport": passport, "row": row, "at": stamp, "label": label, "probability": round(p, 6)}
        )
        + os.linesep
        for row, (label, p) in enumerate(zip(answer.labels, top, strict=True))
    ]
