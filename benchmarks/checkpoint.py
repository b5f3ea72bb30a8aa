"""What saving costs a training: how long a checkpoint of 100 million parameters holds the loop, written at once
(fsync and SHA-256) and beside it, and how much slower the steps are meanwhile. In turns, on this machine's disk.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.measure import say
from inference.rows import at_most

from tasks.site import Site

ROUNDS, PARAMETERS, WIDTH = 5, 100_000_000, 1000
BLOCKED, SLOWER = 0.20, 0.10


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows."""
    with tempfile.TemporaryDirectory(prefix="drydock-bench-", dir=site.home) as base:
        return rows_of(*measured(Path(base)))


def measured(base: Path) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return, a round each: seconds of a save at once, seconds that one beside holds the loop, seconds of a step alone
    and of a step while one is written."""
    import torch

    from tasks.train import checkpoint
    from tasks.train.fence import Fence
    from tasks.train.writer import Writer

    torch.set_num_threads(1)
    tensors = {f"model/{i}": torch.randn(PARAMETERS // 50) for i in range(50)}
    saved = checkpoint.Saved({"place": {}}, tensors)
    step = steps(torch)
    fence = Fence(base, 1)
    fence.claim()
    writer = Writer(base, 1)
    at_once, held, alone, beside = [], [], [], []
    for turn in range(ROUNDS + 1):
        say(f"round {turn} of {ROUNDS}")
        where = (base / "at-once", f"epoch-{turn:05d}")
        now = clocked(lambda where=where: checkpoint.save(*where, saved, 1, contextlib.nullcontext))
        quiet = statistics.median(clocked(step) for _ in range(12))
        blocked = clocked(lambda n=turn: writer.save(f"epoch-{n:05d}", saved, 1))
        busy = []
        while not (base / "checkpoints" / f"epoch-{turn:05d}").exists():
            busy.append(clocked(step))
        writer.settle()
        if turn:  # the first one starts the writer and makes its memory
            at_once.append(now)
            held.append(blocked)
            alone.append(quiet)
            beside.append(statistics.median(busy))
    writer.close()
    return at_once, held, alone, beside


def steps(torch: Any) -> Callable[[], None]:
    """Return one training step of some 50 ms."""
    network = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    optimiser, x = torch.optim.SGD(network.parameters(), lr=0.0), torch.randn(128, WIDTH)

    def step() -> None:
        optimiser.zero_grad()
        network(x).square().mean().backward()
        optimiser.step()

    return step


def clocked(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rows_of(at_once: list[float], held: list[float], alone: list[float], beside: list[float]) -> list[dict[str, Any]]:
    ratio = statistics.median(b / a for a, b in zip(at_once, held, strict=True))
    slower = statistics.median(b / a - 1 for a, b in zip(alone, beside, strict=True))
    return [
        at_most("written at once with fsync and SHA-256, seconds", statistics.median(at_once), None),
        at_most("written beside, seconds that the loop is held", statistics.median(held), None),
        at_most("the same as a ratio", ratio, BLOCKED),
        at_most("a step alone, ms", 1000 * statistics.median(alone), None),
        at_most("steps meanwhile, by how much slower", slower, SLOWER),
    ]
