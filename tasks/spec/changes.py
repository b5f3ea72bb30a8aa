"""What one run may change of its workload: size and data freely, the gate and the review only tighter."""

from __future__ import annotations

from typing import Any

from tasks.spec.errors import BadRequest
from tasks.spec.fields import closest_first
from tasks.spec.workload import Workload

# Parameter of a run -> field of the workload file. An empty parameter changes nothing.
FIELDS = {
    "source_path": "data.source.path",
    "max_epochs": "train.stopping.max_epochs",
    "batch_size": "train.batch_size",
    "ranks": "train.ranks",
    "seed": "train.seed",
    "objective": "compress.objective",
}
TIGHTENING = ("min_accuracy", "review")


def changed(workload: Workload, params: dict[str, Any]) -> Workload:
    """Return the workload with a run's parameters applied.

    ``min_accuracy`` is added as one more rule, beside those of the file; ``review`` can be switched on.

    Raises:
        BadRequest: an unknown parameter, a value that the field refuses, or a loosened review.
    """
    if unknown := sorted(set(params) - {*FIELDS, *TIGHTENING}):
        known = closest_first(unknown[0], [*FIELDS, *TIGHTENING])
        raise BadRequest(f"parameter {unknown[0]} is not known, must be one of {known}")
    data = workload.model_dump(mode="json")
    for name, field in FIELDS.items():
        if params.get(name) is not None:
            _set(data, field.split("."), params[name])
    if params.get("min_accuracy") is not None:
        data["gate"]["rules"].append({"metric": "accuracy", "min": params["min_accuracy"]})
    if params.get("review") is not None:
        if workload.review.required and not params["review"]:
            raise BadRequest(f"{workload.name}: review = false, must be true: the workload's file demands it")
        data["review"]["required"] = params["review"]
    return Workload.parse(data, f"{workload.name} with this run's parameters")


def _set(data: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value
