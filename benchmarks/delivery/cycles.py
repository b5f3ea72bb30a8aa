"""Deploy and roll back under load, again and again: every part as in production, no request may be lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from delivery.platform import Answer, Platform

from tasks import delivery
from tasks.release.model import Version

Say = Callable[[str], None]
# A whole rollout in a few seconds of live load: a copy of the traffic, then half of it.
PLAN = {"step_seconds": 1, "steps": [50], "shadow_percent": 100, "bake_seconds": 0}
HOLD_SECONDS = 0.3


class Cycles(NamedTuple):
    """What was done: seconds of each deployment and rollback, why good versions did not pass, what the load saw."""

    deploy_seconds: list[float]
    warm_seconds: list[float]
    cold_seconds: list[float]
    sent_back: list[str]
    answers: list[Answer]

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.good]


def run_cycles(
    platform: Platform,
    base: Version,
    versions: Sequence[Version],
    retire_every: int,
    say: Say,
    **load_spec: Any,
) -> Cycles:
    """Deploy each version (start, ready, shadow, canary, promote) and roll it back to ``base``.

    Each ``retire_every``-th time the version before is retired first, so that the rollback is a cold one.
    """
    platform.plan(**PLAN)
    load = platform.load(**load_spec)
    found = Cycles([], [], [], [], [])
    for number, version in enumerate(versions, 1):
        cold = number % retire_every == 0
        _run_cycle(platform, base, version, cold, found)
        say(f"cycle {number} of {len(versions)}{' (cold)' if cold else ''}")
    say("waiting for the last requests")
    found.answers.extend(load.end())
    return found


def _run_cycle(platform: Platform, base: Version, version: Version, cold: bool, found: Cycles) -> None:
    began = time.monotonic()
    order, state = platform.roll_out(version)
    if state.phase != "passed":
        return found.sent_back.append(f"version {version.version}: {state.outcome}: {state.why}")
    delivery.promote(order, platform.site)
    found.deploy_seconds.append(time.monotonic() - began)
    time.sleep(HOLD_SECONDS)
    if cold:
        delivery.retire(platform.order(version), platform.site)
    began = time.monotonic()
    delivery.rollback(platform.order(base, "the cycle's end"), platform.site)
    (found.cold_seconds if cold else found.warm_seconds).append(time.monotonic() - began)
    time.sleep(HOLD_SECONDS)
    if cold:
        delivery.retire(platform.order(base), platform.site)
    return None
