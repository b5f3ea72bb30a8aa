"""How training speeds up by ranks, and what its own loop costs: rows a second of each topology on the same rows, what
``auto`` takes, DDP beside the same without exchange, and the loop beside a bare one of the same network.

Two networks: the MLP 784-512-256-128-10 at batch 256, and a transformer encoder of 10 million parameters at batch 16
of 64 tokens. Rows are drawn. All trainings of a round run one after another; ratios are of a round, medians of rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from inference.measure import say
from inference.rows import at_least
from training.topologies import BARE, CASES, Case, bare_rows_per_second, rows_per_second, unexchanged

from tasks.site import Site

ROUNDS = 3
WAYS = {
    "one": {"ranks": 1},
    "ddp": {"ranks": 2},
    "fsdp": {"ranks": 2, "parallel": "fsdp"},
    "tensor": {"ranks": 2, "parallel": "tensor"},
    "pipeline": {"ranks": 2, "parallel": "pipeline"},
    "auto": {"ranks": 2, "parallel": "auto"},
}
OF_BEST, OF_BARE, BUSY = 0.97, 0.95, 0.95


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows."""
    rows = []
    for case in CASES:
        rows += rows_of(case, ROUNDS)
    return rows


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    seen: dict[str, list[float]] = {name: [] for name in (*WAYS, BARE, "ceiling", "busy")}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
            for name, way in WAYS.items():
                rate, busy = rows_per_second(case, way, Path(base) / name)
                seen[name].append(rate)
                if name == "one":
                    seen["busy"].append(busy)
            seen[BARE].append(bare_rows_per_second(case))
            seen["ceiling"].append(unexchanged(case, Path(base) / "ceiling"))
        say(f"{case.name}, round {turn + 1}: " + ", ".join(f"{name} {rates[-1]:.4g}" for name, rates in seen.items()))
    return told(case, seen)


def told(case: Case, seen: dict[str, list[float]]) -> list[dict[str, Any]]:
    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seen[one], seen[other], strict=True))

    best = [max(rates) for rates in zip(seen["one"], seen["ddp"], seen["fsdp"], strict=True)]
    of_best = statistics.median(a / b for a, b in zip(seen["auto"], best, strict=True))
    rows = [at_least(f"{case.name}: {name}, rows/s", statistics.median(seen[name]), None) for name in WAYS]
    return [
        *rows,
        at_least(f"{case.name}: auto by the best hand-picked", of_best, OF_BEST),
        at_least(f"{case.name}: ddp by two ranks without exchange", ratio("ddp", "ceiling"), case.of_ceiling),
        at_least(f"{case.name}: our loop by a bare one", ratio("one", BARE), OF_BARE),
        at_least(f"{case.name}: processor by wall time of one rank", statistics.median(seen["busy"]), BUSY),
    ]
