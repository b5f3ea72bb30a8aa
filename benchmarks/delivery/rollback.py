"""How long the old version goes on answering after a rollback was asked for; beside a bare flip of Envoy's route."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from delivery.platform import WORKLOAD, Answer, Platform, free_ports

from tasks import delivery
from tasks.release.envoy import ROUTES, render_routes
from tasks.release.gateway import Gateway, command
from tasks.release.model import Backend, GatewayState, Route, Version, service_name
from tasks.replicas import ready_endpoints
from tasks.spec.errors import Refused, TryAgain
from tasks.spec.settings import Settings
from tasks.store.files import write_whole

HOLD_SECONDS, START_SECONDS = 1.5, 15


class Rollbacks(NamedTuple):
    """Seconds to the last answer of what was taken away, turn by turn; and how many requests failed meanwhile."""

    seconds: list[float]
    failed: int


def by_command(platform: Platform, old: Version, turns: int, rate: float) -> Rollbacks:
    """Seconds from the start of the process ``drydock rollback`` to the last answer of what it took away."""
    line = [str(Path(sys.executable).with_name("drydock")), "rollback", WORKLOAD, "--reason", "bench"]

    def roll_back() -> None:
        done = subprocess.run(line, env=platform.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(f"drydock rollback: exit code {done.returncode}: {done.stderr.strip()}")

    return _measure(platform, old, turns, rate, lambda: platform.force(old), roll_back)


def in_process(platform: Platform, old: Version, turns: int, rate: float) -> Rollbacks:
    """The same in a process that runs already, as the reconciler or a task."""

    def roll_back() -> None:
        delivery.rollback(platform.order(None, "bench"), platform.site)

    return _measure(platform, old, turns, rate, lambda: platform.force(old), roll_back)


def by_bare_flip(platform: Platform, old: Version, new: Version, turns: int, rate: float) -> Rollbacks:
    """The same with nothing but an Envoy of its own whose route file is replaced."""
    backends = [_backend(platform, version) for version in (old, new)]
    with _bare_envoy(platform, backends) as (port, flip):
        return _measure(platform, old, turns, rate, lambda: flip(0), lambda: flip(1), port=port)


def _measure(
    platform: Platform,
    old: Version,
    turns: int,
    rate: float,
    prepare: Callable[[], object],
    act: Callable[[], object],
    **spec: Any,
) -> Rollbacks:
    prepare()
    load, began = platform.load(rate, **spec), []
    for turn in range(turns):
        if turn:
            prepare()
        time.sleep(HOLD_SECONDS)
        began.append(time.monotonic())
        act()
        time.sleep(HOLD_SECONDS)
    answers = load.end()
    return Rollbacks([last_answer(answers, old, start) for start in began], sum(not a.good for a in answers))


def last_answer(answers: Sequence[Answer], old: Version, start: float) -> float:
    """Seconds from ``start`` to the old version's last answer, before it is made to serve again.

    Raises:
        Refused: it did not answer before ``start``, so nothing was taken away from it.
    """
    times = sorted(a.done for a in answers if a.version == old.version and a.done > start - HOLD_SECONDS / 2)
    if not times or times[0] > start:
        raise Refused(f"version {old.version} did not answer before the rollback")
    return max(_without_gap(times) - start, 0.0)


def _without_gap(times: Sequence[float]) -> float:
    """The last of the times before none came for HOLD_SECONDS / 2."""
    for now, after in itertools.pairwise(times):
        if after - now > HOLD_SECONDS / 2:
            return now
    return times[-1]


def _backend(platform: Platform, version: Version) -> Backend:
    endpoints = tuple(ready_endpoints(WORKLOAD, version, platform.site))
    return Backend(service=service_name(WORKLOAD, version.digest_sha256), endpoints=endpoints)


@contextlib.contextmanager
def _bare_envoy(platform: Platform, backends: Sequence[Backend]) -> Iterator[tuple[int, Callable[[int], None]]]:
    """An Envoy with both services in it; ``flip(n)`` sends all to the n-th by one rename of its route file."""
    home, (port, admin) = platform.base / "bare", free_ports(2)
    settings = Settings(
        **platform.site.settings.model_dump() | {"home": str(home), "gateway_port": port, "gateway_admin_port": admin}
    )
    gateway = Gateway(settings)
    gateway.prepare()
    process = subprocess.Popen(
        command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    revision = 100

    def flip(chosen: int) -> None:
        nonlocal revision
        revision += 1
        weighed = [b.model_copy(update={"weight": 100 * (n == chosen)}) for n, b in enumerate(backends)]
        state = GatewayState(revision=revision, routes={WORKLOAD: Route(backends=tuple(weighed))})
        write_whole(gateway.folder / ROUTES, render_routes(state))

    try:
        _await_envoy(gateway)
        gateway.route(WORKLOAD, Route(backends=tuple(backends)))
        yield port, flip
    finally:
        process.terminate()
        process.wait(10)


def _await_envoy(gateway: Gateway) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            return gateway.check()
        except TryAgain:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
