"""What clients see of deliveries: cycles of deployment and rollback, bad candidates, and how fast a rollback is.

Everything is real: an own state folder on free ports, MLflow, Envoy, the reconciler that drives the rollouts,
inference servers as supervised processes; and a client that checks every answer, on a core of its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delivery.candidates import Outcome, release_bad
from delivery.chart import chart
from delivery.cycles import Cycles, run_cycles
from delivery.platform import Answer, Platform
from delivery.rollback import by_bare_flip, by_command, in_process

from tasks.release.model import Version
from tasks.site import Site

CYCLES, REQUESTS, RETIRE_EVERY = 30, 100_000, 5
# A server gives a body ten seconds to arrive.
LONG_REQUESTS, LONG_SECONDS = 6, 9
CYCLE_RATE, RATE = 600.0, 300.0
OFF_SECONDS, VISIBLE = 5.0, 20
COMMAND_SECONDS, DECISION_SECONDS = 1.5, 0.2
COMMANDS, DECISIONS = 3, 5
# A server that can't load its package is refused after this time.
READY_SECONDS = 5

_STARTED = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {line}", flush=True)


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows, and print where the chart is."""
    base = Path(tempfile.mkdtemp(prefix="drydock-bench-"))
    platform = Platform(site.root, base)
    try:
        say("starting MLflow, the gateway and the reconciler")
        platform.up()
        champion = first_version(platform)
        rows = cycle_rows(platform, champion)
        bad, all_errors = bad_rows(platform)
        rows += bad + rollback_rows(platform, champion)
        say(f"chart: {chart(all_errors, site.home / 'bench' / 'rollouts.png')}")
        return rows
    finally:
        platform.down()
        shutil.rmtree(base, ignore_errors=True)


def first_version(platform: Platform) -> Version:
    """Register a version and make it the champion."""
    version = platform.register("good", 0)
    platform.force(version)
    return version


def cycle_rows(platform: Platform, champion: Version) -> list[dict[str, Any]]:
    say(f"registering {CYCLES} versions")
    versions = [platform.register("good", 1 + number) for number in range(CYCLES)]
    done = run_cycles(
        platform,
        champion,
        versions,
        RETIRE_EVERY,
        say,
        rate=CYCLE_RATE,
        long=LONG_REQUESTS,
        long_seconds=LONG_SECONDS,
        at_least=REQUESTS,
    )
    tell_failures("cycles", done.failed)
    for line in done.sent_back:
        say(f"cycles: {line}")
    return [
        at_least("cycles of deploy and rollback", len(done.deploy_seconds), CYCLES),
        at_least("cycles: requests", len(done.answers), REQUESTS),
        *(at_least(f"cycles: of them {kind}", count, None) for kind, count in kinds(done).items()),
        at_most("cycles: failed, reset or truncated", len(done.failed), 0),
        at_most("cycles: good versions that did not pass", len(done.sent_back), 0),
        at_most("cycles: one deployment, s (median)", middle(done.deploy_seconds), None),
        at_most("cycles: one warm rollback, s (median)", middle(done.warm_seconds), None),
        at_most("cycles: one cold rollback, s (median)", middle(done.cold_seconds), None),
        at_most("cycles: p99 of all but the long requests, ms", 1000 * p99(done.answers), None),
    ]


def bad_rows(platform: Platform) -> tuple[list[dict[str, Any]], Outcome]:
    """The rows of the bad candidates, and what came of the one that answers with errors only."""
    errors = _release(platform, "nan", 1, "all errors, no shadow", shadow_percent=0)
    rows = _caught(errors, "all errors, no shadow", "failures", len(errors.failures), VISIBLE)
    rows.append(at_most("all errors, no shadow: off the traffic after, s", errors.off_seconds, OFF_SECONDS))
    for kind, seed, title in (("nan", 2, "NaN, shadow"), ("constant", 1, "always the same label, shadow")):
        found = _release(platform, kind, seed, title, shadow_percent=100)
        rows += _caught(found, title, "failures and wrong answers", len(found.failures), 0)
    for kind, title in (("unloadable", "can't be loaded"), ("shape", "wrong shape")):
        found = _release(platform, kind, 1, title, shadow_percent=0, ready_seconds=READY_SECONDS)
        rows += _caught(found, title, "failures", len(found.failures), 0)
    for shadow, limit, title in ((100, 0, "+200 ms in 5 %, shadow"), (0, VISIBLE, "+200 ms in 5 %, no shadow")):
        found = _release(platform, "slow", 1 + shadow, title, shadow_percent=shadow)
        rows += _caught(found, title, "slow or failed", len(found.slow) + len(found.failures), limit)
    return rows, errors


def _release(platform: Platform, kind: Any, seed: int, title: str, **options: Any) -> Outcome:
    found = release_bad(platform, kind, seed, rate=RATE, **options)
    say(f"{title}: {found.ended}: {found.why}")
    tell_failures(title, found.failures)
    return found


def _caught(found: Outcome, title: str, what: str, visible: int, limit: int) -> list[dict[str, Any]]:
    """It must be refused or failed: one that is inconclusive, or passes, was not caught."""
    caught = found.ended in ("refused", "failed")
    return [
        at_least(f"{title}: caught", int(caught), 1),
        at_most(f"{title}: {what} that clients saw", visible, limit),
    ]


def rollback_rows(platform: Platform, champion: Version) -> list[dict[str, Any]]:
    """The worst of the turns must hold; their medians stand beside."""
    newer = platform.register("good", 1000)
    say("rolling back: by command, in this process, and by a bare flip of Envoy's route")
    commands = by_command(platform, newer, COMMANDS, RATE)
    decisions = in_process(platform, newer, DECISIONS, RATE)
    flips = by_bare_flip(platform, newer, champion, DECISIONS, RATE)
    last = "s to the old version's last answer"
    return [
        at_most(f"drydock rollback: {last}, worst of {COMMANDS}", max(commands.seconds), COMMAND_SECONDS),
        at_most(
            f"rollback in a running process: {last}, worst of {DECISIONS}", max(decisions.seconds), DECISION_SECONDS
        ),
        at_most("rollback in a running process: median", middle(decisions.seconds), None),
        at_most(f"reference, a bare flip of Envoy's route: {last}, median", middle(flips.seconds), None),
        at_most("reference, a bare flip of Envoy's route: worst", max(flips.seconds), None),
        at_most("rollbacks: failed requests", commands.failed + decisions.failed + flips.failed, 0),
    ]


def tell_failures(title: str, failed: Sequence[Answer]) -> None:
    counts = Counter((answer.kind, answer.version, answer.outcome) for answer in failed)
    for (kind, version, outcome), count in sorted(counts.items()):
        say(f"{title}: {count} x {outcome} ({kind}, version {version})")


def kinds(done: Cycles) -> dict[str, int]:
    names = {"kept": "on kept connections", "new": "on new connections", "long": f"long ones of {LONG_SECONDS} s"}
    counts = Counter(answer.kind for answer in done.answers)
    return {name: counts[kind] for kind, name in names.items()}


def p99(answers: Sequence[Answer]) -> float:
    times = sorted(answer.seconds for answer in answers if answer.kind != "long")
    return times[int(len(times) * 0.99)]


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def at_least(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "limit": limit, "ok": limit is None or value >= limit}


def at_most(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "limit": limit, "ok": limit is None or value <= limit}


if __name__ == "__main__":
    print(json.dumps(bench(Site()), indent=2))
