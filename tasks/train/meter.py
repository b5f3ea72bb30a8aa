"""What a training costs and how well it uses its machine, measured on every rank and summed up once an epoch.

Utilisation: of compute (processor time by wall time, and the model's floating-point operations by the matrix-product
peak that was measured here), of storage (time spent waiting for data), of the network (bytes on the wire).
"""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.train.energy import Energy

if TYPE_CHECKING:
    from tasks.train.trainer import Trainer

PEAK_SIDE = {"cpu": 512, "cuda": 4096}
PEAK_TURNS = 6
FLOPS_ROWS = 16
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Meter:
    """Measures a trainer's epochs. ``flops`` is what a row takes in training, forwards and backwards."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.energy = trainer, Energy(trainer.local_rank, trainer.device.type)
        self.flops = flops_of_a_row(trainer)
        self.begin()

    def find_peak(self) -> None:
        """Measure the machine's peak with the threads, and in the numbers, that training computes with."""
        self.peak = peak_flops(self.trainer.device, PRECISIONS[self.trainer.train.precision])

    def begin(self) -> None:
        self._began, self._cpu = time.monotonic(), time.process_time()
        self._waited, self._joules = self.trainer.loader.waited_seconds, self.energy.joules()
        self._first_step = self.trainer.place.step

    def passed(self) -> None:
        """The epoch's steps are done; what comes until ``end`` is validation."""
        self._passed = time.monotonic()

    def end(self, num_steps: int) -> dict[str, float]:
        """Return what the epoch since ``begin`` took; called by every rank at the same time."""
        trainer, seconds = self.trainer, time.monotonic() - self._began
        trained = self._passed - self._began
        done = num_steps - self._first_step
        rows = done * rows_of_step(trainer)
        mine = [time.process_time() - self._cpu, trainer.loader.waited_seconds - self._waited, memory_bytes()]
        mine += [self.peak, self.energy.joules() - self._joules, trainer.strategy.fingerprint()]
        ranks = _of_all_ranks(mine, trainer)
        cpu, waited, memory, peak, joules, _ = (sum(column) for column in zip(*ranks, strict=True))
        hold_together([rank[-1] for rank in ranks], trainer.place.epoch)
        world = len(ranks)
        line = {
            "at_ms": int(time.time() * 1000),
            "seconds": seconds,
            "samples_per_second": rows / trained,
            "mfu": rows / trained * self.flops / peak,
            "data_wait_ratio": waited / seconds / world,
            "cpu_seconds": cpu,
            "cpu_busy_ratio": cpu / seconds / (world * torch.get_num_threads()),
            "memory_bytes": memory,
            "wire_bytes": trainer.strategy.wire_bytes(world, done),
            "ranks": world,
        }
        line |= {f"joules_{self.energy.source}": joules} if self.energy.source else {}
        for rank, (cpu_of_rank, _, memory_of_rank, *_) in enumerate(ranks):
            line[f"rank_{rank}/cpu_busy_ratio"] = cpu_of_rank / seconds
            line[f"rank_{rank}/memory_bytes"] = memory_of_rank
        return line

    def now(self, step: int) -> dict[str, float]:
        """Return what this rank can say in the middle of an epoch, after ``step`` of its steps."""
        seconds = time.monotonic() - self._began
        rate = (step - self._first_step) * rows_of_step(self.trainer) / seconds
        waited = self.trainer.loader.waited_seconds - self._waited
        return {
            "samples_per_second": rate,
            "mfu": rate / self.trainer.world * self.flops / self.peak,
            "data_wait_ratio": waited / seconds,
            "memory_bytes": memory_bytes(),
        }


def hold_together(fingerprints: list[float], epoch: int) -> None:
    """Hold the ranks' copies of the weights against each other.

    Raises:
        IntegrityLost: one differs: memory or an exchange failed, and every step from here on would be wrong.
    """
    for rank, found in enumerate(fingerprints):
        if found != fingerprints[0]:
            raise IntegrityLost(f"rank {rank}'s weights are not rank 0's after epoch {epoch}; train again")


def rows_of_step(trainer: Trainer) -> int:
    from tasks.train.batches import whole_batch

    return whole_batch(len(trainer.data["train"]), trainer.train.batch_size, trainer.readers)


def memory_bytes() -> float:
    """Return this process's peak: on the GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the floating-point operations a second of a product of large matrices, the best of a few."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.ones((side, side), device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_TURNS):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def flops_of_a_row(trainer: Trainer) -> float:
    """Count the floating-point operations of one row, forwards and backwards, on a few rows.

    Raises:
        BadRequest: the workload's own network has not as many outputs as there are classes.
    """
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    data, network = trainer.data["train"], trainer.task.network
    rows = np.linspace(0, len(data) - 1, min(FLOPS_ROWS, len(data))).astype(np.int64)
    x, y = trainer.loader.load(data, rows)
    network.eval()  # nothing is drawn, and no running mean moves
    with FlopCounterMode(display=False) as counter:
        logits = network(x)
        outputs = trainer.task.outputs
        if outputs is not None and tuple(logits.shape[:2]) != (len(x), outputs):
            raise BadRequest(f"model.py: answers {list(logits.shape)} to {len(x)} rows, must be [{len(x)}, {outputs}]")
        trainer.task.loss(logits, y).backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(rows)


def _of_all_ranks(mine: list[float], trainer: Any) -> list[list[float]]:
    if trainer.world == 1:
        return [mine]
    own = torch.tensor(mine, dtype=torch.float64, device=trainer.device)
    parts = [torch.empty_like(own) for _ in range(trainer.world)]
    dist.all_gather(parts, own)
    return [part.tolist() for part in parts]


def threads() -> int:
    """Return how many threads a rank has by its launcher's word."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))
