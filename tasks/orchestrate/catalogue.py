"""What the DAG files ask: the declared workloads, and each DAG's docs as Airflow shows them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from airflow.sdk import get_parsing_context

from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload, workload_names
from tasks.spec.workload import Workload


def declared() -> list[Workload]:
    """Return the workloads whose files are right."""
    return [found for found in _all().values() if isinstance(found, Workload)]


def broken() -> list[tuple[str, str, str]]:
    """Return DAG name, folder name and error of the wrong workloads: one wrong file takes no other's DAGs away."""
    return [(dag_name(name), name, found) for name, found in _all().items() if isinstance(found, str)]


def names() -> list[str]:
    """Return the names of all workloads: what serves can be rolled back, whatever its file says by now."""
    return [name for name in workload_names(Site().workloads) if dag_name(name) == name]


def dag_name(folder: str) -> str:
    """Return a folder's name as Airflow allows it in a DAG's id; a folder may be called anything."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", folder)[:80]


def _all() -> dict[str, Workload | str]:
    """Every workload, or what is wrong with its file; where a task's process parses a workload's DAG, that alone."""
    workloads, asked = Site().workloads, get_parsing_context().dag_id or ""
    names = workload_names(workloads)
    names = [name for name in names if asked.endswith(f"_{dag_name(name)}")] or names
    return {name: _read(workloads, name, _stamp(workloads / name / "workload.yaml")) for name in names}


@cache
def _read(workloads: Path, name: str, stamp: tuple[int, int]) -> Workload | str:
    try:
        return load_workload(workloads, name)
    except BadRequest as error:
        return str(error)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def retrain_docs(workload: Workload) -> str:
    rules = "\n".join(f"- {_rule(rule)}" for rule in workload.gate.rules)
    return f"""### Retrain {workload.name}

{workload.description}

Reads the source, cleans it by the declared rules, validates data and labels, versions the dataset, trains
{workload.train.world_size} ranks, makes {" and ".join(workload.compress.labels)} candidates, evaluates each on
the holdout beside the champion, judges them and registers the one taken (objective: {workload.compress.objective}).

**The gate**

{rules}

A refusal fails its task without a retry and tells number and limit; the champion goes on serving. The run's
curves and reports are in MLflow under the experiment `{workload.name}`.
"""


def release_docs(workload: Workload) -> str:
    review = "asks a person to approve" if workload.review.required else "goes on without asking a person"
    replay = "With too few live requests a stage is inconclusive."
    if not workload.rollout.live_only:
        replay = "Where live requests are too few, the holdout is replayed."
    return f"""### Release {workload.name}

Runs when `retrain_{workload.name}` registers a version, or by hand with a version's number.

`review` {review}; `preflight` verifies the signed packages of this version and of the one that a rollback
would go back to; `start` starts its replicas; `ready` waits until each has answered its golden sample;
{_stages(workload)}; `promote` moves traffic, alias and ledger together or
not at all; `bake` keeps the previous version warm for {workload.rollout.bake_seconds} s; `retire` stops it.

Each stage is judged against the champion by errors and latency as the gateway counts them, and by the answers'
distribution. {replay} A rollout that fails or stays
inconclusive returns all traffic to the champion by itself, whatever becomes of this run.
"""


def _stages(workload: Workload) -> str:
    plan = workload.rollout
    shadow = f"`shadow` copies {plan.shadow_percent} % of the live requests to it and drops its answers"
    canary = f"`canary` gives it {', '.join(map(str, plan.steps))} % of the traffic" if plan.steps else "no canary"
    return f"{shadow if plan.shadow_percent else 'no shadow'}; {canary}"


def rollback_docs() -> str:
    return """### Roll back

Moves traffic, alias and ledger back together or not at all: to the previous version (warm while the last
release bakes, else started and verified first), or to any version that served before. The reason is kept in
the ledger. The same as `./drydock rollback WORKLOAD --reason ...`.
"""


def _rule(rule: object) -> str:
    said = {k: v for k, v in rule.model_dump().items() if v is not None}  # type: ignore[attr-defined]
    metric, where = said.pop("metric"), said.pop("slice")
    return f"`{metric}` ({where}): " + ", ".join(f"{key} {value}" for key, value in said.items())
