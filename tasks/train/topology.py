"""Which ranks train, and how they share: what the workload says, or by ``auto`` what is measured to be the fastest.

Two ranks may be slower than one (a small network waits for its exchange longer than it computes). So each candidate
makes real steps for under a second, on copies, and rank 0 decides for all. The choice is kept in ``topology.json``:
a gang that is restarted goes on with it.
"""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from tasks.spec.parallel import DIVIDING
from tasks.spec.train import Train
from tasks.store.files import write_json
from tasks.train import learn
from tasks.train.batches import shares
from tasks.train.exchange import told_by_first
from tasks.train.meter import threads
from tasks.train.strategies import STRATEGIES
from tasks.train.wire import HALF

if TYPE_CHECKING:
    from tasks.train.trainer import Trainer

NAME = "topology.json"
# Of all candidates together. The warm steps are more than those that PowerSGD sends whole.
MEASURED_SECONDS, WARM_STEPS, MOST_STEPS = 2.4, 3, 200
# What sends other gradients than were computed must be so much faster: a measurement this short is no better.
WORTH = 1.15


class Topology(NamedTuple):
    """``threads`` of each rank that takes part: all ranks, or rank 0 alone with what is every rank's of its node."""

    strategy: str
    all_ranks: bool
    threads: int
    gradients: str = "fp32"

    def takes(self, rank: int) -> bool:
        return self.all_ranks or rank == 0


def candidates(train: Train, own_threads: int) -> dict[str, Topology]:
    """What may be taken, by name: one where nothing is ``auto``, which measures no way that divides a network or is
    another training."""
    if train.parallel in (*DIVIDING, "parameter-server"):
        return {train.parallel: Topology(train.parallel, True, own_threads)}
    ways = (*HALF, "powersgd", "fp32") if train.gradients == "auto" else (train.gradients,)
    ddp = {f"ddp {way}" if len(ways) > 1 else "ddp": Topology("ddp", True, own_threads, way) for way in reversed(ways)}
    found = {"one": Topology("one", False, train.ranks * own_threads)} | ddp
    found["fsdp"] = Topology("fsdp", True, own_threads)
    return found if train.parallel == "auto" else {n: one for n, one in found.items() if one.strategy == train.parallel}


def chosen(trainer: Trainer) -> Topology:
    """Return the topology of a training; by ``auto`` every rank measures."""
    if trainer.world == 1:
        return Topology("one", True, threads())
    if len(found := candidates(trainer.train, threads())) == 1:
        return next(iter(found.values()))
    path = trainer.folder / NAME
    before = json.loads(path.read_text()) if trainer.rank == 0 and path.exists() else None
    kept = told_by_first(before, trainer.device) or measured(trainer, found)
    if trainer.rank == 0 and before is None:
        with trainer.fence.held():
            write_json(path, kept)
    return found[kept["fastest"]]


def measured(trainer: Trainer, found: dict[str, Topology]) -> dict[str, Any]:
    """Measure every candidate's rows a second; return the fastest one's name, and all that was measured."""
    rates: dict[str, float] = {}
    for name, candidate in found.items():
        torch.set_num_threads(candidate.threads)
        seconds = MEASURED_SECONDS / len(found)
        rates[name] = rows_per_second(trainer, candidate, seconds) if candidate.takes(trainer.rank) else 0.0
        trainer.watch.beat()
        dist.barrier()
    torch.set_num_threads(threads())
    rates = told_by_first(rates, trainer.device)
    fastest = max(rates, key=lambda name: rates[name] / (1.0 if found[name].gradients == "fp32" else WORTH))
    if trainer.rank == 0:
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"auto: {fastest}, of measured rows/s: {told}", flush=True)  # noqa: T201 - the rank's log
    return {"fastest": fastest, "rows_per_second": rates}


def rows_per_second(trainer: Trainer, candidate: Topology, seconds: float) -> float:
    """Make steps on a copy of the network; after the warm ones they count, for so many seconds."""
    world = trainer.world if candidate.all_ranks else 1
    strategy = STRATEGIES[candidate.strategy](copy.deepcopy(trainer.task.network), trainer.train, candidate.gradients)
    strategy.call.train()
    optimiser = learn.optimiser(trainer.train.optimiser, strategy.network)
    data, rows, steps, began = trainer.data["train"], 0, 0, time.monotonic()
    budget = float("inf")
    while steps < budget:
        for share in shares(len(data), trainer.train.batch_size, 0, 0, trainer.rank, world):
            x, y = trainer.loader.load(data, share)
            optimiser.zero_grad(set_to_none=True)
            with trainer.narrow():
                loss = trainer.task.loss(strategy.call(x), y)
            loss.backward()
            optimiser.step()
            steps, rows = steps + 1, rows + len(share) * world
            trainer.watch.beat()
            if steps == WARM_STEPS:
                _settle(trainer.device)
                asked = seconds * WARM_STEPS / (time.monotonic() - began)
                budget = WARM_STEPS + _steps_within(trainer, world, asked)
                rows, began = 0, time.monotonic()
            if steps >= budget:
                break
    _settle(trainer.device)
    return rows / (time.monotonic() - began)


def _settle(device: torch.device) -> None:
    """Wait for what was launched: a GPU's steps are done later than they are asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps_within(trainer: Trainer, world: int, asked: float) -> int:
    """Return how many steps are measured; rank 0 says, so that all ranks make as many."""
    found = max(2, min(MOST_STEPS, round(asked)))
    return found if world == 1 else int(told_by_first(found, trainer.device))
