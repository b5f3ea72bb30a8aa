"""The typed trigger form of a retrain: the parameters of ``tasks.spec.changes`` as Airflow shows them."""

from __future__ import annotations

from typing import Any, get_args

from tasks.spec.changes import FIELDS
from tasks.spec.compress import Objective
from tasks.spec.workload import Workload

SIZE, GATE = "Size and data", "Gate and review (may only tighten)"


def form(workload: Workload) -> dict[str, Any]:
    """Return the params of one retrain DAG, with the file's own values in the descriptions."""
    from airflow.sdk import Param

    schemas: dict[str, tuple[Any, dict[str, Any]]] = {
        "max_epochs": (None, {"type": ["null", "integer"], "minimum": 1, "maximum": 10_000, "section": SIZE}),
        "batch_size": (None, {"type": ["null", "integer"], "minimum": 1, "maximum": 65_536, "section": SIZE}),
        # The task holds the file's slots of the training pool, so a run may take fewer ranks, not more.
        "ranks": (None, {"type": ["null", "integer"], "minimum": 1, "maximum": workload.train.ranks, "section": SIZE}),
        "seed": (None, {"type": ["null", "integer"], "minimum": 0, "section": SIZE}),
        "objective": (workload.compress.objective, {"enum": list(get_args(Objective)), "section": SIZE}),
        "min_accuracy": (None, {"type": ["null", "number"], "minimum": 0, "maximum": 1, "section": GATE}),
        "review": (workload.review.required, {"type": "boolean", "section": GATE}),
    }
    if workload.data.source.kind == "files":
        schemas["source_path"] = (None, {"type": ["null", "string"], "section": SIZE})
    return {
        name: Param(default, description=_description(workload, name), **schema)
        for name, (default, schema) in schemas.items()
    }


def _description(workload: Workload, name: str) -> str:
    if name == "min_accuracy":
        return "a higher limit than the gate's own, as one more rule"
    if name == "review":
        return "a person must approve the version before it is released"
    value: Any = workload.model_dump(mode="json")
    for part in FIELDS[name].split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return f"{FIELDS[name]}; empty: {value}"
