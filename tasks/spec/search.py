"""The ``search`` section of a workload: which fields of ``train`` are tried out, and how often."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.spec.value import Value

Plain = int | float | str | bool


class Between(Value):
    """A number from ``low`` to ``high``; ``log``: by its magnitude; ``whole``: without a fraction."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _rises(self) -> Between:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low = {self.low}, high = {self.high}: low must be below high, and above 0 where log")
        return self

    @property
    def first(self) -> Plain:
        return int(self.low) if self.whole else self.low


class OneOf(Value):
    choices: tuple[Plain, ...] = Field(min_length=2)

    @property
    def first(self) -> Plain:
        return self.choices[0]


class Search(Value):
    """Trials of ``train`` with other values; the best one by ``train.stopping.metric`` goes on down the pipeline."""

    trials: int = Field(default=8, ge=2, le=1000)
    space: dict[str, Annotated[Between | OneOf, Field(union_mode="smart")]] = Field(
        min_length=1, description="a field of train (optimiser.learning_rate) -> what it may be"
    )
    prune: bool = Field(default=True, description="a trial that is worse than most were at its epoch ends there")
    seed: int = 0


def tried(train: Train, values: dict[str, Plain], where: str = "search.space") -> Train:
    """Return ``train`` with a trial's values.

    Raises:
        BadRequest: a field that ``train`` does not have, or a value that it refuses.
    """
    data = train.model_dump(mode="json")
    for path, value in values.items():
        _set(data, path, value, where)
    return Train.parse(data, where)


def _set(data: dict[str, Any], path: str, value: Plain, where: str) -> None:
    *parents, last = path.split(".")
    for part in parents:
        data = data.get(part) if isinstance(data, dict) else None  # type: ignore[assignment]
    if not isinstance(data, dict) or last not in data:
        raise BadRequest(f"{where}: {path!r} is no field of train")
    data[last] = value
