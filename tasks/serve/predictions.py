"""The log of served predictions: JSON lines in files of bounded size, age and number. It never holds a request up.

    <folder>/<ULID>.jsonl     one line a row: {"passport", "row", "at", "label", "probability"}: no inputs

``passport`` is the answer's, ``row`` counts within it from 0, ``at`` is aware UTC, ``probability`` is that of
``label``; where it is several tags, of the least sure one; null where the label is a number. ``"replayed": true``
stands in the lines of requests that were replays of kept data and no one's question. A new file begins when one is
full and at least once a day, so its name's time is within a day of its lines'; whole files older than the declared
days are removed. A server that can't write drops lines and counts them, and so does one that answers more than is
logged a second: an answer is worth more than its log line.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.serve.passport import Ulids
from tasks.serve.protocol import Answer

MAX_WAITING = 2048
MAX_FILE_BYTES = 8 << 20
MAX_FILES = 16
DAY_SECONDS = 86_400


class LogRules(NamedTuple):
    """How much is logged, and how long it is kept."""

    ratio: float = 1.0
    per_second: int = 100  # answers, of any number of rows
    days: float = 30
    max_file_bytes: int = MAX_FILE_BYTES
    max_files: int = MAX_FILES


class Entry(NamedTuple):
    passport: str
    at: float  # seconds since 1970
    answer: Answer
    replayed: bool


class PredictionLog:
    """Writes from a thread of its own. Replicas may share the folder; the bounds are the folder's."""

    def __init__(self, folder: Path, on_drop: Callable[[], None], rules: LogRules = LogRules()) -> None:  # noqa: B008
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._on_drop, self._rules = folder, on_drop, rules
        self._second = self._in_second = 0
        self._new_name = Ulids()
        self._path, self._bytes, self._begun = folder / f"{self._new_name()}.jsonl", 0, time.time()
        self._waiting: queue.Queue[Entry | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="predictions", daemon=True)
        self._thread.start()

    def record(self, passport: str, answer: Answer, replayed: bool = False) -> None:
        """Hand an answer to the writer; sampled, and dropped where too many come or the writer lags."""
        if self._rules.ratio < 1 and random.random() >= self._rules.ratio:
            return
        now = time.time()
        if int(now) != self._second:
            self._second, self._in_second = int(now), 0
        self._in_second += 1
        if self._in_second > self._rules.per_second:
            return self._on_drop()
        try:
            self._waiting.put_nowait(Entry(passport, now, answer, replayed))
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

    def _write(self, entries: list[Entry]) -> None:
        content = "".join(line for entry in entries for line in _lines(entry)).encode()
        try:
            self._rotate(len(content))
            with self._path.open("ab", buffering=0) as stream:
                stream.write(content)
            self._bytes += len(content)
        except OSError:
            for _ in entries:
                self._on_drop()

    def _rotate(self, num_bytes: int) -> None:
        """Begin a new file where the current one would grow too large or too old; forget what is over the bounds."""
        full = self._bytes + num_bytes > self._rules.max_file_bytes
        if full or time.time() - self._begun > DAY_SECONDS or not self._path.exists():
            self._path, self._bytes, self._begun = self._folder / f"{self._new_name()}.jsonl", 0, time.time()
            self._path.touch()
            self._forget()

    def _forget(self) -> None:
        oldest = time.time() - self._rules.days * DAY_SECONDS
        paths = sorted(self._folder.glob("*.jsonl"))
        for path in paths[:-1]:
            with contextlib.suppress(FileNotFoundError):  # another replica was quicker
                if path in paths[: -self._rules.max_files] or path.stat().st_mtime < oldest:
                    path.unlink()


def _lines(entry: Entry) -> list[str]:
    top = _sureness(entry.answer)
    stamp = dt.datetime.fromtimestamp(entry.at, dt.UTC).isoformat(timespec="milliseconds")
    mark: dict[str, Any] = {"replayed": True} if entry.replayed else {}
    return [
        json.dumps(
            {"passport": entry.passport, "row": row, "at": stamp, "label": label, "probability": p} | mark
        )
        + os.linesep
        for row, (label, p) in enumerate(zip(entry.answer.labels, top, strict=True))
    ]


def _sureness(answer: Answer) -> list[float | None]:
    """The probability of each row's label."""
    if answer.probabilities.shape[1] == 1:
        return [None] * len(answer.labels)
    top = answer.probabilities.max(axis=1)
    if len(top) != len(answer.labels):
        ends = np.cumsum([label.count(" ") + 1 for label in answer.labels])
        top = np.minimum.reduceat(top, [0, *ends[:-1]])
    return [round(p, 6) for p in top.tolist()]
