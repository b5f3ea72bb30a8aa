"""A watchdog over a node's ranks: one that is late with its sign of life is killed, and its launcher restarts all.

Without it a stopped rank (SIGSTOP, a deadlock, a dead disk) holds all others in their next exchange until Gloo's or
NCCL's own time-out, 30 minutes by default. torch's file timer does the same and then kills the launcher as well.

The ranks are forks of the launcher and write into memory that they share with it: for each rank its process id and
until when it must be heard of again, by the monotonic clock, which is one for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from pathlib import Path

# Before the first step a rank loads data and meets the others.
FIRST_SECONDS = 120.0
# A step that takes ten times as long as the longest before it is late.
FACTOR = 10.0
LOOK_SECONDS = 0.2
SLOT = struct.Struct("=qd")


class Watchdog:
    """Kills late ranks of this process from a thread of its own. Made before the ranks are forked."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._memory = mmap.mmap(-1, SLOT.size * num_ranks)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def expect(self, rank: int, until: float) -> None:
        """Say, as a rank, until when this process is to be heard of again; ``inf``: never."""
        SLOT.pack_into(self._memory, SLOT.size * rank, os.getpid(), until)

    def late(self) -> list[int]:
        """Return the process ids of the ranks that are late."""
        slots = [SLOT.unpack_from(self._memory, SLOT.size * rank) for rank in range(self.num_ranks)]
        return [pid for pid, until in slots if pid and time.monotonic() > until and _is_child(pid)]

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            for pid in self.late():
                # SIGKILL is what a stopped process hears too.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Watch:
    """A rank's side: ``beat`` at every step, ``stop`` before work that is no step; no watchdog, nothing to do."""

    def __init__(self, watchdog: Watchdog | None, rank: int, hang_seconds: float) -> None:
        self._watchdog, self._rank, self._hang_seconds = watchdog, rank, hang_seconds
        self._longest, self._last = 0.0, time.monotonic()
        self._expect(self._last + FIRST_SECONDS)

    def beat(self) -> None:
        """Say that a step is done."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._expect(now + max(self._hang_seconds, FACTOR * self._longest))

    def stop(self) -> None:
        """Be watched no more."""
        self._expect(float("inf"))

    def _expect(self, until: float) -> None:
        if self._watchdog:
            self._watchdog.expect(self._rank, until)


def _is_child(pid: int) -> bool:
    """Whether a process is ours still: the number of one that died may be another's by now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state, parent = stat.rpartition(")")[2].split()[:2]
    return int(parent) == os.getpid() and state != "Z"
