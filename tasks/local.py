"""``drydock run WORKLOAD --local``: the same steps in this process, without Airflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tasks.notify import check_secrets
from tasks.plan import request_for, retrain_of
from tasks.site import Site
from tasks.spec.workload import Workload
from tasks.steps import run_step
from tasks.store.space import require_space

Say = Callable[[str], None]


def run_local(workload: Workload, site: Site, say: Say, asked_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the retrain's steps in order for those who asked; return all results by step, as plain data.

    Raises:
        DrydockError: as the step that failed says; results so far are kept and recognised by the next run.
    """
    require_space(site.home)
    check_secrets(workload, site)
    done: dict[str, Any] = {}
    for step in retrain_of(workload):
        if step == "trial":
            assert workload.search is not None
            numbers = range(workload.search.trials)
            done[step] = [_timed(step, workload, done, site, say, number) for number in numbers]
        elif step == "compress":
            done[step] = [_timed(step, workload, done, site, say, item) for item in workload.compress.labels]
        elif step == "evaluate":
            done[step] = [_timed(step, workload, done, site, say, item) for item in done["compress"]]
            done["evaluate_champion"] = _timed("evaluate_champion", workload, done, site, say)
        else:
            done[step] = _timed(step, workload, done, site, say, asked_by=asked_by)
    return done


def _timed(
    step: str,
    workload: Workload,
    done: dict[str, Any],
    site: Site,
    say: Say,
    item: Any = None,
    asked_by: tuple[str, ...] = (),
) -> Any:
    started = time.monotonic()
    request = request_for(step, workload, done, site, item, asked_by)
    if request is None:
        return None
    result = run_step("evaluate" if step == "evaluate_champion" else step, request, site)
    say(f"{step:<20} done     {time.monotonic() - started:>6.1f} s")
    return result.model_dump(mode="json")
