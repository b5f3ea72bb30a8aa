"""A platform of the benchmark's own: state folder, free ports, and the programs that a release needs (no Airflow)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from delivery.packages import Kind, make_package, samples

from tasks import delivery, stack
from tasks.engines.supervisor import Supervisor
from tasks.registry import runs, versions
from tasks.release.model import Version
from tasks.release.rollout import RolloutState
from tasks.release.switch import switch
from tasks.replicas import await_ready, start_replicas
from tasks.site import Site
from tasks.spec.errors import TryAgain
from tasks.spec.settings import resolve
from tasks.store.files import write_whole

WORKLOAD, ACTOR = "digits", "bench"
PROGRAMS = ("gateway", "mlflow", "reconciler")
HEALTH_SECONDS, ROLLOUT_SECONDS, LOAD_SECONDS, POLL_SECONDS = 90, 90, 180, 0.05
PORTS = ("AIRFLOW", "MLFLOW", "GATEWAY", "GATEWAY_ADMIN")
HOLDOUT_ROWS = 256
LOAD = Path(__file__).with_name("load.py")


class Answer(NamedTuple):
    """One request of the load: times of ``time.monotonic``, which all processes share."""

    kind: str
    sent: float
    done: float
    version: str
    outcome: str

    @property
    def good(self) -> bool:
        return self.outcome == "ok"

    @property
    def seconds(self) -> float:
        return self.done - self.sent


class Platform:
    """Started by ``up``, ended by ``down`` with everything that it started."""

    def __init__(self, root: Path, base: Path) -> None:
        self.base = base
        shutil.copytree(root / "workloads" / WORKLOAD, base / "workloads" / WORKLOAD)
        self._file = base / "workloads" / WORKLOAD / "workload.yaml"
        self.environment = _environment(root, base)
        self.site = Site(resolve(self.environment))
        self._samples = samples()
        (base / "samples.json").write_text(json.dumps(self._samples))
        self._loads: list[RunningLoad] = []
        self._asked = 0

    def up(self) -> None:
        """Start the programs and wait until they answer.

        Raises:
            TryAgain: one does not in time.
        """
        # It tells each version that it makes.
        logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
        stack.prepare_home(self.site)
        self.site.gateway.prepare()
        supervisor = Supervisor(self.site.home)
        supervisor.start()
        for program in stack.programs(self.site):
            if program.name in PROGRAMS:
                supervisor.add(program)
        until = time.monotonic() + HEALTH_SECONDS
        while wrong := [
            name for name, state in stack.health(self.site).items() if name in PROGRAMS[:2] and state != "healthy"
        ]:
            if time.monotonic() > until:
                raise TryAgain(f"{wrong[0]} does not answer after {HEALTH_SECONDS} s; see {self.site.home / 'logs'}")
            time.sleep(0.2)

    def down(self) -> None:
        for load in self._loads:
            load.kill()
        Supervisor(self.site.home).stop()

    def plan(self, **rollout: Any) -> None:
        """Set the workload's rollout: what is not named has its default."""
        data = yaml.safe_load(self._file.read_text()) | {"rollout": rollout}
        write_whole(self._file, yaml.safe_dump(data, sort_keys=False))

    def register(self, kind: Kind, seed: int) -> Version:
        """Register a package as a version, with its holdout, as the step ``register`` leaves them."""
        folder = self.base / "made" / f"{kind}-{seed}"
        digest = make_package(folder, kind, seed, self.site.keys)
        client = self.site.mlflow
        run_id = runs.open_run(client, WORKLOAD, f"{kind}-{seed}", {}, {})
        tags = {versions.PACKAGE_TAG: digest, versions.EVIDENCE_TAG: digest, "drydock.variant": "fp32"}
        found = versions.register(client, WORKLOAD, run_id, folder, f"{kind}, for the benchmark", tags)
        step = max(1, len(self._samples) // HOLDOUT_ROWS)
        lines = [f"{json.dumps(sample.row)}\n" for sample in self._samples[::step]]
        write_whole(self.site.packages / f"{digest}.holdout.jsonl", "".join(lines))
        return Version(version=found.version, digest_sha256=digest)

    def order(self, version: Version | None, reason: str = "bench") -> delivery.Order:
        """Return an order with an intent of its own."""
        self._asked += 1
        champion = self.site.ledger.champion(WORKLOAD)
        return delivery.Order(
            workload=WORKLOAD,
            version=version.version if version else None,
            actor=ACTOR,
            reason=reason,
            intent_id=f"bench:{self._asked}",
            package_sha256=version.digest_sha256 if version else None,
            expected_champion=champion.version if champion else None,
        )

    def roll_out(self, version: Version) -> tuple[delivery.Order, RolloutState]:
        """Take a version through its release up to the promotion; return its rollout, passed or over.

        Raises:
            Refused: it never was ready.
        """
        order = self.order(version)
        for action in (delivery.preflight, delivery.start, delivery.ready):
            action(order, self.site)
        delivery.roll(order, self.site)
        return order, self.await_rollout(lambda state: state.phase == "passed" or state.ended)

    def await_rollout(self, over: Callable[[RolloutState], bool]) -> RolloutState:
        """Wait until the last rollout is as wanted; the reconciler drives it."""
        until = time.monotonic() + ROLLOUT_SECONDS
        while True:
            state = self.site.rollouts.last(WORKLOAD)
            if state and over(state):
                return state
            if time.monotonic() > until:
                phase = state.phase if state else "not there"
                raise TryAgain(f"{WORKLOAD}: the rollout is {phase} after {ROLLOUT_SECONDS} s; see {self.site.home}")
            time.sleep(POLL_SECONDS)

    def force(self, version: Version) -> None:
        """Make a version the champion without a rollout."""
        order = self.order(version, "forced by the benchmark")
        start_replicas(WORKLOAD, version, self.site)
        endpoints = await_ready(WORKLOAD, version, self.site)
        named = {"actor": ACTOR, "intent_id": order.intent_id, "reason": order.reason}
        switch(
            delivery.parts(self.site), WORKLOAD, version, endpoints, expected_champion=order.expected_champion, **named
        )

    def load(self, rate: float, **spec: Any) -> RunningLoad:
        """Start the clients, on the last core; wait until the first answers are in."""
        cores = sorted(os.sched_getaffinity(0))
        defaults = {"port": self.site.settings.gateway_port, "samples": str(self.base / "samples.json")}
        defaults |= {"out": str(self.base / f"load-{len(self._loads)}.txt"), "core": cores[-1], "rate": rate}
        defaults |= {"connections": 16, "new_every": 20, "long": 0, "long_seconds": 8, "at_least": 0}
        load = RunningLoad(defaults | spec)
        self._loads.append(load)
        time.sleep(1.0)
        return load


class RunningLoad:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._out = Path(spec["out"])
        command = [sys.executable, "-P", str(LOAD), json.dumps(spec)]
        self._process = subprocess.Popen(command)

    def end(self) -> list[Answer]:
        """End it, once it asked what it must; return every request's end."""
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(LOAD_SECONDS):
            raise TryAgain(f"the load ended with code {self._process.returncode}")
        found = []
        for line in self._out.read_text().splitlines():
            kind, sent, done, version, outcome = line.split()
            found.append(Answer(kind, float(sent), float(done), version, outcome))
        return found

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _environment(root: Path, base: Path) -> dict[str, str]:
    own = {f"DRYDOCK_{name}_PORT": str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    own |= {"DRYDOCK_HOME": str(base / "home"), "DRYDOCK_ROOT": str(root), "DRYDOCK_USER": ACTOR}
    own |= {"DRYDOCK_WORKLOADS": str(base / "workloads")}
    return {name: value for name, value in os.environ.items() if not name.startswith("DRYDOCK_")} | own


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
