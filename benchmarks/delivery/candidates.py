"""Bad candidates released under load: how much of them clients see, and for how long."""

from __future__ import annotations

import time
from typing import NamedTuple

from delivery.packages import SLOW_SECONDS, Kind
from delivery.platform import Answer, Platform

from tasks.release.model import Version
from tasks.release.rollout import RolloutState
from tasks.spec.errors import Refused

STEPS = [5, 25, 50]
SETTLE_SECONDS = 1.0


class Outcome(NamedTuple):
    """What came of one bad candidate. ``state`` is None where it was refused before it got any request."""

    version: Version
    began: float
    state: RolloutState | None
    why: str
    answers: list[Answer]

    @property
    def ended(self) -> str:
        return self.state.outcome or self.state.phase if self.state else "refused"

    @property
    def of_candidate(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.version == self.version.version]

    @property
    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.good]

    @property
    def slow(self) -> list[Answer]:
        """The candidate's answers that took as long as its fault takes; those behind them in its queue too."""
        return [answer for answer in self.of_candidate if answer.seconds > SLOW_SECONDS / 2]

    @property
    def off_seconds(self) -> float:
        """From its first answer to a client until its last."""
        times = [answer.done for answer in self.of_candidate]
        return max(times) - min(times) if times else 0.0


def release_bad(
    platform: Platform, kind: Kind, seed: int, *, shadow_percent: int, rate: float, ready_seconds: int = 60
) -> Outcome:
    """Release one under load, wait until it is gone, and return what clients saw."""
    steps = {"steps": STEPS, "step_seconds": 3, "stage_seconds": 60, "shadow_percent": shadow_percent}
    platform.plan(**steps, ready_seconds=ready_seconds)
    version = platform.register(kind, seed)
    load, state, why = platform.load(rate), None, ""
    began = time.monotonic()
    try:
        _, state = platform.roll_out(version)
        if state.phase != "passed":
            state = platform.await_rollout(lambda seen: seen.ended)
        why = state.why
    except Refused as error:
        why = str(error)
    time.sleep(SETTLE_SECONDS)
    return Outcome(version, began, state, why, load.end())
