"""What a container costs a training: the way to its first step, and its speed, beside stock ``torchrun`` bare.

The same request, two ranks on one node, in turns: ``torchrun --standalone``; our launcher as a child process; the
same in a container. The first step is the first epoch's, by the rank's own clock.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.rows import at_least, at_most
from training.gangs import Watched, as_children, bare, digits, in_containers

from tasks.engines.docker import DockerEngine
from tasks.engines.images import digest_of_image
from tasks.gangs import IMAGE
from tasks.site import Site

ROUNDS, EPOCHS = 5, 12
MORE_SECONDS, SPEED = 1.5, 0.98


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows.

    Raises:
        BadRequest: the trainer image was not built. TryAgain: no Docker daemon answers.
    """
    digest_of_image(IMAGE, site.home)
    engine = DockerEngine(site.home)
    seen: dict[str, list[Watched]] = {"torchrun": [], "ours": [], "docker": []}
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
        request = digits(Path(base), EPOCHS, hidden=(512, 512), batch_size=64)
        ways: dict[str, Callable[[Path], Watched]] = {
            "torchrun": lambda folder: bare(request, folder),
            "ours": lambda folder: as_children(request, folder),
            "docker": lambda folder: in_containers(request, folder, engine, lambda line: None),
        }
        for turn in range(ROUNDS):
            print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            for name, way in ways.items():
                seen[name].append(way(Path(base) / f"{name}-{turn}"))
        weights = {one.sha256() for all_of in seen.values() for one in all_of}
    return [*rows_of(seen), at_most("different weights in all runs", len(weights), 1)]


def rows_of(seen: dict[str, list[Watched]]) -> list[dict[str, Any]]:
    first = {name: statistics.median(one.first_step for one in all_of) for name, all_of in seen.items()}
    rows = [at_most(f"{name}: seconds to the first step (median)", value, None) for name, value in first.items()]
    more = [ours.first_step - stock.first_step for ours, stock in zip(seen["docker"], seen["torchrun"], strict=True)]
    rows.append(at_most("docker, seconds more than torchrun (median)", statistics.median(more), MORE_SECONDS))
    for name in ("ours", "docker"):
        pairs = zip(seen[name], seen["torchrun"], strict=True)
        ratio = statistics.median(one.rows_per_second / stock.rows_per_second for one, stock in pairs)
        limit = SPEED if name == "docker" else None
        rows.append(at_least(f"{name}, steady rows/s as a ratio of torchrun's", ratio, limit))
    return rows
