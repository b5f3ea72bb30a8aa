"""How a gang in containers comes back: 20 faults of each kind at random points, each held against an undisturbed run.

Recovery is the time from the fault to the start of the first step after it. Whatever the fault, the weights must be
those of the undisturbed run bit for bit, and no container, network or volume may be left. Then a rank is killed each
minute for ten minutes, and the epochs done are held against those of a minute without.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.rows import at_least, at_most
from training.gangs import KEY, Watched, digits, in_containers, pids_of_ranks, starts_at

from tasks.engines.docker import DockerEngine
from tasks.engines.images import digest_of_image
from tasks.gangs import IMAGE, Containers
from tasks.site import Site
from tasks.train.fit import fit

TIMES, EPOCHS, HANG_SECONDS = 20, 24, 5
CALM_SECONDS, STORM_SECONDS, KILL_EVERY_SECONDS = 60, 600, 60
LIMITS = {"killed rank": 10.0, "segfault": 10.0, "hung rank": 20.0, "killed container": None}


def bench(site: Site) -> list[dict[str, Any]]:
    """Inject; return the rows. ``DRYDOCK_BENCH_TIMES`` says how many of each kind.

    Raises:
        BadRequest: the trainer image was not built. TryAgain: no Docker daemon answers.
    """
    digest_of_image(IMAGE, site.home)
    engine, times = DockerEngine(site.home), int(os.environ.get("DRYDOCK_BENCH_TIMES", TIMES))
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
        request = digits(Path(base), EPOCHS, hang_seconds=HANG_SECONDS)
        undisturbed = in_containers(request, Path(base) / "undisturbed", engine, lambda line: None).sha256()
        rows = []
        for name, fault in faults(engine).items():
            seconds, same = [], 0
            for turn in range(times):
                run = Injected(fault, random.randint(3, EPOCHS - 6))
                watched = run(lambda heard, n=name, t=turn: _run(request, Path(base) / f"{n}-{t}", engine, heard))
                seconds.append(run.recovery(watched))
                same += watched.sha256() == undisturbed
                print(f"{name} {turn + 1} of {times}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
            rows += rows_of(name, seconds, same, times)
        rows += under_kills(engine, Path(base))
    volumes = engine.api.volumes(filters={"label": f"drydock.site={engine.site}"})["Volumes"] or []
    left = len(engine.list()) + len(volumes)
    return [*rows, at_most("containers and volumes left", left, 0)]


def rows_of(name: str, seconds: list[float], same: int, times: int) -> list[dict[str, Any]]:
    return [
        at_most(f"{name}: seconds to the first step after it (median)", statistics.median(seconds), None),
        at_most(f"{name}: the slowest", max(seconds), LIMITS[name]),
        at_least(f"{name}: weights as undisturbed, of {times}", same, times),
    ]


def under_kills(engine: DockerEngine, base: Path) -> list[dict[str, Any]]:
    """A rank dies each minute: how much of the work is done all the same."""
    request = digits(base, 10**6, hidden=(1024, 1024), hang_seconds=HANG_SECONDS)
    calm, seconds = epochs_in(CALM_SECONDS, request, base / "calm", engine)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(KILL_EVERY_SECONDS):
            if pids := pids_of_ranks(engine):
                killed.append(random.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done, took = epochs_in(STORM_SECONDS, request, base / "storm", engine)
    over.set()
    killer.join()
    ratio = (done / took) / (calm / seconds)
    return [
        at_least(f"a rank killed every {KILL_EVERY_SECONDS} s for {STORM_SECONDS} s: share of the epochs", ratio, 0.90),
        at_least("ranks killed meanwhile", len(killed), STORM_SECONDS // KILL_EVERY_SECONDS - 1),
    ]


class Over(Exception):
    """The time is up."""


def epochs_in(seconds: float, request: Any, folder: Path, engine: DockerEngine) -> tuple[int, float]:
    """Train for so long from the end of the first epoch; return the epochs after it, and how long they took."""
    watched = Watched(folder)

    def heard(line: dict[str, float]) -> None:
        watched.heard(line)
        if watched.lines and watched.lines[-1]["at_ms"] - watched.lines[0]["at_ms"] > seconds * 1000:
            raise Over

    gang = Containers(engine, KEY, {"workload": "bench"}, engine.home / "jobs" / KEY, lambda line: None)
    try:
        fit(request, folder, None, heard, gang)
    except Over:
        gang.cancel()
    first, last = watched.lines[0], watched.lines[-1]
    return int(last["epoch"] - first["epoch"]), (last["at_ms"] - first["at_ms"]) / 1000


def faults(engine: DockerEngine) -> dict[str, Callable[[], None]]:
    def send(number: int) -> Callable[[], None]:
        return lambda: os.kill(random.choice(pids_of_ranks(engine)), number)

    return {
        "killed rank": send(signal.SIGKILL),
        "segfault": send(signal.SIGSEGV),
        "hung rank": send(signal.SIGSTOP),
        "killed container": lambda: engine.api.kill(engine.list(f"drydock.job={KEY}")[0]["Id"], "SIGKILL"),
    }


def _run(request: Any, folder: Path, engine: DockerEngine, heard: Callable[[dict[str, float]], None]) -> Watched:
    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    return in_containers(request, folder, engine, tell, heard)


class Injected:
    """A fault that happens once, when an epoch is over."""

    def __init__(self, fault: Callable[[], None], epoch: int) -> None:
        self.fault, self.epoch, self.at = fault, epoch, 0.0

    def __call__(self, run: Callable[[Callable[[dict[str, float]], None]], Watched]) -> Watched:
        return run(self.heard)

    def heard(self, line: dict[str, float]) -> None:
        if line["epoch"] >= self.epoch and not self.at:
            self.fault()
            self.at = time.time()

    def recovery(self, watched: Watched) -> float:
        """From the fault to the first step that began after it. Raises StopIteration where it came too late."""
        return next(starts_at(line) for line in watched.lines if starts_at(line) > self.at) - self.at
