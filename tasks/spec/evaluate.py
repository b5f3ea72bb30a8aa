"""Section ``evaluate``: what is measured beside quality by class, so that rules and reports can name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, field_validator

from tasks.spec.value import Value

SliceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]


class Slice(Value):
    """A part of the holdout; rules name it ``slice:NAME``."""

    name: SliceName
    where: str = Field(min_length=1, description="an SQL condition (DuckDB) over the features' columns and label")


class Evaluate(Value):
    slices: tuple[Slice, ...] = ()
    groups: tuple[str, ...] = Field(
        default=(),
        description="feature or kept columns between whose values gaps are measured; rules name them group:COLUMN",
    )
    relevant: float | None = Field(
        default=None, description="from which number on an item is one that its user wants; none: 3/4 of the range"
    )
    perturb: tuple[str, ...] | None = Field(
        default=None,
        description="how inputs are changed, to measure quality on them too: images noise, blur, shift; texts typos, "
        "upper-case; tagged words typos, lower-case; tables noise, missing; ids unknown-user, unknown-item; none: in "
        "each way that fits the feature; rules name them perturbed:NAME",
    )

    @field_validator("slices")
    @classmethod
    def _slices_are_distinct(cls, slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
        _check_distinct([item.name for item in slices])
        return slices

    @field_validator("perturb")
    @classmethod
    def _perturbations_are_distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        _check_distinct(names or ())
        return names


def _check_distinct(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{list(names)}, must be distinct")
