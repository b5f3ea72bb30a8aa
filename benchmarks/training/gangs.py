"""Gangs to measure: one request, started bare or in containers, and what its history tells of time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.engines.docker import DockerEngine
from tasks.gangs import Containers
from tasks.spec.errors import DrydockError
from tasks.spec.requests import TrainRequest
from tasks.store.room import Room
from tasks.train.fit import RANK_ENVIRONMENT, fit

KEY = "train-of-a-benchmark"
PIXELS = 64


def digits(base: Path, epochs: int, hidden: tuple[int, ...] = (256, 256), **train: Any) -> TrainRequest:
    """Return a request to train two ranks on scikit-learn's digits for so many epochs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    bunch = load_digits()
    n = len(bunch.target)
    split = ["train" if i % 20 < 14 else "validation" if i % 20 < 17 else "holdout" for i in range(n)]
    columns = {"pixels": list(bunch.data.astype(np.uint8)), "label": bunch.target.astype(str).tolist(), "split": split}
    room = Room(base, "dataset")
    if (ref := room.published()) is None:
        pq.write_table(pa.table({"row_id": list(range(n)), **columns}), room.begin() / "data.parquet")
        ref = room.publish({})
    recipe = {"kind": "mlp", "hidden": list(hidden)}
    stopping = {"max_epochs": epochs, "patience_epochs": epochs}
    asked = {"recipe": recipe, "batch_size": 16, "ranks": 2, "stopping": stopping}
    request = {
        "workload": "digits",
        "dataset": ref.model_dump(),
        "revision": "digits-000000000000",
        "feature": {"kind": "image", "height": 8, "width": 8, "max_value": 16},
        "label": {"classes": list(range(10))},
        "train": asked | train,
    }
    return TrainRequest.parse(request, "the benchmark's request")


class Watched:
    """One training: when each epoch ended, by this machine's clock, in seconds since ``began``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.began = folder, [], time.time()
        folder.mkdir(parents=True)

    def heard(self, line: dict[str, float]) -> None:
        if "validation_loss" in line:  # not from within an epoch
            self.lines.append(line)

    @property
    def first_step(self) -> float:
        return starts_at(self.lines[0]) - self.began

    @property
    def rows_per_second(self) -> float:
        """Of all epochs but the first, whose allocations are not the steady state."""
        return sum(line["samples_per_second"] for line in self.lines[1:]) / (len(self.lines) - 1)

    def sha256(self) -> str:
        return hashlib.sha256((self.folder / "weights.safetensors").read_bytes()).hexdigest()


def starts_at(line: dict[str, float]) -> float:
    """Return when an epoch's first step began, as the rank's clock says."""
    return line["at_ms"] / 1000 - line["seconds"]


def in_containers(
    request: TrainRequest,
    folder: Path,
    engine: DockerEngine,
    tell: Callable[[str], None],
    heard: Callable[[dict[str, float]], None] = lambda line: None,
) -> Watched:
    """Train in containers; ``heard`` gets each epoch's line as it comes."""
    watched = Watched(folder)

    def on_epoch(line: dict[str, float]) -> None:
        watched.heard(line)
        heard(line)

    gang = Containers(engine, KEY, {"workload": "bench"}, engine.home / "jobs" / KEY, tell)
    fit(request, folder, None, on_epoch, gang)
    return watched


def as_children(request: TrainRequest, folder: Path) -> Watched:
    watched = Watched(folder)
    fit(request, folder, None, watched.heard)
    return watched


class Bare:
    """The reference: stock ``torchrun`` on this machine, the same ranks, nothing around them."""

    SCRIPT = "import sys; from tasks.train.rank import work; work(sys.argv[1], 1)"

    def run(self, request: TrainRequest, folder: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
        import os

        (folder / "rank.py").write_text(self.SCRIPT)
        ranks = f"--nproc-per-node={request.train.ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks, str(folder / "rank.py")]
        environment = os.environ | RANK_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, check=False)
        if done.returncode:
            raise DrydockError(f"torchrun ended with {done.returncode}: {done.stderr.decode()[-400:]}")
        for line in (folder / "history.jsonl").read_text().splitlines():
            on_epoch(json.loads(line))


def bare(request: TrainRequest, folder: Path) -> Watched:
    watched = Watched(folder)
    fit(request, folder, None, watched.heard, Bare())
    return watched


def pids_of_ranks(engine: DockerEngine) -> list[int]:
    """Return the ranks' process ids on this machine: forks of the launchers, which are children of an init."""
    found = []
    for one in engine.list(f"drydock.job={KEY}"):
        rows = [line for line in engine.api.top(one["Id"])["Processes"] if line[-1].startswith("python")]
        launchers = {line[1] for line in rows}
        found += [int(line[1]) for line in rows if line[2] in launchers]
    return found
