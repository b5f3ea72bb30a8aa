"""A rank's sign of life for the watchdog of torch's elastic agent, which kills a rank that is late with it.

Without it a stopped rank (SIGSTOP, a deadlock, a dead disk) holds all others in their next exchange until Gloo's
or NCCL's own time-out, 30 minutes by default.
"""

from __future__ import annotations

import os
import time

# Before the first step a rank loads data and meets the others.
FIRST_SECONDS = 120.0
# A step that takes ten times as long as the longest before it is late.
FACTOR = 10.0
SCOPE = "step"


class Watch:
    """``beat`` at every step; ``stop`` before work that is no step."""

    def __init__(self, hang_seconds: float) -> None:
        self.hang_seconds, self.longest, self.last = hang_seconds, 0.0, time.monotonic()
        self.armed_at = float("-inf")
        self.client = _client()
        self._arm(FIRST_SECONDS)

    def beat(self) -> None:
        """Say that a step is done. Cheap: most beats only look at the clock."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if now - self.armed_at > self.hang_seconds / 10:
            self._arm(max(self.hang_seconds, FACTOR * self.longest))

    def stop(self) -> None:
        """Be watched no more."""
        if self.client:
            self.client.release(SCOPE)

    def _arm(self, seconds: float) -> None:
        self.armed_at = time.monotonic()
        if self.client:
            # The agent's clock is the time of day: a clock that jumps forward costs a restart, no more.
            self.client.acquire(SCOPE, time.time() + seconds)


def _client() -> object:
    from torch.distributed.elastic.timer import FileTimerClient

    path = os.environ.get("TORCHELASTIC_TIMER_FILE")
    return FileTimerClient(path) if path else None
