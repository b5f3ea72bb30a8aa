"""Section ``evaluate``: what is measured beside quality by class, so that rules and reports can name it."""

from __future__ import annotations

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
    robustness: bool = Field(
        default=True, description="whether accuracy is measured under perturbations too: perturbed:NAME"
    )

    @field_validator("slices")
    @classmethod
    def _distinct(cls, slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
        names = [item.name for item in slices]
        if len(set(names)) != len(names):
            raise ValueError(f"{names}, must be distinct")
        return slices
